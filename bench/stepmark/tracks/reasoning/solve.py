"""Track reasoning, tasks of solving: word problems, where answers can be voted on, and countdown, where each can be checked.

On problems and judged a text is in any format that holds an answer (`stepmark.datasets.problems`). accuracy: share whose
last ``ans`` is followed by the right number. answered: by any number, so that answered - accuracy is the share of wrong
answers and the rest abstain. valid: share whose every step is due where it stands and rightly worked as well. deep:
accuracy among questions of five steps, the most that a model has seen.

On countdown and the Game of 24 accuracy is the share whose moves are all allowed and leave the target alone; answered: whose
last move says to leave one number. There is no one answer to vote on, but whoever wants to know whether a text is right can
work it out from the question: a method that does so is held against chains that are checked as well (`checked_chains`).

On judged the questions are the longer ones of problems, and the verifiers are good: what a method makes of one is to be
seen there. On problems they are weak where it counts: a copy of the reasoner tells right from wrong texts of one question
little better than a coin, and worse than the reasoner's own likelihood. On both a method that asks one stands beside the
same with a coin in its place, and with an exact check, a bound. What the ground gives stands in the reports of `reasoner`
and of the verifiers, on the track's page.

`session.networks`: on problems and judged "process" and "outcome" besides "model", verifiers. They are no language models:
what they read counts in NFE-equivalents, not against the rung.
"""

from __future__ import annotations

from stepmark.task import Task
from stepmark.tracks.reasoning import check as check
from stepmark.tracks.reasoning import handles as handles
from stepmark.tracks.reasoning import inputs as inputs
from stepmark.tracks.reasoning import layers as layers
from stepmark.tracks.reasoning import reference_call as reference_call
from stepmark.tracks.reasoning import score as score

TASKS = (
    Task(
        id="solve/problems",
        version=1,
        summary="Arithmetic word problems of 2 to 5 steps",
        dataset="problems",
        backbones={
            "model": "reasoner",
            "process": "reasoner_process",
            "outcome": "reasoner_outcome",
        },
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(32, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "deep": "higher",
            "written": "lower",
        },
        n=200,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/judged",
        version=1,
        summary="Arithmetic word problems of 3 to 5 steps, with verifiers that see what the model expected",
        dataset="long_problems",
        backbones={
            "model": "reasoner",
            "process": "grader_process",
            "outcome": "grader_outcome",
        },
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "deep": "higher",
            "written": "lower",
        },
        n=300,
        batch=60,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/countdown",
        version=1,
        summary="Countdown with three and four numbers, none of which any model has seen together",
        dataset="countdown",
        backbones={"model": "reasoner"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512),
        metrics={"accuracy": "higher", "answered": "higher", "written": "lower"},
        n=120,
        batch=40,
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
        backbones={"model": "reasoner"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512, 1024),
        metrics={"accuracy": "higher", "answered": "higher", "written": "lower"},
        n=120,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
)
