"""The language model of deduction: rules and facts stand in the prompt, and what they give is worked out word by word.

Looking a word up in a prompt of shuffled statements is a circuit that forms late or never at this size. Two heads of the
first layer therefore start as what the circuit needs: they look one and two words back. All of it stays trainable. Depth and
distractors grow with what has been learnt; copying and recalling help at first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.lm import Muon, hidden_states
from stepmark.backbones.reasoners import PAD, Reasoner, built, encode

LEVELS = ((1, 0), (2, 1), (3, 2), (4, 3), (5, 4))  # (greatest depth, most rules that lead nowhere)
MODULES = ("<select>", "<infer>", "<holds>", "<rules>", "<goal>", "<agree>", "<follows>", "<whole>")
Row = tuple[list[int], list[float]]  # token ids, and what each counts as a target


def looking_back(network: Reasoner, offsets: Sequence[int] = (1, 2), peak: float = 20.0, constant: float = 0.3) -> None:
    """Let heads 0, 1, ... of the first layer attend to the token `offsets` before, to about three quarters.

    A constant in the first channel of all embeddings drives queries and keys; the keys are turned beforehand, so that the
    rotary product has its maximum at that distance.
    """
    inner = network.llama.model
    attention, table = inner.layers[0].self_attn, inner.embed_tokens.weight
    size, width = attention.head_dim, table.shape[1]
    frequencies = 1.0 / network.llama.config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    share = (frequencies > 0.12).float()
    share = share / share.sum()
    with torch.no_grad():
        table[:, 0] = constant
        scaled = constant / ((constant**2 + 0.04**2 * (width - 1)) / width) ** 0.5  # behind the norm
        amplitude = (peak * size**0.5 * share).sqrt() / scaled
        for head, offset in enumerate(offsets):
            rows = slice(head * size, (head + 1) * size)
            for part in (attention.q_proj, attention.k_proj):
                part.weight[rows] *= 0.3
            turn = frequencies * offset
            attention.q_proj.weight[rows, 0] = torch.cat([amplitude, torch.zeros(size // 2)])
            attention.k_proj.weight[rows, 0] = torch.cat([amplitude * turn.cos(), amplitude * turn.sin()])


def row(parts: Sequence[tuple[str, float]]) -> Row:
    """A training text of parts, each with what its tokens count as targets."""
    ids, weights = list[int](), list[float]()
    for text, weight in parts:
        own = encode(text)
        ids += own
        weights += [weight] * len(own)
    return ids, weights


def copied(rng: random.Random) -> Row:
    """Random words, then the same from a random place on: every word of the second round but the first counts."""
    from stepmark.datasets.deduction import CONCEPTS

    words = rng.choices(CONCEPTS, k=rng.randint(6, 13))
    start = rng.randrange(len(words))
    again = words[start:] + words[:start]
    return row([(" ".join(words), 0.0), (again[0], 0.0), (" ".join(again[1:]), 1.0)])


def recalled(rng: random.Random, most: int) -> Row:
    """Random statements, then all of them in another order: verb and word count."""
    from stepmark.datasets.deduction import CONCEPTS, said

    count = rng.randint(3, most)
    words = rng.sample(CONCEPTS, 2 * count)
    statements = [(words[2 * i], rng.random() < 0.5, words[2 * i + 1]) for i in range(count)]
    parts = [(" ".join(map(said, statements)), 0.0)]
    for statement in rng.sample(statements, count):
        subject, rest = said(statement).split(maxsplit=1)
        parts += [(subject, 0.0), (rest, 1.0), (".", 0.0)]
    return row(parts)


def deduced(rng: random.Random, level: int, direct: float = 0.25) -> Row:
    """Two questions about one context; the second one's answer follows from the first, so that only its steps count."""
    from stepmark.datasets import deduction

    deepest, dead = LEVELS[level]
    depth = deepest if level < len(LEVELS) - 1 and rng.random() < 0.5 else rng.randint(1, deepest)
    at_once = rng.random() < direct
    asked = deduction.question(rng, min(depth, 2) if at_once and rng.random() < 0.5 else depth, rng.randint(0, dead))
    other = next(fact[0] for fact in asked.facts if fact[0] != asked.goal[0])
    parts = [(" ".join(map(deduction.said, asked.statements)), 0.0)]
    for number, who in enumerate((asked.goal[0], other)):
        question = deduction.Question(asked.statements, (who, True, asked.goal[2]))
        form = "<dir>" if at_once and number == 0 else "<proof>"
        parts.append((f"? {deduction.said(question.goal)} {form}", 0.0))
        steps, _, ending = deduction.solution(question, form).rpartition("ans ")
        if steps:
            parts.append((steps.strip(), 1.0))
        # A direct answer is one token among dozens.
        parts += [("ans", 1.0), (ending, 0.0 if number else 5.0 if form == "<dir>" else 1.0)]
        if number == 0 and rng.random() < 0.5:
            parts.append(("<eos>", 1.0))  # most texts end here when they are asked for
            break
    return row(parts)


