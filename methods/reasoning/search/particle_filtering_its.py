"""Particle filtering: steps are sampled, weighed by a verifier and resampled (Puri et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.populations import by_question, drawn, going, in_parts, judged_once, room
from stepmark.tracks.reasoning.solving import STEP, answer_of, plurality, prompts, write_step

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

    The rung gives a particle for each `PARTICLE` tokens: 1, 2, 4, 8, 16, 32. Where what is left has no room for a longest
    step of each, fewer are drawn.

    Its controls run the same loop at the same N. `particle_subtrees` is the paper's rival, diverse verifier tree search:
    of each four particles of a subtree the best is continued four times. `particle_top` keeps the best quarter of all
    (beam search), `particle_best_of_n` all of them to their ends, and the best by the same verifier. `particle_coin` puts
    a random number in the verifier's place. `particle_vote` answers by a vote of the last weights. `particle_noisy` and
    `particle_top_noisy` add normal noise of deviation 2 to every w.

    Differs from the paper: temperature .7, as all sampling of the track, for .8 (it finds .4 to 1 alike). The verifier has
    learnt to judge texts at their full stops, so a text that ends keeps the weight of its last step. Particle Gibbs and
    parallel chains, which the paper builds of this filter, are left out; so is its comparison with larger models.

    What limits it here: texts have two to six steps, so that there are few resamplings. The verifier reads every
    distinct text from its beginning after each step: that counts in NFE-equivalents, not against the rung.
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
    tasks = ("solve/problems", "solve/problems_deep")
    baselines = ("self_consistency", "weighted_vote", "step_beam", "particle_subtrees", "particle_best_of_n")
    claims = (
        Claim(
            "accuracy[particle_filtering_its,64] >= accuracy[particle_subtrees,256] "
            "and accuracy[particle_filtering_its,128] >= accuracy[particle_subtrees,512] "
            "and accuracy[particle_filtering_its,256] >= accuracy[particle_subtrees,1024]",
            says="as accurate as deterministic tree search with four times the tokens",
            headline=True,
            setting="texts of two to five steps, 2 to 8 particles, and a verifier no larger than the model",
        ),
        Claim(
            "accuracy[particle_filtering_its,128..1024] > accuracy[particle_subtrees,128..1024] "
            "and accuracy[particle_filtering_its,128..1024] > accuracy[particle_best_of_n,128..1024] "
            "and accuracy[particle_filtering_its,128..1024] > accuracy[weighted_vote,128..1024] "
            "and accuracy[particle_filtering_its,128..1024] > accuracy[self_consistency,128..1024]",
            says="better than tree search and best of N by the same verifier, a weighted and a plain vote, at as many tokens",
        ),
        Claim(
            "accuracy[particle_filtering_its,256..1024] > accuracy[particle_subtrees,256..1024] "
            "and accuracy[particle_filtering_its,256..1024] > accuracy[particle_top,256..1024] "
            "and accuracy[particle_filtering_its,256..1024] > accuracy[self_consistency,256..1024]",
            says="and so on problems that are deeper than any that the model has seen",
            task="solve/problems_deep",
        ),
        Claim(
            "accuracy[particle_noisy,256..1024] > accuracy[particle_top_noisy,256..1024]",
            says="a noisy verifier misleads it less than beam search",
        ),
        Claim(
            "accuracy[particle_filtering_its,128..1024] > accuracy[particle_coin,128..1024]",
            says="it is the verifier that does it",
        ),
    )

    select = "softmax"  # "top", "subtrees": deterministic search; "all": no selection
    worth, noise, answer, temperature = "process", 0.0, "best", 0.7
    variants = (
        Variant("particle_subtrees", says="diverse verifier tree search: the best of each four", select="subtrees"),
        Variant("particle_top", says="beam search: the best quarter of all", select="top"),
        Variant("particle_best_of_n", says="no resampling: the best of N texts by the same verifier", select="all"),
        Variant("particle_vote", says="a vote of the last weights", answer="vote"),
        Variant("particle_coin", says="a random number in the verifier's place", worth="coin"),
        Variant("particle_noisy", says="weights with noise", noise=2.0),
        Variant("particle_top_noisy", says="beam search by weights with noise", select="top", noise=2.0),
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
            self.weigh(session, particles, chosen, value)
            kept = self.resample(session, particles, by_question(owner, count), value, size)
            particles, owner, value = particles.take(kept), [owner[i] for i in kept], [value[i] for i in kept]
        return [particles.written(self.chosen(particles, mine, value)) or [EOS] for mine in by_question(owner, count)]

    def weigh(self, session: Session, particles: Chains, new: Sequence[int], value: list[float]) -> None:
        """The weights of particles after their new step; one that has ended keeps what it weighed before."""
        new = [i for i in new if not particles.ended(i)]
        if not new:
            return
        if self.worth == "coin":
            said = torch.rand(len(new), generator=session.rng, device=session.device)
        else:
            said = torch.tensor(judged_once(session.networks["process"], [particles.texts[i] for i in new]))
        weights = said.double().clamp(1e-7, 1 - 1e-7).logit()
        if self.noise:
            noise = torch.randn(len(new), generator=session.rng, device=session.device)
            weights = weights + self.noise * noise.to(weights)
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
        if self.select == "subtrees":
            best = [max(block, key=lambda i: weights[i]) for block in blocks]
        else:
            best = sorted(range(len(weights)), key=lambda i: -weights[i])
        best = best[: -(-number // SPREAD)]
        return [i for i in best for _ in range(SPREAD)][:number]

    def chosen(self, particles: Chains, mine: Sequence[int], value: Sequence[float]) -> int:
        """Number of the particle that answers: the best weighed one, or that of the answer of most weight."""
        answers = [answer_of(particles.written(i)) for i in mine]
        if self.answer == "vote":
            weights = torch.tensor([value[i] for i in mine], dtype=torch.float64).softmax(-1).tolist()
            return mine[plurality(answers, weights)]
        return max(zip(mine, answers, strict=True), key=lambda pair: (pair[1] is not None, value[pair[0]]))[0]
