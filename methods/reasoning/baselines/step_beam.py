"""Beam search over steps, by a process verifier or by likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.populations import in_parts
from stepmark.tracks.reasoning.solving import STEP, judged, left, prompts, write_step

STEPS = 8  # most steps of a text
TYPICAL = 40  # tokens of a text


class StepBeam(Method):
    """Each of the beams kept is continued by some sampled steps, and the best of all are kept (Snell et al. 2024, section 5).

    As many beams are kept as the rung has room for, each continued in 4 ways, by texts of a typical length. A beam is worth what
    the process verifier says at its last full stop, a finished one keeps what it was worth before its answer. The best
    finished one is returned. `likelihood_beam` goes by the mean log-probability of the tokens instead, `random_beam` by
    nothing at all.
    """

    tasks = ("solve/problems", "solve/problems_deep")
    worth, spread, temperature = "process", 4, 0.7
    variants = (
        Variant("likelihood_beam", says="beams are kept by their likelihood", worth="likelihood"),
        Variant("random_beam", says="beams are kept at random", worth="none"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The best finished text of each question."""
        return in_parts(session, batch, rung, self.width(rung) * (self.spread + 1), self.searched)

    def width(self, rung: int) -> int:
        """Beams that are kept of a question."""
        return max(1, rung // (TYPICAL * self.spread))

    def searched(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The same of some questions, worked on side by side."""
        asked = prompts(batch, "<cot>")
        count, width = len(asked), self.width(rung)
        beams = Chains(session.networks["model"], asked)
        owner, value = list(range(count)), [0.5] * count
        for _ in range(STEPS):
            going = [i for i in range(len(beams)) if not beams.ended(i)]
            share = left(session, batch) * count // max(1, len(going) * self.spread)
            if not going or share < 2:
                break
            done = [i for i in range(len(beams)) if beams.ended(i)]
            chosen = [*done, *(i for i in going for _ in range(self.spread))]
            beams = beams.take(chosen)
            owner, value = [owner[i] for i in chosen], [value[i] for i in chosen]
            new = list(range(len(done), len(chosen)))
            write_step(beams, new, session, self.temperature, min(STEP, share))
            self.weigh(session, beams, new, value)
            kept = []
            for question in range(count):
                mine = [i for i in range(len(beams)) if owner[i] == question]
                kept += sorted(mine, key=lambda i: -value[i])[:width]
            beams, owner, value = beams.take(kept), [owner[i] for i in kept], [value[i] for i in kept]
        best = {}
        for i in range(len(beams)):
            if owner[i] not in best or (beams.ended(i), value[i]) > (
                beams.ended(best[owner[i]]),
                value[best[owner[i]]],
            ):
                best[owner[i]] = i
        return [beams.written(best[question]) or [1] for question in range(count)]

    def weigh(self, session: Session, beams: Chains, new: list[int], value: list[float]) -> None:
        """What the beams are worth after their new step; of those that have ended, what they were before."""
        if self.worth == "none":
            drawn = torch.rand(len(new), generator=session.rng, device=session.device).tolist()
            value[:] = [*value[: len(value) - len(new)], *drawn]
            return
        if self.worth == "likelihood":
            for i in new:
                own = beams.logprobs[i][beams.starts[i] :]
                value[i] = sum(own) / len(own)
            return
        going = [i for i in new if not beams.ended(i)]
        if going:
            for i, worth in zip(
                going, judged(session.networks["process"], [beams.texts[i] for i in going]), strict=True
            ):
                value[i] = worth
