"""Track reasoning, tasks of worked examples: what a question needs is told by examples before it, or how it is to be
answered.

Digits go through signs that each person reads in a way of their own (`stepmark.datasets.demonstrations`). A question
may tell how its signs are read: two in five of them (mixed, deep), none (bare), or all (told, wishes). What it does not
tell, examples about the same person may: each person has 160 questions of their own in the train split, with right
answers in five styles, so that a method chooses, makes or changes examples in `prepare` and puts them before the
question.

accuracy: share whose text ends in the right digit; one in ten is right by chance, one in four of bare by the usual
readings. answered: in any digit. valid: share that says nothing wrong on the way and leaves no sign out. lines: steps
of a text. bridging: F1 of the results that a text goes through against those that are due. Of some questions only,
accuracy as coarse (the first sign is of the family whose questions people work several signs a step), easy (1 or 2
signs) and hard (5 or 6).

Wishes, where all is told and easy to work: met is the share that is right and has the trait that its person wants of an
answer, and no other; wished: that have the trait; needless: traits besides, of each text. Whoever copies all that a
liked answer has is never met, whoever guesses one trait in one of four, and of two that all liked answers have in one
of two.

What the ground gives stands in the reports of `demonstrator` and, of wishes, `wisher`, on the track's page: how many are
right behind how many examples, of which kind and in which style. Texts end within 64 tokens, a greedy method has no use
for more; on bare there is room for votes.
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
        id="shown/mixed",
        version=1,
        summary="Digits through 2 to 4 signs of which the question tells two in five, worked examples perhaps the rest",
        dataset="demonstrations",
        backbones={"model": "demonstrator"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(8, 16, 32, 64),
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
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "lines": "higher",
            "bridging": "higher",
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
        rungs=(8, 16, 32, 64),
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
        rungs=(8, 16, 32, 64),
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
        backbones={"model": "wisher"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(8, 16, 32, 64),
        metrics={
            "met": "higher",
            "accuracy": "higher",
            "answered": "higher",
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
)
