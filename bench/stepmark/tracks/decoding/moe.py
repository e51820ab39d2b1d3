"""Track decoding, tasks of architectures: how soon does a language model learn, and what must it hold while it writes?

A rung is a number of training steps: `prepare` trains a model once and keeps its weights after each rung's steps. `run`
receives {"context": lists of token ids}, beginnings of stories of the test split, and returns log-probabilities [B, V] of
the word that comes next. No model sees that word, so that none can look it up: the score is the exact expectation of the
loss under the grammar's own distribution of it. Contexts are read as in decoding, up to the last token at once and that
one from the state alone; `kv_bytes` is what the state of all layers holds then.

The parts that methods share stand below: the selective scan and the Mamba block (Gu and Dao 2023), the switch layer
(Fedus et al. 2022), causal attention with its cache, models made of such blocks (`BlockModel`), training with snapshots
(`learn`) and `next_words`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.session import Session
from stepmark.task import BadOutput, Score, Task, harness_only, load_split

TASKS = (
    Task(
        id="learning/stories",
        version=1,
        summary="The next word of a story, as a model knows it after a number of training steps",
        dataset="stories",
        unit="training steps",
        rungs=(120, 240, 480),
        metrics={"loss": "lower", "excess": "lower", "copies": "higher"},
        n=192,
        batch=8,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(120,),
        probe=1,
    ),
)

WIDTH, BLOCKS = 64, 4  # of the embeddings; Mamba blocks, or as many active parameters in others
STATE, KERNEL, STEP_RANK = 8, 4, 4  # Mamba: channels of the state, of the convolution, rank of the step sizes
HEAD = 32
TOKENS, RATE, CLIP = 900, 4e-3, 0.5  # of a training step; the paper of MoE-Mamba clips gradients at 0.5


# -- what the harness calls ---------------------------------------------------------------------------------------


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """Beginnings of `n` stories of the test split, each cut before any of its words or before its end."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    data = load_split(task.dataset, "test")
    contexts = []
    for i in torch.randperm(len(data["prompt"]), generator=generator)[:n].tolist():
        words = data["target"][i].split()
        cut = int(torch.randint(len(words) + 1, (), generator=generator))
        contexts.append(encode(" ".join([data["prompt"][i], *words[:cut]])))
    return {"context": contexts}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """Normalised log-probabilities [B, V]."""
    from stepmark.backbones.lm import VOCABULARY

    shape = (len(batch["context"]), len(VOCABULARY))
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != shape or not outputs.is_floating_point():
        raise BadOutput(f"run must return a float tensor of shape {shape}")
    if not bool(torch.isfinite(outputs).all()):
        raise BadOutput("a log-probability is not finite")
    if not torch.allclose(
        outputs.double().logsumexp(1), torch.zeros(len(outputs)).double().to(outputs.device), atol=1e-3
    ):
        raise BadOutput("the probabilities of the next word do not add up to 1")


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all contexts, from the log-probabilities and the grammar alone.

    loss: expected -log q of the next word in nats, the word drawn from the grammar. excess: loss minus the grammar's own
    entropy, the least possible. copies: probability given to the word where the grammar allows only one.
    """
    from stepmark.backbones.lm import VOCABULARY, decode
    from stepmark.tracks.decoding.texts import story_walk

    harness_only("scoring")
    number = {word: i for i, word in enumerate(VOCABULARY)}
    rows = []
    for context, log_q in zip(batch["context"], outputs.double().cpu().tolist(), strict=True):
        opening, _, told = decode(list(context)).partition(" <story>")
        walk = story_walk(opening)
        expected = next(walk)
        for word in told.split():
            expected = walk.send(word)
        loss = -sum(p * log_q[number[word]] for word, p in expected.items())
        entropy = -sum(p * math.log(p) for p in expected.values())
        only = len(expected) == 1
        rows.append((loss, loss - entropy, math.exp(-loss) if only else 0.0, float(only)))
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    found = {name: Score(float(values[:, i].mean()), means[:, i].tolist()) for i, name in enumerate(("loss", "excess"))}
    certain = values[:, 3].sum()
    ratios = means[:, 2] / np.maximum(means[:, 3], 1e-12)
    return found | {"copies": Score(float(values[:, 2].sum() / max(certain, 1)), ratios.tolist())}


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """Never called: the task has no network of its own."""
    raise ValueError(f"{task.id} has no reference network")


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The blocks: all of them once are one evaluation."""
    return list(getattr(network, "layers", []))


