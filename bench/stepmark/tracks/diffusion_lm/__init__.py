"""Track diffusion_lm: what a language model that fills masks in any order writes, and knows, with few evaluations.

All texts have 64 words of one exact grammar (`stepmark.datasets.stories64`), so that quality is computed, not judged
by another model. A masked-diffusion model (`model`) and an autoregressive one of the same size (`ar`) are given.

* `generation/*`, `completion/*`: a batch is {"prompt": lists of token ids, "length": ints}; `run` returns per item the
  list of the `length - len(prompt)` token ids that follow. A rung is a number of evaluations per text: all blocks of a
  network once, over however many positions (`model_positions` counts those). An evaluation that is not needed, because
  no word is revealed in a step, is not spent.
* `likelihood/*`: a batch is {"tokens": int64 [B, 64]}; `run` returns an upper bound of -log p(text) in nats, float [B].
  A rung is a number of evaluations of that bound or of its parts, gradient included.

Masks: alpha(t) = 1 - t is the probability that a word is visible at time t, t = 1 all masked. A denoiser is any
function from token ids [B, L] to logits [B, L, V] of the clean words. What methods share stands below: drawing words
(`word_probabilities`, `draw_words`), steps of samplers (`ancestral_step`, `remasking_step` and its schedules), passes
over some positions (`run_blocks`, `run_from_clean`), confident and guided unmasking, targets of self-distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.backbones.mdlm import LENGTH, MASK, logits
from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding import KeyValueCache

TASKS = (
    Task(
        id="generation/stories64",
        version=1,
        summary="Write the first 64 words of a story from nothing; likelihood under the exact grammar",
        dataset="stories64",
        backbones={"model": "mdlm_stories", "ar": "ar_stories"},
        reference="model",
        unit="NFE",
        rungs=(4, 8, 16, 32, 64, 256),
        metrics={"gen_ppl": "lower", "valid": "higher", "entropy": "higher"},
        n=48,
        batch=8,
        seeds=3,
        smoke_n=1,
        smoke_rungs=(4,),
        probe=2,
        rounds=3,
    ),
    Task(
        id="completion/stories64",
        version=1,
        summary="Complete a story after 24 of 64 words, any right way; likelihood under the exact grammar",
        dataset="stories64",
        backbones={"model": "mdlm_stories", "ar": "ar_stories"},
        reference="model",
        bounded=("model",),
        unit="NFE",
        rungs=(4, 8, 16, 40),
        metrics={"valid": "higher", "gen_ppl": "lower", "entropy": "higher"},
        n=96,
        batch=8,
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
# Texts outside the grammar have probability 0. Scored through a channel that replaces one word in a hundred by any
# other, they have a finite figure, and each wrong word costs about ln(words / 0.01) nats.
NOISE = 0.01

Denoiser = Callable[[Tensor], Tensor]


# -- what the harness calls -----------------------------------------------------------------------------------------


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


# -- texts and words --------------------------------------------------------------------------------------------------


def masked_texts(batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """The prompts, followed by masks up to the length asked for: int64 [B, L]."""
    rows = [ids + [MASK] * (n - len(ids)) for ids, n in zip(batch["prompt"], batch["length"], strict=True)]
    return torch.tensor(rows, device=device)


def continuations(batch: Mapping[str, Any], x: Tensor) -> list[list[int]]:
    """What follows the prompts in texts [B, L]."""
    return [row[len(prompt) :] for prompt, row in zip(batch["prompt"], x.tolist(), strict=True)]


def word_log_probabilities(found: Tensor) -> Tensor:
    """log p of the clean words [..., V] from logits: a mask is none of them."""
    return found.index_fill(-1, torch.tensor([MASK], device=found.device), -torch.inf).log_softmax(-1)


def word_probabilities(found: Tensor, nucleus: float = 1.0) -> Tensor:
    """Probabilities, float64 [..., V], of logits: no mask, and only the smallest set of words with mass >= `nucleus`.

    In double precision, for rounding in single precision makes rare words rarer (Zheng et al. 2025, section 4).
    """
    p = word_log_probabilities(found.double()).exp()
    if nucleus < 1:
        ordered, index = torch.sort(p, dim=-1, descending=True, stable=True)
        kept = ordered * (ordered.cumsum(-1) - ordered < nucleus)
        p = torch.zeros_like(p).scatter(-1, index, kept)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw_words(p: Tensor, u: Tensor) -> Tensor:
    """The words whose cumulative probability first exceeds u: p [N, V], u in [0, 1) [N] -> int64 [N]."""
    cumulative = p.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (u.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    # Rounding may put u behind the last word that is possible at all.
    last = p.shape[1] - 1 - (p > 0).flip(1).to(torch.uint8).argmax(1)
    return torch.minimum(drawn, last)


def uniforms(x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two uniforms for each position of x: whether it moves, and to which word. Drawn at every step by every sampler,
    so that samplers that decide alike stay on the same random stream."""
    return (
        torch.rand(x.shape, generator=rng, device=x.device, dtype=torch.float64),
        torch.rand(x.shape, generator=rng, device=x.device, dtype=torch.float64),
    )


