"""Track reasoning, task of analogies: a rule is found from pairs and carried out on something else.

Over letters a rule changes a string, over people it follows relations of a world that the model knows by heart
(`stepmark.datasets.analogies`). Half of the questions have four answers to choose from. The answer may be given at once
(<dir>), or behind a rule and what each of its operations gives (<rules>); a rule can be held against the pairs, whose
seconds the question tells.

accuracy: share whose text ends in the right answer. answered: in one that can be read. fits: whose text settles on a
rule that leads from the first to the second of each pair. Of some questions only, accuracy as letters_easy and
people_easy (one operation), letters_hard and people_hard (three), free and choice.
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
        id="infer/analogies",
        version=1,
        summary="Rules of 1 to 3 operations found from pairs, over letters and people, free or with a choice",
        dataset="analogies",
        backbones={"model": "analogist"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
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
        n=360,
        batch=60,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
)
