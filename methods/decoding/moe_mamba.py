"""MoE-Mamba: Mamba blocks and switch layers in turn (Pioro et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.lm import VOCABULARY, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.attention import CausalAttention, States

WIDTH, BLOCKS, EXPERTS = 32, 4, 16  # of the embeddings; blocks of a model, experts of a switch layer
STATE, KERNEL, STEP_RANK = 4, 4, 4  # Mamba: channels of the state, of the convolution, rank of the step sizes
TEXTS, RATE, CLIP = 32, 6e-3, 0.5  # of a training step; the paper clips gradients at 0.5


class MoeMamba(Method):
    """Every second Mamba block gives way to a switch layer, of which a token uses one expert.

    x + Mamba(norm x), then x + Switch(norm x), and so on (section 3 of the paper, its figure 1). An expert is a ReLU
    network of inner width 3 d, 6 d^2 weights like the Mamba block in its place, so that a token meets no more
    parameters than in `mamba_lm` (a Mamba block has a fifth more in its small parts, at this width). Routing is top-1
    with capacity factor 1 and a balance loss of weight 0.01. A Mamba block holds a state of constant size, a switch
    layer none.

    Differs from the paper: width 32, 4 blocks and 16 experts for 512, 16 and 32; state size 4; 1600 training steps, AdamW at
    one rate for all arms. Gates are plain softmax and experts ReLU networks, as in Switch; no noise, no dropout. While it
    reads contexts no token is dropped, so that what a token gets does not hang on others. Mamba's convolution has no bias,
    its step sizes no floor, and weight decay is on all weights; the balance loss is the mean over the switch layers.

    `mamba_lm` is Mamba itself (Gu and Dao 2023), four of its blocks: a convolution over the last four words, a state space
    whose step sizes, inputs and outputs hang on the word (h_t = exp(D_t A) h_(t-1) + D_t B_t u_t, y_t = C_t h_t, algorithm
    2 of that paper) and a gate; its state does not grow with the text. `transformer_moe` has attention in the places of
    the Mamba blocks, of 4 d^2 weights, and experts of inner width 4 d, of 8 d^2: together those of two Mamba blocks. Its
    cache of keys and values grows with the text.

    What limits it here: in half of Mamba's steps its final loss is about reached, its loss midway is not. The first word
    of a text says in which tongue all others are read. Attention looks it up; a state space must hold it among all that
    it reads, of which two blocks with small states learn less. So this task cannot show the half of the abstract that is
    about Transformers with experts. Nor is Mamba's cheap decoding measured, which is kept: states are of constant size by
    construction, and contexts of 23 words too short for time to show it. And a table learnt by heart rewards weights as
    such; no control routes words to experts at random, to say what the router is worth.
    """

    paper = Paper(
        id="moe_mamba",
        title="MoE-Mamba: Efficient Selective State Space Models with Mixture of Experts",
        authors="Maciej Pióro, Kamil Ciebiera, Krystian Król, Jan Ludziejewski, Michał Krutul, Jakub Krajewski, "
        "Szymon Antoniak, Piotr Miłoś, Marek Cygan, Sebastian Jaszczur",
        year=2024,
        arxiv="2401.04081",
    )
    tasks = ("learning/tongues",)
    baselines = ("mamba_lm", "transformer_moe")
    trainings = 3
    claims = (
        Claim(
            "loss[moe_mamba,800] <= loss[mamba_lm,1600] and loss[moe_mamba,400] <= loss[mamba_lm,800]",
            says="Mamba's loss in half its training steps (the paper's 2.2 times fewer)",
            headline=True,
            setting="16 experts for 32 and 1600 steps: what experts gain grows with their number and with the training",
        ),
        Claim(
            "loss[moe_mamba,1200] <= loss[mamba_lm,1600]",
            says="Mamba's final loss in three quarters of its training steps",
        ),
        Claim(
            "loss[moe_mamba,*] < loss[mamba_lm,*]",
            says="a lower loss than Mamba after as many steps, of as many active parameters",
        ),
        Claim(
            "loss[moe_mamba,*] < loss[transformer_moe,*]",
            says="a lower loss than a Transformer with experts after as many steps",
            setting="all of a text hangs on its first word, which attention looks up and a small state must hold",
        ),
    )

    attention = False  # in the places of the Mamba blocks
    inner = 3  # inner width of an expert in widths of the model; 0: Mamba blocks in the places of the switch layers
    variants = (
        Variant(
            "mamba_lm",
            says="Mamba: selective state space blocks alone, at equal active parameters",
            inner=0,
            baselines=(),
        ),
        Variant(
            "transformer_moe",
            says="a Transformer with switch layers: attention in place of the Mamba blocks, at equal active parameters",
            attention=True,
            inner=4,
            baselines=("mamba_lm",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """One model for each rung; `learn` fills them."""
        return {f"after_{rung}": BlockModel(self.mixers()) for rung in session.task.rungs}

    def mixers(self) -> list[nn.Module]:
        """What mixes in each block, in turn."""
        found: list[nn.Module] = []
        for _ in range(BLOCKS // 2):
            found.append(CausalAttention(WIDTH) if self.attention else MambaBlock(WIDTH))
            found.append(SwitchLayer(WIDTH, self.inner * WIDTH, EXPERTS) if self.inner else MambaBlock(WIDTH))
        return found

    def prepare(self, session: Session) -> None:
        """Train, with the balance loss of the switch layers."""
        learn(session, balance=0.01)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
        """Log-probabilities of the next words."""
        return next_words(session, batch, rung)


# -- blocks ---------------------------------------------------------------------------------------------------------


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


# -- training and reading --------------------------------------------------------------------------------------------


def learn(session: Session, balance: float) -> None:
    """Train the model of the last rung on the train split, and copy it after the steps of each earlier one.

    Cross-entropy of the words, plus `balance` times the mean imbalance of the switch layers; AdamW, cosine schedule over all
    steps. The texts are read in the order of a shuffle, and of another one when they have all been read.
    """
    texts, rungs = session.train["text"], session.task.rungs
    rows = torch.tensor([encode(text) for text in texts[: session.scale(len(texts), 16)]])
    shuffle, queue = torch.Generator().manual_seed(session.seed), torch.zeros(0, dtype=torch.long)
    after = {session.scale(rung, 1 + i): f"after_{rung}" for i, rung in enumerate(rungs)}
    model, steps = session.networks[f"after_{rungs[-1]}"], max(after)
    switches = [part for part in model.modules() if isinstance(part, SwitchLayer)]
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in session.progress(range(1, steps + 1), "language model"):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        if len(queue) < TEXTS:
            queue = torch.cat((queue, torch.randperm(len(rows), generator=shuffle)))
        ids, queue = rows[queue[:TEXTS]].to(session.device), queue[TEXTS:]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
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
