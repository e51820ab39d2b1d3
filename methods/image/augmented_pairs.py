from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepmark import Method
from stepmark.session import Session
from stepmark.tracks.image.depth import augmented, picked


class AugmentedPairs(Method):
    """Real pairs, cut to a random window and mirrored by half the chance: the usual augmentation.

    Windows are three quarters of the picture or more and are enlarged to its size again; depth stays as it is. No network is
    evaluated, and all rungs are the same.
    """

    tasks = ("training_pairs/scenes16",)

    def prepare(self, session: Session) -> dict[str, Tensor]:
        return {"pairs": session.train["x0"]}

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return augmented(picked(session.state["pairs"], len(batch["noise"]), session.rng), session.rng)
