"""Track pages and comparisons: whole ladders, effect sizes, data files; from synthetic records of the real schema."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rigs.records import few_seeds, whole
from stepmark.leaderboard import (
    charts,
    compare_page,
    coverage,
    fronts,
    ledger,
    method_pages,
    pages,
    picker,
    site,
    track_pages,
)
from stepmark.leaderboard.comparisons import comparisons
from stepmark.leaderboard.estimates import figure
from stepmark.leaderboard.fronts import COSTS, ladders, yardstick
from stepmark.leaderboard.groups import grouped
from stepmark.leaderboard.rows import training
from stepmark.leaderboard.tables import compare

from stepmark import __version__, plugins
from stepmark import record as record_files
from stepmark.method import Paper
from stepmark.record import Energy, Latency, Memory, Offline, Quality, Record
from stepmark.stats import standardised_difference

TASK = "class_to_image/digits_flow"
HOSTILE = "</script><script>alert(1)</script> \u2028 <img src=x onerror=alert(2)>"


def ladder() -> tuple[int, ...]:
    """The first three rungs of the task."""
    return tuple(sorted(plugins.tasks()[TASK][1].rungs)[:3])


def make(method: str, rung: int, value: float, seed: int = 0, **fields: Any) -> Record:
    """A record of the task's first metric (lower is better); noise is shared by methods but for a small own part."""
    metric = next(iter(plugins.tasks()[TASK][1].metrics))
    shared = np.random.default_rng(seed).normal(0, 0.02, 100)
    own = np.random.default_rng([seed, rung, *method.encode()]).normal(0, 0.005, 100)
    full: dict[str, Any] = {
        "suite": __version__, "track": "image", "method": method, "task": TASK, "rung": rung, "seed": seed,
        "tier": "embedded", "machine": "test-cpu", "status": "ok",
        "counts": {"nfe": float(rung), "nfe_equivalent": 1.5 * rung},
        "quality": {metric: Quality(value=value, resamples=[value * (1 + float(x)) for x in shared + own])},
        "latency": Latency(
            items=10, median_ms=10.0 * rung, iqr_ms=0.1, p95_ms=11.0 * rung,
            samples_ms=[10.0 * rung + max(i, -10 * rung) for i in range(-2, 3)],
        ),
        "memory": Memory(peak_mib=1.0 + rung, how="tracker", state_mib=0.0),
        "offline": Offline(seconds=2.5, evaluations={}, state_mib=0.0),
        "command": "stepmark run", "created": "2031-01-02T03:04:05Z",
    }  # fmt: skip
    return whole(Record(**(full | fields)))


def suite() -> list[Record]:
    """A baseline; one method that halves its cost; one that is worse; one trained; one flagged; a second machine."""
    low, middle, high = ladder()
    values = {
        "toy_base": {low: 4.0, middle: 2.0, high: 1.0},
        "toy_half": {low: 2.0, middle: 1.0, high: 0.9},
        "toy_worse": {low: 5.0, middle: 4.5, high: 4.4},
        "toy_trained": {low: 1.0},
    }
    records = []
    for machine in ("test-cpu", "other-cpu"):
        for seed in (0, 1):
            for method, by_rung in values.items():
                more: dict[str, Any] = {"machine": machine}
                if method == "toy_trained":
                    more["offline"] = Offline(seconds=60.0, evaluations={"teacher": 10.0}, state_mib=0.5)
                if machine == "other-cpu" and method == "toy_worse":
                    continue
                records += [make(method, rung, value, seed, **more) for rung, value in by_rung.items()]
            records.append(
                make("toy_cheat", low, 0.1, seed, machine=machine, status="flagged", flags=[HOSTILE], message=HOSTILE)
            )
    return records


@pytest.fixture(scope="module", autouse=True)
def toys() -> Iterator[Mapping[str, plugins.MethodInfo]]:
    """Plugins of these names, of which only the metadata matters."""
    path = next(iter(plugins.methods().values())).path
    paper = Paper(id=coverage.catalogue()[0].id, title="T", authors="A", year=2031)
    found = {
        name: plugins.MethodInfo(
            id=name, track="image", path=path, class_name="Toy", doc=f"{name}.", paper=paper, tasks=(TASK,),
            baselines=() if name == "toy_base" else ("toy_base",), claims=(),
        )
        for name in ("toy_base", "toy_half", "toy_worse", "toy_trained", "toy_cheat")
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "methods", lambda: found)
        few_seeds(patch, 2)
        yield found


