"""The built site in a real browser, from disk and from a server on this machine: what a reader does, and what it looks
like. Screenshots of the main pages are left in build/screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rigs.records import few_seeds, whole
from stepmark.leaderboard import coverage, markup, site
from stepmark.leaderboard.comparisons import comparisons, in_a_sentence
from stepmark.leaderboard.estimates import Estimate, figure

from stepmark import __version__, plugins
from stepmark import record as record_files
from stepmark.method import Paper
from stepmark.record import Latency, Memory, Offline, Quality, Record

REQUIRED = os.environ.get("STEPMARK_BROWSER") == "required"  # as in CI: what is missing fails instead of skipping
if not REQUIRED:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
from playwright import sync_api as playwright  # noqa: E402

TASK = "class_to_image/digits_flow"
HOSTILE = '</script><script>alert(1)</script> <img src="https://evil.example/x.png" onerror="alert(2)">'
PAGES = ("index.html", "tracks/image.html", "compare.html", "methods/toy_half.html", "papers.html", "downloads.html")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if REQUIRED and CHROMIUM is None:
    raise RuntimeError("STEPMARK_BROWSER=required, but no Chromium is on the path; run .ci/browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found on the path; .ci/browser installs one")


def make(method: str, rung: int, value: float, seed: int, machine: str, **fields: Any) -> Record:
    """A record of the task's metrics, the first as given."""
    first, *others = plugins.tasks()[TASK][1].metrics
    noise = np.random.default_rng(seed).normal(0, 0.02, 100)
    own = np.random.default_rng([seed, rung, *method.encode()]).normal(0, 0.01, 100)
    quality = {name: Quality(value=0.5 + 0.01 * rung, resamples=(0.5 + noise).tolist()) for name in others}
    quality[first] = Quality(value=value, resamples=(value * (1 + noise + own)).tolist())
    speed = 2.0 if method == "toy_half" else 1.0
    full: dict[str, Any] = {
        "suite": __version__, "track": "image", "method": method, "task": TASK, "rung": rung, "seed": seed,
        "tier": "embedded", "machine": machine, "status": "ok",
        "counts": {"nfe": float(rung), "nfe_equivalent": 1.5 * rung}, "quality": quality,
        "latency": Latency(
            items=10, median_ms=10 * rung / speed, iqr_ms=0.1, p95_ms=11.0 * rung,
            samples_ms=[(10.0 * rung + i) / speed for i in range(-2, 3)],
            baseline=None if method == "toy_base" else "toy_base", speedup=speed,
        ) if seed == 0 else None,
        "memory": Memory(peak_mib=1.0 + rung, how="tracker", state_mib=0.0) if seed == 0 else None,
        "offline": Offline(seconds=2.5, evaluations={}, state_mib=0.5 if method == "toy_half" else 0.0),
        "command": "stepmark run", "created": "2031-01-02T03:04:05Z", "commit": "abcdef1",
    }  # fmt: skip
    return whole(Record(**(full | fields)))


