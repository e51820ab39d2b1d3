"""Small pieces of HTML. Every text that does not come from this repository's own code passes through `esc`."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stepmark.leaderboard.equations import typeset
from stepmark.leaderboard.estimates import Estimate, figure


def esc(text: object) -> str:
    """Text for HTML and for attributes. Control characters go: Markdown uses some of them as its own marks."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", "\N{REPLACEMENT CHARACTER}", str(text))
    return html.escape(clean, quote=True).replace("\n", "&#10;")


def heading(text: str) -> str:
    """Text for a heading of Markdown: nothing in it is a mark."""
    clean = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text)
    return re.sub(r"([\\`*_{}\[\]()#+.!-])", r"\\\1", html.escape(clean, quote=False))


class Cell(NamedTuple):
    """A table cell: HTML, the value it is sorted by (None: its text), whether it is a number."""

    html: str
    value: float | str | None = None
    number: bool = False


def number(x: float | None, why: str | None = None, unit: str = "") -> Cell:
    """A figure, or a dash with the reason why it is null."""
    if x is None:
        return Cell(f'<span title="{esc(why)}">–</span>' if why else "–", "", True)
    return Cell(figure(x) + unit, x, True)


def estimate(e: Estimate | None, unit: str = "", why: str | None = None) -> Cell:
    """A figure with its 95 % interval."""
    if e is None:
        return number(None, why)
    return Cell(
        f'{figure(e.value)}{unit} <span class="sm-range">[{figure(e.low)}, {figure(e.high)}]</span>', e.value, True
    )


def text(content: object) -> Cell:
    """Plain text."""
    return Cell(esc(content))


class Line(NamedTuple):
    """A table row: its cells (the first is its head), its rung for the filter, whether it is set back, more to filter
    by (each value a list parted by commas), whether it is of a variant, which stands below its method.
    """

    cells: Sequence[Cell]
    rung: int | None = None
    weak: bool = False
    marks: Mapping[str, str] = {}
    variant: bool = False


def table(
    head: Sequence[str],
    lines: Sequence[Line],
    label: str,
    searched: bool = False,
    picks: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
) -> str:
    """A table that scrolls inside its box; the script makes it sortable and filterable. `head` is plain text.

    `picks` are those `marks` of the lines that get a choice of their own beside the filter; `hints` explain headings.
    Only a `searched` table is in the index of the site's search: figures would swamp it.
    """
    hints = hints or {}
    columns = [any(line.cells[i].number for line in lines) for i in range(len(head))]
    names = [(name, re.sub("([_/])", r"\1<wbr>", esc(name))) for name in head]  # long names may break
    titles = [f'<abbr title="{esc(hints[name])}">{text}</abbr>' if name in hints else text for name, text in names]
    top = "".join(f'<th scope="col"{_class(wide)}>{name}</th>' for name, wide in zip(titles, columns, strict=True))
    body = []
    for line in lines:
        cells = []
        for i, cell in enumerate(line.cells):
            own = f"{cell.value:.9g}" if isinstance(cell.value, float) else cell.value
            # A cell without a value of its own is sorted by its text.
            value = "" if own is None or str(own) == cell.html else f' data-v="{esc(own)}"'
            tag = 'th scope="row"' if i == 0 else "td"
            cells.append(f"<{tag}{_class(cell.number)}{value}>{cell.html}</{tag.split()[0]}>")
        rung = "" if line.rung is None else f' data-rung="{line.rung}"'
        rung += "".join(f' data-{name}="{esc(value)}"' for name, value in line.marks.items())
        kinds = " ".join(["sm-weak"] * line.weak + ["sm-variant"] * line.variant)
        kinds = f' class="{kinds}"' if kinds else ""
        body.append(f"<tr{rung}{kinds}>{''.join(cells)}</tr>")
    hidden = "" if searched else " data-search-exclude"
    chosen = f' data-picks="{" ".join(picks)}"' if picks else ""
    return (
        f'<div class="sm-scroll" tabindex="0" role="region" aria-label="{esc(label)}"{hidden}>\n'
        f'<table class="sm-table"{chosen}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n' + "\n".join(body) + "\n</tbody>\n"
        "</table>\n</div>"
    )


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def chip(word: str, mood: str = "", title: str = "") -> str:
    """A short state. `mood` is good, bad, open or nothing."""
    kind = f"sm-chip sm-{mood}" if mood else "sm-chip"
    hint = f' title="{esc(title)}"' if title else ""
    return f'<span class="{kind}"{hint}>{esc(word)}</span>'


def tally(counted: Mapping[str, int], moods: Mapping[str, str]) -> str:
    """How many there are of each state, in the order of `moods`."""
    have = [(state, counted[state]) for state in moods if counted.get(state)]
    return " ".join(f'<span class="sm-count">{n:,} {chip(state, moods[state])}</span>' for state, n in have)


