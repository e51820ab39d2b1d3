"""The board and the site, from synthetic records of the real schema: verdicts, groups, escaping, links, downloads."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from pyarrow import parquet
from rigs.records import few_seeds, whole
from stepmark.leaderboard import coverage, downloads, markup, site
from stepmark.leaderboard.estimates import times
from stepmark.leaderboard.fronts import COSTS, KEEP, Offer, Saving, front, offer
from stepmark.leaderboard.groups import grouped
from stepmark.leaderboard.rows import headline, newest, record_id
from stepmark.leaderboard.tables import compare, show
from stepmark.leaderboard.trust import Dispute, sources_now, stale, standing
from stepmark.leaderboard.verdicts import verdicts

from stepmark import __version__, plugins
from stepmark import record as record_files
from stepmark.record import Latency, Memory, Offline, Quality, Record

TASK = "class_to_image/digits_flow"
HOSTILE = (
    '<script>alert(1)</script> </td></table> [x](javascript:alert(2)) ![y](http://evil.example/p.png) "onload=" \x02'
)
PLUGIN = '''
from stepmark import Claim, Method, Paper


class Toy(Method):
    """{title}: a toy.

    Update (equation 7)::

        x_s = a <b>x</b> + eps
    """

    paper = Paper(id="{paper}", title="A title & more", authors="A. Author", year=2031, arxiv="3101.00001")
    tasks = ("{task}",)
    baselines = {baselines}
    claims = ({claims})
'''


def known() -> tuple[str, int, int, int]:
    """(metric, and three rungs) of the task under test, whose metric must be one where lower is better."""
    task = plugins.tasks()[TASK][1]
    metric, higher = headline(task)
    assert not higher
    return metric, *sorted(task.rungs)[:3]


def make(method: str, rung: int, value: float, seed: int = 0, **fields: Any) -> Record:
    """A record whose metric reads `value`, with resamples that all methods share."""
    metric, *_ = known()
    task = plugins.tasks()[TASK][1]
    shared = np.random.default_rng(seed).normal(0, 0.02, 100)
    rounds = [float(rung * (0.5 if method == "toy_fast" else 1.0) + 0.01 * i) for i in range(9)]
    others = [float(rung + 0.01 * i) for i in range(9)]
    speedup = float(np.median(others) / np.median(rounds))
    full: dict[str, Any] = {
        "suite": __version__,
        "track": "image",
        "method": method,
        "task": TASK,
        "rung": rung,
        "seed": seed,
        "tier": "embedded",
        "machine": "test-cpu",
        "status": "ok",
        "counts": {"nfe": float(rung)} | ({"nfe_equivalent": rung * 1.5, "flops": 1e6} if seed == 0 else {}),
        "handles": {"teacher": {"calls": 2.0, "evaluations": float(rung)}},
        "reported": {"nfe": float(rung)},
        "quality": {metric: Quality(value=value, resamples=[value * (1 + float(x)) for x in shared])},
        "latency": Latency(
            items=10, median_ms=float(np.median(rounds)), iqr_ms=0.1, p95_ms=rounds[-1], samples_ms=rounds,
            baseline=None if method == "toy_base" else "toy_base", baseline_samples_ms=others,
            baseline_median_ms=float(np.median(others)),
            speedup=speedup, speedup_low=speedup * 0.9, speedup_high=speedup * 1.1,
        ) if seed == 0 else None,
        "memory": Memory(peak_mib=1.25, how="tracker", state_mib=0.5) if seed == 0 else None,
        "offline": Offline(seconds=3.5, evaluations={"teacher": 70.0}, state_mib=0.1, seed=seed, updates=30.0),
        "reasons": {"energy": f"no counter {HOSTILE}"},
        "outputs": "ab" * 16,
        "digests": {"task": hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode()).hexdigest()},
        "environment": {"cpu": HOSTILE},
        "command": f"stepmark run --method {method} {HOSTILE}",
        "created": "2031-01-02T03:04:05Z",
        "commit": "abcdef1",
    }  # fmt: skip
    return whole(Record(**(full | fields)))


def suite() -> list[Record]:
    """A baseline, a method that matches its best rung for less, one that is flagged, one cell that failed."""
    _, low, middle, high = known()
    records = []
    for seed in (0, 1):
        for rung, value in ((low, 3.0), (middle, 2.0), (high, 1.0)):
            records.append(make("toy_base", rung, value, seed))
        for rung, value in ((low, 2.9), (middle, 0.9), (high, 0.8)):
            records.append(make("toy_fast", rung, value, seed))
        records.append(make("toy_cheat", low, 0.1, seed, status="flagged", flags=[HOSTILE]))
        records.append(
            make(
                "toy_cheat", high, 0.1, seed, status="failed", message=f"=HYPERLINK {HOSTILE}", quality={}, latency=None
            )
        )
    return records


def write(records: list[Record], root: Path) -> Path:
    """Records as files below a results folder."""
    for each in records:
        record_files.append(record_files.path_of(root, each), each)
    return root


class Tag(NamedTuple):
    """A start tag with its attributes."""

    name: str
    attributes: dict[str, str]


class Page(HTMLParser):
    """Tags, ids and text of a page, and the text inside scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[Tag] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(Tag(tag, {name: value or "" for name, value in attrs}))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.text).append(data)

    @property
    def content(self) -> str:
        """All text, spaces joined."""
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Three plugins on one task, and no other, so that the test costs the same however many methods there are."""
    metric, low, middle, high = known()
    folder = tmp_path_factory.mktemp("methods") / "image"
    folder.mkdir()
    claims = (
        f'Claim("{metric}[toy_fast,{middle}] <= {metric}[toy_base,{high}]", says="holds <i>well</i>", headline=True),'
        f'Claim("{metric}[toy_fast,{low}] <= 0.5 * {metric}[toy_base,{low}]", says="does not hold"),'
        f'Claim("speedup[toy_fast,{low}] >= 1.5 and nfe[toy_fast,{low}] == {low}", says="twice as fast", setting="toys"),'
        f'Claim("{metric}[toy_cheat,{low}] <= 9", says="rests on a flagged record"),'
    )
    first = coverage.catalogue()[0].id
    for name, paper, baselines, stated in (
        ("toy_base", "toy_base", (), ""),
        ("toy_fast", first, ("toy_base",), claims),
        ("toy_cheat", "toy_cheat", ("toy_base",), ""),
    ):
        text = PLUGIN.format(title=name, paper=paper, task=TASK, baselines=repr(baselines), claims=stated)
        (folder / f"{name}.py").write_text(text)
    found = {path.stem: plugins.read_methods(path)[0] for path in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "methods", lambda: found)
        few_seeds(patch, 2)
        yield


@pytest.fixture(scope="module")
def built(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of `suite()`, built with --strict."""
    root = tmp_path_factory.mktemp("site")
    few = coverage.catalogue()[:20]  # pages of papers are all alike, and there are hundreds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "catalogue", lambda: few)
        home = site.build(write(suite(), root / "results"), root / "out")
    assert home.exists()
    return home.parent


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[str, Page]:
    """Every page by its path in the site."""
    return {path.relative_to(built).as_posix(): Page(path) for path in sorted(built.rglob("*.html"))}