def make_board(records: list[Record]) -> pages.Board:
    """What the pages are made from."""
    return pages.Board(ledger.of(records), plugins.methods(), plugins.tasks())


def read_script(path: Path, variable: str) -> Any:
    """The JSON that a data script assigns; fails on anything else in the file."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"window.{variable} = ")
    assert text.endswith(";\n")
    assert text.isascii()
    assert "<" not in text
    return json.loads(text.removeprefix(f"window.{variable} = ").removesuffix(";\n"))


# figures ----------------------------------------------------------------------------------------


def test_effect_size_is_cohens_d_of_paired_means() -> None:
    rng = np.random.default_rng(0)
    items = 400
    differences = rng.normal(0.3, 1.0, items)
    other = rng.normal(0, 5, items)
    index = rng.integers(0, items, (4000, items))
    a, b = (other + differences)[index].mean(axis=1), other[index].mean(axis=1)
    expected = differences.mean() / differences.std()
    assert standardised_difference(a, b, items) == pytest.approx(expected, rel=0.05)
    assert standardised_difference(b, a, items) == pytest.approx(-expected, rel=0.05)
    # Over seeds the spread is pooled: two seeds alike leave it as it was, and a constant shift has no unit.
    assert standardised_difference(np.stack([a, a]), np.stack([b, b]), items) == pytest.approx(expected, rel=0.05)
    assert standardised_difference(a + 1, a, items) is None
    assert standardised_difference(a, a, items) == 0.0
    with pytest.raises(ValueError, match="not paired"):
        standardised_difference(a, b[:-1], items)


def test_whole_ladders_against_the_baseline() -> None:
    low, middle, high = ladder()
    task = plugins.tasks()[TASK][1]
    rows = [row for row in grouped(suite()) if row.place.machine == "test-cpu"]
    stick = yardstick(rows, task, plugins.methods())
    assert stick is not None
    assert (stick.best.method, stick.best.rung, stick.worst) == ("toy_base", high, 4.0)
    assert stick.dearest == {"unit": high, "nfe_equivalent": 1.5 * high, "latency_ms": high}
    found = {each.method: each for each in ladders(rows, task, plugins.methods())}
    assert set(found) == {"toy_base", "toy_half", "toy_worse", "toy_trained"}  # not the flagged one
    assert found["toy_base"].matching == {"unit": high, "nfe_equivalent": 1.5 * high, "latency_ms": high}
    assert found["toy_half"].matching == {"unit": middle, "nfe_equivalent": 1.5 * middle, "latency_ms": middle}
    assert found["toy_worse"].matching == dict.fromkeys(COSTS)
    assert found["toy_trained"].matching["unit"] == low
    # By hand: quality 0 is 4.0, quality 1 is 1.0; strips from the cheapest rung on, up to the dearest of the baseline.
    decades = {rung: math.log10(high / rung) for rung in (low, middle, high)}
    assert found["toy_base"].area["unit"] == pytest.approx(decades[middle] * 2 / 3)
    assert found["toy_half"].area["unit"] == pytest.approx(decades[low] * 2 / 3 + decades[middle] * 1 / 3)
    assert found["toy_half"].area["nfe_equivalent"] == pytest.approx(found["toy_half"].area["unit"])
    assert found["toy_worse"].area["unit"] == 0.0
    assert found["toy_trained"].area["unit"] == pytest.approx(decades[low])


def test_without_baseline_or_cost_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    low, middle, _ = ladder()
    task = plugins.tasks()[TASK][1]
    monkeypatch.setattr(plugins, "tasks", lambda: {TASK: ("image", replace(task, seeds=1))})
    alone = grouped([make("toy_half", low, 1.0)])
    assert yardstick(alone, task, plugins.methods()) is None
    (only,) = ladders(alone, task, plugins.methods())
    assert set(only.matching.values()) == set(only.area.values()) == {None}
    untimed = [make("toy_base", r, v, latency=None) for r, v in ((low, 2.0), (middle, 1.0))]
    (base,) = ladders(grouped(untimed), task, plugins.methods())
    assert base.area["latency_ms"] is None
    assert base.area["unit"] is not None
    flat = [make("toy_base", rung, 1.0) for rung in (low, middle)]
    (level,) = ladders(grouped(flat), task, plugins.methods())
    assert level.area["unit"] is None


def test_training_follows_from_the_records() -> None:
    found = make_board(suite())
    assert found.training["toy_trained"] == "trained"
    assert found.training["toy_base"] == "none"
    searched = make(
        "toy_half", ladder()[0], 1.0, offline=Offline(seconds=9.0, evaluations={"teacher": 5.0}, state_mib=0.0)
    )
    assert training(grouped([searched])) == "calibrated"


# data files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(toys: Mapping[str, plugins.MethodInfo], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data files of `suite()`."""
    folder = tmp_path_factory.mktemp("data")
    found = make_board(suite())
    track_pages.write_data(found, "image", folder)
    compare_page.write_data(found, folder)
    return folder