# -- blocks -------------------------------------------------------------------------------------------------------


class States:
    """What a model holds of the text so far: by block, tensors that the block itself chooses."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, ...]] = {}
        self.length = 0


class SelectiveScan(torch.autograd.Function):
    """h_t = a_t h_(t-1) + b_t for t = 1 .. T, with gradients by the same recurrence backwards.

    a, b: [T, ...]; first: [...], h_0. Returns all h, [T, ...]. One multiply-add a step, without the graph that
    differentiating each step would build.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, first: Tensor) -> Tensor:
        """All states."""
        states, h = torch.empty_like(b), first
        for t in range(len(a)):
            h = torch.addcmul(b[t], a[t], h, out=states[t])
        ctx.save_for_backward(a, states, first)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g_t = dL/dh_t + a_(t+1) g_(t+1): the gradient of b; times h_(t-1) that of a."""
        a, states, first = ctx.saved_tensors
        g = gradients[0].clone()
        for t in range(len(a) - 2, -1, -1):
            g[t].addcmul_(a[t + 1], g[t + 1])
        return g * torch.cat((first[None], states[:-1])), g, a[0] * g[0]


class MambaBlock(nn.Module):
    """The block of Mamba (Gu and Dao 2023, figure 3, algorithm 2): convolution, selective state space, gate.

    Expansion 2, so 6 width^2 weights besides small ones. Its state is the last inputs of the convolution and h.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.enter = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = nn.Parameter(torch.empty(inner, 1, KERNEL).uniform_(-(KERNEL**-0.5), KERNEL**-0.5))
        self.select = nn.Linear(inner, STEP_RANK + 2 * STATE, bias=False)
        self.widen = nn.Linear(STEP_RANK, inner)
        self.log_decay = nn.Parameter(torch.arange(1.0, STATE + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.leave = nn.Linear(inner, width, bias=False)
        with torch.no_grad():  # step sizes start log-uniform in [0.001, 0.1], as in the paper's appendix
            steps = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)))
            self.widen.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor, states: States | None, layer: int) -> Tensor:
        """[B, T, D] -> [B, T, D]; goes on from the states, where they hold something of this layer."""
        signal, gate = self.enter(x).chunk(2, -1)
        signal = signal.transpose(1, 2)
        if states is not None and layer in states.held:
            window, h = states.held[layer]
        else:
            window = signal.new_zeros(*signal.shape[:2], KERNEL - 1)
            h = signal.new_zeros(*signal.shape[:2], STATE)
        signal = torch.cat((window, signal), 2)
        window = signal[:, :, -(KERNEL - 1) :]
        u = F.silu(F.conv1d(signal, self.convolution, groups=len(self.skip))).permute(2, 0, 1)  # [T, B, inner]
        low, write, read = self.select(u).split((STEP_RANK, STATE, STATE), -1)
        step = F.softplus(self.widen(low))
        a = torch.exp(step[..., None] * -self.log_decay.exp())
        b = (step * u)[..., None] * write[..., None, :]
        hidden = SelectiveScan.apply(a, b, h)
        if states is not None:
            states.held[layer] = window.clone(), hidden[-1].clone()
        y = (hidden @ read[..., None])[..., 0] + self.skip * u
        return self.leave(y.transpose(0, 1) * F.silu(gate))


class SwitchLayer(nn.Module):
    """A switch layer (Fedus et al. 2022, section 2): each token goes to the expert that its router finds likeliest.

    y = p_e FFN_e(x) with p = softmax(router x), e its greatest. While it trains, an expert takes at most its `capacity`
    share of the tokens, the first ones, and the others pass the layer by; `balance` is E sum_e f_e P_e, with f_e the
    share of tokens routed to e and P_e its mean probability: 1 where all is even. Otherwise no token is dropped.
    """

    def __init__(self, width: int, inner: int, experts: int, capacity: float = 1.0) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, width) * inner**-0.5)
        self.capacity = capacity
        self.balance = torch.zeros(())

    def forward(self, x: Tensor, states: States | None, layer: int) -> Tensor:
        """[B, T, D] -> [B, T, D]. It holds nothing of the text."""
        rows = x.reshape(-1, x.shape[-1])
        p = self.router(rows).softmax(-1)
        best, chosen = p.max(-1)
        room = len(rows)
        if self.training:
            share = F.one_hot(chosen, p.shape[1]).to(p).mean(0)
            self.balance = p.shape[1] * (share * p.mean(0)).sum()
            room = math.ceil(self.capacity * len(rows) / p.shape[1])
        found = torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            mine = (chosen == expert).nonzero()[:room, 0]
            y = F.relu(rows[mine] @ self.up[expert]) @ self.down[expert]
            found = found.index_add(0, mine, y * best[mine, None])
        return found.view(x.shape)


