"""Relufication: a pre-trained model becomes one of sparse activations (Mirzadeh et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.lm import EOS, batches, encode, fit
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder

KEPT = 0.4  # share of the neurons that the controls keep


class ReluStrikesBack(Method):
    """Relufication in two stages; what meets a zero activation is neither read nor multiplied.

    Stage 1 (section 4.1 of the paper): the gate of each feed-forward block becomes ReLU, FFN(x) = W_down (relu(W_gate x)
    * W_up x), and the model is trained on briefly. Stage 2 (section 4.2): a ReLU is put after the norms in front of
    attention and feed-forward, so that the inputs of the query, key, value, gate and up projections are sparse too, and
    the model is trained on again. While it writes, one token at a time, a projection reads only the columns of its
    weights that meet an input other than zero, and only the rows of W_up whose gate is open: an identity, not an
    approximation, counted in the FLOPs of the calls themselves.

    Differs from the paper: training goes on for 200 or 600 steps, a third of them in stage 1, on completions of the task's
    own train split, with Muon; `silu_tuned` has the same steps without a change. Shifted ReLUs and the reuse of neurons over
    neighbouring tokens (sections 5.1 and 5.3) are left out. So are the paper's models trained from scratch, of which it
    says that ReLUs hardly slow their training: here all arms start from a model with SiLU.

    Four controls. `silu_tuned` keeps its SiLU gates and skips nothing, so that a difference in quality is due to the
    activations and not to the texts. `topk_activations` is pruning by magnitude without training: of h = silu(W_gate x) *
    (W_up x) the 40 % greatest |h| of a token are kept, about as many as relufication leaves open, and W_down reads only their
    columns; gate and up projection are needed in full to know which. `topk_tuned` is trained on so for as many steps.
    `narrow_tuned`, plain pruning, takes the same 40 % of the neurons for every token, those of the greatest mean |h| times the
    length of their columns of W_down on 64 texts, and is trained on: if it did as well, sparsity would not be needed.

    The model is judged when its training has settled, as in the paper; after 200 steps its loss still falls fast.

    What limits it here: attention, embedding and head are no smaller than before; a third of the computation is out of
    reach. And the target has more neurons than its texts need: two fifths of them, the same for all tokens, lose less
    than ReLUs do.
    """

    paper = Paper(
        id="relu_strikes_back",
        title="ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models",
        authors="Iman Mirzadeh, Keivan Alizadeh, Sachin Mehta, Carlo C Del Mundo, Oncel Tuzel, Golnoosh Samei, "
        "Mohammad Rastegari, Mehrdad Farajtabar",
        year=2023,
        arxiv="2310.04564",
    )
    tasks = ("converted/blend",)
    baselines = ("silu_tuned", "topk_activations", "topk_tuned", "narrow_tuned")
    trainings = 3
    claims = (
        Claim(
            "3 * nfe_equivalent[relu_strikes_back,600] <= nfe_equivalent[silu_tuned,600] "
            "and loss[relu_strikes_back,600] <= loss[silu_tuned,600] + 0.03",
            says="a third of the computation per token, at a perplexity three hundredths higher at most, when training has "
            "settled",
            headline=True,
            setting="head, attention scores and output projection are a third of the computation of a model of width 128",
        ),
        Claim(
            "1.5 * nfe_equivalent[relu_strikes_back,600] <= nfe_equivalent[silu_tuned,600] "
            "and loss[relu_strikes_back,600] <= loss[silu_tuned,600] + 0.03",
            says="two thirds of the computation per token, at a perplexity three hundredths higher at most",
        ),
        Claim(
            "1.5 * nfe_equivalent[relu_strikes_back,*] <= nfe_equivalent[silu_tuned,*] "
            "and loss[relu_strikes_back,*] <= loss[silu_tuned,*] + 0.03",
            says="the same already after 200 steps: what ReLUs lose is soon learnt back",
            setting="the paper speaks of models whose training is done, and the loss still falls fast at 200 steps",
        ),
        Claim(
            "nfe_equivalent[relu_strikes_back,*] <= 0.8 * nfe_equivalent[topk_tuned,*] "
            "and loss[relu_strikes_back,*] <= loss[topk_tuned,*] + 0.01",
            says="a fifth less than by keeping the greatest activations of the model with SiLU, trained on for as long",
        ),
        Claim(
            "nfe_equivalent[relu_strikes_back,*] <= 1.05 * nfe_equivalent[narrow_tuned,*] "
            "and loss[relu_strikes_back,*] < loss[narrow_tuned,*]",
            says="which neurons are open must hang on the token: better than as few that are the same for all, at their cost",
        ),
    )

    # "relu": ReLUs in the gates, then after the norms; "silu": none; "topk": the greatest of SiLU's; "narrow": always the same
    activation = "relu"
    trained = True
    variants = (
        Variant(
            "silu_tuned",
            says="the target trained on as it is: what training alone does for a model that others convert",
            activation="silu",
            baselines=(),
        ),
        Variant(
            "topk_activations",
            says="top-k activations: only the greatest activations of each token count, without training",
            activation="topk",
            trained=False,
            baselines=("silu_tuned",),
        ),
        Variant(
            "topk_tuned",
            says="top-k activations, trained on with them for as many steps",
            activation="topk",
            baselines=("silu_tuned", "topk_activations"),
        ),
        Variant(
            "narrow_tuned",
            says="two fifths of the neurons for all tokens, trained on for as many steps",
            activation="narrow",
            baselines=("silu_tuned",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """For each rung the target with other activations, on its own weights."""
        found: dict[str, nn.Module] = {}
        for rung in session.task.rungs:
            student: Any = session.clone("target")
            if self.activation == "relu":
                rectify(student)
            for layer in student.model.layers:
                if self.activation == "topk":
                    layer.mlp = TopkMlp(layer.mlp)
                if self.activation == "narrow":
                    layer.mlp = NarrowMlp(layer.mlp)
            found[f"after_{rung}"] = student
        return found

    def prepare(self, session: Session) -> None:
        """For each rung stage 1, then stage 2; without ReLUs the same steps change nothing but the weights."""
        data = session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(16_000, 8)]
        rows = [(encode(prompt), [*encode(target), EOS]) for prompt, target in chosen]
        for rung in session.task.rungs:
            student = session.networks[f"after_{rung}"]
            if self.activation == "narrow":
                narrow(student, session.networks["target"], [[*prompt, *target] for prompt, target in rows[:64]])
            if not self.trained:
                continue
            stream = batches(rows, session.scale(1500, 150), session.seed)
            for stage, steps in ((1, session.scale(rung // 3, 1)), (2, session.scale(rung - rung // 3, 1))):
                for part in student.modules():
                    if isinstance(part, RectifiedNorm):
                        part.on = stage == 2
                fit(student, session.progress, steps=steps, lr=2e-3, seed=session.seed, stream=stream)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
        """Log-probabilities [B, V] of the next words; contexts are read token after token, as they are written."""
        model, found = session.networks[f"after_{rung}"], []
        for context in batch["context"]:
            decoder = Decoder(model, len(context))
            for token in context:
                logits = decoder.forward([token])
            found.append(logits[0].log_softmax(-1))
        return torch.stack(found)


# -- sparse activations -----------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """A linear map without bias. For a single token only the columns of the weights that meet no zero are read."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = dense.weight

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, in] -> [.., T, out]."""
        if x.numel() > x.shape[-1]:
            return F.linear(x, self.weight)
        row = x.flatten()
        live = row.nonzero()[:, 0]
        return (self.weight.index_select(1, live) @ row[live]).view(*x.shape[:-1], -1)


class SparseMlp(nn.Module):
    """A gated feed-forward block with ReLU in place of SiLU: down(relu(gate x) * up x).

    For a single token the rows of `up` and the columns of `down` of neurons whose gate is shut are not read, nor are
    the columns of `gate` and `up` that meet a zero of x.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = SparseLinear(dense.gate_proj), SparseLinear(dense.up_proj)
        self.down_proj = SparseLinear(dense.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, D] -> [.., T, D]."""
        gate = self.gate_proj(x).relu()
        if x.numel() > x.shape[-1]:
            return self.down_proj(gate * self.up_proj(x))
        row, live = x.flatten(), gate.flatten().nonzero()[:, 0]
        seen = row.nonzero()[:, 0]
        opened = self.up_proj.weight.index_select(0, live).index_select(1, seen) @ row[seen]
        found = self.down_proj.weight.index_select(1, live) @ (gate.flatten()[live] * opened)
        return found.view(x.shape)


class RectifiedNorm(nn.Module):
    """A norm and a ReLU after it, which `on` switches."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.on = norm, True

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return self.norm(x).relu() if self.on else self.norm(x)


