"""Track diffusion_lm: what a language model that fills masks in any order writes, and knows, with few evaluations.

All texts have 64 words of one exact grammar (`stepmark.datasets.stories64`), so that quality is computed, not judged
by another model. A masked-diffusion model (`model`) and an autoregressive one of the same size (`ar`) are given.

* `generation/*`, `completion/*`: a batch is {"prompt": lists of token ids, "length": ints}; `run` returns per item the
  list of the `length - len(prompt)` token ids that follow. A rung is a number of evaluations per text: all blocks of a
  network once, over however many positions (`model_positions` counts those). An evaluation that is not needed, because
  no word is revealed in a step, is not spent.
  Completions come one text at a time, so that methods which advance each text at its own pace and methods that would
  advance several at once are timed alike.
* `likelihood/*`: a batch is {"tokens": int64 [B, 64]}; `run` returns an upper bound of -log p(text) in nats, float [B].
  A rung is a number of evaluations of that bound or of its parts, gradient included.

What the tasks can tell: `valid` is the share of wholly right texts and moves over the whole ladder, about three standard
errors of 480 texts (n x seeds) are 0.06 where it is 0.7. Unigram entropy moves little, for most words of a story are
fixed: a nucleus of a half (`mdlm_sharp`), which buys right texts with variety, loses two to four hundredths of it on
`generation/*`. Claims that ask for variety therefore ask for 0.985 of another method's entropy.

On `likelihood/*` the autoregressive backbone is within two thousandths of a nat of the grammar's own entropy, so that
no model can be better than it there: what learns less well is compared with an autoregressive model of the same size
and training instead.

Masks: alpha(t) = 1 - t is the probability that a word is visible at time t, t = 1 all masked. A denoiser is any
function from token ids [B, L] to logits [B, L, V] of the clean words. What methods share stands beside: drawing words
and steps of samplers in `sampling`, passes over some positions and confident unmasking in `blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.backbones.mdlm import LENGTH, MASK, logits
from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.diffusion_lm.sampling import NOISE

TASKS = (
    Task(
        id="generation/stories64",
        version=2,
        summary="Write the first 64 words of a story from nothing; likelihood under the exact grammar",
        dataset="stories64",
        backbones={"model": "mdlm_stories", "ar": "ar_stories"},
        reference="model",
        unit="NFE",
        rungs=(4, 8, 16, 32, 64, 256),
        metrics={"gen_ppl": "lower", "valid": "higher", "entropy": "higher"},
        n=96,
        batch=16,
        seeds=5,
        smoke_n=1,
        smoke_rungs=(4,),
        probe=2,
        rounds=3,
    ),
    Task(
        id="completion/stories64",
        version=2,
        summary="Complete a story after 24 of 64 words, any right way; likelihood under the exact grammar",
        dataset="stories64",
        backbones={"model": "mdlm_stories", "ar": "ar_stories"},
        reference="model",
        bounded=("model",),
        unit="NFE",
        rungs=(4, 8, 16, 40),
        metrics={"valid": "higher", "gen_ppl": "lower", "entropy": "higher"},
        n=96,
        batch=1,
        seeds=3,
        smoke_n=1,
        smoke_rungs=(4,),
        probe=2,
    ),
    Task(
        id="likelihood/stories64",
        version=1,
        summary="Bound -log p of the first 64 words of stories; the grammar's own entropy is the floor",
        dataset="stories64",
        backbones={"model": "mdlm_stories", "ar": "ar_stories"},
        reference="model",
        unit="evaluations of the bound",
        rungs=(2, 5, 9, 17, 33),
        metrics={"nll": "lower", "excess": "lower"},
        n=96,
        batch=32,
        seeds=3,
        smoke_n=4,
        smoke_rungs=(2,),
        probe=4,
    ),
)


PROMPT = {"generation/stories64": 0, "completion/stories64": 24}


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Any]:
    """`n` distinct texts of the test split, or the beginnings that are to be completed (generation: nothing)."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    texts = load_split(task.dataset, "test")["text"]
    chosen = [encode(texts[i]) for i in torch.randperm(len(texts), generator=generator)[:n].tolist()]
    if task.id.startswith("likelihood/"):
        return {"tokens": torch.tensor(chosen, device=device)}
    return {"prompt": [ids[: PROMPT[task.id]] for ids in chosen], "length": [LENGTH] * n}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """Whole texts of valid words without masks; for likelihoods one finite number per text, not below 0."""
    from stepmark.backbones.lm import VOCABULARY

    if task.id.startswith("likelihood/"):
        n = len(batch["tokens"])
        if not isinstance(outputs, Tensor) or outputs.shape != (n,) or not outputs.is_floating_point():
            raise BadOutput(f"run must return a float tensor of shape [{n}]: nats per text")
        if not bool(outputs.isfinite().all()) or bool((outputs < 0).any()):
            raise BadOutput("a bound of -log p is not finite, or below 0")
        return
    if not isinstance(outputs, list) or len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return a list of {len(batch['prompt'])} lists of token ids")
    for prompt, length, ids in zip(batch["prompt"], batch["length"], outputs, strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(VOCABULARY) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(VOCABULARY)})")
        if len(ids) != length - len(prompt):
            raise BadOutput(f"an output has {len(ids)} words; {length - len(prompt)} were asked for")
        if MASK in ids:
            raise BadOutput("an output still holds a mask")