def fill(denoise: Denoiser, x: Tensor, where: Tensor, u: Tensor, nucleus: float) -> Tensor:
    """Words drawn at the positions `where` [B, L]; only texts with such a position are evaluated."""
    filled, rows = x.clone(), where.any(1)
    if rows.any():
        filled[where] = draw_words(word_probabilities(denoise(x[rows])[where[rows]], nucleus), u[where])
    return filled


# -- samplers ---------------------------------------------------------------------------------------------------------


def times(steps: int) -> list[float]:
    """1, 1 - 1/steps, ..., 0."""
    return [1 - i / steps for i in range(steps)] + [0.0]


def ancestral_step(
    denoise: Denoiser, x: Tensor, t: float, s: float, rng: torch.Generator, nucleus: float = 1.0
) -> Tensor:
    """One reverse step from t to s < t: each mask is replaced with probability (t - s) / t, by a word from the model.

    Sahoo et al. 2024, equation 7 with alpha = 1 - t: visible words are carried over. Which masks move does not hang on
    the model, so that a text of which none moves needs no evaluation.
    """
    u, v = uniforms(x, rng)
    return fill(denoise, x, (x == MASK) & (u < (t - s) / t), v, nucleus)


def ancestral(denoise: Denoiser, x: Tensor, steps: int, rng: torch.Generator, nucleus: float = 1.0) -> Tensor:
    """All masks of x [B, L] filled in `steps` reverse steps; at most `steps` evaluations of each text, L if fewer."""
    for t, s in pairwise(times(steps)):
        x = ancestral_step(denoise, x, t, s, rng, nucleus)
    return x


def greatest_sigma(visible: float, then: float) -> float:
    """Greatest probability of remasking for which the posterior is one: min(1, (1 - alpha_s) / alpha_t)."""
    return min(1.0, (1 - then) / visible) if visible > 0 else 1.0


def moves(visible: float, then: float, sigma: float) -> tuple[float, float]:
    """Probabilities that a mask is replaced, and that a word is masked again, in a step from alpha_t to alpha_s.

    Wang et al. 2025, equation 6: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) and sigma. For every sigma a position
    that is visible with probability alpha_t before the step is so with probability alpha_s after it.
    """
    return (then - (1 - sigma) * visible) / (1 - visible), sigma


def remasking_step(
    denoise: Denoiser,
    x: Tensor,
    visible: float,
    then: float,
    sigma: float,
    fixed: Tensor,
    rng: torch.Generator,
    nucleus: float = 1.0,
) -> Tensor:
    """One step of ReMDM from alpha_t = `visible` to alpha_s = `then`. With sigma 0 it is `ancestral_step`.

    Args:
        sigma: probability with which a word is masked again.
        fixed: bool [B, L], words of the prompt, which stay.
    """
    reveal, hide = moves(visible, then, sigma)
    u, v = uniforms(x, rng)
    masked = x == MASK
    filled = fill(denoise, x, masked & (u < reveal), v, nucleus)
    return filled.masked_fill(~masked & ~fixed & (u < hide), MASK)


# From (alpha_t, alpha_s) to sigma.
Sigma = Callable[[float, float], float]