def rectify(model: nn.Module) -> nn.Module:
    """Put ReLUs into a Llama, in place: in the gates, and after the norms before attention and feed-forward."""
    for layer in model.model.layers:
        layer.mlp = SparseMlp(layer.mlp)
        layer.input_layernorm = RectifiedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = RectifiedNorm(layer.post_attention_layernorm)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, SparseLinear(getattr(layer.self_attn, name)))
    return model


class TopkMlp(nn.Module):
    """A gated feed-forward block: down(h) with h = silu(gate x) * up x, all but the greatest |h| of a token set to zero."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.act_fn = dense.gate_proj, dense.up_proj, dense.act_fn
        self.down_proj = SparseLinear(dense.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, D] -> [.., T, D]."""
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        least = hidden.abs().topk(round(KEPT * hidden.shape[-1]), dim=-1).values[..., -1:]
        return self.down_proj(hidden * (hidden.abs() >= least))


class NarrowMlp(nn.Module):
    """A gated feed-forward block of `KEPT` of the neurons, untrained: `narrow` says which, the same for all tokens."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        wide, width = dense.gate_proj.weight.shape
        few = round(KEPT * wide)
        self.gate_proj, self.up_proj = (nn.Linear(width, few, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(few, width, bias=False), dense.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, D] -> [.., T, D]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def narrow(student: nn.Module, target: nn.Module, texts: list[list[int]]) -> None:
    """Fill the blocks of a student with the neurons of the target that write the most into its states on some texts."""
    models: Any = (student, target)
    for layer, dense in zip(*(model.model.layers for model in models), strict=True):
        sizes: list[Tensor] = []
        down = dense.mlp.down_proj
        hook = down.register_forward_pre_hook(lambda _, given, sizes=sizes: sizes.append(given[0][0].abs().sum(0)))
        with torch.no_grad():
            for text in texts:
                models[1](torch.tensor([text], device=down.weight.device), use_cache=False)
            hook.remove()
            few = len(layer.mlp.gate_proj.weight)
            kept = (torch.stack(sizes).sum(0) * down.weight.norm(dim=0)).topk(few).indices.sort().values
            layer.mlp.gate_proj.weight.copy_(dense.mlp.gate_proj.weight[kept])
            layer.mlp.up_proj.weight.copy_(dense.mlp.up_proj.weight[kept])
            layer.mlp.down_proj.weight.copy_(down.weight[:, kept])