def test_data_of_a_track_holds_every_row(data: Path) -> None:
    content = read_script(data / "ladders-image.js", "stepmarkLadders")
    assert list(content["axes"]) == list(charts.AXES)
    block = content["tasks"][TASK]
    assert json.loads((data / "ladders-class_to_image-digits_flow.json").read_text()) == block
    found = grouped(suite())
    assert len(block["rows"]["method"]) == len(found)
    assert {len(column) for column in block["rows"].values()} == {len(found)}
    assert [each["machine"] for each in block["places"]] == ["test-cpu", "other-cpu"]
    metric = next(iter(plugins.tasks()[TASK][1].metrics))
    by_key = {(row.place.machine, row.method, row.rung): row for row in found}
    for i, method in enumerate(block["rows"]["method"]):
        columns = {name: values[i] for name, values in block["rows"].items()}
        row = by_key[block["places"][columns["place"]]["machine"], block["methods"][method], columns["rung"]]
        assert columns["group"] == row.group
        assert columns["status"] == row.status
        assert columns[f"metric:{metric}:low"] == pytest.approx(row.quality[metric].low, rel=1e-5)
        assert columns["memory_mib"] == row.memory_mib
        assert columns["joules"] is None
        assert columns["offline_s"] == row.offline_s
    lines = list(csv.DictReader((data / "ladders-class_to_image-digits_flow.csv").open(encoding="utf-8", newline="")))
    assert len(lines) == len(found)
    cheat = next(line for line in lines if line["method"] == "toy_cheat")
    assert (cheat["status"], float(cheat[metric])) == ("flagged", 0.1)


def test_the_comparisons_are_those_of_the_terminal(data: Path) -> None:
    index = read_script(data / "compare.js", "stepmarkComparisons")
    assert [track["name"] for track in index["tracks"]] == ["image"]
    content = read_script(data / "compare-image.js", "stepmarkComparisons_image")
    names = content["methods"]
    assert names == sorted(plugins.methods())
    for a, b in permutations(names, 2):
        i, j = names.index(a), names.index(b)
        contrast = comparisons(suite(), a, b, "image")
        expected = contrast.tests
        pair = f"{min(i, j)},{max(i, j)}"
        stored = content["tiers"]["embedded"].get(pair, [])
        assert len(stored) == len(expected)
        left = content["left"]["embedded"].get(pair, [])
        assert {(names[method], status): n for method, status, n in left} == contrast.left_out
        assert bool(expected) != bool(left) == ("toy_cheat" in {a, b})
        sign = 1 if i < j else -1
        for (task, place, rung, difference, low, high, p, effect, ratio, won), test in zip(
            stored, expected, strict=True
        ):
            assert (content["tasks"][task]["name"], content["places"][place], rung) == (
                test.task,
                str(test.place),
                test.rung,
            )
            assert sign * difference == pytest.approx(test.difference, rel=1e-8)
            assert sorted((sign * low, sign * high)) == pytest.approx([test.low, test.high], rel=1e-8)
            assert p == pytest.approx(test.p, rel=1e-8)
            assert sign * effect == pytest.approx(test.effect, rel=1e-8)
            assert ratio**sign == pytest.approx(test.latency_ratio, rel=1e-8)
            assert {0: None, sign: a, -sign: b}[won] == test.winner


