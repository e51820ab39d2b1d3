"""Draft & Verify: the target drafts with some of its sub-layers skipped (Zhang et al., ACL 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern
from torch import Tensor, nn

from stepmark.backbones.lm import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draft_while_sure, speculate

DRAFTED = 12  # tokens drafted at most
GAMMA, ALPHA, EPSILON, BETA_1, BETA_2 = 0.6, 0.9, 0.01, 0.5, 0.9  # exit threshold at the start, and its adaptation


class SelfSpeculativeDecoding(Method):
    """Self-speculative decoding: draft with a part of the target's own sub-layers, verify with all of them.

    z in {0, 1}^(2 L) marks the attention and MLP sub-layers that drafting skips (h passes them by unchanged). It is
    found offline by Bayesian optimisation, equation 3: z* = argmin f(z), f the cost per token on calibration prompts,
    with a Gaussian process on log f (Matern 5/2 plus a linear kernel, as sub-layers do much of their harm each for
    itself, over z and over which layers go whole, as only those save evaluations) and expected improvement.

    A step drafts one token after another until the draft's greatest probability falls below gamma (equation 5), then
    runs the whole target once over the drafted tokens (algorithm 1). The longest agreeing prefix is kept, in sampling
    by the rule of speculative sampling, and the output is the target's own. Verification writes the keys and values of
    all layers over those that drafting left. gamma follows the rate of acceptance AR (equation 6):

        AR <- beta1 AR + (1 - beta1) AR_step
        gamma <- beta2 gamma + (1 - beta2) (gamma + epsilon if AR < alpha else gamma - epsilon)

    Differs from the paper: f is not wall time but a count, so that the search can be repeated bit for bit: evaluations
    of the target per token, as the budget counts them. There a layer counts whole once one of its two sub-layers runs,
    so that masks pay that skip both; candidates therefore include flips of whole layers. The search tries fewer masks
    on fewer prompts. gamma starts anew with every prompt; it moves after every step, while the official code leaves it
    where AR is high and the draft was as long as it may be. A draft has 12 tokens at most and gamma starts at 0.6, where
    that code's defaults are 8 and 0.8. The target is no ordinary one: its layers were split out of a model of four and
    trained on with stochastic depth, so that it bears skipping; nothing is trained for the method itself.

    Its controls: `random_skips` skips as many sub-layers, at random, and so fewer whole layers: its drafts are dearer as well
    as worse. `random_search` keeps the best of as many random masks as the search tries. They mark each sub-layer by
    itself and hardly ever save a layer, so that the hand-made mask both begin with is hard to beat: against the search
    this shows what flips of whole layers and the Gaussian process are worth together.
    """

    paper = Paper(
        id="self_speculative_decoding",
        title="Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding",
        authors="Jun Zhang, Jue Wang, Huan Li, Lidan Shou, Ke Chen, Gang Chen, Sharad Mehrotra",
        year=2024,
        arxiv="2309.08168",
        code="dilab-zju/self-speculative-decoding",
    )
    tasks = ("greedy/sums_deep", "greedy/words_deep", "greedy/stories_deep")
    baselines = ("autoregressive", "speculative", "random_skips", "random_search")
    trainings = 3
    claims = (
        Claim(
            "exact_match[self_speculative_decoding,*] >= 1 "
            "and latency_ms[self_speculative_decoding,64] <= 0.75 * latency_ms[autoregressive,64] "
            "and latency_ms[self_speculative_decoding,64] < latency_ms[random_skips,64]",
            says="the output is greedy decoding's, in at most three quarters of the time (the paper: up to 1.73 times the "
            "speed), without training and without a draft model, and sooner than with as many sub-layers skipped at random",
            headline=True,
        ),
        Claim(
            "exact_match[self_speculative_decoding,*] >= 1 "
            "and latency_ms[self_speculative_decoding,96] <= 0.75 * latency_ms[autoregressive,96] "
            "and latency_ms[self_speculative_decoding,96] < latency_ms[random_skips,96]",
            says="the same on stories",
            task="greedy/stories_deep",
        ),
        Claim(
            "exact_match[self_speculative_decoding,*] >= 1 "
            "and tokens[self_speculative_decoding,*] > tokens[random_skips,*] - 0.01 "
            "and target_layer_evaluations[self_speculative_decoding,64] < target_layer_evaluations[random_skips,64] "
            "and target_layer_evaluations[self_speculative_decoding,64] < target_layer_evaluations[autoregressive,64]",
            says="which sub-layers are skipped matters: fewer layer evaluations than with as many skipped at random",
        ),
        Claim(
            "exact_match[self_speculative_decoding,*] >= 1 "
            "and target_layer_evaluations[self_speculative_decoding,96] < target_layer_evaluations[random_skips,96] "
            "and target_layer_evaluations[self_speculative_decoding,96] < target_layer_evaluations[autoregressive,96]",
            says="the same on stories: which sub-layers are skipped matters",
            task="greedy/stories_deep",
        ),
        Claim(
            "target_layer_evaluations[self_speculative_decoding,64] <= target_layer_evaluations[random_search,64]",
            says="Bayesian optimisation, which also flips whole layers, finds a mask as good as random sub-layers give in as "
            "many tries, or better",
        ),
    )

    found = (
        "bayes"  # how the mask is found; "random": the best of as many random ones; "any": one as large, not searched
    )
    variants = (
        Variant(
            "random_skips",
            says="as many sub-layers skipped as the search skips, drawn at random",
            found="any",
            baselines=("autoregressive",),
        ),
        Variant(
            "random_search",
            says="the best of as many random masks as the search tries",
            found="random",
            baselines=("autoregressive",),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """The mask, {"skipped": bool [L, 2]: attention, MLP}."""
        if self.found == "random":
            return {"skipped": session.once(searched, False)["skipped"]}
        skipped = session.once(searched, True)["skipped"]
        if self.found == "any":
            order = torch.randperm(skipped.numel(), generator=session.rng, device=session.device).to(skipped.device)
            skipped = skipped.flatten()[order].view_as(skipped)
        return {"skipped": skipped}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(session.networks["target"], len(prompt) + room)
            return self.decode(target, prompt, room, temperature, rung, session.state["skipped"], session.rng)

        return write_each(batch, write)

    def decode(
        self,
        target: Decoder,
        prompt: Sequence[int],
        room: int,
        temperature: float,
        budget: float,
        skipped: Tensor,
        rng: torch.Generator,
    ) -> list[int]:
        """New token ids for one prompt in at most `budget` evaluations, drafting without the sub-layers `skipped`."""
        gamma, rate, before, drafted = GAMMA, 0.0, 0, 0

        def propose(tokens: list[int], most: int) -> tuple[list[int], Tensor | None]:
            nonlocal gamma, rate, before, drafted
            if drafted:
                gamma, rate = self.adapted(gamma, rate, (len(tokens) - before - 1) / drafted)
            with self.skipping(target.layers, skipped) as layers:
                share = len(layers) / len(target.layers)

                def after(draft: list[int]) -> Tensor | None:
                    if target.spent + share + 1 > budget:
                        return None
                    last = draft[-1:] or tokens[-1:]
                    hidden = target.run(target.embed(last), target.length + len(draft), layers)
                    return target.logits(hidden)[0]

                draft, q = draft_while_sure(after, min(DRAFTED, most), target.eos, temperature, rng, gamma)
            before, drafted = len(tokens), len(draft)
            return draft, q

        return speculate(target, prompt, room, budget, temperature, propose, rng)

    @staticmethod
    def adapted(gamma: float, rate: float, now: float) -> tuple[float, float]:
        """Exit threshold and rate of acceptance after a step in which the share `now` of the draft was kept."""
        rate = BETA_1 * rate + (1 - BETA_1) * now
        aim = gamma + EPSILON if rate < ALPHA else gamma - EPSILON
        return BETA_2 * gamma + (1 - BETA_2) * aim, rate

    @staticmethod
    @contextlib.contextmanager
    def skipping(layers: Sequence[nn.Module], skipped: Tensor) -> Iterator[list[nn.Module]]:
        """Take the sub-layers marked in `skipped` [L, 2] out while inside; yields the layers of which one is left."""
        parts = [(layer.self_attn, layer.mlp) for layer in layers]
        marks = skipped.tolist()
        try:
            for layer, (no_attention, no_mlp) in zip(layers, marks, strict=True):
                if no_attention != no_mlp:
                    setattr(layer, "self_attn" if no_attention else "mlp", Nothing(no_attention))
            yield [layer for layer, mark in zip(layers, marks, strict=True) if not all(mark)]
        finally:
            for layer, (attention, mlp) in zip(layers, parts, strict=True):
                layer.self_attn, layer.mlp = attention, mlp

    @staticmethod
    def beginnings(size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The masks that a search begins with: nothing, every second layer and three random ones."""
        every_second = np.arange(size) // 2 % 2 == 1
        return [np.zeros(size, bool), every_second, *(rng.random((3, size)) < np.array([[0.25], [0.5], [0.75]]))]

    @staticmethod
    def search(
        cost: Callable[[np.ndarray], float], layers: int, tries: Iterable[int], rng: np.random.Generator
    ) -> np.ndarray:
        """The cheapest mask found, bool [2 layers]: Bayesian optimisation, one evaluation of `cost` per try."""
        size = 2 * layers
        masks = SelfSpeculativeDecoding.beginnings(size, rng)
        costs = [cost(mask) for mask in masks]

        def features(z: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
            whole = np.stack(z).reshape(len(z), layers, 2).all(2)
            return np.concatenate([np.stack(z), whole], axis=1).astype(float)

        kernel = ConstantKernel(20 / size, "fixed") * DotProduct(1.0, "fixed") + Matern(np.sqrt(size), "fixed", nu=2.5)
        process = GaussianProcessRegressor(kernel, alpha=1e-2, normalize_y=True)
        for _ in tries:
            best = np.stack([masks[i] for i in np.argsort(costs, kind="stable")[:4]])
            near = np.repeat(best, 64, axis=0)
            single = rng.random((256, size)) < 1.5 / size
            whole = np.repeat(rng.random((256, layers)) < 1.5 / layers, 2, axis=1)
            anywhere = rng.random((128, size)) < rng.random((128, 1))
            candidates = np.unique(np.concatenate([near ^ single, near ^ whole, anywhere]), axis=0)
            seen = {mask.tobytes() for mask in masks}
            candidates = candidates[[c.tobytes() not in seen for c in candidates]]
            process.fit(features(masks), np.log(costs))
            mean, deviation = process.predict(features(candidates), return_std=True)
            better = np.log(min(costs)) - mean
            gain = better * norm.cdf(better / deviation) + deviation * norm.pdf(better / deviation)
            masks.append(candidates[int(gain.argmax())])
            costs.append(cost(masks[-1]))
        return masks[int(np.argmin(costs))]


def searched(session: Session, bayes: bool) -> dict[str, Tensor]:
    """Search the mask on the first prompts of the train split."""
    model, method = session.networks["target"], SelfSpeculativeDecoding()
    prompts = [encode(text) for text in session.train["prompt"][: session.scale(4, 1)]]
    room, layers = session.scale(32, 6), len(model.model.layers)
    rng = np.random.default_rng(session.seed)

    def cost(skipped: np.ndarray) -> float:
        mask = torch.from_numpy(skipped).view(-1, 2)
        written, spent = 0, 0.0
        with torch.no_grad():
            for prompt in prompts:
                target = Decoder(model, len(prompt) + room)
                written += len(method.decode(target, prompt, room, 0.0, float("inf"), mask, session.rng))
                spent += target.spent
        return spent / written

    tries = session.progress(range(session.scale(80, 3)), "skipped sub-layers")
    if bayes:
        mask = method.search(cost, layers, tries, rng)
    else:  # after the same five masks to begin with as many as the search tries, each of a random density
        first = method.beginnings(2 * layers, rng)
        masks = [*first, *(rng.random(2 * layers) < rng.random() for _ in tries)]
        mask = masks[int(np.argmin([cost(each) for each in masks]))]
    return {"skipped": torch.from_numpy(np.array(mask)).view(-1, 2)}


class Nothing(nn.Module):
    """A sub-layer that adds nothing to the residual stream."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        """Zeros; with no attention weights beside them where attention's place is taken."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.attention else nothing
