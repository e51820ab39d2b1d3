"""Track decoding, tasks of other targets: a dear one of twelve layers, and one of a single layer that is often wrong.

Inputs, outputs and metrics are those of the track. Where the target is dear, what is saved in forwards shows in time.
"""

from __future__ import annotations

from stepmark.task import Task
from stepmark.tracks.decoding import check as check
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import inputs as inputs
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding import score as score
from stepmark.tracks.decoding import steps_of as steps_of

TASKS = (
    Task(
        id="greedy/words_weak",
        version=1,
        summary="Greedy decoding of word problems, 1-layer target that is often wrong",
        dataset="words",
        backbones={"target": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(16, 32, 64),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=192,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/hops_weak",
        version=1,
        summary="Greedy decoding of multi-hop answers, 1-layer target that is often wrong",
        dataset="hops",
        backbones={"target": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(12, 24, 48),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=192,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/sums_deep",
        version=1,
        summary="Greedy decoding of column additions, 12-layer target",
        dataset="sums",
        backbones={"target": "lm_deep", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(4,),
        probe=1,
    ),
    Task(
        id="greedy/words_deep",
        version=1,
        summary="Greedy decoding of word problems, 12-layer target",
        dataset="words",
        backbones={"target": "lm_deep", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(4, 8, 16, 32),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(4,),
        probe=1,
    ),
    Task(
        id="greedy/stories_deep",
        version=1,
        summary="Greedy decoding of stories with a refrain, 12-layer target",
        dataset="stories",
        backbones={"target": "lm_deep", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64, 96),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(4,),
        probe=1,
    ),
)