def test_the_terminal_shows_the_effect_size() -> None:
    table = compare(suite(), "toy_half", "toy_base")
    head, line = table.splitlines()[:2]
    test = comparisons(suite(), "toy_half", "toy_base").tests[0]
    assert "effect" in head
    assert figure(test.effect) in line.split()


def test_a_flagged_record_neither_wins_nor_counts() -> None:
    low, middle, _ = ladder()
    clean = [make(name, rung, value, s) for name, value in (("toy_base", 2.0), ("toy_half", 2.001)) for rung in (low, middle)
             for s in (0, 1)]  # fmt: skip
    spoilt = [
        r.model_copy(update={"status": "flagged", "flags": ["hides a forward"]})
        if (r.method, r.rung, r.seed) == ("toy_half", middle, 1)
        else r
        for r in clean
    ]
    before, after = (comparisons(runs, "toy_half", "toy_base") for runs in (clean, spoilt))
    assert [test.rung for test in before.tests] == [low, middle]
    assert [test.rung for test in after.tests] == [low]  # though one of two seeds is clean
    assert after.left_out == {("toy_half", "flagged"): 1}
    assert after.tests[0].p == comparisons([r for r in clean if r.rung == low], "toy_half", "toy_base").tests[0].p
    cheat = [make("toy_cheat", low, 0.1, s, status="flagged") for s in (0, 1)]
    said = compare([*clean, *cheat], "toy_cheat", "toy_base")
    assert "better" not in said
    assert said.endswith("Left out of the comparison: 1 where toy_cheat is flagged.")
    assert compare(spoilt, "toy_base", "toy_half").endswith("Left out of the comparison: 1 where toy_half is flagged.")


# reading ----------------------------------------------------------------------------------------


def test_many_processes_read_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = [r.model_copy(update={"suite": "0.0.9"}) for r in suite()[:6]]
    for each in [*suite(), *older]:
        record_files.append(record_files.path_of(tmp_path / "results", each), each)

    def told(found: ledger.Ledger, folder: Path) -> tuple[Any, ...]:
        rows = [(row.id, row.group, row.status, row.nfe, row.quality, row.latency_ms) for row in found.rows]
        standings = {key: (each.state, each.reasons) for key, each in found.standings.items()}
        versions = {suite: [row.id for row in mine] for suite, mine in found.versions.items()}
        files = [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir())]
        return rows, standings, versions, found.files, files

    alone = told(ledger.read(tmp_path / "results", folder=tmp_path / "alone"), tmp_path / "alone")
    assert list(alone[2]) == ["0.0.9", __version__]
    assert len(alone[4]) == 2 * len(alone[3]) == 10
    monkeypatch.setattr(ledger, "APART", 0)
    monkeypatch.setattr(ledger, "cores", lambda: 2)
    assert told(ledger.read(tmp_path / "results", folder=tmp_path / "apart"), tmp_path / "apart") == alone


@pytest.mark.parametrize("apart", [False, True])
def test_work_beside_is_done_or_fails_aloud(tmp_path: Path, apart: bool) -> None:
    with ledger.beside(partial((tmp_path / "done").write_text, "yes"), apart):
        pass
    assert (tmp_path / "done").read_text() == "yes"

    def fail() -> None:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"), ledger.beside(fail, apart):
        pass


# hostile records --------------------------------------------------------------------------------


