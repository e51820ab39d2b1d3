"""Claims: what papers boast of, what the records say of it, and the table of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stepmark.leaderboard import markup
from stepmark.leaderboard.estimates import figure
from stepmark.leaderboard.markup import Cell, Line, chip, esc, link, table
from stepmark.leaderboard.pages import Board, element, slug
from stepmark.leaderboard.rows import Place
from stepmark.leaderboard.verdicts import claim_task

from stepmark import claims
from stepmark.method import Claim
from stepmark.plugins import MethodInfo

PICKS = ("track", "headline", "setting", "verdict")
MOST = 8  # measured values that a cell shows; the rest stand in the records

HOW = (
    "Reproduced: holds in at least 95 % of bootstrap draws over seeds, trainings and items; not reproduced: in at most "
    "5 %; else inconclusive, as is whatever rests on a single training. Setting differs: it fails in a setting that is "
    "not the paper's, which says nothing about the paper."
)


def of_method(found: Board, info: MethodInfo, up: str) -> str:
    """Every claim of a plugin with its verdict, the share of draws it holds in, and the values behind it."""
    places = {place for _, by_place in found.verdicts[info.id] for place in by_place}
    lines = []
    for claim, by_place in found.verdicts[info.id]:
        task = claim_task(claim, info)
        where = Cell(link(f"{up}tasks/{slug(task)}.html", task) if task in found.tasks else esc(task))
        for place, verdict in by_place.items() or [(None, None)]:
            machine = [markup.text(place or "–")] if len(places) > 1 else []
            lines.append(Line([_said(claim), *_judged(verdict), where, *machine]))
    head = ("The paper says", "Verdict", "Holds in", "Measured", "Task", *(["Machine"] if len(places) > 1 else []))
    measured = f" Measured on {esc(next(iter(places)))}." if len(places) == 1 else ""
    return table(head, lines, f"Claims of {info.id} and verdicts") + f'<p class="sm-note">{HOW}{measured}</p>'


def _said(claim: Claim) -> Cell:
    """The claim in words and as a sentence, headlines marked."""
    mark = chip("headline", "open", "what the paper's abstract boasts of") + " " if claim.headline else ""
    check = f'<code class="sm-check">{esc(claim.check)}</code>'
    return Cell(f"{mark}{esc(claim.says)}<br>{check}", claim.says)


def _judged(verdict: claims.Verdict | None) -> list[Cell]:
    """Verdict, share of the draws, and what was measured with what has to be read beside it."""
    state = verdict.state if verdict else "not run"
    fraction = verdict.fraction if verdict else None
    share = Cell("–", "", True) if fraction is None else Cell(f"{100 * fraction:.1f} %", fraction, True)
    values = [f"{k} = {figure(v)}" for k, v in verdict.values.items()] if verdict else []
    shown = ", ".join(values[:MOST]) + (f" and {len(values) - MOST} more" if len(values) > MOST else "")
    why = esc(shown or (verdict.text if verdict else "no records of this method"))
    notes = "".join(f'<br><span class="sm-range">{esc(note)}</span>' for note in (verdict.notes if verdict else ()))
    return [Cell(chip(state, markup.VERDICT_MOOD[state]), state), share, Cell(why + notes)]


def page(found: Board) -> list[str]:
    """Every claim of every paper, to be filtered; headlines counted apart."""
    lines, headlines, bare = [], Counter[str](), []
    for info in found.methods.values():
        judged = found.verdicts[info.id]
        rows = {each.entry.id for each in found.covered}
        if info.base is None and info.paper and info.paper.id in rows and not any(c.headline for c, _ in judged):
            bare.append(info)
        for claim, by_place in judged:
            verdict = _best(by_place)
            state = verdict.state if verdict else "not run"
            headlines[state] += claim.headline
            marks = {
                "track": info.track,
                "headline": "headline" if claim.headline else "further",
                "setting": "another" if claim.setting else "the paper's",
                "verdict": state,
            }
            name = Cell(link(f"methods/{info.id}.html", info.id), info.id)
            verdict_cell, share, measured = _judged(verdict)
            lines.append(Line([name, verdict_cell, share, _said(claim), measured], marks=marks))
    told = markup.tally(headlines, markup.VERDICT_MOOD) or "none stated yet"
    missing = [f"{link(f'methods/{i.id}.html', i.id)} ({esc(i.unclaimed or 'not stated yet')})" for i in bare]
    return [
        element("p", f"Headline claims, what the abstracts boast of: {told}.") + _missing(missing),
        table(("Method", "Verdict", "Holds in", "The paper says", "Measured"), lines, "Claims", picks=PICKS),
        f'<p class="sm-note">{HOW} {link("claims-and-trust.html", "The language, and what a verdict needs")}.</p>',
    ]


def _best(by_place: dict[Place, claims.Verdict]) -> claims.Verdict | None:
    return next(iter(by_place.values()), None)


def _missing(missing: Sequence[str]) -> str:
    """The papers that state no headline, with their reasons, folded away."""
    if not missing:
        return ""
    return f"<details><summary>{len(missing)} papers state none</summary><p>{', '.join(missing)}.</p></details>"