def capped(eta: float) -> Sigma:
    """ReMDM-cap: sigma = min(eta, greatest)."""
    return lambda visible, then: min(eta, greatest_sigma(visible, then))


def rescaled(eta: float) -> Sigma:
    """ReMDM-rescale: sigma = eta x greatest."""
    return lambda visible, then: eta * greatest_sigma(visible, then)


def forward_backward(visible: float, then: float) -> float:
    """sigma of forward-backward correction: each step is followed by its own noising and taken again.

    (alpha_s - alpha_t) / alpha_t (Wang et al. 2025, proposition 4.2), kept at the greatest possible near the end.
    """
    return min((then - visible) / visible, greatest_sigma(visible, then)) if visible > 0 else 0.0


def remask(
    denoise: Denoiser, x: Tensor, steps: int, sigma: Sigma, rng: torch.Generator, nucleus: float = 1.0
) -> Tensor:
    """Texts [B, L] after `steps` steps of ReMDM on the time grid of `ancestral`."""
    fixed = x != MASK
    for t, s in pairwise(times(steps)):
        x = remasking_step(denoise, x, 1 - t, 1 - s, sigma(1 - t, 1 - s), fixed, rng, nucleus)
    return x


def loop_schedule(steps: int, on: float, off: float, plateau: float) -> Iterator[tuple[float, float, bool]]:
    """(alpha_t, alpha_s, whether words are remasked) of ReMDM-loop: up to `plateau` while t > `on`, constant down to
    `off`, then up to 1."""

    def alpha(t: float) -> float:
        if t > on:
            return (1 - t) * plateau / (1 - on)
        return plateau if t > off else 1 - t * (1 - plateau) / off

    for t, s in pairwise(times(steps)):
        yield alpha(t), alpha(s), alpha(t) == alpha(s)


def remask_in_a_loop(
    denoise: Denoiser,
    x: Tensor,
    steps: int,
    eta: float,
    rng: torch.Generator,
    nucleus: float = 1.0,
    on: float = 0.55,
    off: float = 0.05,
    plateau: float = 0.9,
) -> Tensor:
    """ReMDM-loop: write most of the text, then remask and write again at a constant number of words, then finish."""
    fixed = x != MASK
    for visible, then, loop in loop_schedule(steps, on, off, plateau):
        sigma = min(eta, greatest_sigma(visible, then)) if loop else 0.0
        x = remasking_step(denoise, x, visible, then, sigma, fixed, rng, nucleus)
    return x


# -- passes over some positions ---------------------------------------------------------------------------------------


def run_blocks(network: nn.Module, ids: Tensor, start: int, cache: KeyValueCache) -> Tensor:
    """Logits [B, T, V] of the positions start .. start + T - 1, the blocks of a GPT-2 over these positions alone.

    Keys and values of all other positions are those that the cache holds: of the positions before `start` as they were
    when they last ran. A causal network looks back only, the other one at all 'start + T' positions.
    """
    inner: Any = network.transformer
    stop = start + ids.shape[1]
    positions = torch.arange(start, stop, device=ids.device)
    mask = None
    if inner.h[0].attn.is_causal and start > 0 and ids.shape[1] > 1:
        mask = (positions[:, None] >= torch.arange(stop, device=ids.device))[None, None]
    hidden = inner.wte(ids) + inner.wpe(positions)
    cache.start = start
    for block in inner.h:
        hidden = block(hidden, past_key_values=cache, attention_mask=mask)
    found: Tensor = network.lm_head(inner.ln_f(hidden))
    return found


def new_cache(network: nn.Module) -> KeyValueCache:
    """An empty cache for one batch of texts."""
    inner: Any = network.transformer
    return KeyValueCache(len(inner.h), LENGTH)


def unmask_confident(found: Tensor, x: Tensor, count: int) -> Tensor:
    """x [B, L] with the `count` masks filled of whose most likely word the model is most certain, by that word."""
    p, words = word_probabilities(found).max(-1)
    best = p.masked_fill(x != MASK, -1.0).topk(count, dim=1).indices
    return x.scatter(1, best, words.gather(1, best))


