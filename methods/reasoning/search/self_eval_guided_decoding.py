"""Self-evaluation guided decoding: stochastic beam search over steps that the model judges itself (Xie et al., 2023)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.oracles import sound
from stepmark.tracks.reasoning.populations import by_question, drawn, going, in_parts, room
from stepmark.tracks.reasoning.solving import STEP, answer_of, plurality, prompts, self_judged, write_step

BEAM = 64  # tokens of the rung for each beam
RIGHT = 7  # the least of the digits that say of a step that it is right


class SelfEvalGuidedDecoding(Method):
    """Beams of steps, each step judged by the model that wrote it, and pruned by a draw.

    From each of k beams n steps are sampled. A step s_t has its probability P, and the confidence C that the model gives
    when it is asked whether the step is right (Eq. 5). A beam is worth (Eq. 3)

        E(s_1:t) = prod_i P(s_i)^lambda C(s_i)^(1 - lambda)

    and of all candidates k are drawn without replacement, with probability proportional to exp(E / tau) (Eq. 4). tau falls
    to alpha tau after each step. Beams that have ended stay among the candidates. At the end the answers of the beams vote,
    weighted by E. As in the authors' code, P is the geometric mean over the tokens of a step and E that over the steps,
    candidates that are the same are judged once, and a few beams are spread over 2 k candidates.

    lambda = .5, alpha = .5 and n = 2 (the paper's cost analysis) are the paper's, tau = .5 that of the authors' script for
    GSM8K, which keeps it as it is (alpha = 1) and samples n = 16. C is the probability of the digits
    7 to 9 in the format <verify>, the model's own word that a step is right: one row of the model, which counts against the
    rung like a generated token.

    The rung gives a beam for each `BEAM` tokens: 1, 2, 4, 8 from 64 on. Where what is left has no room for all
    candidates, fewer are sampled, from the better beams; a single one is not judged, and at 32 tokens one text is written.

    Its controls: `self_eval_likelihood` goes by P alone (lambda = 1) and `self_eval_confidence` by C alone;
    `self_eval_coin` has a random number in the place of C, `self_eval_exact` an exact check of all steps, a bound;
    `self_eval_beam` takes the best k (tau = 0, plain beam search).

    Differs from the paper: a model of this size follows no written instruction, it has been trained to judge steps. It has
    not been trained to judge an answer: the step that ends a text takes the C of the step before. The rejection of
    low scores and the reweighting by P in the authors' code are left out, as they are in the paper. Candidates that are the
    same are one element of the set that is drawn from; in the code each copy has its chance. Those that vote are the k drawn
    last; in the code they are all candidates of the last step. Sampling is at temperature .7, as all of the track's; the paper
    tunes it by task, .1 to 1.

    What limits it here: a judgement costs one row however long the text that it reads, where the paper counts its input
    tokens; steps are short, so that it is still an eighth of a step.
    """

    paper = Paper(
        id="self_eval_guided_decoding",
        title="Decomposition Enhances Reasoning via Self-Evaluation Guided Decoding",
        authors="Yuxi Xie, Kenji Kawaguchi, Yiran Zhao, Xu Zhao, Min-Yen Kan, Junxian He, Qizhe Xie",
        year=2023,
        arxiv="2305.00633",
        code="YuxiXie/SelfEval-Guided-Decoding",
    )
    tasks = ("solve/problems",)
    baselines = ("self_consistency", "chain_of_thought", "likelihood_beam", "self_eval_likelihood")
    claims = (
        Claim(
            "accuracy[self_eval_guided_decoding,128..512] > accuracy[chain_of_thought,128..512] "
            "and accuracy[self_eval_guided_decoding,128..512] > accuracy[self_consistency,128..512]",
            says="better than a greedy chain of thought, and than self-consistency at as many tokens, judgements included",
            headline=True,
        ),
        Claim(
            "accuracy[self_eval_guided_decoding,128..512] > accuracy[self_eval_likelihood,128..512] "
            "and accuracy[self_eval_guided_decoding,128..512] > accuracy[self_eval_confidence,128..512] "
            "and accuracy[self_eval_guided_decoding,128..512] > accuracy[self_eval_coin,128..512]",
            says="both parts of the score are needed, and a coin does not do",
        ),
        Claim(
            "deep[self_eval_guided_decoding,256..512] > deep[chain_of_thought,256..512] "
            "and deep[self_eval_guided_decoding,256..512] > deep[self_consistency,256..512]",
            says="and on problems of five steps, where errors pile up",
        ),
        Claim(
            "accuracy[self_eval_guided_decoding,256..512] > accuracy[self_eval_beam,256..512]",
            says="drawing beams, for a vote, is better than keeping the best",
        ),
    )

    mix, tau, decay, samples, judge, temperature = 0.5, 0.5, 0.5, 2, "self", 0.7
    variants = (
        Variant("self_eval_likelihood", says="by the probability of steps alone", mix=1.0, judge="none"),
        Variant("self_eval_confidence", says="by the model's confidence alone", mix=0.0),
        Variant("self_eval_coin", says="a random number in the place of the confidence", judge="coin"),
        Variant("self_eval_exact", says="an exact check of all steps in its place: a bound", judge="exact"),
        Variant("self_eval_beam", says="the best beams are kept", tau=0.0),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The text of each question whose answer weighs most."""
        return in_parts(
            session, batch, rung, 3 * max(1, rung // BEAM), self.searched
        )  # beams and twice as many candidates

    def searched(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The same of some questions, worked on side by side."""
        asked, width = prompts(batch, "<cot>"), max(1, rung // BEAM)
        count, tau = len(asked), self.tau
        beams, owner = Chains(session.networks["model"], asked), list(range(count))
        # of each beam, the sum of the logarithms of its factors, how many there are, and the last C
        total, length, sure = [0.0] * count, [0] * count, [1.0] * count
        while True:
            before = self.spread(session, beams, by_question(owner, count), total, length, width)
            new = [i for i, parent in enumerate(before) if going(beams, [parent])]
            if not new or room(session, len(new)) < 1:
                break
            beams, owner = beams.take(before), [owner[i] for i in before]
            total, length, sure = ([of[i] for i in before] for of in (total, length, sure))
            share = room(session, len(new))
            if share < 1:
                break
            steps = write_step(beams, new, session, self.temperature, min(STEP, share))
            first: dict[tuple[int, tuple[int, ...]], int] = {}
            for i in range(len(beams)):
                first.setdefault((owner[i], tuple(beams.texts[i])), i)
            distinct = list(first.values())
            self.weigh(session, batch, beams, owner, dict(zip(new, steps, strict=True)), distinct, total, length, sure)
            kept = []
            for question in range(count):
                mine = [i for i in distinct if owner[i] == question]
                kept += [mine[k] for k in self.pruned(session, [worth(total[i], length[i]) for i in mine], width, tau)]
            beams, owner = beams.take(kept), [owner[i] for i in kept]
            total, length, sure = ([of[i] for i in kept] for of in (total, length, sure))
            tau *= self.decay
        found = []
        for mine in by_question(owner, count):
            mine = sorted(mine, key=lambda i: -worth(total[i], length[i]))
            answers = [answer_of(beams.written(i)) for i in mine]
            best = mine[plurality(answers, [worth(total[i], length[i]) for i in mine])]
            found.append(beams.written(best) or [EOS])
        return found

    def spread(
        self,
        session: Session,
        beams: Chains,
        groups: Sequence[Sequence[int]],
        total: Sequence[float],
        length: Sequence[int],
        width: int,
    ) -> list[int]:
        """Of which beam each candidate is a continuation: those that have ended once, the others as often as there is
        room for, the better ones first."""
        chosen: list[int] = []
        live = sum(bool(going(beams, mine)) for mine in groups)
        fit = max(1, room(session, live) // (STEP + 1))
        for mine in groups:
            active = sorted(going(beams, mine), key=lambda i: -worth(total[i], length[i]))
            chosen += [i for i in mine if i not in active]
            each = self.samples if self.samples * len(mine) > width else 2 * width // len(mine)
            number = min(fit, each * len(active))
            for rank, i in enumerate(active):
                chosen += [i] * (number // len(active) + (rank < number % len(active)))
        return chosen

    def weigh(
        self,
        session: Session,
        batch: Mapping[str, Any],
        beams: Chains,
        owner: Sequence[int],
        steps: Mapping[int, Sequence[int]],
        distinct: Sequence[int],
        total: list[float],
        length: list[int],
        sure: list[float],
    ) -> None:
        """Multiply the factor of its new step to each of the distinct candidates that has one."""
        new = [i for i in distinct if i in steps]
        rivals = Counter(owner[i] for i in steps)
        asked = [i for i in new if not beams.ended(i) and rivals[owner[i]] > 1 and self.judge != "none"]
        if self.judge == "self" and len(asked) > session.limit - session.spent:
            asked = []
        if asked:
            for i, confidence in zip(asked, self.confidences(session, batch, beams, owner, asked), strict=True):
                sure[i] = confidence
        for i in new:
            logprobs = beams.logprobs[i][-len(steps[i]) :]
            likely = sum(logprobs) / len(logprobs)
            total[i] += self.mix * likely + (1 - self.mix) * math.log(max(sure[i], 1e-6))
            length[i] += 1

    def confidences(
        self, session: Session, batch: Mapping[str, Any], beams: Chains, owner: Sequence[int], asked: Sequence[int]
    ) -> list[float]:
        """C of the last steps of some beams (Eq. 5)."""
        if self.judge == "coin":
            return torch.rand(len(asked), generator=session.rng, device=session.device).tolist()
        questions = [batch["question"][owner[i]] for i in asked]
        if self.judge == "exact":
            return [float(sound(q, beams.written(i), False)) for q, i in zip(questions, asked, strict=True)]
        digits = self_judged(session.networks["model"], questions, [beams.written(i) for i in asked])
        return digits[:, RIGHT:].sum(-1).tolist()

    def pruned(self, session: Session, scores: Sequence[float], width: int, tau: float) -> list[int]:
        """Which `width` of the candidates of a question are kept, drawn by exp(E / tau)."""
        if len(scores) <= width:
            return list(range(len(scores)))
        if tau < 0.005:  # as the authors do: nothing is left of the randomness
            return sorted(range(len(scores)), key=lambda i: -scores[i])[:width]
        return drawn(session, (torch.tensor(scores, dtype=torch.float64) / tau).softmax(-1), width)


def worth(total: float, length: int) -> float:
    """E of a beam, the geometric mean over its steps."""
    return math.exp(total / max(1, length))
