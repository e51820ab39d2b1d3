"""Track reasoning, task of navigation: the shortest way over a small graph whose edges stand in the prompt, move by
move.

A walk is a move for each edge and needs no answer behind it (`stepmark.datasets.navigation`): it is its own. Where ways
part nothing near tells which is right, so that whoever writes the walk in one go has to look ahead. The model also
proposes single moves (<propose>) and says in a word how a state stands (<value>).

accuracy: share that goes along edges from the start to the goal. shortest: by as few as there may be. valid: whose
every move goes along an edge from where the walk stands, to the goal or not. answered: whose last move says to end at
the goal.

What the ground gives stands in the report of `navigator`, on the track's page: how many greedy
walks, sampled ones and any of eight arrive, by edges and by how many lead nowhere. Of the words by which it judges a state
*impossible* is hardly ever said: who chooses by them knows little.
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
        n=200,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
)
