from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepmark import Method
from stepmark.session import Session
from stepmark.tracks.image.depth import picked


class EnginePairs(Method):
    """Pairs rendered by a graphics engine: exact depth and as many as wanted, but of another style than the real ones.

    Every item is one of a thousand at random. No network is evaluated, and all rungs are the same.
    """

    tasks = ("training_pairs/scenes16",)

    def prepare(self, session: Session) -> dict[str, Tensor]:
        return {"pairs": session.train["engine"]}

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return picked(session.state["pairs"], len(batch["noise"]), session.rng)
