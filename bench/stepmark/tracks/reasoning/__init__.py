"""Track reasoning: how much accuracy does each generated token buy?

A rung is a number of generated tokens per question: rows of calls of the language models, one for each token that is
sampled, and one for each piece of text that a model is given and whose continuation or likelihood is asked for (the row
that reads a prompt gives the first token). One call may serve many texts: its rows are what counts, and how many calls
follow each other is what a user waits for. Verifiers are not language models: what they read counts apart, and with all
else in NFE-equivalents, calls of the task's model over one token.

`run` receives {"question": lists of token ids} and returns one list of token ids per question: the text that answers it,
without its prompt, at most `LONGEST` tokens, nothing after the end-of-sequence token. How it is asked for is the
method's choice: a question is followed by a word that chooses a format (`stepmark.datasets.problems`, `.countdown`,
`.deduction`, `.knowledge`, `.demonstrations`, `.analogies`, `.procedures`, `.traces`, `.navigation`), and the text may be in
any of those that hold an answer. Where several texts were written, the one that holds the answer chosen is returned.

`session.networks`: "model", the language model of the task; on problems and countdown "small" and "large" as well, of the
same words and data (all `Reasoner`s of `stepmark.backbones.reasoners`, driven by `stepmark.backbones.chains.Chains`), and
on problems "process" and "outcome", `Verifier`s. Procedures and programs have "small" and "large" too. `session.train` holds
"question", "prompt", "target", "answer", "level": lists of texts, of worked examples also whose they are and answers in
several styles, of knowledge also their "kind", for all of its tasks share one training split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split

LONGEST = 400
LONGEST_OF = {"procedures": 1_200}  # where 25 states of 30 letters may be asked for

TASKS = (
    Task(
        id="solve/problems",
        version=1,
        summary="Arithmetic word problems of 2 to 5 steps",
        dataset="problems",
        backbones={
            "model": "reasoner",
            "small": "reasoner_small",
            "large": "reasoner_large",
            "process": "reasoner_process",
            "outcome": "reasoner_outcome",
        },
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(32, 64, 128, 256, 512, 1024),
        metrics={"accuracy": "higher", "answered": "higher", "valid": "higher", "written": "lower"},
        n=200,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/problems_deep",
        version=1,
        summary="Arithmetic word problems of 6 steps, one more than any model has seen",
        dataset="problems",
        backbones={
            "model": "reasoner",
            "small": "reasoner_small",
            "large": "reasoner_large",
            "process": "reasoner_process",
            "outcome": "reasoner_outcome",
        },
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(64, 128, 256, 512, 1024),
        metrics={"accuracy": "higher", "answered": "higher", "valid": "higher", "written": "lower"},
        n=160,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/countdown",
        version=1,
        summary="Countdown with three and four numbers",
        dataset="countdown",
        backbones={"model": "reasoner", "small": "reasoner_small", "large": "reasoner_large"},
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(32, 64, 128, 256, 512, 1024),
        metrics={"accuracy": "higher", "answered": "higher", "written": "lower"},
        n=120,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/game24",
        version=1,
        summary="Game of 24 with sets of numbers that no model has seen",
        dataset="countdown",
        backbones={"model": "reasoner", "small": "reasoner_small", "large": "reasoner_large"},
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(64, 128, 256, 512, 1024, 2048),
        metrics={"accuracy": "higher", "answered": "higher", "written": "lower"},
        n=120,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="deduce/chains",
        version=1,
        summary="True or false by 1 to 5 rules of the prompt, 2 or 4 statements that lead nowhere",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "answered": "higher",
            "steps": "higher",
            "straight": "higher",
            "misled": "lower",
            "detoured": "higher",
            "valid_depth1": "higher",
            "valid_depth5": "higher",
            "valid_dead2": "higher",
            "valid_dead4": "higher",
            "written": "lower",
        },
        n=200,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="deduce/dense",
        version=1,
        summary="True or false by 3 rules of the prompt, 6 or 8 statements that lead nowhere",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "answered": "higher",
            "steps": "higher",
            "straight": "higher",
            "misled": "lower",
            "detoured": "higher",
            "written": "lower",
        },
        n=160,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="deduce/deep",
        version=1,
        summary="True or false by 6 rules of the prompt, one more than the model has seen",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "answered": "higher",
            "steps": "higher",
            "straight": "higher",
            "misled": "lower",
            "detoured": "higher",
            "written": "lower",
        },
        n=160,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/hops",
        version=1,
        summary="1 to 3 relations over facts known by heart, common and rare",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "found": "higher",
            "far": "higher",
            "rare": "higher",
            "written": "lower",
        },
        n=480,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/could",
        version=1,
        summary="Yes or no by relations that the question does not name",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "pairs": "higher",
            "unseen": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/years",
        version=1,
        summary="Where somebody worked in a year, of people about whom nobody has asked",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "found": "higher",
            "rare": "higher",
            "written": "lower",
        },
        n=320,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/claims",
        version=1,
        summary="Claims and their denials, true or false, about what is known more or less well",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "agree": "higher",
            "far": "higher",
            "rare": "higher",
            "written": "lower",
        },
        n=480,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/odd",
        version=1,
        summary="The odd one out of 5 to 8, more than the model has seen but for 5, in two orders",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "agree": "higher",
            "large": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/options",
        version=1,
        summary="One of four options, of which 1 to 3 break a law, about facts that are seldom told",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "relations": "higher",
            "refutable": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/make",
        version=1,
        summary="What can be made on the way to a thing, by alternatives and their parts",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512, 1024),
        metrics={
            "f1": "higher",
            "precision": "higher",
            "recall": "higher",
            "written": "lower",
        },
        n=200,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/chains",
        version=1,
        summary="What each step of a chain is worth, and the whole, held against pages",
        dataset="knowledge",
        backbones={"model": "knower"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(4, 16, 64, 128),
        metrics={
            "chain": "higher",
            "attribution": "higher",
            "logic": "higher",
            "relevance": "higher",
            "answered": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="shown/mixed",
        version=1,
        summary="Digits through 2 to 4 signs of which the question tells two in five, worked examples perhaps the rest",
        dataset="demonstrations",
        backbones={"model": "demonstrator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "coarse": "higher",
            "answered": "higher",
            "valid": "higher",
            "lines": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="shown/bare",
        version=1,
        summary="The same with signs of which worked examples alone can tell",
        dataset="demonstrations",
        backbones={"model": "demonstrator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "lines": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="shown/told",
        version=1,
        summary="Digits through 1 to 6 signs, all told: worked examples show how answers are written",
        dataset="demonstrations",
        backbones={"model": "demonstrator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "easy": "higher",
            "hard": "higher",
            "answered": "higher",
            "valid": "higher",
            "bridging": "higher",
            "lines": "higher",
            "written": "lower",
        },
        n=480,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="shown/deep",
        version=1,
        summary="Digits through 5 and 6 signs, more than the model has seen, of which the question tells two in five",
        dataset="demonstrations",
        backbones={"model": "demonstrator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "lines": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="shown/wishes",
        version=1,
        summary="Answers as somebody wants them, which opinions on other answers tell",
        dataset="demonstrations",
        backbones={"model": "demonstrator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128, 256),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "right": "higher",
            "wished": "higher",
            "needless": "lower",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="infer/analogies",
        version=1,
        summary="Rules of 1 to 3 operations found from pairs, over letters and people, free or with a choice",
        dataset="analogies",
        backbones={"model": "analogist"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "fits": "higher",
            "letters_easy": "higher",
            "letters_hard": "higher",
            "people_easy": "higher",
            "people_hard": "higher",
            "free": "higher",
            "choice": "higher",
            "written": "lower",
        },
        n=480,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="carry/procedures",
        version=1,
        summary="Eight procedures of 2 to 25 told steps, of which a model has seen up to 10",
        dataset="procedures",
        backbones={"model": "proceduralist", "small": "proceduralist_small", "large": "proceduralist_large"},
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512, 1024),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "prefix": "higher",
            "accuracy_short": "higher",
            "accuracy_medium": "higher",
            "accuracy_long": "higher",
            "prefix_short": "higher",
            "prefix_medium": "higher",
            "prefix_long": "higher",
            "written": "lower",
        },
        n=240,
        batch=24,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="carry/traces",
        version=1,
        summary="Programs traced line by line, 2 to 24 lines, of which a model has seen up to 12",
        dataset="traces",
        backbones={"model": "proceduralist", "small": "proceduralist_small", "large": "proceduralist_large"},
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512, 1024),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "prefix": "higher",
            "valid_trained": "higher",
            "valid_longer": "higher",
            "valid_few": "higher",
            "valid_many": "higher",
            "written": "lower",
        },
        n=300,
        batch=30,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="navigate/paths",
        version=1,
        summary="Shortest ways of 1 to 5 edges over a graph of the prompt, 3 or 6 edges beside them",
        dataset="navigation",
        backbones={"model": "navigator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "shortest": "higher",
            "valid": "higher",
            "answered": "higher",
            "written": "lower",
        },
        n=160,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="navigate/deep",
        version=1,
        summary="The same of 6 and 7 edges, more than the model has seen",
        dataset="navigation",
        backbones={"model": "navigator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "shortest": "higher",
            "valid": "higher",
            "answered": "higher",
            "written": "lower",
        },
        n=120,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
)

SPLITS = {
    "solve/problems_deep": "deep",
    "solve/game24": "game24",
    "deduce/dense": "dense",
    "deduce/deep": "deep",
    "shown/bare": "bare",
    "shown/told": "told",
    "shown/deep": "deep",
    "shown/wishes": "wishes",
    "navigate/paths": "paths",
    "navigate/deep": "deep",
}
TWINS = ("know/claims", "know/odd")  # each second question is the one before it, denied or in another order


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct questions of the task's split: {"question": lists of ids}."""
    from stepmark.backbones.reasoners import encode

    harness_only("the test split")
    split = task.id.partition("/")[2] if task.dataset == "knowledge" else SPLITS.get(task.id, "test")
    asked = load_split(task.dataset, split)["question"]
    if task.id in TWINS:
        pairs = torch.randperm(len(asked) // 2, generator=generator)[: -(-n // 2)].tolist()
        chosen = [2 * i + k for i in pairs for k in (0, 1)][:n]
    else:
        chosen = torch.randperm(len(asked), generator=generator)[:n].tolist()
    return {"question": [encode(asked[i]) for i in chosen]}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per question, not empty, not too long, nothing after the end of the sequence."""
    from stepmark.backbones.reasoners import EOS, WORDS

    if not isinstance(outputs, list) or len(outputs) != len(batch["question"]):
        raise BadOutput(f"run must return a list of {len(batch['question'])} lists of token ids")
    for ids in outputs:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(WORDS) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(WORDS)})")
        longest = LONGEST_OF.get(task.dataset, LONGEST)
        if not 1 <= len(ids) <= longest:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {longest}")
        if EOS in ids[:-1]:
            raise BadOutput("an output goes on after its end-of-sequence token")


def judged(task: Task, question: str, text: str) -> dict[str, Any]:
    """What `score` means of, for one text."""
    from stepmark.datasets import countdown, knowledge, problems
    from stepmark.tracks.reasoning.marking import MARKS

    if task.dataset == "knowledge":
        return knowledge.judged(question, text)
    if task.dataset in MARKS:
        return MARKS[task.dataset](task, question, text)
    if task.dataset == "countdown":
        left = countdown.left(text)
        answered = left is not None and len(left) == 1
        return {"accuracy": float(countdown.check(question, text)[1]), "answered": float(answered)}
    seen = problems.check(question, problems.as_clauses(text) if text.startswith("|") else text)
    answered = problems.answer_of(text) is not None
    return {"accuracy": float(seen.right), "answered": float(answered), "valid": float(seen.valid)}


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Means over the questions.

    accuracy: share whose text ends in the right answer (countdown: whose moves are all allowed and leave the target).
    answered: share whose text gives an answer that can be read, right or wrong (countdown: a last move that leaves one number),
    so that accuracy / answered is how often an answer is right, and answered - accuracy the share of wrong ones.
    valid: share whose every step is right and in its place as well (deduction: valid, and the last one settles the question;
    a coin is right half the time, but never valid). written: tokens of the text that is returned, not of those that were
    written on the way.

    Of deduction alone, steps: share of a text's steps that are valid; straight: that lie on the proof; misled: share of texts
    whose first step off the proof is a valid one; detoured: that are valid all the same; valid by the number of rules (depth1,
    depth5) and of statements that lead nowhere (dead2, dead4).

    Of knowledge alone, found: share of the pages that hold the facts needed among those that a text names (``see TITLE .``);
    pairs: F1 of the relations that it names between ``<needs>`` and ``<cot>``; agree: share of pairs of twins answered alike,
    or for a claim and its denial oppositely; relations: share of options rightly called impossible, likely or sure; f1,
    precision, recall: of the things named. Of chains, macro F1 over all questions together, what is not said counting as
    wrong: chain (is all of it right?), attribution (steps by pages), logic (does the answer follow?), relevance (of steps).
    Of some questions only, accuracy as far (over two or three facts), rare (one of them among the rarer half), unseen (a verb
    between such things was never met), large (sets of 7 and 8), refutable (two or three options break a law).

    Of walks, accuracy: share that goes along edges from the start to the goal; shortest: by as few as there may be; valid: whose
    every move goes along an edge from where the walk stands, to the goal or not; answered: whose last move says to end there.

    Of worked examples, lines: steps of a text; bridging: F1 of the results that it goes through. Of wishes, accuracy: share that
    is right, has what is wanted and nothing needless; wished, needless: the two for themselves; right: as accuracy elsewhere.
    Of analogies, fits: share whose rule leads from each pair's first to its second. Of procedures and programs, prefix: share of
    states or lines up to the first wrong one. Where a name holds a kind (easy: 1 or 2 signs, 1 operation; hard: 5 or 6 signs, 3
    operations; coarse: of which people are used to do several signs in a step; short, medium, long; trained, longer;
    few: up to 6 lines; many: 7 to 12; free, choice), the mean is of its questions; 0 where there are none.
    """
    from stepmark.backbones.reasoners import decode

    harness_only("scoring")
    rows = [
        judged(task, decode(question), decode(ids)) | {"written": float(len(ids))}
        for question, ids in zip(batch["question"], outputs, strict=True)
    ]
    if "agree" in task.metrics:
        _paired(rows, [decode(question) for question in batch["question"]])
    found = {}
    for name in task.metrics:
        values = np.array([row[name] for row in rows], dtype=float)
        if values.ndim == 1:
            there = ~np.isnan(values)  # a metric may be of some questions only
            counts, totals = there[resample].sum(axis=1), np.where(there, values, 0.0)[resample].sum(axis=1)
            mean = float(values[there].mean()) if there.any() else 0.0
            found[name] = Score(mean, (totals / np.maximum(counts, 1)).tolist())
        else:
            found[name] = Score(macro_f1(values.sum(0)), [macro_f1(values[drawn].sum(0)) for drawn in resample])
    return found


def macro_f1(table: NDArray[np.float64]) -> float:
    """Mean over classes of F1, from counts [C, C + 1] of true by given classes, the last column for none of them."""
    count = len(table)
    hits, true, given = np.diag(table[:, :count]), table.sum(1), table[:, :count].sum(0)
    return float((2 * hits / np.maximum(1, true + given)).mean())


def _paired(rows: list[dict[str, Any]], questions: list[str]) -> None:
    """Add "agree" to rows of which each second is the twin of the one before it; one that is left over agrees with nothing."""
    from stepmark.datasets.knowledge import agree

    for i, row in enumerate(rows):
        other = rows[i ^ 1] if (i ^ 1) < len(rows) else {"said": None}
        row["agree"] = float(agree(questions[i], row["said"], other["said"]))


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """The model over one token of one text."""
    model = networks["model"]
    model(torch.tensor([batch["question"][0][-1:]], device=next(model.parameters()).device))
    return 1


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """None: a network is counted by its forward."""
    return []
