"""Relufication: a pre-trained model becomes one of sparse activations (Mirzadeh et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.lm import EOS, batches, encode, fit
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.models import write_greedily

KEPT = 0.4  # share of the neurons that `topk_activations` keeps


class ReluStrikesBack(Method):
    """Relufication in two stages; what meets a zero activation is neither read nor multiplied.

    Stage 1 (section 4.1 of the paper): the gate of each feed-forward block becomes ReLU, FFN(x) = W_down (relu(W_gate x)
    * W_up x), and the model is trained on briefly. Stage 2 (section 4.2): a ReLU is put after the norms in front of
    attention and feed-forward, so that the inputs of the query, key, value, gate and up projections are sparse too, and
    the model is trained on again. While it writes, one token at a time, a projection reads only the columns of its
    weights that meet an input other than zero, and only the rows of W_up whose gate is open: an identity, not an
    approximation, counted in the FLOPs of the calls themselves.

    Differs from the paper: the prompt is read densely, as different tokens open different neurons, and its share of the
    work is far greater in short texts. Training goes on for 450 steps on completions of the task's own train split,
    with Muon; `silu_tuned` has the same steps without a change. Shifted ReLUs and the reuse of neurons over neighbouring
    tokens (sections 5.1 and 5.3) are left out.

    Three controls: `silu_tuned` keeps its SiLU gates and skips nothing, so that a difference in quality is due to the
    activations and not to the texts. `topk_activations` is pruning by magnitude without training: of h = silu(W_gate x) *
    (W_up x) the 40 % greatest |h| of a token are kept, as many as relufication leaves open, and W_down reads only their
    columns; gate and up projection are needed in full to know which. `topk_tuned` is trained on so for as many steps.

    What limits it here: the prompt, read densely, is a fifth of the positions of a story and more than half of those of a
    word problem, and attention, embedding and head are no smaller than before; a third of the computation is out of
    reach. All of these models write right texts, pruned ones too, so that quality does not tell them apart.
    """

    paper = Paper(
        id="relu_strikes_back",
        title="ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models",
        authors="Iman Mirzadeh, Keivan Alizadeh, Sachin Mehta, Carlo C Del Mundo, Oncel Tuzel, Golnoosh Samei, "
        "Mohammad Rastegari, Mehrdad Farajtabar",
        year=2023,
        arxiv="2310.04564",
    )
    tasks = ("converted/stories", "converted/words")
    baselines = ("autoregressive", "silu_tuned", "topk_activations", "topk_tuned")
    claims = (
        Claim(
            "3 * nfe_equivalent[relu_strikes_back,*] <= nfe_equivalent[autoregressive,*] "
            "and accuracy[relu_strikes_back,96] >= accuracy[silu_tuned,96] - 0.03",
            says="a third of the computation per text, and stories are as often right as without ReLUs",
            headline=True,
        ),
        Claim(
            "3 * nfe_equivalent[relu_strikes_back,*] <= nfe_equivalent[autoregressive,*] "
            "and accuracy[relu_strikes_back,40] >= accuracy[silu_tuned,40] - 0.03",
            says="the same on word problems",
            task="converted/words",
        ),
        Claim(
            "1.5 * nfe_equivalent[relu_strikes_back,*] <= nfe_equivalent[autoregressive,*] "
            "and accuracy[relu_strikes_back,96] >= accuracy[silu_tuned,96] - 0.03",
            says="two thirds of the computation per text, and stories are as often right as without ReLUs",
        ),
        Claim(
            "nfe_equivalent[relu_strikes_back,*] <= 0.8 * nfe_equivalent[topk_tuned,*] "
            "and accuracy[relu_strikes_back,96] >= accuracy[topk_tuned,96] - 0.03",
            says="a fifth less than by keeping the greatest activations of the model with SiLU, trained on for as long",
        ),
    )

    activation = (
        "relu"  # "relu": ReLUs in the gates, then after the norms; "silu": none; "topk": the greatest of SiLU's
    )
    trained = True
    variants = (
        Variant(
            "silu_tuned",
            says="the target trained on as it is: what training alone does for a model that others convert",
            activation="silu",
            baselines=("autoregressive",),
        ),
        Variant(
            "topk_activations",
            says="top-k activations: only the greatest activations of each token count, without training",
            activation="topk",
            trained=False,
            baselines=("autoregressive",),
        ),
        Variant(
            "topk_tuned",
            says="top-k activations, trained on with them for as many steps",
            activation="topk",
            baselines=("autoregressive", "topk_activations"),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with other activations, on its own weights."""
        student: Any = session.clone("target")
        if self.activation == "relu":
            rectify(student)
        if self.activation == "topk":
            for layer in student.model.layers:
                layer.mlp = TopkMlp(layer.mlp)
        return {"student": student}

    def prepare(self, session: Session) -> None:
        """Stage 1, then stage 2; without ReLUs the same steps change nothing but the weights."""
        if not self.trained:
            return
        student, data = session.networks["student"], session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(16_000, 8)]
        rows = [(encode(prompt), [*encode(target), EOS]) for prompt, target in chosen]
        stream = batches(rows, session.scale(1500, 150), session.seed)
        for stage, steps in ((1, session.scale(150, 1)), (2, session.scale(300, 1))):
            for part in student.modules():
                if isinstance(part, RectifiedNorm):
                    part.on = stage == 2
            fit(student, session.progress, steps=steps, lr=2e-3, seed=session.seed, stream=stream)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)


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