def wild() -> list[Record]:
    """Records that the schema allows and that no measurement writes: what the board takes in of them, it survives."""
    low, middle, high = ladder()
    metric = next(iter(plugins.tasks()[TASK][1].metrics))
    huge = 1e308
    quality = {metric: Quality(value=huge, resamples=[huge, -huge] * 50)}
    timing = Latency(items=0, median_ms=huge, iqr_ms=0.0, p95_ms=0.0, samples_ms=[huge, huge])
    slow = Latency(items=1, median_ms=huge, iqr_ms=0.0, p95_ms=0.0, samples_ms=[huge, huge])
    return [
        make("toy_half", low, 1.0, 0, quality=quality),
        make("toy_half", low, 1.0, 1),
        make("toy_half", middle, 1.0, 0, counts={"nfe": 1e24, "nfe_equivalent": 1e24}, latency=timing),
        make("toy_half", middle, 1.0, 1, counts={"nfe": 0.0, "nfe_equivalent": 1e24}, latency=slow),
        make("toy_half", high, 1e-300, 0, memory=Memory(peak_mib=huge, how=HOSTILE, state_mib=huge)),
        make("toy_trained", low, 1.0, 0, counts={}, latency=None, memory=None, offline=None, quality={}),
        make("toy_trained", 10**12, 1.0, 0),
        make("toy_trained", middle, 1.0, 0, energy=Energy(joules=huge, idle_watts=None, window_s=0.0, sensor=HOSTILE)),
        make("toy_trained", high, 1.0, 0, latency=timing, offline=Offline(seconds=huge, evaluations={}, state_mib=huge)),
        make("toy_worse", middle, -huge, 0, quality={metric: Quality(value=-huge, resamples=[-huge] * 100)}),
        make("toy_worse", low, -huge, 0, quality={metric: Quality(value=-huge, resamples=[])}, reasons={"latency": HOSTILE}),
        make("toy_cheat", low, 0.1, 0, status="failed", message=HOSTILE, quality={}, counts={}, latency=None),
    ]  # fmt: skip


def test_hostile_records_neither_break_nor_deface(tmp_path: Path) -> None:
    found = make_board(suite()[:20] + wild())
    (tmp_path / "data").mkdir()
    track_pages.write_data(found, "image", tmp_path / "data")
    compare_page.write_data(found, tmp_path / "data")
    content = read_script(tmp_path / "data" / "ladders-image.js", "stepmarkLadders")
    text = json.dumps(content["tasks"])
    assert "1e+308" not in text
    assert "alert(1)" in text  # the flag is there, as text
    read_script(tmp_path / "data" / "compare-image.js", "stepmarkComparisons_image")
    page = "\n\n".join(track_pages.track_page(found, "image", tmp_path / "data") + compare_page.page(found))
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    drawings = list((tmp_path / "data" / "charts").glob("*.svg"))
    assert drawings
    assert not [path for path in drawings if "NaN" in path.read_text() or "alert" in path.read_text()]


def test_wild_records_reach_every_page_and_harm_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = coverage.catalogue()[:3]
    monkeypatch.setattr(coverage, "catalogue", lambda: few)
    root = plugins.checkout()
    assert root is not None
    low, middle, _ = ladder()
    odd = [
        make("toy_worse", low, 1.0, environment={"cpu": HOSTILE}, command=HOSTILE, digests={}, commit=None),
        make(
            "toy_worse", middle, 1.0, counts={"nfe": 1.0, "sent_bytes": 4096.0, "absurd": 1e20}, reported={"x": -1e308}
        ),
        make("nobody", low, 1.0, status="skipped", message=HOSTILE, quality={}, counts={}, latency=None, offline=None),
        make("toy_half", low, 1.0, task="nowhere/at_all"),
        make("toy_half", 0, 1.0, reasons={"energy": HOSTILE}, handles={"teacher": {"calls": 1e24}}),
        make("toy_half", low, 9.0, suite="0.0.9", latency=None, memory=None, offline=None),
    ]
    (tmp_path / "src").mkdir()
    aside = site.write(make_board([*suite()[:20], *wild(), *odd]), tmp_path / "src", root)
    own = (
        "index",
        "downloads",
        "papers",
        "changes",
        "compare",
        "tracks/image",
        "tracks/index",
        "methods/index",
        "tasks/index",
    )
    own += tuple(f"methods/{name}" for name in ("toy_worse", "toy_half", "toy_trained", "toy_cheat"))
    written = {name: (tmp_path / "src" / f"{name}.md").read_text(encoding="utf-8") for name in own}
    for name, text in [*written.items(), *enumerate(aside)]:
        assert "<script>alert" not in text, name
        assert "<img src=x" not in text, name
        assert not re.search(r"\b(nan|inf|None)\b", re.sub("<[^>]*>", " ", text)), name
    # Counts that no column is made for are shown by their names.
    counted = next(text for text in aside if 'aria-label="Counts"' in text and "absurd" in text)
    assert "absurd 1.00e+20; sent bytes 4,096" in counted