VERDICT_MOOD = {
    "reproduced": "good",
    "not reproduced": "bad",
    "setting differs": "open",
    "inconclusive": "open",
    "not run": "",
}
TRUST_MOOD = {"claimed": "", "measured": "open", "reproduced": "good", "disputed": "bad"}
STATUS_MOOD = {"ok": "good", "incomplete": "open", "flagged": "bad", "failed": "bad", "skipped": ""}
COVERAGE_MOOD = {"live": "good", "not run": "open", "no plugin yet": ""}


def link(address: str, label: str) -> str:
    """A link; only https and relative addresses become one."""
    if not re.match(r"https://|[a-z0-9./_#-]+$", address):
        return esc(label)
    return f'<a href="{esc(address)}">{esc(label)}</a>'


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of (term, HTML)."""
    return '<dl class="sm-dl">' + "".join(f"<dt>{esc(k)}</dt><dd>{v}</dd>" for k, v in pairs) + "</dl>"


def code(content: str) -> str:
    """A block of code with line breaks kept."""
    return f"<pre><code>{esc(content)}</code></pre>"


# docstrings ---------------------------------------------------------------------------------------


def docstring(doc: str) -> str:
    """A docstring as HTML: paragraphs, lists, ``code``, and indented blocks as equations (see `equations`)."""
    blocks: list[str] = []
    for part in re.split(r"\n[ \t]*\n", doc.strip("\n")):
        lines = part.split("\n")
        while lines:
            kind = _kind(lines[0])
            listed = kind in {"item", "number"}
            size = 1
            while size < len(lines) and (_kind(lines[size]) == kind or (listed and lines[size][:1] == " ")):
                size += 1
            blocks.append(_block(kind, lines[:size]))
            lines = lines[size:]
    return '<div class="sm-doc">' + "\n".join(_joined(blocks)) + "</div>"


def _kind(line: str) -> str:
    if re.match(r"[-*] ", line):
        return "item"
    if re.match(r"\d{1,2}\. ", line):
        return "number"
    return "shown" if line.startswith(("  ", "\t")) else "text"


def _block(kind: str, lines: Sequence[str]) -> str:
    if kind == "shown":
        least = min(len(line) - len(line.lstrip()) for line in lines)
        inside = [line[least:] for line in lines]
        if re.match(r"\$ |>>> |stepmark ", inside[0]):
            return code("\n".join(inside))
        return '<div class="sm-eq">' + "".join(map(_equation, inside)) + "</div>"
    if kind in {"item", "number"}:
        mark = r"[-*]" if kind == "item" else r"\d{1,2}\."
        tag = "ul" if kind == "item" else "ol"
        items = re.split(rf"(?:^|\n){mark} ", "\n".join(lines))[1:]
        return f"<{tag}>" + "".join(f"<li>{_inline(' '.join(item.split()))}</li>" for item in items) + f"</{tag}>"
    paragraph = " ".join(" ".join(lines).split())
    return f"<p>{_inline(re.sub(r'::$', ':', paragraph))}</p>"


def _equation(line: str) -> str:
    """A line of an indented block. What stands far to the right of an equation is a remark on it."""
    deep = "\u2003" * ((len(line) - len(line.lstrip())) // 2)
    formula, *remarks = re.split(r"\s{3,}", re.sub(r"\s+(=|<-) ", r" \1 ", line.strip()))
    beside = "".join(f'<span class="sm-range">{typeset(esc(remark))}</span>' for remark in remarks)
    return f"<div><span>{deep}{typeset(esc(formula))}</span>{beside}</div>"


def _inline(content: str) -> str:
    parts = re.split(r"(`{1,2})([^`]+)\1", content)
    found = [typeset(esc(part)) for part in parts[::3]]
    codes = [f"<code>{esc(part)}</code>" for part in parts[2::3]]
    return "".join(text + code for text, code in zip(found, [*codes, ""], strict=True))


JOINS = (
    ("</ul>", "<ul>", ""),
    ("</ol>", "<ol>", ""),
    ("</div>", '<div class="sm-eq">', ""),
    ("</code></pre>", "<pre><code>", "&#10;&#10;"),
)


def _joined(blocks: Sequence[str]) -> list[str]:
    """Neighbouring lists and neighbouring indented blocks, parted by blank lines only, as one."""
    found: list[str] = []
    for block in blocks:
        for end, start, between in JOINS:
            if found and found[-1].endswith(end) and block.startswith(start):
                found[-1] = found[-1].removesuffix(end) + between + block.removeprefix(start)
                break
        else:
            found.append(block)
    return found