def agreed(draft: list[int], guide: list[int]) -> int:
    """How many leading words of a draft the guide would have written too; 1 if none, so that every step goes on."""
    kept = 0
    while kept < len(draft) and draft[kept] == guide[kept]:
        kept += 1
    return max(1, kept)


def first_mask(x: Tensor) -> int:
    """Position of the first mask of one text [1, L], L if there is none."""
    masks = (x[0] == MASK).nonzero()
    return int(masks[0]) if len(masks) else x.shape[1]


def run_from_clean(network: nn.Module, x: Tensor, cache: KeyValueCache | None) -> Tensor:
    """Logits [1, L, V] of one text, its clean beginning taken from the cache (FreeCache, Hu et al. 2025, section 4.1).

    The first call runs over all positions. Later ones start at the last word of the clean beginning: keys and values
    of the words before it stay as they were when they last ran, though the words behind have changed since. Logits of
    positions that did not run are 0. Without a cache everything runs.
    """
    if cache is None:
        return logits(network, x)
    start = max(0, first_mask(x) - 1) if cache.start >= 0 else 0
    found = run_blocks(network, x[:, start:], start, cache)
    return torch.cat([found.new_zeros(1, start, found.shape[2]), found], 1)


def free_cache(network: nn.Module) -> KeyValueCache:
    """A cache for `run_from_clean`, which tells by its start whether a first pass has been."""
    cache = new_cache(network)
    cache.start = -1
    return cache


def fill_guided(network: nn.Module, guide: nn.Module, x: Tensor, budget: int, cached: bool) -> Tensor:
    """One text [1, L] filled from the left by guided diffusion (Hu et al. 2025, section 4.2).

    Each step the diffusion model drafts every mask by its most likely word, the autoregressive `guide` reads the draft
    in one pass, and the words up to the first on which they differ are kept; the first one always. The guide only
    agrees or not, it supplies no word. The last evaluation of the budget keeps the whole draft.
    """
    from stepmark.backbones.mdlm import START

    own, guides = free_cache(network) if cached else None, new_cache(guide)
    read = 0  # positions whose keys and values the guide holds, for words that stay
    for left in range(budget, 0, -1):
        start = first_mask(x)
        if start == x.shape[1]:
            break
        words = word_probabilities(run_from_clean(network, x, own)).argmax(-1)
        draft = torch.where(x == MASK, words, x)
        kept = x.shape[1] - start
        if left > 1:
            before = torch.cat([torch.full_like(draft[:, :1], START), draft[:, :-1]], 1)
            wished = word_probabilities(run_blocks(guide, before[:, read:], read, guides)).argmax(-1)
            kept = agreed(draft[0, start:].tolist(), wished[0, start - read :].tolist())
            read = start + kept
        x = torch.cat([draft[:, : start + kept], x[:, start + kept :]], 1)
    return x


# -- self-distillation through time -----------------------------------------------------------------------------------


def targets_through_time(
    denoise: Denoiser, x: Tensor, t: Tensor, step: float, count: int, rng: torch.Generator
) -> Tensor:
    """What a student should predict at once where the teacher takes `count` ancestral steps: log p, [B, L, V].

    Deschenaux and Gulcehre 2025, algorithm 1: at each mask the teacher's log probabilities of the step in which it was
    replaced, for masks that remain those of its last step. Positions visible in x hold 0.

    Args:
        t: [B], the times of x. step: length of one teacher step.
    """
    masked = x == MASK
    target = torch.zeros(*x.shape, 1, dtype=torch.float64, device=x.device)
    for i in range(count):
        now, then = (t - i * step).clamp(min=1e-6), (t - (i + 1) * step).clamp(min=0)
        log_p = word_log_probabilities(denoise(x).double())
        u, v = uniforms(x, rng)
        moved = (x == MASK) & (u < ((now - then) / now)[:, None])
        open_ = (x == MASK)[..., None]
        target = torch.where(open_, log_p, target)  # stays, once the mask is gone
        x = x.masked_scatter(moved, draw_words(log_p[moved].exp(), v[moved]))
    return torch.where(masked[..., None], target, torch.zeros_like(target))


def denoiser(network: nn.Module) -> Denoiser:
    """A masked-diffusion GPT-2 as a function from token ids to logits."""
    return partial(logits, network)