@pytest.fixture
def variant(toys: Mapping[str, plugins.MethodInfo], monkeypatch: pytest.MonkeyPatch) -> str:
    """A variant of toy_half whose name comes first of all, and that is better than its method at one rung."""
    name = "a_control"
    info = replace(
        toys["toy_half"], id=name, base="toy_half", says="without <half>", overrides={"half": False},
        baselines=("toy_base", "toy_half"),
    )  # fmt: skip
    found = {name: info, **toys}
    monkeypatch.setattr(plugins, "methods", lambda: found)
    return name


def first_cells(html: str, label: str) -> list[tuple[str, bool]]:
    """The methods of a table's lines from top to bottom, and whether each stands below another."""
    table = html[html.index(f'aria-label="{label}"') :]
    table = table[: table.index("</table>")]
    lines = re.findall(r"<tr([^>]*)><th scope=\"row\"[^>]*>(.*?)</th>", table)
    return [(re.sub("<[^>]*>", "", cell), "sm-variant" in kinds) for kinds, cell in lines]


def test_a_variant_stands_under_its_method_everywhere(variant: str, tmp_path: Path) -> None:
    low, middle, _ = ladder()
    records = [
        *suite(),
        *(make(variant, rung, value, s) for s in (0, 1) for rung, value in ((low, 0.5), (middle, 9.0))),
    ]
    found = make_board(records)
    task = plugins.tasks()[TASK][1]
    rows = found.of_task(TASK, found.places_of(TASK)[0])
    html = pages.figures(found, rows, task)
    shown = first_cells(html, f"Figures on {TASK}")
    at = [i for i, (name, _) in enumerate(shown) if name == variant]
    assert len(at) == 2
    assert all(shown[i][1] and shown[i - 1] == ("toy_half", False) for i in at)
    assert not any(below for name, below in shown if name != variant)
    assert 'title="A variant of toy_half: without &lt;half&gt;"' in html
    whole = [
        name
        for name, _ in first_cells(track_pages.whole_ladders(found, task, rows[0].place), f"Whole ladders on {TASK}")
    ]
    assert whole.index(variant) == whole.index("toy_half") + 1
    names = [name for name, _ in first_cells("".join(method_pages.index(found)), "Methods")]
    assert names.index(variant) == names.index("toy_half") + 1

    # The script of the track page puts the same lines in the same order.
    block = track_pages.task_data(found, TASK)
    first = [i for i, place in enumerate(block["rows"]["place"]) if place == 0]
    assert [block["methods"][block["rows"]["method"][i]] for i in first] == [name for name, _ in shown]
    assert dict(zip(block["methods"], block["bases"], strict=True))[variant] == "toy_half"

    page = "".join(method_pages.page(found, variant))
    assert '<a href="toy_half.html">toy_half</a>: without &lt;half&gt; (<code>half = False</code>)' in page
    assert "../source/toy_half.py.txt" in page
    assert "What it is" not in page  # its method's page says so
    assert f'<a href="{variant}.html">{variant}</a>' in "".join(method_pages.page(found, "toy_half"))
    assert variant not in {row.method for row in found.offer(TASK, rows[0].place).keeping["20%"]}


def test_a_variant_whose_method_has_no_row_there_keeps_a_place_of_its_own(variant: str) -> None:
    low, *_ = ladder()
    found = make_board([make("toy_base", low, 1.0), make(variant, low, 0.5), make("toy_worse", low, 2.0)])
    task = plugins.tasks()[TASK][1]
    rows = found.ranked(found.of_task(TASK, found.places_of(TASK)[0]), task)
    assert [row.method for row in rows] == [variant, "toy_base", "toy_worse"]


def test_a_chart_has_colour_for_what_leads_only() -> None:
    found = make_board(suite())
    task = plugins.tasks()[TASK][1]
    rows = found.of_task(TASK, found.places_of(TASK)[0])
    leading = found.leading(rows, task)
    assert leading[0] == "toy_base"
    assert "toy_half" in leading
    assert "toy_worse" not in leading
    styles = charts.style(found.order(rows))
    svg = charts.curve(rows, task, "unit", styles, leading=leading)
    worse = re.findall(r'<[a-z]+ data-method="toy_worse"[^>]*>', svg)
    assert worse
    assert all('stroke="currentColor"' in mark for mark in worse)
    assert "toy_worse, rung" not in svg
    assert "toy_half, rung" in svg
    assert "toy_worse, rung" in charts.curve(rows, task, "unit", styles)
    names = charts.legend(styles, leading=leading)
    assert "toy_worse" not in names
    assert f"{len(styles) - len(leading)} more without colour" in names


