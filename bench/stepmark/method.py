"""What the author of a plugin sees: `Method`, its `Variant`s, the `Paper` it comes from, the `Claim`s that paper makes.

A method is one file, anywhere below `methods/<track>/`, holding one subclass of `Method`. Its class attributes are plain
literals: listing, the site and the coverage table read them with `ast` and never import the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepmark.task import Skip as Skip
from stepmark.task import skip as skip

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stepmark.session import Session


@dataclass(frozen=True)
class Paper:
    """The publication a method reimplements. `code` is `owner/repo` of the official code, where there is one."""

    id: str
    title: str
    authors: str
    year: int
    arxiv: str | None = None
    code: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Claim:
    """One checkable claim of a paper.

    `check` is a sentence of the claim language (`stepmark.claims`), `says` the same for people, `task` the task it is
    evaluated on (default: the method's first task). `headline`: it is what the paper's abstract boasts of. `setting`: why
    the setting here is not the paper's, so that its failure would say nothing about the paper.
    """

    check: str
    says: str
    task: str | None = None
    headline: bool = False
    setting: str = ""


class Variant:
    """Another setting of a method, in the same file: a control or an ablation of its paper.

    A variant is a method everywhere (id, records, claims, tables); on boards it stands under its paper. `overrides` are
    plain literals for class attributes that the file defines; of `tasks`, `baselines` and `claims` those it names replace
    the method's. Not named, `tasks` are the method's, `baselines` the method's without the variant itself, `claims` none.

        variants = (Variant("ddt_every_step", says="the encoder runs in every step", shared=1),)
    """

    def __init__(self, id: str, says: str, **overrides: Any) -> None:
        self.id, self.says, self.overrides = id, says, overrides


class Method:
    """The plugin contract: three calls, of which only `run` is timed.

    Instances hold no state of their own: what `prepare` computes travels as tensors in `session.state` and as weights
    of the networks that `networks` declared, so that it can be cached, digested and loaded elsewhere.
    """

    paper: Paper | None = None
    tasks: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    variants: tuple[Variant, ...] = ()
    unclaimed: str = ""  # of a paper without a headline claim: why there is none
    trainings: int = (
        1  # seeds that it is prepared and run with at least, where a task asks for fewer: 3 if `prepare` draws
    )
    ranks: int = 1  # processes in which `run` is called at once; they meet in `session.group`

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """Build, untrained, the networks that the method adds to those of the task.

        The harness counts them like the task's own and caches their trained weights. Offline, not timed.
        """
        return {}

    def prepare(self, session: Session) -> Mapping[str, Tensor] | None:
        """Train, distil, calibrate or search, on `session.train` only. Offline; its cost is recorded, its result cached.

        Trains `session.networks[...]` in place and returns further tensors, which `run` finds in `session.state`.
        """
        return None

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Any:
        """Turn a batch of the track's inputs into its outputs within `rung` units per item. The only timed call.

        A pure function of (state, networks, batch, rung, session.rng): no I/O, no global state, no threads.
        """
        raise TypeError(f"{type(self).__name__} does not define run(self, session, batch, rung)")
