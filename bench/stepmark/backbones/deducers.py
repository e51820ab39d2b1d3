"""The language model of deduction: rules and facts stand in the prompt, and what they give is worked out word by word.

Looking a word up in a prompt of shuffled statements is a circuit that forms late or never at this size. Two heads of the
first layer therefore start as what the circuit needs: they look one and two words back. All of it stays trainable. Depth and
distractors grow with what has been learnt; copying and recalling help at first. Which rules end in a word is looked up against
the order of writing and stays hard (`rules` of the report): methods ask what each rule gives instead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.examined import drawn, texts_of
from stepmark.backbones.lm import Muon, hidden_states
from stepmark.backbones.reasoners import PAD, Reasoner, built, encode, looking_back

LEVELS = ((1, 0), (2, 1), (3, 2), (4, 3), (5, 4))  # (greatest depth, most rules that lead nowhere)
# Formats that take a question apart, and how often each is practised: those that look all over the prompt are the hard ones.
MODULES = {
    "<select>": 2, "<infer>": 1, "<holds>": 3, "<rules>": 5, "<goal>": 1, "<agree>": 1, "<follows>": 2, "<whole>": 3,
}  # fmt: skip
ASKED_OF_ONE = ("<holds>", "<rules>")  # several goals about the same statements make a text
VERDICTS = ("<agree>", "<follows>", "<whole>")  # a completion is one word among dozens
Row = tuple[list[int], list[float]]  # token ids, and what each counts as a target


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
    """One of the formats that take a question apart: several goals about the same statements, or several short texts."""
    from stepmark.datasets import deduction

    deepest, dead = LEVELS[-1]
    (form,) = rng.choices(list(MODULES), list(MODULES.values()))
    shallowest = 3 if form == "<rules>" else 1  # where facts begin no rule ends
    asked = deduction.question(rng, rng.randint(shallowest, deepest), rng.randint(0, dead))
    first, completion = deduction.module(rng, asked, form)
    worth = 3.0 if form in VERDICTS else 1.0
    parts = [(first, 0.0), (f"{completion} <eos>", worth)]
    context = first.partition(" ? ")[0]
    if form in ASKED_OF_ONE:
        for _ in range(3):
            prompt, completion = deduction.module(rng, asked, form)
            if prompt.startswith(f"{context} ? "):
                parts += [(prompt.removeprefix(context), 0.0), (f"{completion} <eos>", worth)]
    elif len(first.split()) < 12:
        for _ in range(5):
            asked = deduction.question(rng, rng.randint(1, deepest), rng.randint(0, dead))
            prompt, completion = deduction.module(rng, asked, form)
            parts += [(prompt, 0.0), (f"{completion} <eos>", worth)]
    return row(parts)


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
        elif together and drawn < 0.55:
            yield "module", apart(rng)
        else:
            yield "task", deduced(rng, level)


def train_deducer(network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3) -> dict[str, float]:
    """64 texts an update; a level further where nine in ten words of proofs and of recall come out right. The report holds
    what `measure` finds."""
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
        **measure(network),
    }


def measure(model: nn.Module, each: int = 60) -> dict[str, float]:
    """Shares of questions that no split holds: right answers (proof_3: by 3 rules, dense: among 6 or 8 statements that lead
    nowhere) and valid proofs of greedy texts, steps that are valid, answers at once (dir); of one text, the plurality of
    eight and any of eight at temperatures .7 and 1; and what is said word for word in each format that takes a question
    apart. `each`: questions of a depth."""
    from stepmark.datasets import deduction

    rng = random.Random("examined deducer")
    found = dict[str, float]()
    sets = {
        str(depth): [deduction.question(rng, depth, rng.choice((2, 4))) for _ in range(each)] for depth in range(1, 7)
    }
    sets["dense"] = [deduction.question(rng, 3, rng.choice((6, 8))) for _ in range(each)]
    for name, asked in sets.items():
        told = [deduction.told(question) for question in asked]
        proofs = texts_of(model, [f"{question} <proof>" for question in told], 64)
        checked = [deduction.check(question, text) for question, text in zip(asked, proofs, strict=True)]
        found[f"proof_{name}"] = sum(c.right for c in checked) / each
        found[f"valid_{name}"] = sum(c.valid for c in checked) / each
        found[f"steps_{name}"] = sum(sum(c.steps) / max(1, len(c.steps)) for c in checked) / each
        at_once = texts_of(model, [f"{question} <dir>" for question in told], 4)
        answers = [deduction.answer_of(text) == deduction.answer(q) for q, text in zip(asked, at_once, strict=True)]
        found[f"dir_{name}"] = sum(answers) / each
    asked = [question for depth in range(1, 6) for question in sets[str(depth)]]
    found["proof"] = sum(found[f"proof_{depth}"] for depth in range(1, 6)) / 5
    found |= drawn(
        model, [f"{deduction.told(question)} <proof>" for question in asked], 64,
        lambda i, text: deduction.check(asked[i], text).right, deduction.answer_of,
    )  # fmt: skip
    for form in MODULES:
        pairs = [
            deduction.module(rng, deduction.question(rng, rng.randint(1, 5), rng.randint(0, 4)), form)
            for _ in range(2 * each)
        ]
        said = texts_of(model, [prompt for prompt, _ in pairs], 24)
        # The rules that end in a word may be named in any order.
        same = [sorted(_statements(a)) == sorted(_statements(b)) for a, (_, b) in zip(said, pairs, strict=True)]
        found[form.strip("<>")] = sum(same) / len(pairs)
    return found


def _statements(text: str) -> list[str]:
    words = text.removesuffix(" done").split()
    return [" ".join(words[i : i + 3]) for i in range(0, len(words), 3)]


RECIPES: dict[str, Recipe] = {
    "deducer": Recipe(
        partial(built, Reasoner, 128, 3, 31), partial(train_deducer, steps=2_400, seed=31),
        "Llama, width 128, 3 layers, deduction from rules and facts in the prompt, whole and in parts",
    ),
}  # fmt: skip
