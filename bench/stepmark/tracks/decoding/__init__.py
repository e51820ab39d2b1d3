"""Track decoding: how much of a text a language model writes with a budget of its own forward passes.

A rung is a number of target forwards per prompt: one target forward is all decoder layers once, over however many
positions the call holds; a call that runs some of the layers costs its share. The prefill is a forward and gives the
first token. Decoding ends with the end-of-sequence token, after `max_new_tokens`, or when the budget allows no
further forward. Plain decoding gets one token per forward, so the curve over the rungs is quality against forwards.

`run` receives {"prompt": lists of token ids, "max_new_tokens": ints, "temperature": floats (0: greedy)} and returns
one list of new token ids per prompt, at most `max_new_tokens` long, nothing after the end-of-sequence token.

`session.networks["target"]` is a Llama of transformers: `Decoder` in `decoder` drives it (token ids in, logits [T, V] out,
going back allowed), `speculate` in `speculation` is the loop of drafting and verifying around it. Where a task has one,
`session.networks["draft"]` is a smaller Llama of the same vocabulary, whose forwards do not count against the rung.
`session.train` holds lists of texts, "prompt", "target", "answer"; `stepmark.backbones.lm` has `encode`, `decode`,
`VOCABULARY` and `EOS`, the id of the end of a sequence: one id for each word between blanks.

Beside this module, what methods share: `decoder` (a key/value cache with rollback, forward passes on it, prompt after
prompt), `speculation` (draft and verify, draws), `held_cache` (caches that evict), `attention` (a layer with its states).
Tasks of other targets: `targets`; tasks whose inputs or metrics are their own: `chains`, `converted`, `forced`, `models`,
`moe`, `parallel`, `recall`, `texts`, `tokens`, `vocab`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding.metrics import agreement, token_deviation
from stepmark.tracks.decoding.steps import steps_of as steps_of

TASKS = (
    Task(
        id="greedy/sums",
        version=1,
        summary="Greedy decoding of column additions, 4-layer target",
        dataset="sums",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/words",
        version=1,
        summary="Greedy decoding of word problems, 4-layer target",
        dataset="words",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(4, 8, 16, 32),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/hops",
        version=1,
        summary="Greedy decoding of multi-hop answers, 4-layer target",
        dataset="hops",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(4, 8, 16, 24),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/stories",
        version=1,
        summary="Greedy decoding of stories with a refrain, 4-layer target",
        dataset="stories",
        backbones={"target": "lm_target", "draft": "lm_draft"},
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
    Task(
        id="sampling/stories",
        version=1,
        summary="Sampling of stories at temperature 1: lossless means the same distribution, 4-layer target",
        dataset="stories",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64, 96),
        metrics={"accuracy": "higher", "token_bias": "lower", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(4,),
        probe=1,
    ),
)


MAX_NEW_TOKENS = {"sums": 64, "words": 40, "hops": 24, "stories": 96}


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct prompts of the test split: {"prompt": lists of ids, "max_new_tokens": ints, "temperature": floats}."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    return {
        "prompt": [encode(prompts[i]) for i in chosen],
        "max_new_tokens": [MAX_NEW_TOKENS[task.dataset]] * n,
        "temperature": [1.0 if task.id.startswith("sampling/") else 0.0] * n,
    }


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per prompt, not empty, not too long, nothing after the end of the sequence."""
    from stepmark.backbones.lm import EOS, VOCABULARY

    if not isinstance(outputs, list) or len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return a list of {len(batch['prompt'])} lists of token ids")
    for ids, limit in zip(outputs, batch["max_new_tokens"], strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(VOCABULARY) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(VOCABULARY)})")
        if not 1 <= len(ids) <= limit:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {limit}")
        if EOS in ids[:-1]:
            raise BadOutput("an output goes on after its end-of-sequence token")


def solved(task: Task, prompt: Sequence[int], output: Sequence[int]) -> bool:
    """Whether an output is complete and right: its answer (stories: a text of the grammar)."""
    from stepmark.backbones.lm import EOS, decode
    from stepmark.datasets.stories import valid

    if not output or output[-1] != EOS:
        return False
    question, text = decode(list(prompt)), decode(list(output))
    if task.dataset == "stories":
        return bool(valid(question, text))
    return text.rpartition("ans ")[2] == _answers(task.dataset)[question]


def _answers(dataset: str) -> dict[str, str]:
    data = load_split(dataset, "test")
    return dict(zip(data["prompt"], data["answer"], strict=True))


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids alone.

    accuracy: share of prompts whose text is complete and right. exact_match: share of outputs that are plain greedy
    decoding's, as a prefix where the budget ended. first_divergence: mean number of leading tokens that are. tokens:
    mean number of new tokens. token_bias (sampling): squared deviation of the word counts from what the target's own
    distributions promise, over its expectation for exact samples: about 1 if lossless, greater if words are favoured.
    """
    harness_only("scoring")
    prompts = batch["prompt"]
    lengths = np.array([len(ids) for ids in outputs], dtype=float)
    right = np.array([solved(task, p, ids) for p, ids in zip(prompts, outputs, strict=True)], dtype=float)
    found = {"accuracy": _mean(right, resample), "tokens": _mean(lengths, resample)}
    if "token_bias" in task.metrics:
        pairs = [token_deviation(networks["target"], p, o) for p, o in zip(prompts, outputs, strict=True)]
        deviation, expected = torch.stack([d for d, _ in pairs]).numpy(), np.array([e for _, e in pairs])
        bias = [float((deviation[rows].sum(0) ** 2).sum() / expected[rows].sum()) for rows in resample]
        value = float((deviation.sum(0) ** 2).sum() / expected.sum())
        return found | {"token_bias": Score(value, bias)}
    agreeing = np.array(
        [agreement(networks["target"], p, o) for p, o in zip(prompts, outputs, strict=True)], dtype=float
    )
    found["exact_match"] = _mean((agreeing == lengths).astype(float), resample)
    found["first_divergence"] = _mean(agreeing, resample)
    return found


def _mean(values: NDArray[np.float64], resample: NDArray[np.int64]) -> Score:
    return Score(float(values.mean()), values[resample].mean(axis=1).tolist())


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """One target forward over one position, what plain decoding pays for a token."""
    target = networks["target"]
    target(torch.tensor([batch["prompt"][0][-1:]], device=next(target.parameters()).device), use_cache=False)
    return 1


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The decoder layers: all of them once are one evaluation. A network without any is counted by its forward."""
    return list(getattr(getattr(network, "model", None), "layers", []))
