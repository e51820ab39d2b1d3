"""A language model of word problems and countdown, on one mixture of all formats, and verifiers of its texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.examined import drawn, texts_of
from stepmark.backbones.reasoners import EOS, PAD, STOP, Reasoner, Verifier, built, decode, encode, looking_back

# Shares of the training examples.
MIXTURE = {
    "<cot>": 0.18, "<prose>": 0.12, "<table>": 0.12, "<guided>": 0.12, "<think>": 0.14, "<find>": 0.1, "<verify>": 0.1,
    "<dir>": 0.03, "countdown": 0.05, "<propose>": 0.02, "<value>": 0.02,
}  # fmt: skip


def example(rng: random.Random, form: str) -> tuple[str, str]:
    """A prompt and its completion in one of the formats of `MIXTURE`."""
    from stepmark.datasets import countdown, problems

    if form in ("countdown", "<propose>", "<value>"):
        count = rng.choice((3, 4))
        if form == "countdown":
            state, target = countdown.question(rng, count)
            return f"{countdown.told(state, target)} <cot>", countdown.solution(state, target, rng)
        state, target = countdown.somewhere(rng, count)
        if form == "<value>":
            return f"{countdown.told(state, target)} <value>", countdown.value(state, target)
        while len(state) == 1:
            state, target = countdown.somewhere(rng, count)
        return f"{countdown.told(state, target)} <propose>", countdown.said(*rng.choice(countdown.moves(state)))
    question = problems.problem(rng, rng.randint(1, 5))
    if form == "<find>":
        return found_back(rng, question)
    steps = problems.reordered(problems.read(question), rng)
    done = rng.randint(0, len(steps))
    before = [f"{step.clause} ." for step in steps[:done]]
    if form == "<guided>":
        kind, clause = (
            (steps[done].kind, f"{steps[done].clause} .")
            if done < len(steps)
            else ("done", problems.solution(question, "<dir>"))
        )
        return " ".join([question, form, *before, "<next>"]), f"{kind} <step> {clause}"
    if form == "<verify>":
        return judged(rng, question, max(done, 1))
    return f"{question} {form}", problems.solution(question, form, rng)


def found_back(rng: random.Random, question: str) -> tuple[str, str]:
    """An answer told, a number of the question asked for."""
    from stepmark.datasets import problems

    while True:
        number = rng.randrange(len(problems.places(question)))
        completion = problems.backward(question, number)
        if completion is not None:
            return problems.asked_back(question, number, problems.read(question).answer), completion


def judged(rng: random.Random, question: str, done: int) -> tuple[str, str]:
    """The first `done` steps of a solution and the word <score>; a digit says what the last of them is worth.

    7 to 9: right; 4 to 6: rightly worked, but not the step that was due; 0 to 2: wrongly worked. One step in four stands
    behind a wrong one: it is worth what it is for itself, less three.
    """
    from stepmark.datasets import problems

    every = problems.reordered(problems.read(question), rng)
    steps = every[:done]
    last, spoilt = steps[-1], done > 1 and rng.random() < 0.25
    worth, kind = rng.randint(7, 9), rng.random()
    other = problems.misread(question, every[done - 1 :], rng) if kind < 0.25 else None
    if other is not None:
        last, worth = other, rng.randint(4, 6)
    elif kind < 0.5:
        last, worth = problems.slip(last, rng), rng.randint(0, 2)
    if spoilt:
        k = rng.randrange(done - 1)
        steps[k], worth = problems.slip(steps[k], rng), max(0, worth - 3)
    clauses = [f"{step.clause} ." for step in (*steps[:-1], last)]
    return " ".join([question, "<verify>", *clauses, "<score>"]), str(worth)


def examples(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Training examples (prompt ids, completion ids with EOS) of the mixture."""
    rng = random.Random(f"reasoners {seed}")
    forms = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=count)
    rows = []
    for form in forms:
        prompt, completion = example(rng, form)
        rows.append((encode(prompt), [*encode(completion), EOS]))
    return rows