def planted(
    task: Task, n: int, generator: torch.Generator, device: torch.device
) -> tuple[dict[str, Any], list[float]] | None:
    """Texts half or wholly made at random, and the nats that a bound of each must not be below; None where no likelihoods
    are asked.

    Over the V^k ways to fill k places the probabilities add up to 1 at most, so that one drawn at random has more than
    e^20 / V^k with probability e^-20 at most (Markov's inequality), whatever the model. Of the vocabulary's words the
    mask is not among the V: no text holds one, and the loss of one that did would be no number.
    """
    from stepmark.backbones.lm import VOCABULARY
    from stepmark.backbones.mdlm import MASK

    if not task.id.startswith("likelihood/"):
        return None
    tokens = inputs(task, n, generator, torch.device("cpu"))["tokens"]
    words = torch.tensor([i for i in range(len(VOCABULARY)) if i != MASK])
    drawn = words[torch.randint(len(words), tokens.shape, generator=generator)]
    places = [LENGTH if i % 2 else LENGTH // 2 for i in range(n)]
    for row, new, k in zip(tokens, drawn, places, strict=True):
        at = torch.randperm(LENGTH, generator=generator)[:k]
        row[at] = new[at]
    return {"tokens": tokens.to(device)}, [k * math.log(len(words)) - 20 for k in places]


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: Any,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all texts, prompt included.

    gen_ppl: exp of the mean -log p per word under the grammar seen through a channel that replaces one word in a
    hundred. valid: share of texts that the grammar can write. entropy: of the words of all texts together, in nats:
    falls when texts repeat each other. nll: mean bound in nats per word. excess: the same less the grammar's own -log p
    of the same texts, which no model can be below on average.
    """
    from stepmark.backbones.lm import VOCABULARY
    from stepmark.datasets.stories64 import log_likelihood

    harness_only("scoring")
    if task.id.startswith("likelihood/"):
        nll = outputs.double().cpu().numpy() / LENGTH
        floor = -log_likelihood(batch["tokens"], VOCABULARY).numpy() / LENGTH
        return {"nll": _mean(nll, resample), "excess": _mean(nll - floor, resample)}
    texts = torch.tensor([p + ids for p, ids in zip(batch["prompt"], outputs, strict=True)])
    per_word = -log_likelihood(texts, VOCABULARY, NOISE).numpy() / LENGTH
    valid = torch.isfinite(log_likelihood(texts, VOCABULARY)).double().numpy()
    counts = nn.functional.one_hot(texts, len(VOCABULARY)).sum(1).double().numpy()
    mean = _mean(per_word, resample)
    return {
        "gen_ppl": Score(math.exp(mean.value), [math.exp(v) for v in mean.resamples]),
        "valid": _mean(valid, resample),
        "entropy": Score(_entropy(counts.sum(0)), [_entropy(counts[rows].sum(0)) for rows in resample]),
    }


def _mean(values: NDArray[np.float64], resample: NDArray[np.int64]) -> Score:
    return Score(float(values.mean()), values[resample].mean(axis=1).tolist())


def _entropy(counts: NDArray[np.float64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """One evaluation of the masked-diffusion model over a whole text."""
    network = networks["model"]
    logits(network, torch.full((1, LENGTH), MASK, device=next(network.parameters()).device))
    return 1


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The blocks of a GPT-2: all of them once are one evaluation. Other networks are counted by their forward."""
    return list(getattr(getattr(network, "transformer", None), "h", []))