# the board -------------------------------------------------------------------------------------


def test_rows_average_seeds_and_carry_an_interval(toys: None) -> None:
    metric, low, *_ = known()
    row = next(r for r in grouped([make("toy_base", low, 3.0, 0), make("toy_base", low, 5.0, 1)]))
    estimate = row.quality[metric]
    assert estimate.value == pytest.approx(4.0)
    assert 2.7 < estimate.low < 3.3  # a draw of two equal seeds is as low as the lower seed
    assert 4.7 < estimate.high < 5.3
    assert row.latency_ms is not None
    assert row.latency_ms.value == pytest.approx((low + 0.04) / 10)
    assert row.nfe_equivalent == low * 1.5


def also(patch: pytest.MonkeyPatch, name: str) -> None:
    """One toy more."""
    methods = plugins.methods()
    patch.setattr(plugins, "methods", lambda: methods | {name: replace(methods["toy_fast"], id=name)})


def test_groups_tell_apart_what_differs_and_leave_out_flags(toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    also(monkeypatch, "toy_same")
    _, low, *_ = known()
    found = grouped(
        [make("toy_base", low, 2.0, s) for s in (0, 1)]
        + [make("toy_fast", low, 1.0, s) for s in (0, 1)]
        + [make("toy_same", low, 2.0, s) for s in (0, 1)]
        + [make("toy_cheat", low, 0.1, s, status="flagged") for s in (0, 1)]
    )
    assert {row.method: row.group for row in found} == {
        "toy_fast": 1,
        "toy_base": 2,
        "toy_same": 2,
        "toy_cheat": None,
    }


def timed(rung: int, per_call: float, spread: float = 0.01) -> Latency:
    """A reading of nine rounds about `per_call` ms."""
    rounds = [per_call + spread * i for i in range(-4, 5)]
    return Latency(items=10, median_ms=per_call, iqr_ms=0.1, p95_ms=rounds[-1], samples_ms=rounds)


def test_every_axis_has_a_best_method_of_its_own(toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    also(monkeypatch, "toy_slow")
    _, low, middle, high = known()
    task = plugins.tasks()[TASK][1]
    deal = offer(grouped(suite()), task, plugins.methods())
    assert deal is not None
    assert (deal.baseline.method, deal.baseline.rung) == ("toy_base", high)
    saving = deal.saving("unit")
    assert saving is not None
    assert (saving.row.method, saving.row.rung) == ("toy_fast", middle)
    assert saving.factor.value == pytest.approx(high / middle)
    assert deal.saving("memory_mib") is None  # all take the same
    assert deal.saving("joules") is None  # nobody was read

    # Fewest evaluations, but slower than the baseline's best: a saving on one axis and none on the other.
    slow = [make("toy_slow", low, 0.9, s, latency=timed(low, 2.0 * high) if s == 0 else None) for s in (0, 1)]
    deal = offer(grouped([*suite(), *slow]), task, plugins.methods())
    assert deal is not None
    by_axis = {axis: deal.saving(axis) for axis in COSTS}
    assert {axis: s and s.row.method for axis, s in by_axis.items()} == {
        "unit": "toy_slow", "nfe_equivalent": "toy_slow", "latency_ms": "toy_fast",
    }  # fmt: skip
    time = by_axis["latency_ms"]
    assert time is not None
    assert time.factor.low < time.factor.value < time.factor.high
    assert deal.saving("unit", able=lambda row: row.method != "toy_slow") == saving_of("toy_fast", deal, middle, "unit")


def saving_of(method: str, deal: Offer, rung: int, axis: str) -> Saving:
    """The saving of a row that is known to be offered."""
    row = next(row for row in deal.keeping["same"] if (row.method, row.rung) == (method, rung))
    factor = deal.factor(row, axis)
    assert factor is not None
    return Saving(row, factor)


def test_what_may_be_chance_is_no_saving(toys: None) -> None:
    _, _, _, high = known()
    task = plugins.tasks()[TASK][1]
    base = [make("toy_base", high, 1.0, s, latency=timed(high, 10.0, 2.0) if s == 0 else None) for s in (0, 1)]
    near = [make("toy_fast", high, 0.9, s, latency=timed(high, 9.0, 2.0) if s == 0 else None) for s in (0, 1)]
    deal = offer(grouped([*base, *near]), task, plugins.methods())
    assert deal is not None
    row = deal.keeping["same"][0]
    factor = deal.factor(row, "latency_ms")
    assert factor is not None
    assert factor.low < 1 < factor.value  # faster by the medians, but the rounds overlap
    assert deal.saving("latency_ms") is None


def test_what_must_be_kept_is_a_test_or_a_share(toys: None) -> None:
    _, low, middle, high = known()
    task = plugins.tasks()[TASK][1]
    base = [make("toy_base", high, 1.0, s) for s in (0, 1)]
    others = [make("toy_fast", rung, value, s) for s in (0, 1) for rung, value in ((low, 1.15), (middle, 1.04))]
    deal = offer(grouped([*base, *others]), task, plugins.methods())
    assert deal is not None
    found = {keep: (saving := deal.saving("unit", keep)) and saving.row.rung for keep in KEEP}
    assert found == {"same": None, "5%": middle, "20%": low}  # the paired resamples tell 1.04 from 1
    variants = plugins.methods() | {
        "toy_fast": replace(plugins.methods()["toy_fast"], base="toy_base", says="an oracle")
    }
    alone = offer(grouped([*base, *others]), task, variants)
    assert alone is not None
    assert alone.saving("unit", "20%") is None  # a control is nobody's advice


def test_front_leaves_out_the_dominated(toys: None) -> None:
    metric, low, middle, high = known()
    best = front(grouped(suite()), "unit", metric, False)
    assert [(row.method, row.rung) for row in best] == [
        ("toy_fast", low),
        ("toy_fast", middle),
        ("toy_fast", high),
    ]


def test_verdicts(toys: None) -> None:
    found = verdicts(plugins.methods()["toy_fast"], grouped(suite()))
    states = [next(iter(by.values())).state for _, by in found]
    assert states == ["reproduced", "not reproduced", "reproduced", "not run"]
    last = next(iter(found[-1][1].values()))
    assert "flagged" in last.text


def test_standing_follows_from_second_runs_and_objections(toys: None) -> None:
    _, low, *_ = known()
    first = make("toy_base", low, 2.0)
    state = lambda *runs, objections=None: standing("toy_base", TASK, runs, objections or {}).state  # noqa: E731
    assert state() == "claimed"
    assert state(first) == "measured"
    assert state(first, replace_fields(first, machine="other-cpu")) == "reproduced"
    assert state(first, replace_fields(first, commit="1234567")) == "reproduced"
    assert state(first, replace_fields(first, created="2031-01-03T00:00:00Z")) == "measured"
    assert state(first, make("toy_base", low, 4.0, machine="other-cpu")) == "disputed"
    assert state(first, make("toy_base", low, 4.0, machine="other-cpu", digests={"task": "0" * 64})) == "measured"
    objection = Dispute(record_id(first), "too good", "https://example.org/1")
    assert state(first, objections={objection.record: objection}) == "disputed"
    others = [make("toy_base", low, 4.0 + i, machine=f"other-{i}") for i in range(5)]
    last = Dispute(record_id(others[-1]), "too bad", "https://example.org/2")
    found = standing("toy_base", TASK, [first, *others], {last.record: last})
    assert len(found.reasons) == 6
    assert "too bad" in found.said.split("; ")[0]
    assert found.said.endswith("; and 3 more")


def replace_fields(record: Record, **fields: Any) -> Record:
    """The record with other fields."""
    return record.model_copy(update=fields)


def test_newest_suite_only(toys: None) -> None:
    _, low, *_ = known()
    old, new = make("toy_base", low, 2.0, suite="0.9.0"), make("toy_base", low, 1.0, suite="0.10.0")
    assert newest([old, new]) == [new]


def test_show_and_compare(toys: None) -> None:
    _, low, middle, _ = known()
    table = show(suite()).splitlines()
    assert table[0].startswith(f"{TASK} v")
    line = next(text for text in table if text.split()[:1] == [str(middle)] and "toy_fast" in text)
    assert line.split()[:4] == [str(middle), "1", "toy_fast", "0.9"]
    assert any("failed: =HYPERLINK" in text for text in table)
    assert all(text.isprintable() for text in table)
    said = compare(suite(), "toy_fast", "toy_base")
    assert "toy_fast is better than toy_base in 3 of 3 comparisons" in said
    assert "Left out" not in said
    assert f"{low} " in said
    with pytest.raises(ValueError, match="no records of method 'nobody'"):
        compare(suite(), "toy_fast", "nobody")


def test_catalogue_is_well_formed(toys: None) -> None:
    entries = coverage.catalogue()
    assert len({entry.id for entry in entries}) == len(entries) >= 330
    assert all(entry.title and entry.track for entry in entries)
    covered = coverage.covered(entries, plugins.methods(), grouped(suite()))
    assert covered[0].status == "live"
    assert covered[0].states["reproduced"] == 2
    assert covered[0].boasts == {"reproduced": 1}
    assert {each.status for each in covered[1:]} == {"no plugin yet"}
    assert coverage.covered(entries, plugins.methods(), [])[0].status == "not run"


def test_a_changed_source_shows(toys: None) -> None:
    _, low, *_ = known()
    task, info = plugins.tasks()[TASK][1], plugins.methods()["toy_base"]
    current = plugins.source_digests(info, task)
    fresh = make("toy_base", low, 1.0, digests=current)
    assert not stale(fresh, sources_now(info, task))
    assert stale(make("toy_base", low, 1.0, digests=current | {"method": "0" * 64}), sources_now(info, task))
    assert stale(fresh, sources_now(info, replace(task, version=task.version + 1)))


def test_docstring_keeps_equations() -> None:
    html = markup.docstring("One.\n\nUpdate::\n\n    a = b < c\n\n    d = e\n\n- x ``y``\n  and z\n- w\n\nEnd.")
    assert '<div class="sm-eq"><div><span>a = b &lt; c</span></div><div><span>d = e</span></div></div>' in html
    assert "<ul><li>x <code>y</code> and z</li><li>w</li></ul>" in html
    assert html.count("<p>") == 3


# the built site --------------------------------------------------------------------------------


def test_no_asset_comes_from_the_network(built: Path, pages: dict[str, Page]) -> None:
    assert len(pages) > 10
    for name, page in pages.items():
        for tag in page.tags:
            for attribute in (
                "src",
                "data",
                "srcset",
                "poster",
                *(["href"] if tag.name in {"link", "use", "image"} else []),
            ):
                address = tag.attributes.get(attribute, "")
                assert not address.lower().startswith(("http:", "https:", "//")), (name, tag)
    sheets = [path.read_text() for path in built.rglob("*.css")]
    assert sheets
    assert not [sheet for sheet in sheets if "url(http" in sheet.replace('"', "") or "@import" in sheet]
    scripts = "".join(tag.attributes.get("src", "") for page in pages.values() for tag in page.tags)
    assert "assets/iframe-worker-shim.js" in scripts


def test_every_link_inside_leads_somewhere(built: Path, pages: dict[str, Page]) -> None:
    ids = {
        name: {t.attributes[a] for t in page.tags for a in ("id", "name") if a in t.attributes}
        for name, page in pages.items()
    }
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue
        for tag in page.tags:
            address = tag.attributes.get("href") or tag.attributes.get("src") or ""
            parts = urlsplit(address)
            if not address or parts.scheme or address.startswith("//"):
                continue
            target = (built / name).parent / unquote(parts.path) if parts.path else built / name
            if target.is_dir():
                target /= "index.html"
            inside = target.resolve().relative_to(built.resolve()).as_posix()
            if not target.exists() or (
                parts.fragment and inside in ids and unquote(parts.fragment) not in {*ids[inside], "__skip"}
            ):
                broken.append((name, address))
    assert not broken


def test_hostile_text_stays_text(pages: dict[str, Page]) -> None:
    seen = 0
    for name, page in pages.items():
        assert not [text for text in page.scripts if "alert(" in text], name
        for tag in page.tags:
            assert not [key for key in tag.attributes if key.startswith("on")], (name, tag)
            assert not tag.attributes.get("href", "").strip().lower().startswith("javascript:"), (name, tag)
            assert "evil.example" not in tag.attributes.get("src", "") + tag.attributes.get("href", ""), (name, tag)
        seen += "<script>alert(1)</script>" in page.content
    assert seen >= 4  # the home page, the track, and the pages of the methods say it as text


def test_verdicts_stand_beside_the_claims(pages: dict[str, Page]) -> None:
    text = pages["methods/toy_fast.html"].content
    after = text.index("holds <i>well</i>")
    assert " reproduced 100.0 % " in text[after : after + 200]
    after = text.index("does not hold")
    assert " not reproduced 0.0 % " in text[after : after + 200]
    assert "x s = a <b>x</b> + ε" in text  # set as an equation, and still text
    assert "stepmark run --method toy_fast" in text
    assert "70 of teacher" in text


def test_headlines_are_counted_apart_and_settings_can_be_picked(pages: dict[str, Page]) -> None:
    assert "what the abstracts boast of: 1 reproduced All claims that the plugins state: 2 reproduced" in (
        pages["index.html"].content
    )
    page = pages["claims.html"]
    (table,) = (tag for tag in page.tags if "data-picks" in tag.attributes)
    assert table.attributes["data-picks"].split() == ["track", "headline", "setting", "verdict"]
    said = [tag.attributes["data-setting"] for tag in page.tags if "data-setting" in tag.attributes]
    assert sorted(said) == ["another", "the paper's", "the paper's", "the paper's"]


def test_track_page_has_charts_and_reasons(built: Path, pages: dict[str, Page]) -> None:
    page = pages["tracks/image.html"]
    charts = [tag for tag in page.tags if tag.name == "img" and "data/charts/" in tag.attributes.get("src", "")]
    assert len(charts) == 3
    assert all("against" in tag.attributes["alt"] for tag in charts)
    drawing = Page(built / "tracks" / charts[0].attributes["src"])
    points = {
        tag.attributes["data-method"] for tag in drawing.tags if tag.name == "path" and "data-method" in tag.attributes
    }
    assert points == {"toy_base", "toy_fast", "toy_cheat"}
    identifiers = [tag.attributes["id"] for tag in page.tags if "id" in tag.attributes]
    assert len(identifiers) == len(set(identifiers))
    _, _, middle, high = known()
    assert f"{times(high / middle)} fewer evaluations with toy_fast at rung {middle}" in page.content
    assert "energy: no counter" in page.content


def kinds(name: str) -> Callable[[str], Any]:
    """The type of a column of the downloads."""
    whole = {"rung", "seed", "offline_seed"}
    return int if name in whole else str if name in downloads.TEXTS else float


def test_downloads_parse(built: Path) -> None:
    metric, *_ = known()
    lines = list(csv.DictReader((built / "data" / "image.csv").open(encoding="utf-8", newline="")))
    assert len(lines) == len(suite())
    assert {float(line[metric]) for line in lines if line[metric]} >= {3.0, 0.9}
    assert all(line["message"].startswith("'=") for line in lines if line["status"] == "failed")
    table = parquet.read_table(built / "data" / "image.parquet").to_pylist()
    assert [{name: value for name, value in line.items() if value is not None} for line in table] == [
        {name: kinds(name)(value) for name, value in line.items() if value} for line in lines
    ]
    entries = json.loads((built / "data" / "image.json").read_text(encoding="utf-8"))
    again = [Record.model_validate(entry) for entry in entries]
    assert {record_id(r) for r in again} == {line["id"] for line in lines} == {record_id(r) for r in suite()}


def test_a_site_without_records_says_so(toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = coverage.catalogue()[:2]
    monkeypatch.setattr(coverage, "catalogue", lambda: few)
    home = site.build(tmp_path / "nothing", tmp_path / "out")
    assert "No records yet" in Page(home).content
    assert "Not run yet" in Page(home.parent / "methods" / "toy_fast.html").content


def test_a_foreign_folder_is_not_cleared(toys: None, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "thesis.tex"
    kept.parent.mkdir()
    kept.write_text("years of work")
    with pytest.raises(ValueError, match="did not write"):
        site.build(tmp_path / "nothing", kept.parent)
    assert kept.read_text() == "years of work"
