"""Particle filtering: steps are sampled, weighed by a verifier and resampled (Puri et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.oracles import sound
from stepmark.tracks.reasoning.populations import by_question, drawn, going, in_parts, judged_once, room
from stepmark.tracks.reasoning.solving import STEP, answer_of, prompts, write_step

PARTICLE = 32  # tokens of the rung for each particle
SPREAD = 4  # continuations of a text that deterministic search keeps


class ParticleFilteringIts(Method):
    """Texts are particles of a state space model, and a process verifier says how likely it is that each is fine so far.

    The model gives the transition p(x_t | c, x_<t), one more step of a text; the verifier r gives the likelihood that
    the step is accepted, a Bernoulli of parameter r(c, x_1:t) (section 4.1). N particles are carried through (Algorithm 1):

        x_t^i ~ p(. | c, x_<t^i)
        w_i = log r(x_1:t^i) - log(1 - r(x_1:t^i))
        P(j = i) = exp w_i / sum_k exp w_k,   N draws with replacement

    until all have ended; the best weighed one is the answer. Weights are those of the whole text so far, read in one
    piece ("model aggregation", section 4.2), and are not multiplied up over steps. A particle that has ended stays among
    those that are drawn. Because draws are random, a text that the verifier undervalues may live on, where beam search
    takes its word.

    The rung gives a particle for each `PARTICLE` tokens: 1, 2, 4, 8, 16. Where what is left has no room for a longest step of
    each, fewer are drawn.

    Its controls run the same loop at the same N. `particle_subtrees` is the paper's rival, diverse verifier tree search:
    of each four particles of a subtree the best is continued four times. `particle_best_of_n` carries all of them to their
    ends and takes the best by the same verifier. `particle_coin` puts a random number in the verifier's place,
    `particle_exact` an exact check of all steps, a bound.

    Differs from the paper: temperature .7, as all sampling of the track, for .8 (it finds .4 to 1 alike). The verifier has
    learnt to judge texts at their full stops, so a text that ends keeps the weight of its last step. Particle Gibbs and
    parallel chains, which the paper builds of this filter, are left out; so is its comparison with larger models.

    What limits it here: texts have two to five steps, so that there are few resamplings. The verifier reads every
    distinct text from its beginning after each step: that counts in NFE-equivalents, not against the rung. On
    solve/problems the verifier is a plain copy of the model, which tells little.
    """

    paper = Paper(
        id="particle_filtering_its",
        title="A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo "
        "Methods",
        authors="Isha Puri, Shivchander Sudalairaj, Guangxuan Xu, Kai Xu, Akash Srivastava",
        year=2025,
        arxiv="2502.01618",
        code="probabilistic-inference-scaling/probabilistic-inference-scaling",
    )
    tasks = ("solve/judged", "solve/problems")
    baselines = ("self_consistency", "weighted_vote", "step_beam", "particle_subtrees", "particle_best_of_n")
    claims = (
        Claim(
            "accuracy[particle_filtering_its,64] >= accuracy[particle_subtrees,256] "
            "and accuracy[particle_filtering_its,128] >= accuracy[particle_subtrees,512]",
            says="as accurate as deterministic tree search with four times the tokens",
            headline=True,
            setting="texts of three to five steps, 2 and 4 particles, and a verifier no larger than the model",
        ),
        Claim(
            "accuracy[particle_filtering_its,128..512] > accuracy[particle_subtrees,128..512] "
            "and accuracy[particle_filtering_its,128..512] > accuracy[particle_best_of_n,128..512] "
            "and accuracy[particle_filtering_its,128..512] > accuracy[weighted_vote,128..512] "
            "and accuracy[particle_filtering_its,128..512] > accuracy[self_consistency,128..512]",
            says="better than tree search and best of N by the same verifier, a weighted and a plain vote, at as many tokens",
        ),
        Claim(
            "deep[particle_filtering_its,256..512] > deep[particle_subtrees,256..512] "
            "and deep[particle_filtering_its,256..512] > deep[self_consistency,256..512]",
            says="and so on the deepest problems, of five steps",
        ),
        Claim(
            "accuracy[particle_filtering_its,128..512] > accuracy[particle_coin,128..512]",
            says="it is the verifier that does it",
        ),
        Claim(
            "accuracy[particle_filtering_its,64] >= accuracy[particle_subtrees,256] "
            "and accuracy[particle_filtering_its,128] >= accuracy[particle_subtrees,512]",
            says="the headline with a verifier that hardly tells right from wrong steps of one question",
            task="solve/problems",
            setting="the verifier is worse than the likelihood of a text",
        ),
        Claim(
            "deep[particle_filtering_its,256..512] > deep[particle_subtrees,256..512] "
            "and deep[particle_filtering_its,256..512] > deep[self_consistency,256..512]",
            says="with such a verifier, on the deepest problems",
            task="solve/problems",
        ),
    )

    select = "softmax"  # "subtrees": deterministic search; "all": no selection
    worth, temperature = "process", 0.7
    variants = (
        Variant("particle_subtrees", says="diverse verifier tree search: the best of each four", select="subtrees"),
        Variant("particle_best_of_n", says="no resampling: the best of N texts by the same verifier", select="all"),
        Variant("particle_coin", says="a random number in the verifier's place", worth="coin"),
        Variant("particle_exact", says="an exact check of all steps in its place: a bound", worth="exact"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The best particle of each question."""
        return in_parts(session, batch, rung, max(1, rung // PARTICLE), self.filtered)

    def filtered(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The same of some questions, worked on side by side."""
        asked = prompts(batch, "<cot>")
        count, size = len(asked), max(1, rung // PARTICLE)
        owner = [question for question in range(count) for _ in range(size)]
        particles = Chains(session.networks["model"], asked).take(owner)
        value = [0.0] * len(owner)
        while True:
            chosen = going(particles, range(len(owner)))
            share = room(session, len(chosen))
            if not chosen or share < 1:
                break
            write_step(particles, chosen, session, self.temperature, min(STEP, share))
            self.weigh(session, batch, particles, owner, chosen, value)
            kept = self.resample(session, particles, by_question(owner, count), value, size)
            particles, owner, value = particles.take(kept), [owner[i] for i in kept], [value[i] for i in kept]
        best = [max(mine, key=lambda i: (answered(particles, i), value[i])) for mine in by_question(owner, count)]
        return [particles.written(i) or [EOS] for i in best]

    def weigh(
        self,
        session: Session,
        batch: Mapping[str, Any],
        particles: Chains,
        owner: Sequence[int],
        new: Sequence[int],
        value: list[float],
    ) -> None:
        """The weights of particles after their new step; one that has ended keeps what it weighed before."""
        new = [i for i in new if not particles.ended(i)]
        if not new:
            return
        if self.worth == "coin":
            said = torch.rand(len(new), generator=session.rng, device=session.device).tolist()
        elif self.worth == "exact":
            said = [float(sound(batch["question"][owner[i]], particles.written(i), False)) for i in new]
        else:
            said = judged_once(session.networks["process"], [particles.texts[i] for i in new])
        weights = torch.tensor(said, dtype=torch.float64).clamp(1e-7, 1 - 1e-7).logit()
        for i, weight in zip(new, weights.tolist(), strict=True):
            value[i] = weight

    def resample(
        self, session: Session, particles: Chains, groups: Sequence[Sequence[int]], value: Sequence[float], size: int
    ) -> list[int]:
        """Numbers of the particles that the next ones go on from; those of a question of which all have ended stay."""
        still = [bool(going(particles, mine)) for mine in groups]
        number = max(1, min(size, room(session, sum(still)) // STEP))
        kept: list[int] = []
        for mine, some in zip(groups, still, strict=True):
            numbers = self.survivors(session, [value[i] for i in mine], number) if some else range(len(mine))
            kept += [mine[k] for k in numbers]
        return kept

    def survivors(self, session: Session, weights: Sequence[float], number: int) -> list[int]:
        """Which of the particles of a question the next `number` ones go on from."""
        if len(weights) == 1 or self.select == "all":
            return list(range(min(number, len(weights))))
        if self.select == "softmax":
            return drawn(session, torch.tensor(weights, dtype=torch.float64).softmax(-1), number, replacement=True)
        blocks = [list(range(k, min(k + SPREAD, len(weights)))) for k in range(0, len(weights), SPREAD)]
        best = [max(block, key=lambda i: weights[i]) for block in blocks][: -(-number // SPREAD)]
        return [i for i in best for _ in range(SPREAD)][:number]


def answered(particles: Chains, i: int) -> bool:
    """Whether particle i gives an answer."""
    return answer_of(particles.written(i)) is not None
