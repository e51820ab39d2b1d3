from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepmark import Method
from stepmark.session import Session
from stepmark.tracks.image.depth import picked


class RealPairsOnly(Method):
    """The real pairs themselves, once more: a depth network that learns from nothing else.

    Every item is one of them at random. No network is evaluated, and all rungs are the same.
    """

    tasks = ("training_pairs/scenes16",)

    def prepare(self, session: Session) -> dict[str, Tensor]:
        return {"pairs": session.train["x0"]}

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return picked(session.state["pairs"], len(batch["noise"]), session.rng)