def train_reasoner(network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3) -> dict[str, float]:
    """Completions of the mixture, about 3 000 tokens an update. The report holds what `measure` finds."""
    from stepmark.backbones.lm import batches, fit

    assert isinstance(network, Reasoner)
    looking_back(network, (1, 2, 3))  # who gives what to whom stands in three words
    stream = batches(examples(seed, 60_000), 3_000, seed)
    report = fit(network.llama, progress, steps=steps, lr=lr, seed=seed, stream=stream)
    return report | measure(network)


class Labelled(NamedTuple):
    """A text of a reasoner. `ids`: with its prompt; `marks`: (where a step ends, whether all is well up to there); `right`:
    whether its answer is; `asked`: number of its question."""

    ids: list[int]
    marks: list[tuple[int, bool]]
    right: bool
    asked: int


def labelled(model: nn.Module, seed: int, questions: int, each: int = 4) -> list[Labelled]:
    """`each` texts of so many fresh questions of 1 to 5 steps, written by a model at temperature 1, one question after the
    other: what tells a right text from a wrong one is to be learnt, not which questions are easy."""
    from stepmark.backbones.chains import Chains
    from stepmark.datasets import problems

    rng, draw = random.Random(f"verifiers {seed}"), torch.Generator().manual_seed(seed)
    found: list[Labelled] = []
    for start in range(0, questions, 25):
        asked = [problems.problem(rng, rng.randint(1, 5)) for _ in range(min(25, questions - start))]
        prompts = Chains(model, [encode(f"{question} <cot>") for question in asked])
        with torch.no_grad():
            chains = prompts.take([i for i in range(len(asked)) for _ in range(each)])
            chains.write(limit=80, temperature=1.0, generator=draw)
        for i in range(len(chains)):
            own = chains.written(i)
            seen = problems.check(asked[i // each], decode(own))
            ends = [chains.starts[i] + k for k, token in enumerate(own) if token == STOP]
            marks = [(end, all(seen.steps[: k + 1])) for k, end in enumerate(ends[: len(seen.steps)])]
            found.append(Labelled(chains.texts[i], marks, seen.right, start + i // each))
    return found


def train_verifier(
    network: nn.Module, progress: Progress, process: bool, seed: int, steps: int = 1_000
) -> dict[str, float]:
    """Start as `reasoner`, and `taught` from there."""
    from stepmark.backbones import load

    assert isinstance(network, Verifier)
    writer = load("reasoner")
    network.reader.load_state_dict(writer.state_dict())
    return taught(network, progress, writer, process, seed, steps, 3e-4)


def taught(
    network: nn.Module, progress: Progress, writer: nn.Module, process: bool, seed: int, steps: int, lr: float
) -> dict[str, float]:
    """Cross entropy of whether all is well, at the end of each step (process) or of the text (outcome), on texts of a writer.

    The report holds areas under the ROC curve on texts of other questions: over all of them, and within questions (which text
    of one is right, the mean over questions that have both kinds); which of four is right by chance, by the verifier's
    choice, and by a choice that knows.
    """
    rows, held_out = labelled(writer, seed, 3_000), labelled(writer, seed + 1_000, 300)
    rng = random.Random(f"verifier {seed}")
    trained = [each for each in network.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    for step in progress(range(steps), "verifier"):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        # Texts of eight questions.
        said, truth, _ = _judgements(
            network, [rows[4 * i + k] for i in rng.sample(range(3_000), 8) for k in range(4)], process
        )
        loss = F.binary_cross_entropy_with_logits(said, truth)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    with torch.no_grad():
        said, truth, owner = _judgements(network, held_out, process)
        last = said if not process else _judgements(network, held_out, process, last=True)[0]
    right = torch.tensor([float(row.right) for row in held_out]).view(-1, 4)
    within = [auroc(said[owner == i], truth[owner == i]) for i in range(300)]
    return {
        "auroc": auroc(said, truth),
        "auroc_within": float(torch.tensor(within).nanmean()),
        "any": float(right.mean()),
        "best_of_4": float(right.gather(1, last.view(-1, 4).argmax(1, keepdim=True)).mean()),
        "pass_4": float(right.amax(1).mean()),
    }


def _judgements(
    network: nn.Module, rows: Sequence[Labelled], process: bool, last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [M], truths [M] and questions [M] of all places of these texts that are judged; `last`: one of each text."""
    longest = max(len(row.ids) for row in rows)
    said = network(torch.tensor([row.ids + [PAD] * (longest - len(row.ids)) for row in rows]))
    number, at, truth = list[int](), list[int](), list[bool]()
    for i, row in enumerate(rows):
        marks = row.marks if process and row.marks else [(len(row.ids) - 1, row.right)]
        for place, fine in marks[-1:] if last else marks:
            number, at, truth = [*number, i], [*at, place], [*truth, fine]
    asked = torch.tensor([rows[i].asked for i in number])
    return said[number, at], torch.tensor(truth, dtype=torch.float32), asked


def auroc(said: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of scores [M] for truths [M] of 0 and 1; ties count half. NaN where all are alike."""
    right, wrong = said[truth > 0.5], said[truth <= 0.5]
    if not len(right) or not len(wrong):
        return float("nan")
    above = (right[:, None] > wrong[None]).float() + 0.5 * (right[:, None] == wrong[None]).float()
    return float(above.mean())


def measure(model: nn.Module, each: int = 60) -> dict[str, float]:
    """Shares of right answers to questions that no split holds: greedy chains of 1 to 6 steps (cot: 2 to 5 together), the same
    in other formats; of one text, the plurality of eight and any of eight at temperatures .7 and 1; countdown with three
    and four numbers. `each`: questions of a depth."""
    from stepmark.datasets import countdown, problems

    rng = random.Random("examined reasoner")
    asked = {steps: [problems.problem(rng, steps) for _ in range(each)] for steps in range(1, 7)}
    found = dict[str, float]()
    for steps, questions in asked.items():
        texts = texts_of(model, [f"{question} <cot>" for question in questions], 90)
        right = [problems.check(question, text).right for question, text in zip(questions, texts, strict=True)]
        found[f"cot_{steps}"] = sum(right) / each
    found["cot"] = sum(found[f"cot_{steps}"] for steps in range(2, 6)) / 4
    questions = [question for steps in range(2, 6) for question in asked[steps]]
    for form, limit in (("<dir>", 8), ("<prose>", 160), ("<table>", 120), ("<think>", 240)):
        texts = texts_of(model, [f"{question} {form}" for question in questions], limit)
        answers = [problems.answer_of(text) for text in texts]
        right = [problems.read(q).answer == answer for q, answer in zip(questions, answers, strict=True)]
        found[form.strip("<>")] = sum(right) / len(questions)
    found |= drawn(
        model, [f"{question} <cot>" for question in questions], 90,
        lambda i, text: problems.check(questions[i], text).right, problems.answer_of,
    )  # fmt: skip
    for count in (3, 4):
        told = [countdown.told(*countdown.question(rng, count)) for _ in range(each)]
        prompts = [f"{question} <cot>" for question in told]
        texts = texts_of(model, prompts, 60)
        found[f"countdown_{count}"] = sum(countdown.check(q, t)[1] for q, t in zip(told, texts, strict=True)) / each
        chains = drawn(
            model, prompts, 60, lambda i, text, told=told: countdown.check(told[i], text)[1], lambda text: text
        )  # type: ignore[misc]
        found |= {f"countdown_{count}_{name}": share for name, share in chains.items() if not name.startswith("vote")}
    return found


RECIPES: dict[str, Recipe] = {
    "reasoner": Recipe(
        partial(built, Reasoner, 192, 4, 22), partial(train_reasoner, steps=2_400, seed=22),
        "Llama, width 192, 4 layers, word problems in ten formats and countdown",
    ),
    "reasoner_process": Recipe(
        partial(built, Verifier, 192, 4, 24), partial(train_verifier, process=True, seed=24),
        "a copy of reasoner with a head: is all well up to the end of this step?",
    ),
    "reasoner_outcome": Recipe(
        partial(built, Verifier, 192, 4, 25), partial(train_verifier, process=False, seed=25),
        "a copy of reasoner with a head: is the answer of this text right?",
    ),
}  # fmt: skip
