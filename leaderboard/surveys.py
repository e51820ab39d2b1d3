"""Surveys: how each orders the papers of its track. `surveys.json` holds the branches, in our own words; who stands where is
computed.

A survey has one axis or several that cross. On an axis a paper stands in the branch that names it, else in the first, in the
order of the file, that names its kind or one of its tags; `*` takes whoever is left. So each paper has one place on an axis,
or none, which the page says and the tests of this repository refuse.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from stepmark.leaderboard.coverage import CatalogueEntry  # which asks here whether a survey is live

REST = "*"


class Branch(NamedTuple):
    """A branch: what puts a paper into it. `papers` holds ids, for what tags cannot tell, or `REST`."""

    id: str
    title: str
    description: str
    tags: list[str]
    kinds: list[str]
    papers: list[str]


class Axis(NamedTuple):
    """A question that a survey asks of every paper, and its answers."""

    title: str
    branches: list[Branch]


class Survey(NamedTuple):
    """A paper of kind survey by its id, what it orders by in a sentence, and its axes."""

    id: str
    says: str
    axes: list[Axis]


def surveys(path: Path | None = None) -> list[Survey]:
    """Every survey that orders papers, in the order of the file.

    Raises:
        ValueError: a file that holds anything else, two surveys of one id, or an axis on which a branch, tag, kind or
            paper stands twice, so that a later one could never count, or whose rest is not the last branch.
    """
    path = path or Path(__file__).with_name("surveys.json")
    try:
        found = [
            Survey(each["id"], each["says"], [Axis(a["title"], [Branch(**b) for b in a["branches"]]) for a in each["axes"]])
            for each in json.loads(path.read_text(encoding="utf-8"))["surveys"]
        ]  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}; a branch has {', '.join(Branch._fields)}") from None
    if twice := _twice(survey.id for survey in found):
        raise ValueError(f"{path}: {', '.join(twice)} stands there twice")
    for survey in found:
        for axis in survey.axes:
            where = f"{path}: {survey.id}: {axis.title!r}"
            for field in ("id", "tags", "kinds", "papers"):
                values = [getattr(branch, field) for branch in axis.branches]
                flat = values if field == "id" else [each for value in values for each in value]
                if twice := _twice(flat):
                    raise ValueError(f"{where}: {', '.join(twice)} stands twice among {field}")
            if any(REST in branch.papers for branch in axis.branches[:-1]):
                raise ValueError(f"{where}: the branch that takes the rest is not the last")
    return found


def _twice(values: Iterable[str]) -> list[str]:
    return sorted(value for value, n in Counter(values).items() if n > 1)


def orders(own: CatalogueEntry, entry: CatalogueEntry) -> bool:
    """Whether a paper is among those that the survey `own` is to order: all of its track but surveys."""
    return entry.track == own.track and entry.kind != "survey"


def place(axis: Axis, entry: CatalogueEntry) -> str | None:
    """The id of the branch of an axis in which a paper stands; None for none."""
    named = next((branch.id for branch in axis.branches if entry.id in branch.papers), None)
    if named is not None:
        return named
    fitting = (
        branch.id
        for branch in axis.branches
        if REST in branch.papers or entry.kind in branch.kinds or not set(entry.tags).isdisjoint(branch.tags)
    )
    return next(fitting, None)


def places(survey: Survey, entry: CatalogueEntry) -> list[str | None]:
    """The place of a paper on every axis of a survey, in their order."""
    return [place(axis, entry) for axis in survey.axes]