def suite() -> list[Record]:
    """Four methods on two machines; one is flagged in words that are markup, one states absurd numbers."""
    low, middle, high = sorted(plugins.tasks()[TASK][1].rungs)[:3]
    first = next(iter(plugins.tasks()[TASK][1].metrics))
    records = []
    for machine, factor in (("first-cpu", 1.0), ("second-cpu", 1.1)):
        for seed in (0, 1):
            for rung, base, half in ((low, 4.0, 2.1), (middle, 2.0, 1.0), (high, 1.0, 0.9)):
                records.append(make("toy_base", rung, base * factor, seed, machine))
                records.append(make("toy_half", rung, half * factor, seed, machine))
            records.append(make("toy_cheat", low, 0.3, seed, machine, status="flagged", flags=[HOSTILE]))
            records.append(make("toy_wild", low, 3.0, seed, machine))
            absurd = {first: Quality(value=1e308, resamples=[1e308, -1e308] * 50)}
            records.append(make("toy_wild", high, 1.0, seed, machine, quality=absurd, latency=None))
    return records


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The site of `suite()`, with a catalogue of a few papers: that many pages are enough here."""
    entries = coverage.catalogue()[:4]
    path = next(iter(plugins.methods().values())).path
    paper = Paper(id=entries[-1].id, title="A title", authors="A. Author", year=2031)
    found = {
        name: plugins.MethodInfo(
            id=name, track="image", path=path, class_name="Toy", doc=f"{name}: a toy.", paper=paper, tasks=(TASK,),
            baselines=() if name == "toy_base" else ("toy_base",), claims=(),
        )
        for name in ("toy_base", "toy_half", "toy_cheat", "toy_wild")
    }  # fmt: skip
    root = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "methods", lambda: found)
        few_seeds(patch, 2)
        patch.setattr(coverage, "catalogue", lambda: entries)
        for each in suite():
            record_files.append(record_files.path_of(root / "results", each), each)
        # A few papers are less than the taxonomy speaks of; what MkDocs says of that is tested elsewhere.
        yield site.build(root / "results", root / "out", strict=False).parent


class Quiet(SimpleHTTPRequestHandler):
    """A file server that says nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Not a line."""


@pytest.fixture(scope="module", params=["file", "http"])
def origin(request: pytest.FixtureRequest, built: Path) -> Iterator[str]:
    """Where the site is read from: the folder itself, then a server on this machine."""
    if request.param == "file":
        yield built.as_uri()
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for the module."""
    with playwright.sync_playwright() as driver:
        # It shows pages of this repository alone, and containers seldom allow the sandbox.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader:
    """A page, what its console said, and what it asked for outside the site."""

    def __init__(self, browser: Any, origin: str, **options: Any) -> None:
        self.origin = origin
        self.trouble: list[str] = []
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(120_000)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: said.type == "error" and self.trouble.append(f"console: {said.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.context.route("**/*", self._watch)

    def _watch(self, route: Any) -> None:
        url = route.request.url
        if url.startswith((self.origin, "data:", "blob:")):
            route.continue_()
        else:
            self.trouble.append(f"request: {url}")
            route.abort()

    def open(self, path: str) -> Any:
        """The page at a path of the site."""
        self.page.goto(f"{self.origin}/{path}")
        return self.page

    def close(self) -> None:
        """Close, and fail if anything was wrong on the way."""
        self.context.close()
        assert not self.trouble


@pytest.fixture
def reader(chromium: Any, origin: str) -> Iterator[Reader]:
    """A reader at a desk."""
    found = Reader(chromium, origin, viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield found
    found.close()


def column(page: Any, label: str, index: int) -> list[str]:
    """The visible cells of a column of the table with this label, top to bottom."""
    rows = page.locator(f'.sm-scroll[aria-label="{label}"] tbody tr:visible')
    return [row.locator("th,td").nth(index).inner_text().split("\n")[0].strip() for row in rows.all()]


FIGURES = f"Figures on {TASK}"
WHOLE = f"Whole ladders on {TASK}"


def test_sort_and_filter(reader: Reader) -> None:
    page = reader.open("tracks/image.html")
    head = page.locator(f'.sm-scroll[aria-label="{FIGURES}"] thead th').nth(1)
    button = head.locator("button")
    button.focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    rungs = [int(text) for text in column(page, FIGURES, 1)]
    assert rungs == sorted(rungs)
    assert len(set(rungs)) == 3
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [int(text) for text in column(page, FIGURES, 1)] == sorted(rungs, reverse=True)

    bar = page.locator(f'.sm-filter:has(+ .sm-scroll[aria-label="{FIGURES}"])')
    bar.get_by_label("Filter rows").fill("toy_half")
    assert set(column(page, FIGURES, 0)) == {"toy_half"}
    bar.get_by_label("Filter rows").fill("")
    bar.get_by_label("Training").select_option("trained")
    assert set(column(page, FIGURES, 0)) == {"toy_half"}
    assert "3 of 9 rows" in bar.inner_text()
    bar.get_by_label("Training").select_option("")
    bar.get_by_label("Rung").select_option(str(min(rungs)))
    assert set(column(page, FIGURES, 1)) == {str(min(rungs))}
    assert "toy_half" in column(page, WHOLE, 0)


def test_the_chart_answers(reader: Reader) -> None:
    page = reader.open("tracks/image.html")
    box = page.locator(f'.sm-task[data-task="{TASK}"]')
    box.locator(".sm-live").scroll_into_view_if_needed()
    box.locator(".sm-chart svg").wait_for()
    assert not box.locator(".sm-charts").is_visible()  # the drawings are for readers without script
    points = box.locator(".sm-chart svg .mark-symbol path")
    labels = [point.get_attribute("aria-label") for point in points.all()]
    # Three rungs of two methods, the flagged one, the sane one of the wild method.
    assert len(labels) == 8
    assert not [label for label in labels if "308" in label]
    hollow = next(point for point in points.all() if "toy_cheat" in point.get_attribute("aria-label"))
    assert hollow.get_attribute("fill") == "transparent"

    point = next(point for point in points.all() if "toy_half" in point.get_attribute("aria-label"))
    point.hover(force=True)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert "toy_half" in tooltip.inner_text()
    assert re.search(r"\[[\d.]+, [\d.]+\]", tooltip.inner_text())

    axis = box.get_by_label("Across")
    assert [option.inner_text() for option in axis.locator("option").all()] == [
        f"spent per item ({plugins.tasks()[TASK][1].unit})", "NFE-equivalents per item", "ms per item",
        "peak memory of a call, MiB", "seconds of preparation, once",
    ]  # fmt: skip
    axis.select_option("latency_ms")
    box.locator(".sm-chart svg", has_text="ms per item").wait_for()

    before = column(page, FIGURES, 3)
    box.get_by_label("Machine").select_option("second-cpu")
    assert box.locator("[data-place]").inner_text() == "second-cpu"
    assert column(page, FIGURES, 3) != before
    assert sorted(column(page, FIGURES, 0)) == sorted(["toy_base", "toy_half"] * 3 + ["toy_cheat"] + ["toy_wild"] * 2)
    assert HOSTILE in box.inner_text()
    box.get_by_label("Machine").select_option("first-cpu")
    assert column(page, FIGURES, 3) == before  # figures are written alike by Python and by the script

    name = box.locator('.sm-live [data-method="toy_half"]')
    name.focus()
    page.keyboard.press("Enter")
    box.locator('.sm-live [data-method="toy_half"][aria-pressed="true"]').wait_for()

    box.locator(".sm-chart svg", has_text="ms per item").wait_for()
    fresh = next(p for p in points.all() if "toy_half" in p.get_attribute("aria-label"))
    fresh.click(force=True)
    page.wait_for_url("**/methods/toy_half.html")


def test_what_does_not_lead_is_faint_until_asked_for(reader: Reader) -> None:
    page = reader.open("tracks/image.html")
    box = page.locator(f'.sm-task[data-task="{TASK}"]')
    box.locator(".sm-live").scroll_into_view_if_needed()
    box.locator(".sm-chart svg").wait_for()

    def looks(method: str) -> set[tuple[str, bool]]:
        """Colour and whether it is faint, of all points of a method."""
        points = box.locator(f'.sm-chart svg .mark-symbol path[aria-label^="{method},"]').all()
        assert points
        return {(p.get_attribute("stroke"), float(p.get_attribute("opacity") or 1) < 0.2) for p in points}

    ((base, faint),) = looks("toy_base")
    assert base != "currentColor"
    assert not faint
    assert looks("toy_wild") == {("currentColor", True)}  # one rung, behind the front
    assert not box.locator(".sm-legend > button", has_text="toy_wild").count()
    assert not box.locator(".sm-chart svg .mark-area path").count()
    box.get_by_label("95 % intervals").check()
    box.locator(".sm-chart svg .mark-area path").first.wait_for(state="attached")
    assert box.locator(".sm-chart svg .mark-area path").count() == 2  # of toy_base and toy_half, no others

    point = box.locator('.sm-chart svg .mark-symbol path[aria-label^="toy_wild,"]').first
    point.hover(force=True)
    page.wait_for_function(
        """() => [...document.querySelectorAll('.sm-chart svg .mark-symbol path[aria-label^="toy_wild,"]')]
        .every((point) => point.getAttribute("stroke") !== "currentColor")"""
    )
    page.mouse.move(0, 0)

    box.locator(".sm-legend summary").click()
    box.locator(".sm-legend button", has_text="toy_wild").click()
    box.locator('.sm-legend > button[data-method="toy_wild"][aria-pressed="true"]').wait_for()  # it stands open now
    ((wild, faint),) = looks("toy_wild")
    assert wild != "currentColor"
    assert not faint
    assert looks("toy_base") == {("currentColor", True)}


def test_the_picker_answers(reader: Reader) -> None:
    page = reader.open("index.html")
    box = page.locator("[data-picker]")
    _, middle, high = sorted(plugins.tasks()[TASK][1].rungs)[:3]
    answer = box.locator(".sm-answer")

    def says(text: str) -> str:
        page.wait_for_function("(text) => document.querySelector('.sm-answer').innerText.includes(text)", arg=text)
        return answer.inner_text()

    said = says(f"toy_half at rung {middle}")
    assert "less time than toy_base at its best rung" in said
    assert "It is trained first: 2.5 s, once." in said
    assert answer.locator("pre").inner_text().strip().startswith("stepmark run --method toy_half ")
    assert [cell.inner_text().split(" ")[0] for cell in answer.locator("tbody th").all()] == ["toy_half", "toy_base"]
    box.get_by_label("I want").select_option("unit")
    says(f"{high / middle:.2f}".rstrip("0").rstrip(".") + "× fewer evaluations")
    box.get_by_label("Before it runs").select_option("none")
    says("Nothing measured keeps that for fewer evaluations")
    assert not answer.locator("pre").count()
    # The table says the same without a script: one best method per axis.
    table = page.locator('.sm-scroll[aria-label^="What methods save"]')
    assert f"toy_half at {middle}" in table.inner_text().replace("\n", " ")


def test_compare_says_what_the_terminal_says(reader: Reader) -> None:
    page = reader.open("compare.html#a=toy_half&b=toy_base")
    lines = page.locator(".sm-compare tbody tr")
    lines.first.wait_for()

    def check(a: str, b: str) -> None:
        expected = comparisons(suite(), a, b, "image")
        page.locator("[data-result]", has_text=f"{a} {'is better than' if expected.tests else 'and'} {b}").wait_for()
        assert page.locator("[data-result]").inner_text() == in_a_sentence(expected, a, b, "image")
        shown = [[cell.inner_text().strip() for cell in line.locator("th,td").all()] for line in lines.all()]
        terminal = [
            [
                test.task, str(test.place), str(test.rung), next(iter(plugins.tasks()[TASK][1].metrics)),
                figure(test.difference), f"[{figure(test.low)}, {figure(test.high)}]",
                f"{test.p:.3f}" if test.p >= 0.001 else "<0.001", figure(test.effect), test.winner or "tied",
                figure(test.latency_ratio),
            ]
            for test in expected.tests
        ]  # fmt: skip
        assert [[text.replace("–", "-") for text in line] for line in shown] == terminal
        assert page.locator("[data-command]").inner_text() == f"stepmark compare {a} {b} --track image"

    check("toy_half", "toy_base")
    page.get_by_label("First").select_option("toy_base")  # the two change places
    check("toy_base", "toy_half")
    assert "a=toy_base&b=toy_half" in page.url
    page.get_by_label("Second").select_option("toy_cheat")
    check("toy_base", "toy_cheat")
    page.evaluate("location.hash = '#a=<script>&b=toy_wild&track=nowhere'")
    check("toy_base", "toy_wild")


def test_papers_are_chosen_by_what_they_are(reader: Reader) -> None:
    entries = coverage.catalogue()[:4]
    page = reader.open("papers.html")
    bar = page.locator('.sm-filter:has(+ .sm-scroll[aria-label="Papers"])')
    titles = [entry.title for entry in entries]
    assert column(page, "Papers", 0) == [titles[-1], *titles[:-1]]  # the live one leads
    assert set(column(page, "Papers", 1)) == {str(entry.year or "–") for entry in entries}  # years have no commas

    bar.get_by_label("Status").select_option("live")
    assert column(page, "Papers", 0) == titles[-1:]
    assert "1 of 4 rows" in bar.inner_text()
    bar.get_by_label("Status").select_option("no plugin yet")
    assert column(page, "Papers", 0) == titles[:-1]
    tag = next(tag for entry in entries[:-1] for tag in entry.tags)
    bar.get_by_label("Tag").select_option(tag)
    assert column(page, "Papers", 0) == [entry.title for entry in entries[:-1] if tag in entry.tags]
    bar.get_by_label("Filter rows").fill("no paper says this")
    assert column(page, "Papers", 0) == []

    page = reader.open(f"papers.html?tag={tag}")  # as the tags of a paper's page link
    assert sorted(column(page, "Papers", 0)) == sorted(entry.title for entry in entries if tag in entry.tags)


def test_without_script_the_drawings_stand(chromium: Any, origin: str) -> None:
    reader = Reader(chromium, origin, java_script_enabled=False)
    page = reader.open("tracks/image.html")
    assert page.locator(".sm-charts img").first.is_visible()
    assert page.locator(f'.sm-scroll[aria-label="{FIGURES}"] tbody tr').count() == 9
    reader.open("compare.html")
    assert "stepmark compare FIRST SECOND" in page.inner_text("body")
    reader.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_pages_fit_and_are_quiet(chromium: Any, origin: str, width: int, scheme: str) -> None:
    reader = Reader(chromium, origin, viewport={"width": width, "height": 800}, color_scheme=scheme)
    folder = (plugins.checkout() or Path()) / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    for path in PAGES:
        page = reader.open(path)
        if path.startswith("tracks/"):
            page.locator(".sm-live").first.scroll_into_view_if_needed()
            page.locator(".sm-chart svg").first.wait_for()
        if path == "compare.html":
            page.locator(".sm-compare tbody tr").first.wait_for()
        assert page.evaluate("document.body.dataset.mdColorScheme") == ("slate" if scheme == "dark" else "default")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{path} is {wide} px wide"
        if reader.origin.startswith("file"):
            name = path.removesuffix(".html").replace("/", "-")
            page.evaluate("window.scrollTo(0, 0)")
            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
    reader.close()


def test_the_figures_of_a_method_fit_beside_the_contents(chromium: Any) -> None:
    """Four metrics with intervals, as of greedy/stories, in what is left of 1280 px beside the table of contents."""
    head = [
        "Rung",
        "accuracy ↑",
        "exact_match ↑",
        "first_divergence ↑",
        "tokens ↑",
        "NFE/item",
        "NFE-eq/item",
        "ms/item",
    ]
    e = markup.estimate(Estimate(0.1473, 0.1329, 0.2722))
    states = markup.Cell(markup.chip("ok", "good") + " " + markup.chip("older source", "open"))
    cells = [markup.number(96), e, e, e, e, *map(markup.number, (14.67, 179.3)), e, e, markup.number(0.8223), states]
    made = markup.table([*head, "Speed-up", "Peak MiB", "Status", "Record"], [markup.Line([*cells, markup.text("0123456789")])],
                        f"Figures on {TASK}")  # fmt: skip
    style = (site.ASSETS / "stepmark.css").read_text(encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    page.set_content(
        f"<style>{style} html {{ font: 20px system-ui }}</style>"
        f'<div class="md-typeset" style="width: 936px; font-size: 0.8rem">{made}</div>'
    )
    inner, outer = page.evaluate("(({scrollWidth: a, clientWidth: b}) => [a, b])(document.querySelector('.sm-scroll'))")
    assert inner <= outer
    page.close()


def test_dark_mode_is_a_click_away(reader: Reader) -> None:
    page = reader.open("tracks/image.html")
    page.locator(".sm-live").first.scroll_into_view_if_needed()
    page.locator(".sm-chart svg").first.wait_for()

    def ink() -> str:
        return page.evaluate("getComputedStyle(document.querySelector('.sm-chart svg text')).fill")

    light = ink()
    page.locator('label[title="Dark mode"]').click()
    page.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
    page.locator(".sm-chart svg").first.wait_for()
    assert ink() != light