class CausalAttention(nn.Module):
    """Multi-head attention with rotary positions, 4 width^2 weights. It holds the keys and values of the whole text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 3 * width, bias=False)
        self.leave = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, states: States | None, layer: int) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, width = x.shape
        start = 0 if states is None else states.length
        queries, keys, values = self.enter(x).view(batch, length, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        angles = torch.arange(start, start + length, device=x.device)[:, None] * 10_000.0 ** -torch.linspace(
            0, 1, HEAD // 2 + 1, device=x.device
        )[:-1].to(x)
        queries, keys = (_turned(part, angles) for part in (queries, keys))
        if states is not None:
            if layer in states.held:
                keys, values = (
                    torch.cat((old, new), 2) for old, new in zip(states.held[layer], (keys, values), strict=True)
                )
            states.held[layer] = keys.clone(), values.clone()
        seen = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.leave(attended.transpose(1, 2).reshape(x.shape))


def _turned(states: Tensor, angles: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, mixer: nn.Module, width: int, number: int) -> None:
        super().__init__()
        self.norm, self.mixer, self.number = nn.RMSNorm(width), mixer, number

    def forward(self, hidden: Tensor, past_key_values: States | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. The states have the name that the harness weighs caches by."""
        return hidden + self.mixer(self.norm(hidden), past_key_values, self.number)


class BlockModel(nn.Module):
    """A language model over the words of the track: tied embeddings, blocks with the given mixers, a norm."""

    def __init__(self, mixers: Sequence[nn.Module], width: int = WIDTH) -> None:
        from stepmark.backbones.lm import VOCABULARY

        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.layers = nn.ModuleList(Block(mixer, width, number) for number, mixer in enumerate(mixers))
        self.norm = nn.RMSNorm(width)

    def forward(self, ids: Tensor, states: States | None = None) -> Tensor:
        """Logits [B, T, V] of the words after each of `ids` [B, T], which follow what the states hold."""
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, past_key_values=states)
        if states is not None:
            states.length += ids.shape[1]
        return F.linear(self.norm(hidden), self.embed.weight)


# -- training and reading -----------------------------------------------------------------------------------------


def snapshots(session: Session, mixers: Callable[[], list[nn.Module]]) -> dict[str, nn.Module]:
    """One model for each rung; `learn` fills them."""
    return {f"after_{rung}": BlockModel(mixers()) for rung in session.task.rungs}


def learn(session: Session, balance: float = 0.0) -> None:
    """Train the model of the last rung on the train split, and copy it after the steps of each earlier one.

    Cross-entropy of the words of the stories, plus `balance` times the mean imbalance of the switch layers; AdamW,
    cosine schedule over all steps.
    """
    from stepmark.backbones.lm import EOS, batches, encode

    data, rungs = session.train, session.task.rungs
    pairs = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(len(data["prompt"]), 16)]
    rows = [(encode(prompt), [*encode(target), EOS]) for prompt, target in pairs]
    stream = batches(rows, session.scale(TOKENS, 150), session.seed)
    after = {session.scale(rung, 1 + i): f"after_{rung}" for i, rung in enumerate(rungs)}
    model, steps = session.networks[f"after_{rungs[-1]}"], max(after)
    switches = [part for part in model.modules() if isinstance(part, SwitchLayer)]
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in session.progress(range(1, steps + 1), "language model"):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        ids, labels = (part.to(session.device) for part in next(stream))
        wanted = labels >= 0
        loss = F.cross_entropy(model(ids)[wanted], labels[wanted])
        for switch in switches:
            loss = loss + balance * switch.balance / len(switches)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        if step in after and step < steps:
            session.networks[after[step]].load_state_dict(model.state_dict())
    model.eval()


def next_words(session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
    """Log-probabilities [B, V] of the next words: all tokens but the last at once, then the last from the states."""
    model, rows = session.networks[f"after_{rung}"], []
    for context in batch["context"]:
        ids, states = torch.tensor([context], device=session.device), States()
        model(ids[:, :-1], states)
        rows.append(model(ids[:, -1:], states)[0, -1].log_softmax(-1))
    return torch.stack(rows)
