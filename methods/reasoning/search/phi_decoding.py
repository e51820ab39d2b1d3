"""Phi-decoding: steps are drawn by what is foreseen of them, its likelihood and its clusters (Xu et al., 2025)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, decode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.populations import by_question, drawn, going, room, write_to_ends
from stepmark.tracks.reasoning.solving import CHAIN, STEP, answer_of, prompts, write_step

CANDIDATE = 64  # tokens of the rung for each candidate of a round
RESERVE = CHAIN // 2  # tokens that must be left for each: one step and what follows it


class PhiDecoding(Method):
    """Candidate steps are simulated to the end of the text, and the next steps drawn by two estimates of their value.

    In round t each of M beams samples N steps. Of each the rest of the text is sampled as foresight, with mean
    log-probability F_t, and all foresights are put into K = 3 clusters. The value of a step is its advantage over the
    beam that it goes on from (Eq. 5) and the share of its cluster (Eq. 6), and M steps are drawn without replacement by

        A_t = F_t - F_t-1
        C_t = |cluster| / |candidates|
        p = 1/2 softmax(A / tau_1) + 1/2 softmax(C / tau_2)

    (Eq. 7), among those of A > 0; where these are fewer than M, by advantage alone among all. In-width pruning: a step
    whose mean log-probability lies more than a standard deviation below the mean of the round is not simulated (Eq. 10).
    In-depth pruning: from round T_min = 2 on, once a cluster holds 70 % of the candidates (Eq. 11) or all drawn steps are
    the same, the beams are completed without foresight; T_max = 8 at the latest. Of the completed beams one is drawn by p.
    Clusters are k-means on TF-IDF vectors of the words, a number being one word.

    The rung gives a candidate of a round for each `CANDIDATE` tokens: M x N = 1 x 2 at 128, 2 x 2 at 256, 2 x 4 at 512. A
    round takes as many as have `RESERVE` tokens each, as many being kept for the completion; with fewer than two the beams
    are completed. Where a beam cannot be, its foresight stands for its end. Below 128 tokens one text is written.

    Its controls are the paper's ablations, `phi_no_foresight` (steps by their own probability), `phi_no_cluster` (by
    advantage alone) and `phi_no_pruning`, and `phi_random`, which does all this and draws steps at random.

    Differs from the paper: its code and its text are not of one mind. As in the official code, tau_1 = .1 and tau_2 = 1
    (text: .6), F_0 = 0, so that no step of round 1 has an advantage and none is clustered, and A > 0 is asked for; as in the
    text, one completed beam is drawn by the same rule (code: by advantage within the larger of two clusters). T_min is 4 in
    the official script; texts are half as long here. A step that ends its text is its own foresight. Where pruning leaves
    fewer than M steps, the likelier ones of those pruned are taken back, which the code draws. Temperature .7, as all
    sampling of the track (paper: .6; the code: .6 for steps, 1 for foresight and completion).

    What limits it here: the paper's 4 x 4 candidates would take 1024 tokens, twice the greatest rung. The model is sure of
    most tokens, so that advantages are small.
    """

    paper = Paper(
        id="phi_decoding",
        title="$φ$-Decoding: Adaptive Foresight Sampling for Balanced Inference-Time Exploration and Exploitation",
        authors="Fangzhi Xu, Hang Yan, Chang Ma, Haiteng Zhao, Jun Liu, Qika Lin, Zhiyong Wu",
        year=2025,
        arxiv="2503.13288",
        code="xufangzhi/phi-Decoding",
    )
    tasks = ("solve/problems",)
    baselines = ("self_consistency", "chain_of_thought", "likelihood_beam", "self_eval_guided_decoding")
    claims = (
        Claim(
            "accuracy[phi_decoding,256..512] > accuracy[chain_of_thought,256..512] "
            "and accuracy[phi_decoding,256..512] > accuracy[likelihood_beam,256..512] "
            "and accuracy[phi_decoding,256..512] > accuracy[self_eval_guided_decoding,256..512] "
            "and accuracy[phi_decoding,256..512] > accuracy[self_consistency,256..512]",
            says="better than a greedy chain, a beam of likely steps, self-evaluation guided decoding and self-consistency, "
            "at as many tokens",
            headline=True,
            setting="2 x 2 and 2 x 4 candidates of a round, not 4 x 4",
        ),
        Claim(
            "accuracy[phi_decoding,256..512] >= accuracy[phi_no_pruning,256..512] - 0.01 "
            "and nfe[phi_decoding,256..512] <= 0.8 * nfe[phi_no_pruning,256..512]",
            says="pruning saves a fifth of the tokens, and no more than one answer in a hundred is lost",
        ),
        Claim(
            "accuracy[phi_decoding,256..512] > accuracy[phi_no_foresight,256..512] "
            "and accuracy[phi_decoding,256..512] > accuracy[phi_no_cluster,256..512] "
            "and accuracy[phi_decoding,256..512] > accuracy[phi_random,256..512]",
            says="foresight and clusters both help, and chance does not",
            setting="2 x 2 and 2 x 4 candidates of a round, which seldom make clusters",
        ),
        Claim(
            "deep[phi_decoding,256..512] > deep[self_consistency,256..512] "
            "and deep[phi_decoding,256..512] > deep[phi_random,256..512]",
            says="and so on the deepest problems, of five steps",
        ),
    )

    foresight, cluster, prune, chance, temperature = True, True, True, False, 0.7
    tau_1, tau_2, clusters, delta, least, most = 0.1, 1.0, 3, 0.7, 2, 8
    variants = (
        Variant("phi_no_foresight", says="steps are drawn by their own probability", foresight=False),
        Variant("phi_no_cluster", says="steps are drawn by advantage alone", cluster=False),
        Variant("phi_no_pruning", says="every step is simulated, in every round", prune=False),
        Variant("phi_random", says="steps are drawn at random", chance=True),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, drawn among its completed beams."""
        asked = prompts(batch, "<cot>")
        count, wanted = len(asked), max(1, rung // CANDIDATE)
        width = math.isqrt(wanted)
        beams, owner = Chains(session.networks["model"], asked), list(range(count))
        # of each beam F, A and the foresight
        seen, gain, tails = [0.0] * count, [0.0] * count, [list[int]() for _ in asked]
        active = set(range(count))
        for t in range(1, self.most + 1):
            groups = by_question(owner, count)
            active = {q for q in active if going(beams, groups[q])}
            fit = min(wanted, room(session, count) // RESERVE - 1)
            if not active or fit < 2:
                break
            parents, new = self.spread(beams, groups, active, fit)
            beams, owner = beams.take(parents), [owner[i] for i in parents]
            before = [seen[i] if self.foresight else 0.0 for i in parents]
            seen, gain, tails = ([of[i] for i in parents] for of in (seen, gain, tails))
            limit = min(STEP, room(session, len(new)))
            steps = dict(zip(new, write_step(beams, new, session, self.temperature, limit), strict=True))
            likely = {i: mean(beams.logprobs[i][-len(steps[i]) :]) for i in new}
            gone = self.unlikely(likely, by_question(owner, count), width)
            self.foresee(session, beams, [i for i in new if i not in gone], steps, seen, tails, count)
            for i in new:
                gain[i] = seen[i] - before[i]
            kept = []
            for question, mine in enumerate(by_question(owner, count)):
                if question not in active:
                    kept += mine
                    continue
                pool = [i for i in mine if i not in gone]
                weights, share = self.value(session, [gain[i] for i in pool], [tails[i] for i in pool], width)
                chosen = [pool[k] for k in drawn(session, weights, min(width, len(pool)))]
                kept += chosen
                same = len({tuple(steps.get(i, beams.texts[i])) for i in chosen}) == 1
                if self.prune and t >= self.least and (share >= self.delta or same):
                    active.discard(question)
            beams, owner = beams.take(kept), [owner[i] for i in kept]
            seen, gain, tails = ([of[i] for i in kept] for of in (seen, gain, tails))
        return self.completed(session, beams, by_question(owner, count), owner, seen, gain, tails)

    @staticmethod
    def spread(
        beams: Chains, groups: Sequence[Sequence[int]], active: set[int], number: int
    ) -> tuple[list[int], list[int]]:
        """Of which beam each candidate is a continuation, and which candidates write a step: `number` of each active
        question. Beams that have ended, or are not simulated any more, stay as they are."""
        parents, new = list[int](), list[int]()
        for question, mine in enumerate(groups):
            open_ones = going(beams, mine) if question in active else []
            parents += [i for i in mine if i not in open_ones]
            for rank, i in enumerate(open_ones):
                times = number // len(open_ones) + (rank < number % len(open_ones))
                new += range(len(parents), len(parents) + times)
                parents += [i] * times
        return parents, new

    def unlikely(self, likely: Mapping[int, float], groups: Sequence[Sequence[int]], width: int) -> set[int]:
        """Candidates that are not simulated: those below mean - sigma of their question. At least `width` are left, the
        likelier ones, which the authors draw (Eq. 10)."""
        gone: set[int] = set()
        for mine in groups if self.prune else ():
            order = sorted((i for i in mine if i in likely), key=lambda i: -likely[i])
            if order:
                values = torch.tensor([likely[i] for i in order], dtype=torch.float64)
                least = float(values.mean() - values.std(correction=0)) - 1e-9
                gone |= {i for i in order[width:] if likely[i] < least}
        return gone

    def foresee(
        self,
        session: Session,
        beams: Chains,
        chosen: Sequence[int],
        steps: Mapping[int, Sequence[int]],
        seen: list[float],
        tails: list[list[int]],
        count: int,
    ) -> None:
        """F and the foresight of the chosen candidates; a step that ends its text is its own. The texts stay as they are.
        `RESERVE` tokens are left for the completion of each question."""
        for i in chosen:
            seen[i], tails[i] = mean(beams.logprobs[i][-len(steps[i]) :]), list(steps[i]) if beams.ended(i) else []
        ahead = going(beams, chosen) if self.foresight else []
        share = int(session.limit - session.spent - RESERVE * count) // max(1, len(ahead))
        if not ahead or share < 1:
            return
        ends = {i: len(beams.texts[i]) for i in ahead}
        limits = [min(share, CHAIN - len(beams.written(i))) for i in ahead]
        written = beams.write(ahead, limit=limits, temperature=self.temperature, generator=session.rng)
        for i, tail in zip(ahead, written, strict=True):
            seen[i], tails[i] = mean(beams.logprobs[i][-len(tail) :]), tail
            beams.cut(i, ends[i])

    def value(
        self, session: Session, gains: Sequence[float], tails: Sequence[Sequence[int]], needed: int
    ) -> tuple[list[float], float]:
        """The weights by which candidates are drawn, and the share of the largest cluster, 0 where none are made."""
        better = [i for i, one in enumerate(gains) if one > 0]
        inside = better if self.foresight and len(better) >= needed else list(range(len(gains)))
        weights, share = softmax([gains[i] / self.tau_1 for i in inside]), 0.0
        if self.foresight and len(better) >= max(needed, self.clusters):
            labels = clustered(session, [tails[i] for i in better], self.clusters)
            sizes = Counter(labels)
            shares = [sizes[label] / len(labels) for label in labels]
            share = max(shares)
            if self.cluster:
                by_share = softmax([one / self.tau_2 for one in shares])
                weights = [(a + c) / 2 for a, c in zip(weights, by_share, strict=True)]
        if self.chance:
            return [1.0] * len(gains), share
        found = dict(zip(inside, weights, strict=True))
        return [found.get(i, 0.0) for i in range(len(gains))], share

    def completed(
        self,
        session: Session,
        beams: Chains,
        groups: Sequence[Sequence[int]],
        owner: Sequence[int],
        seen: Sequence[float],
        gain: list[float],
        tails: list[list[int]],
    ) -> list[list[int]]:
        """Complete the beams and draw one of each question, of those with an answer where there are any."""
        ends = {i: len(beams.texts[i]) for i in going(beams, range(len(beams)))}
        write_to_ends(session, beams, owner, self.temperature)
        texts = [beams.written(i) for i in range(len(beams))]
        for i, end in ends.items():
            if beams.ended(i) or not tails[i]:
                tails[i] = beams.texts[i][end:]
                gain[i] = mean(beams.logprobs[i][end:]) - seen[i]
            else:  # the rung was too short: what was foreseen stands for it
                texts[i] = [*beams.texts[i][beams.starts[i] : end], *tails[i]]
        found = []
        for mine in groups:
            pool = [i for i in mine if answer_of(texts[i]) is not None] or mine
            weights, _ = self.value(session, [gain[i] for i in pool], [tails[i] for i in pool], 1)
            found.append(texts[pool[drawn(session, weights, 1)[0]]] or [EOS])
        return found


def mean(values: Sequence[float]) -> float:
    """0 where there are none."""
    return sum(values) / max(1, len(values))


def softmax(values: Sequence[float]) -> list[float]:
    """In double precision."""
    return torch.tensor(values, dtype=torch.float64).softmax(-1).tolist()  # type: ignore[no-any-return]


def clustered(session: Session, texts: Sequence[Sequence[int]], number: int) -> list[int]:
    """Labels of texts: k-means on their TF-IDF vectors (smooth, of length 1), from far points drawn by their distance."""
    words = [re.sub(r"(?<=\d) (?=\d)", "", decode(text)).split() for text in texts]
    terms = {word: k for k, word in enumerate(sorted({word for text in words for word in text}))}
    x = torch.zeros(len(texts), len(terms), dtype=torch.float64, device=session.device)
    for row, text in enumerate(words):
        for word in text:
            x[row, terms[word]] += 1
    x = F.normalize(x * (((1 + len(texts)) / (1 + (x > 0).sum(0))).log() + 1))
    centres = x[drawn(session, [1.0] * len(texts), 1)]
    for _ in range(number - 1):
        far = ((x[:, None] - centres) ** 2).sum(-1).min(1).values
        if far.max() < 1e-9:  # no other texts are left
            break
        centres = torch.cat([centres, x[drawn(session, far, 1)]])
    for _ in range(20):
        labels = ((x[:, None] - centres) ** 2).sum(-1).argmin(1)
        new = torch.stack([x[labels == k].mean(0) if (labels == k).any() else c for k, c in enumerate(centres)])
        if torch.equal(new, centres):
            break
        centres = new
    return labels.tolist()  # type: ignore[no-any-return]
