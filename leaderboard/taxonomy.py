"""The taxonomy: which node of `taxonomy.json` each method and paper falls into, and its lists on docs/taxonomy.md.

A paper falls into every node that names one of its tags or its kind; one that falls into none goes by its track. A
method goes with its paper, or where a node names it. Whoever is left stands under "elsewhere": nobody is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stepmark.leaderboard import markup, survey_pages
from stepmark.leaderboard.coverage import CatalogueEntry
from stepmark.leaderboard.markup import chip, esc, link
from stepmark.leaderboard.pages import Board

from stepmark.plugins import MethodInfo

ELSEWHERE = "elsewhere"


class Node(NamedTuple):
    """A node: what its methods save, what puts a paper into it, and methods without a paper in the catalogue."""

    id: str
    title: str
    saves: str
    description: str
    tags: list[str]
    kinds: list[str]
    tracks: list[str]
    methods: list[str]


def nodes(path: Path | None = None) -> list[Node]:
    """Every node, in the order of the file.

    Raises:
        ValueError: a file that holds anything else, or two nodes of one id.
    """
    path = path or Path(__file__).with_name("taxonomy.json")
    try:
        found = [Node(**each) for each in json.loads(path.read_text(encoding="utf-8"))["nodes"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}; a node has {', '.join(Node._fields)}") from None
    if len({node.id for node in found}) != len(found):
        raise ValueError(f"{path}: two nodes have one id")
    return found


def saves(names: Sequence[str], known: Sequence[Node], up: str) -> str:
    """What those who fall into some nodes save, as HTML; "" for none."""
    chosen = [node for node in known if node.id in names]
    said = "; ".join(f"{esc(node.saves)} ({esc(node.title)})" for node in chosen)
    return f"{said}. {link(f'{up}taxonomy.html', 'Taxonomy')}" if chosen else ""


def of_paper(entry: CatalogueEntry, known: Sequence[Node]) -> list[str]:
    """The nodes that a paper falls into, by tag or kind, else by track."""
    found = [node.id for node in known if entry.kind in node.kinds or not set(entry.tags).isdisjoint(node.tags)]
    return found or [node.id for node in known if entry.track in node.tracks]


def of_method(info: MethodInfo, papers: Mapping[str, CatalogueEntry], known: Sequence[Node]) -> list[str]:
    """The nodes that a method falls into: those that name it, and those of its paper."""
    named = [node.id for node in known if info.id in node.methods]
    entry = papers.get(info.paper.id) if info.paper else None
    return list(dict.fromkeys([*named, *(of_paper(entry, known) if entry else [])]))


def place(found: Board, known: Sequence[Node]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Node -> live methods, node -> papers; those in no node under `ELSEWHERE`."""
    papers = {each.entry.id: each.entry for each in found.covered}
    methods: dict[str, list[str]] = {node.id: [] for node in known} | {ELSEWHERE: []}
    entries: dict[str, list[str]] = {node.id: [] for node in known} | {ELSEWHERE: []}
    for name in sorted({row.method for row in found.rows if row.measured}):
        info = found.methods.get(name)
        if info is not None and info.base is not None:
            continue  # its method stands for it
        for node in (of_method(info, papers, known) if info else []) or [ELSEWHERE]:
            methods[node].append(name)
    for entry in papers.values():
        for node in of_paper(entry, known) or [ELSEWHERE]:
            entries[node].append(entry.id)
    return methods, entries


def fill(text: str, found: Board) -> str:
    """docs/taxonomy.md with its lists in place of `<!-- node ID -->`, `<!-- surveys -->` and `<!-- elsewhere -->`.

    Raises:
        ValueError: the text names a node that is not there, or leaves one out, or the surveys.
    """
    known = {node.id: node for node in nodes()}
    methods, entries = place(found, list(known.values()))
    asked = re.findall(r"<!-- node ([a-z_]+) -->", text)
    if sorted(asked) != sorted(known) or "<!-- elsewhere -->" not in text:
        wrong = sorted(set(asked) ^ set(known)) or asked
        raise ValueError(f"docs/taxonomy.md and leaderboard/taxonomy.json do not name the same nodes: {wrong}")
    if "<!-- surveys -->" not in text:
        raise ValueError("docs/taxonomy.md has no place for the surveys: <!-- surveys -->")

    def lists(name: str) -> str:
        node = known.get(name)
        head = f'<p class="sm-range">{esc(node.description)}</p>' if node else ""
        return head + _methods(found, methods[name]) + _papers(found, entries[name])

    text = re.sub(r"<!-- node ([a-z_]+) -->", lambda m: f'<div class="sm-node">{lists(m[1])}</div>', text)
    text = text.replace("<!-- surveys -->", f'<div class="sm-node">{survey_pages.listing(found)}</div>')
    return text.replace("<!-- elsewhere -->", f'<div class="sm-node">{lists(ELSEWHERE)}</div>')


def _methods(found: Board, names: Sequence[str]) -> str:
    if not names:
        return '<p class="sm-note">No live method.</p>'
    items = []
    for name in names:
        info = found.methods.get(name)
        title = esc(info.title) if info else "not in this checkout"
        items.append(f"<li>{link(f'methods/{name}.html', name)}: {title}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _papers(found: Board, ids: Sequence[str]) -> str:
    if not ids:
        return ""
    wanted = set(ids)
    items = []
    for each in found.covered:
        if each.entry.id in wanted:
            mark = chip(each.status, markup.COVERAGE_MOOD[each.status])
            year = f", {esc(each.entry.year)}" if each.entry.year else ""
            items.append(f"<li>{link(f'papers/{each.entry.id}.html', each.entry.title)}{year} {mark}</li>")
    count = "1 paper" if len(items) == 1 else f"{len(items)} papers"
    return (
        f"<details data-search-exclude><summary>{count} of the catalogue</summary><ul>{''.join(items)}</ul></details>"
    )
