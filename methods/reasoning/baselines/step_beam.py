"""Beam search over steps, by a process verifier or by likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.populations import by_question, going, in_parts, judged_once, room
from stepmark.tracks.reasoning.solving import STEP, prompts, write_step

BEAM = 128  # tokens of the rung for each beam: a chain of typical length in `SPREAD` ways
SPREAD = 4


class StepBeam(Method):
    """Each of the beams kept is continued by sampled steps, 4 of each, and the best of all are kept (Snell et al. 2024,
    section 5).

    The rung gives a beam for each `BEAM` tokens, one at least. Where what is left has no room for the longest step of each
    candidate there are fewer, from the better beams. A beam is worth what the process verifier says at its last full stop;
    one that has ended keeps what it was worth before its answer. The best one that has ended is returned.

    `likelihood_beam` goes by the mean log-probability of the tokens.
    """

    tasks = ("solve/problems", "solve/judged")
    worth, temperature = "process", 0.7
    variants = (Variant("likelihood_beam", says="beams are kept by their likelihood", worth="likelihood"),)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The best finished text of each question."""
        return in_parts(session, batch, rung, max(1, rung // BEAM) * (SPREAD + 1), self.searched)

    def searched(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The same of some questions, worked on side by side."""
        asked, width = prompts(batch, "<cot>"), max(1, rung // BEAM)
        count = len(asked)
        beams, owner, value = Chains(session.networks["model"], asked), list(range(count)), [0.0] * count
        while True:
            parents = self.spread(session, beams, by_question(owner, count), value)
            new = [k for k, i in enumerate(parents) if going(beams, [i])]
            if not new:
                break
            beams = beams.take(parents)
            owner, value = [owner[i] for i in parents], [value[i] for i in parents]
            share = room(session, len(new))
            if share < 1:
                break
            write_step(beams, new, session, self.temperature, min(STEP, share))
            self.weigh(session, beams, new, value)
            kept = []
            for mine in by_question(owner, count):
                kept += sorted(mine, key=lambda i: -value[i])[:width]
            beams, owner, value = beams.take(kept), [owner[i] for i in kept], [value[i] for i in kept]
        best = [max(mine, key=lambda i: (beams.ended(i), value[i])) for mine in by_question(owner, count)]
        return [beams.written(i) or [EOS] for i in best]

    @staticmethod
    def spread(session: Session, beams: Chains, groups: Sequence[Sequence[int]], value: Sequence[float]) -> list[int]:
        """Of which beam each candidate is a continuation; beams that have ended stand for themselves."""
        live = sum(bool(going(beams, mine)) for mine in groups)
        fit = max(1, room(session, live) // (STEP + 1))
        parents: list[int] = []
        for mine in groups:
            open_ones = sorted(going(beams, mine), key=lambda i: -value[i])
            parents += [i for i in mine if i not in open_ones]
            number = min(fit, SPREAD * len(open_ones))
            for rank, i in enumerate(open_ones):
                parents += [i] * (number // len(open_ones) + (rank < number % len(open_ones)))
        return parents

    def weigh(self, session: Session, beams: Chains, new: Sequence[int], value: list[float]) -> None:
        """What beams are worth after their new step; those that have ended are judged by nobody and keep what they were."""
        if self.worth == "likelihood":
            for i in new:
                own = beams.logprobs[i][beams.starts[i] :]
                value[i] = sum(own) / len(own)
            return
        new = [i for i in new if not beams.ended(i)]
        said = judged_once(session.networks["process"], [beams.texts[i] for i in new]) if new else []
        for i, worth in zip(new, said, strict=True):
            value[i] = worth
