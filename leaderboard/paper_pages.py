"""Paper pages: one for each paper of the catalogue, and the table of them all. Status and verdicts are computed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from urllib.parse import quote

from stepmark.leaderboard import claims_page, markup, survey_pages, taxonomy
from stepmark.leaderboard.coverage import CatalogueEntry, Covered
from stepmark.leaderboard.markup import Cell, Line, chip, esc, link, table
from stepmark.leaderboard.pages import Board, crumbs, element, slug, verdict_counts, words
from stepmark.leaderboard.surveys import Survey
from stepmark.leaderboard.trust import Standing
from stepmark.leaderboard.verdicts import tally

from stepmark.plugins import MethodInfo

RELATED = 8  # related papers on a page
PICKS = ("track", "kind", "status", "verdict", "year", "tag")
HEAD = ("Paper", "Year", "Track", "Kind", "Status", "Claims", "Tags", "Links")


def links(entry: CatalogueEntry, infos: Sequence[MethodInfo] = ()) -> list[str]:
    """Where a paper and its code are; what the catalogue lacks is taken from the plugins."""
    papers = [info.paper for info in infos if info.paper]
    arxiv = entry.arxiv or next((paper.arxiv for paper in papers if paper.arxiv), None)
    code = entry.code or next((paper.code for paper in papers if paper.code), None)
    address = next((paper.url for paper in papers if paper.url), None)
    found = [link(f"https://arxiv.org/abs/{arxiv}", f"arXiv:{arxiv}")] if arxiv else []
    found += [link(address, "publisher")] if address and not arxiv else []
    found += [link(f"https://github.com/{code}", "code")] if code else []
    return found


# the table --------------------------------------------------------------------------------------


def index(found: Board) -> list[str]:
    """Every paper with its computed status; the script makes choices of what the lines are marked with."""
    lines = []
    status = list(markup.COVERAGE_MOOD)
    for each in sorted(found.covered, key=lambda each: status.index(each.status)):  # what is live first
        entry = each.entry
        byline = f'<br><span class="sm-range">{esc(entry.byline)}</span>' if entry.byline else ""
        cells = [
            Cell(link(f"papers/{entry.id}.html", entry.title) + byline, entry.title),
            Cell(str(entry.year or "–"), entry.year or "", True),
            markup.text(words(entry.track)),
            markup.text(entry.kind),
            Cell(chip(each.status, markup.COVERAGE_MOOD[each.status]), each.status),
            verdict_counts(each.states),
            markup.text(", ".join(entry.tags)),
            Cell(" ".join(links(entry, each.infos)) or "–"),
        ]
        marks = {
            "track": entry.track,
            "kind": entry.kind,
            "status": each.status,
            "verdict": ",".join(state for state in markup.VERDICT_MOOD if each.states[state]),
            "year": str(entry.year or ""),
            "tag": ",".join(entry.tags),
        }
        lines.append(Line(cells, marks=marks))
    known = {each.entry.id for each in found.covered}
    more = [info for info in found.methods.values() if info.base is None and info.paper and info.paper.id not in known]
    parts = [
        element(
            "p",
            "Every paper that Stepmark means to cover. The status is computed: <b>live</b> has a plugin with records, "
            "<b>not run</b> has a plugin without, the others wait for theirs; a survey is live as soon as a paper that it "
            "orders is. "
            f"{link('taxonomy.html', 'The same papers by what they save')}.",
        ),
        table(HEAD, lines, "Papers", searched=True, picks=PICKS),
    ]
    if more:
        items = ", ".join(link(f"methods/{info.id}.html", info.id) for info in more)
        parts.append(element("p", f"Also implemented, as baselines and relatives: {items}."))
    parts.append("Missing a paper? Its plugin is [one file](add-a-method.md).")
    return parts


# a page -----------------------------------------------------------------------------------------


def paper_page(
    found: Board,
    each: Covered,
    related: Sequence[tuple[Covered, list[str]]],
    nodes: Sequence[taxonomy.Node] = (),
    ordering: Sequence[Survey] = (),
) -> list[str]:
    """One paper: what it reports, what Stepmark measured for its claims, its plugins, its relatives; of a survey among
    `ordering` how it orders the others."""
    entry = each.entry
    parts = [crumbs(("../papers.html", "Papers"), (f"{entry.id}.html", entry.title)), _facts(each, nodes)]
    parts += ["## What the paper reports", _reported(entry)]
    survey = next((survey for survey in ordering if survey.id == entry.id and entry.kind == "survey"), None)
    if survey:
        parts += survey_pages.section(found, survey)
    if each.infos or not survey:  # there is nothing to measure in a survey
        parts += ["## What Stepmark measured", *_measured(found, each)]
    if related:
        parts += ["## Related papers", _related(related)]
    return parts


def _facts(each: Covered, nodes: Sequence[taxonomy.Node]) -> str:
    entry = each.entry
    tags = ", ".join(f'<a href="../papers.html?tag={quote(tag)}">{esc(tag)}</a>' for tag in entry.tags)
    state = chip(each.status, markup.COVERAGE_MOOD[each.status])
    pairs = [
        ("Authors", esc(", ".join(entry.authors)) if entry.authors else "not in the catalogue"),
        ("Year", esc(entry.year) if entry.year else "not in the catalogue"),
        *([("Published", esc(entry.reference))] if entry.reference else []),
        ("Links", ", ".join(links(entry, each.infos)) or "none known"),
        ("Track and kind", f"{esc(words(entry.track))}, {esc(entry.kind)}"),
        ("Tags", tags or "none"),
        *([("Saves", saved)] if (saved := taxonomy.saves(taxonomy.of_paper(entry, nodes), nodes, "../")) else []),
        ("Status", f"{state} {verdict_counts(each.states).html if each.states else ''}"),
    ]
    return markup.definitions(pairs)


def _reported(entry: CatalogueEntry) -> str:
    if not entry.headline:
        return element("p", "The catalogue holds no figure of this paper.")
    items = "".join(f"<li>{esc(figure)}</li>" for figure in entry.headline)
    note = element("p", "The paper's own figures, each with its setting, noted briefly by hand.", "sm-note")
    return f"<ul>{items}</ul>{note}"


def _measured(found: Board, each: Covered) -> list[str]:
    if not each.infos:
        return [
            element(
                "p",
                f"Nothing yet: no plugin carries the id <code>{esc(each.entry.id)}</code>. "
                f"{link('../add-a-method.html', 'A plugin is one file')}.",
                "sm-empty",
            )
        ]
    parts = []
    for info in (info for info in each.infos if info.base is None):
        title = f"{link(f'../methods/{info.id}.html', info.id)}: {esc(info.title)}"
        parts.append(element("p", title))
        trust = standing_list(found, info.id, "../")
        parts.append(trust or element("p", "Not run yet.", "sm-empty"))
        if info.claims:
            parts.append(claims_page.of_method(found, info, "../"))
        else:
            parts.append(element("p", "The plugin states no claim.", "sm-note"))
        variants = [variant for variant in each.infos if variant.base == info.id]
        if variants:
            parts.append(element("p", "Controls and ablations in the same file, each with a page of its own:"))
            parts.append(variants_table(found, variants, "../methods/"))
            for variant in variants:
                if variant.claims:
                    parts.append(element("p", f"Claims about {link(f'../methods/{variant.id}.html', variant.id)}:"))
                    parts.append(claims_page.of_method(found, variant, "../"))
    return parts


def variants_table(found: Board, variants: Sequence[MethodInfo], up: str) -> str:
    """The variants of a method, what each changes, and how far it has been measured."""
    lines = []
    for info in variants:
        rows = found.by_method.get(info.id, [])
        overrides = ", ".join(f"{name} = {value!r}" for name, value in info.overrides.items())
        cells = [
            Cell(link(f"{up}{info.id}.html", info.id), info.id),
            markup.text(info.says),
            Cell(f"<code>{esc(overrides)}</code>" if overrides else "–", overrides),
            markup.number(len({row.task for row in rows if row.measured})),
            verdict_counts(tally(found.verdicts[info.id])),
        ]
        lines.append(Line(cells))
    return table(("Variant", "What is different", "In its source", "Tasks measured", "Claims"), lines, "Variants")


def standing_list(found: Board, method: str, up: str) -> str:
    """Trust in a method on every task it ran, with the reasons; "" where it has not run."""
    items = []
    for (name, task_id), state in found.standings.items():
        if name == method:
            mark = chip(state.state, markup.TRUST_MOOD[state.state])
            items.append(f"<li>{link(f'{up}tasks/{slug(task_id)}.html', task_id)}: {mark} {esc(why(state))}</li>")
    return f'<ul class="sm-trust">{"".join(items)}</ul>' if items else ""


def trust_on_task(found: Board, task_id: str) -> str:
    """Trust in every method on a task, with the reasons; what is disputed stands open."""
    states = {name: state for (name, task), state in found.standings.items() if task == task_id}
    if not states:
        return ""
    count = Counter(state.state for state in states.values())
    said = ", ".join(f"{count[state]} {state}" for state in markup.TRUST_MOOD if count[state])
    items = [
        f"<li>{link(f'../methods/{name}.html', name)}: {chip(state.state, markup.TRUST_MOOD[state.state])} "
        f"{esc(why(state))}</li>"
        for name, state in sorted(states.items(), key=lambda pair: (pair[1].state != "disputed", pair[0]))
    ]
    shown = " open" if count["disputed"] else ""
    return f"<details{shown}><summary>Trust: {said}</summary><ul>{''.join(items)}</ul></details>"


def why(state: Standing) -> str:
    """The reasons of a trust state. Untrusted text."""
    plain = {"claimed": "only the paper says so", "measured": "one run, which nobody has repeated"}
    return state.said or plain.get(state.state, "")


def _related(related: Sequence[tuple[Covered, list[str]]]) -> str:
    items = []
    for other, shared in related:
        entry = other.entry
        mark = chip(other.status, markup.COVERAGE_MOOD[other.status])
        year = f", {esc(entry.year)}" if entry.year else ""
        items.append(
            f"<li>{link(f'{entry.id}.html', entry.title)}{year} {mark} "
            f'<span class="sm-range">{esc(", ".join(shared))}</span></li>'
        )
    return f"<ul>{''.join(items)}</ul>"


def relatives(covered: Sequence[Covered]) -> dict[str, list[tuple[Covered, list[str]]]]:
    """Paper id -> the papers that share most of its tags, rare tags weighing more, and the tags they share."""
    holders: dict[str, list[Covered]] = defaultdict(list)
    for each in covered:
        for tag in dict.fromkeys(each.entry.tags):
            holders[tag].append(each)
    found: dict[str, list[tuple[Covered, list[str]]]] = {}
    for each in covered:
        weight: Counter[str] = Counter()
        others: dict[str, tuple[Covered, list[str]]] = {}
        for tag in dict.fromkeys(each.entry.tags):
            for other in holders[tag]:
                if other is not each:
                    weight[other.entry.id] += 1_000_000 // len(holders[tag])  # whole numbers: ties are exact
                    others.setdefault(other.entry.id, (other, []))[1].append(tag)
        same = each.entry.track
        order = sorted(others, key=lambda name: (-weight[name], others[name][0].entry.track != same, name))
        found[each.entry.id] = [others[name] for name in order[:RELATED]]
    return found
