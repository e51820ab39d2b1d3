"""Whether figures are claimed, measured, reproduced or disputed, and why; accepted objections."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from stepmark.leaderboard.rows import record_id

from stepmark import backbones, plugins
from stepmark.plugins import MethodInfo
from stepmark.record import Record
from stepmark.task import Task
from stepmark.verify import compare as repeat
from stepmark.verify import evidence

Trust = Literal["claimed", "measured", "reproduced", "disputed"]
Intervals = Mapping[str, tuple[float, float]]
REASONS = 3  # of a trust state that a page gives


class Dispute(NamedTuple):
    """An accepted objection to a record: a line of `leaderboard/disputes.jsonl`."""

    record: str
    says: str
    link: str


def disputes(path: Path) -> dict[str, Dispute]:
    """Accepted disputes by record id; {} without the file.

    Raises:
        ValueError: a line that is no dispute.
    """
    found: dict[str, Dispute] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            each = Dispute(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(f"{path}:{number}: a dispute is an object of the strings record, says and link") from None
        found[each.record] = each
    return found


@dataclass
class Standing:
    """Trust in a method's figures on one task, and why."""

    state: Trust
    reasons: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        """The first reasons, accepted objections before all others, and how many more there are. Untrusted text."""
        more = f"; and {len(self.reasons) - REASONS} more" if len(self.reasons) > REASONS else ""
        return "; ".join(self.reasons[:REASONS]) + more


def standing(
    method: str,
    task: str,
    everything: Sequence[Record],
    objections: Mapping[str, Dispute],
    intervals_of: Callable[[Record], Intervals | None] = lambda record: None,
) -> Standing:
    """Derived from all runs that the board takes in: *claimed* without one, *measured* with one, *reproduced* when a
    second machine or another commit agrees with the first run of the newest sources (by the rules of `stepmark verify`),
    *disputed* when it does not or when an objection was accepted. `intervals_of` gives the 95 % intervals of a record's
    metrics, where they are known already.
    """
    runs: dict[tuple[int, int, str, str], list[Record]] = defaultdict(list)
    for r in sorted(everything, key=lambda r: r.created):
        if r.method == method and r.task == task and r.status in {"ok", "flagged"} and r.tier != "smoke":
            runs[(r.rung, r.seed, r.tier, r.checkpoint)].append(r)
    if not runs:
        return Standing("claimed")
    found = Standing("measured")
    agreeing: set[str] = set()
    differing: list[str] = []
    for (rung, seed, *_), again in sorted(runs.items()):
        for r in again:
            if objections and (objection := objections.get(record_id(r))) is not None:
                found.state = "disputed"
                found.reasons.append(f"record {objection.record}: {objection.says} ({objection.link})")
        first, *others = [r for r in again if r.digests == again[-1].digests]
        for other in others:
            shows = evidence(first, other)
            if not shows:
                continue
            differs = repeat(first, other, intervals_of(first)).differs
            if differs:
                found.state = "disputed"
                differing.append(f"rung {rung}, seed {seed}: a second run ({shows}) differs: {differs[0]}")
            else:
                agreeing.add(shows)
    found.reasons += differing
    if agreeing and found.state == "measured":
        found.state = "reproduced"
        found.reasons = [f"agrees with {name}" for name in sorted(agreeing)]
    return found


def sources_now(info: MethodInfo, task: Task) -> dict[str, str]:
    """Digests of all that a method's figures on a task hang on, as they are now: what a new record would carry."""
    found = plugins.source_digests(info, task)
    for role, backbone in (task.backbones | task.judges).items():
        found[f"backbone_{role}"] = backbones.digest(backbone)[: plugins.DIGITS]
    return found


def stale(record: Record, now: Mapping[str, str]) -> bool:
    """Whether the sources that a record was written from differ from these, as far as both are known."""
    return any(record.digests.get(name, digest) != digest for name, digest in now.items())
