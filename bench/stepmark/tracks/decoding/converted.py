"""Track decoding, tasks of conversion: how much cheaper may a model become, and what does it still know of its texts?

A method turns the target into a cheaper model of its own. A rung is a number of training steps that it may take for it:
`prepare` makes one model for each. `run` receives {"context": lists of token ids}, beginnings of the target's texts of the
test split, and returns log-probabilities [B, V] of the word that comes next. The context is read as it is written, token
after token, so that FLOPs are those of a token while decoding: `nfe_equivalent` is what a context costs in target forwards
over one position. No model sees the word that it tells. Where the grammar leaves a choice (stories) the score is the exact
expectation of the loss; sums, word problems and answers leave none.

Written texts do not tell such models apart: all of them, pruned ones too, wrote right stories and answers (accuracy 1.0
in every arm of the tasks before this one). Measured (about; `excess` in nats, million FLOPs per token as of a first run):
SiLU after 200 steps .002 at 1.68, ReLUs after 200 steps .5 and after 600 .012 at .90, two fifths of the neurons, the same
for all tokens, after 200 steps .006 at 1.04, the greatest activations without any training .001 at 1.47. So there is room
above and below, and the dumb control is hard to beat: the target has more neurons than these texts need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding.forced import check as check
from stepmark.tracks.decoding.forced import inputs as inputs
from stepmark.tracks.decoding.forced import loss_and_excess
from stepmark.tracks.decoding.forced import reference_call as reference_call
from stepmark.tracks.decoding.texts import story_walk

TASKS = (
    Task(
        id="converted/blend",
        version=1,
        summary="The next word of sums, word problems, answers and stories, told by a model made from a 4-layer target",
        dataset="blend",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=(),
        unit="training steps",
        rungs=(200, 600),
        metrics={"excess": "lower", "loss": "lower"},
        n=240,
        batch=8,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(200,),
        probe=2,
    ),
)


def following(task: Task, context: Sequence[int]) -> dict[str, float]:
    """What may come after a context, with its probability."""
    from stepmark.backbones.lm import decode

    text = decode(list(context))
    opening, story, told = text.partition(" <story>")
    if story:
        walk = story_walk(opening)
        expected = next(walk)
        for word in told.split():
            expected = walk.send(word)
        return expected
    data = load_split(task.dataset, "test")
    whole = next(
        f"{prompt} {target} <eos>"
        for prompt, target in zip(data["prompt"], data["target"], strict=True)
        if text.startswith(prompt) and f"{prompt} {target} <eos>".startswith(f"{text} ")
    )
    return {whole[len(text) :].split()[0]: 1.0}


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all contexts, from the log-probabilities and the texts alone.

    loss: expected -log q of the next word in nats. excess: loss minus the entropy of the grammars, the least possible.
    """
    from stepmark.backbones.lm import VOCABULARY

    harness_only("scoring")
    number = {word: i for i, word in enumerate(VOCABULARY)}
    rows = []
    for context, log_q in zip(batch["context"], outputs.double().cpu().tolist(), strict=True):
        expected = following(task, context)
        rows.append(loss_and_excess(expected, log_q, number))
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    found = {name: Score(float(values[:, i].mean()), means[:, i].tolist()) for i, name in enumerate(("loss", "excess"))}
    return {name: found[name] for name in task.metrics}
