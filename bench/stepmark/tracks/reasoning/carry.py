"""Track reasoning, tasks where every step is told: procedures and programs are carried out, nothing is left to find or
to know.

Procedures go through states (`stepmark.datasets.procedures`), programs through lines of a trace
(`stepmark.datasets.traces`). The models have seen up to 10 states and 12 lines; half of the questions and more ask for
longer ones.

accuracy: share whose last state, or whose answer, is right. valid: whose every state or line is right as well, and
nothing is left out or added. prefix: share of states or lines up to the first wrong one. answered: share of texts that
come to their end. Of some questions only, of procedures accuracy and prefix as short (2 to 6 steps), medium (7 to 16)
and long (17 to 25); of programs valid as few (2 to 6 lines), many (7 to 12), trained (both) and longer (13 to 24).

`session.networks`: on programs "small" and "large", of the same words and data as "model".
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
        id="carry/procedures",
        version=1,
        summary="Eight procedures of 2 to 25 told steps, of which a model has seen up to 10",
        dataset="procedures",
        backbones={"model": "proceduralist"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 256, 1024),
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
        n=144,
        batch=72,
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
        rungs=(16, 64, 256, 512, 1024),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "answered": "higher",
            "prefix": "higher",
            "valid_trained": "higher",
            "valid_longer": "higher",
            "valid_few": "higher",
            "valid_many": "higher",
            "written": "lower",
        },
        n=240,
        batch=60,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
)
