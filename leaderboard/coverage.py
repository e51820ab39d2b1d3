"""The catalogue of papers, and how far each has come."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from stepmark.leaderboard import surveys
from stepmark.leaderboard.rows import Row, index
from stepmark.leaderboard.verdicts import Verdicts, headlines, tally, verdicts

from stepmark.places import checkout
from stepmark.plugins import MethodInfo
from stepmark.scaffold import among_baselines, folder_of

Coverage = Literal["live", "not run", "no plugin yet"]


KINDS = ("method", "analysis", "benchmark", "survey", "system", "theory")


class CatalogueEntry(NamedTuple):
    """A paper of `leaderboard/catalogue.jsonl`: facts only, no abstract. null: not found. CONTRIBUTING.md tells the same.

    Attributes:
        id: small letters, digits and _; the id of the plugin and the name of its file.
        title, authors, year: as the paper has them, all authors by their full names.
        arxiv: the number alone, without a version.
        reference: where it was published, or another way to find it.
        kind: one of `KINDS`.
        track: what it makes cheaper: a track of this suite, or another field, which has no tasks yet.
        tags: its means, in small letters with hyphens; those that others use too make relatives and taxonomy nodes.
        code: owner/repo of the official code on GitHub.
        headline: what it boasts of, each figure with its setting, in words of our own; [] where it has none.
    """

    id: str
    title: str
    authors: list[str] | None
    year: int | None
    arxiv: str | None
    reference: str | None
    kind: str
    track: str
    tags: list[str]
    code: str | None
    headline: list[str]

    @property
    def byline(self) -> str:
        """All authors, or the first three and how many more."""
        names = self.authors or []
        return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


@dataclass
class Covered:
    """A paper, its plugins (variants after their method), and how far it has come. `states` counts the verdicts of the
    claims of all its plugins, each in its best covered place; `boasts` those of the headlines among them.
    """

    entry: CatalogueEntry
    infos: tuple[MethodInfo, ...]
    status: Coverage
    states: Counter[str]
    boasts: Counter[str]

    @property
    def info(self) -> MethodInfo | None:
        """The plugin that carries the paper's own name, else the first."""
        return next((info for info in self.infos if info.id == self.entry.id), next(iter(self.infos), None))


def catalogue(path: Path | None = None) -> list[CatalogueEntry]:
    """Every paper, in the order of the file.

    Raises:
        ValueError: a line that is no entry.
    """
    path = path or Path(__file__).with_name("catalogue.jsonl")
    found: list[CatalogueEntry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = CatalogueEntry(**json.loads(line))
            if not re.fullmatch(r"[a-z0-9][a-z0-9_]{0,63}", entry.id):
                raise ValueError("an id is made of lower-case letters, digits and underscores")
            if entry.kind not in KINDS:
                raise ValueError(f"kind {entry.kind!r} is none of {', '.join(KINDS)}")
            found.append(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}; an entry has {', '.join(CatalogueEntry._fields)}") from None
    return found


def blank(path: Path) -> str | None:
    """The line to fill in for the plugin at `path`; None where it needs none: elsewhere than among the papers of this
    checkout, or under the id of one."""
    root = checkout()
    if root is None or not path.resolve().is_relative_to((root / "methods").resolve()) or among_baselines(path):
        return None
    if path.stem in {entry.id for entry in catalogue()}:
        return None
    year, track = datetime.date.today().year, path.resolve().relative_to(folder_of(path)).parts[0]
    entry = CatalogueEntry(path.stem, "...", ["..."], year, None, None, "method", track, [], None, [])
    return json.dumps(entry._asdict(), ensure_ascii=False)


def covered(
    papers: Sequence[CatalogueEntry],
    infos: Mapping[str, MethodInfo],
    found: Sequence[Row],
    judged: Mapping[str, Verdicts] | None = None,
) -> list[Covered]:
    """Every paper with its computed status. Plugins belong to the paper that their `Paper.id` names, variants to that of
    their method. A plugin that has run makes its paper live; a control alone does not. A survey needs none: a live paper
    that stands in it makes it live. `judged` holds the verdicts by method (default: they are computed).
    """
    if judged is None:
        have = index(found)
        judged = {name: verdicts(info, found, have) for name, info in infos.items()}
    by_paper: dict[str, list[MethodInfo]] = defaultdict(list)
    for info in infos.values():
        paper = infos[info.base].paper if info.base is not None and info.base in infos else info.paper
        if paper:
            by_paper[paper.id].append(info)
    live = {row.method for row in found if row.measured}
    result: list[Covered] = []
    for entry in papers:
        mine = sorted(
            by_paper.get(entry.id, []), key=lambda info: (info.base or info.id, info.base is not None, info.id)
        )
        status: Coverage = "no plugin yet" if not mine else "not run"
        if any(info.id in live for info in mine if info.base is None):
            status = "live"
        states: Counter[str] = sum((tally(judged[info.id]) for info in mine), Counter())
        boasts: Counter[str] = sum((tally(headlines(judged[info.id])) for info in mine), Counter())
        result.append(Covered(entry, tuple(mine), status, states, boasts))
    known = {survey.id: survey for survey in surveys.surveys()}
    running = [each.entry for each in result if each.status == "live"]
    for each in result:
        survey = known.get(each.entry.id)
        if survey and each.entry.kind == "survey":
            standing = (entry for entry in running if surveys.orders(each.entry, entry))
            if any(place is not None for entry in standing for place in surveys.places(survey, entry)):
                each.status = "live"
    return result