def test_an_interval_below_nought_leaves_the_scale_logarithmic() -> None:
    low, middle, high = ladder()
    metric = next(iter(plugins.tasks()[TASK][1].metrics))
    wide = {metric: Quality(value=0.1, resamples=np.linspace(-0.2, 0.4, 100).tolist())}
    found = make_board(
        [make("toy_base", low, 60.0), make("toy_base", middle, 6.0), make("toy_base", high, 0.1, quality=wide)]
    )
    rows = found.of_task(TASK, found.places_of(TASK)[0])
    svg = charts.curve(rows, plugins.tasks()[TASK][1], "unit", charts.style(["toy_base"]))
    ticks = {float(text) for text in re.findall(r'text-anchor="end"[^>]*>([^<]+)</text>', svg)}
    assert {0.1, 1, 10} <= ticks
    ends = [float(y) for y in re.findall(r'y[12]="([\d.]+)"', svg)]
    assert max(ends) <= charts.HEIGHT - charts.BELOW + 0.1  # no bar leaves the chart


def test_the_picker_answers_what_the_board_offers() -> None:
    found = make_board(suite())
    (track,) = picker.data(found)["tracks"]
    (block,) = track["tasks"]
    deal = found.offer(TASK, found.places_of(TASK)[0])
    assert deal is not None
    assert block["title"] == found.titles[TASK]
    base = block["rows"][0]
    assert (base["method"], base["rung"]) == (deal.baseline.method, deal.baseline.rung)
    asked = 0
    for keep in fronts.KEEP:
        for axis in fronts.SAVED:
            saving = deal.saving(axis, keep)
            answer = block["answers"].get(f"{keep} {axis} any")
            assert (answer is None) == (saving is None)
            if saving is not None:
                row = block["rows"][answer[0]]
                assert (row["method"], row["rung"]) == (saving.row.method, saving.row.rung)
                assert row["command"] == saving.row.first.command
                asked += 1
    assert asked
    untrained = [block["rows"][answer[0]] for key, answer in block["answers"].items() if key.endswith(" none")]
    assert untrained
    assert all(row["training"] != "trained" for row in untrained)


def test_titles_are_short_and_tell_tasks_apart() -> None:
    titles = make_board([]).titles
    assert set(titles) == set(plugins.tasks())
    by_track: dict[str, list[str]] = {}
    for name, (track, _) in plugins.tasks().items():
        by_track.setdefault(track, []).append(titles[name])
    assert all(len(set(mine)) == len(mine) for mine in by_track.values())
    assert any(titles[name] != task.summary for name, (_, task) in plugins.tasks().items())


def test_a_script_cannot_be_left() -> None:
    text = track_pages.script("x", {"a": HOSTILE})
    assert "<" not in text
    assert text.isascii()
    assert json.loads(text.removeprefix("window.x = ").removesuffix(";\n")) == {"a": HOSTILE}
    with pytest.raises(ValueError, match="JSON"):
        track_pages.script("x", [math.inf])


def test_no_two_methods_of_a_chart_look_alike(data: Path) -> None:
    looks = charts.style([f"m{i}" for i in range(60)])
    assert len(set(looks.values())) == 60
    content = read_script(data / "ladders-image.js", "stepmarkLadders")  # the script counts through the same lists
    assert list(zip(content["colours"], content["shapes"], strict=True))[:60] == list(looks.values())


def test_figures_are_cut_to_six_digits() -> None:
    assert track_pages.short(1.23456789) == 1.23457
    assert track_pages.short(4.0) == 4
    assert isinstance(track_pages.short(4.0), int)
    assert track_pages.short(1e300) == 1e300
    assert track_pages.short(math.inf) is track_pages.short(math.nan) is track_pages.short(None) is None