def apart(rng: random.Random) -> Row:
    """One of the formats that take a question apart."""
    from stepmark.datasets import deduction

    deepest, dead = LEVELS[-1]
    prompt, completion = deduction.module(
        rng, deduction.question(rng, rng.randint(1, deepest), rng.randint(0, dead)), rng.choice(MODULES)
    )
    return row([(prompt, 0.0), (f"{completion} <eos>", 1.0)])


def batch(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], targets [B, T], weights [B, T]), padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([own + [PAD] * (longest - len(own)) for own, _ in rows])
    weights = torch.tensor([own + [0.0] * (longest - len(own)) for _, own in rows])
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def rows_of(rng: random.Random, level: int, together: bool) -> Iterator[tuple[str, Row]]:
    """Endless training texts and what they are: "copy", "recall", "task", and `together` with them "module"."""
    aid = 0.33 if level == 0 else 0.08
    while True:
        drawn = rng.random()
        if drawn < aid:
            yield "copy", copied(rng)
        elif drawn < 2 * aid:
            yield "recall", recalled(rng, 7 + 2 * level)
        elif together and drawn < 0.5:
            yield "module", apart(rng)
        else:
            yield "task", deduced(rng, level)


def train_deducer(network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3) -> dict[str, float]:
    """64 texts an update; a level further where nine in ten words of proofs and of recall come out right."""
    assert isinstance(network, Reasoner)
    looking_back(network)
    model, rng = network.llama, random.Random(f"deducers {seed}")
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    ]  # fmt: skip
    right = {"copy": 0.0, "recall": 0.0, "task": 0.0, "module": 0.0}
    level, since, reached = 0, 0, 0
    model.train()
    for step in progress(range(steps), "deduction"):
        rate = lr * min(1.0, (step + 1) / 30, max(0.03, (1 - step / steps) / 0.35))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        # Texts of a kind have a length of their own: two halves, so that little is padded.
        source = rows_of(rng, level, together=level == len(LEVELS) - 1)
        drawn = sorted((next(source) for _ in range(64)), key=lambda each: len(each[1][0]))
        for half in (drawn[:32], drawn[32:]):
            ids, targets, weights = batch([each for _, each in half])
            wanted = weights > 0
            logits = model.lm_head(hidden_states(model, ids, [True] * len(model.model.layers))[wanted])
            loss = F.cross_entropy(logits, targets[wanted], reduction="none") * weights[wanted]
            (loss.sum() / weights.sum() / 2).backward()
            hits = torch.zeros(wanted.shape)
            hits[wanted] = (logits.argmax(-1) == targets[wanted]).float()
            for i, (kind, _) in enumerate(half):
                share = float(hits[i].sum() / wanted[i].sum().clamp(min=1))
                right[kind] = 0.995 * right[kind] + 0.005 * share
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        since += 1
        if level < len(LEVELS) - 1 and since > 60 and right["task"] > 0.96 and right["recall"] > 0.93:
            level, since, reached = level + 1, 0, step
    model.eval()
    return {
        "level": float(level),
        "reached": float(reached),
        **{f"right_{kind}": share for kind, share in right.items()},
    }


RECIPES: dict[str, Recipe] = {
    "deducer": Recipe(
        partial(built, Reasoner, 128, 3, 31), partial(train_deducer, steps=1_700, seed=31),
        "Llama, width 128, 3 layers, deduction from rules and facts in the prompt, whole and in parts",
    ),
}  # fmt: skip
