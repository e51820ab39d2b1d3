"""Surveys: who stands in which of their branches, when they are live, what their pages show."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import markdown
import pytest
from rigs.pages import HOSTILE, Text, make_board, record
from stepmark.leaderboard import coverage, paper_pages, survey_pages, surveys, taxonomy
from stepmark.leaderboard.groups import grouped
from stepmark.leaderboard.pages import Board
from stepmark.leaderboard.surveys import Axis, Branch, Survey

from stepmark import plugins

EVERY = coverage.catalogue()
ROWS = {entry.id: entry for entry in EVERY if entry.track == "reasoning" and entry.kind != "survey"}
CARRIED = next(info for info in plugins.methods().values() if info.base is None and info.paper and info.claims)
MEASURED = record(CARRIED.id, CARRIED.tasks[0], plugins.tasks()[CARRIED.tasks[0]][1].rungs[0], 1.0)


def branch(name: str, **fields: Any) -> Branch:
    """A branch that takes nobody but whom the fields name."""
    said = {"id": name, "title": f"The {name}", "description": f"About {name}.", "tags": [], "kinds": [], "papers": []}
    return Branch(**(said | fields))


def paper(name: str, *tags: str, **fields: Any) -> coverage.CatalogueEntry:
    """An entry of the catalogue, of track `toys`."""
    entry = EVERY[0]._replace(id=name, title=f"On {name}", kind="method", track="toys", tags=list(tags), headline=[])
    return entry._replace(**fields)


def plugin(name: str) -> plugins.MethodInfo:
    """A plugin of the paper of that name."""
    assert CARRIED.paper is not None
    return replace(CARRIED, id=name, claims=(), paper=replace(CARRIED.paper, id=name))


def toy_board(
    monkeypatch: pytest.MonkeyPatch, survey: Survey, papers: list[coverage.CatalogueEntry], ran: str
) -> Board:
    """A board of the survey and these papers; `ran` and `idle` have a plugin, and only the first has a record."""
    own = {name: plugin(name) for name in (ran, "idle")}
    monkeypatch.setattr(plugins, "methods", lambda: own)
    monkeypatch.setattr(coverage, "catalogue", lambda: [paper(survey.id, kind="survey"), *papers])
    monkeypatch.setattr(surveys, "surveys", lambda: [survey])
    monkeypatch.setattr(survey_pages, "surveys", lambda: [survey])
    return make_board([record(ran, MEASURED.task, MEASURED.rung, 1.0)])


def page_of(found: Board, survey: Survey) -> str:
    """The survey's own page, built."""
    own = next(each for each in found.covered if each.entry.id == survey.id)
    parts = paper_pages.paper_page(found, own, [], (), [survey])
    return markdown.markdown("\n\n".join(part for part in parts if part), extensions=["attr_list", "tables"])


# the file ---------------------------------------------------------------------------------------


def test_every_survey_of_reasoning_orders_every_paper_of_it() -> None:
    """The pages hold every paper of the track exactly once under each axis, and nobody else."""
    known = surveys.surveys()
    own = {entry.id for entry in EVERY if entry.track == "reasoning" and entry.kind == "survey"}
    assert {survey.id for survey in known} == own
    assert own
    found = make_board([])
    for survey in known:
        html = "\n".join(survey_pages.section(found, survey))
        assert f"{len(ROWS)} of {len(ROWS)} papers (100 %) have exactly one place" in html
        assert "No place." not in html
        _, *axes = html.split("\n### ")
        assert len(axes) == len(survey.axes)
        for axis in axes:
            assert sorted(re.findall(r'href="\.\./papers/(\w+)\.html"', axis)) == sorted(ROWS), (survey.id, axis[:30])


def test_the_surveys_name_only_what_there_is() -> None:
    """A misspelt tag would put nobody anywhere; a paper whose tags lead where its name does need not be named."""
    tags = {tag for entry in EVERY for tag in entry.tags}
    for survey in surveys.surveys():
        for axis in survey.axes:
            assert {tag for each in axis.branches for tag in each.tags} <= tags
            assert {kind for each in axis.branches for kind in each.kinds} <= set(coverage.KINDS)
            for each in axis.branches:
                for name in set(each.papers) - {surveys.REST}:
                    unnamed = Axis(
                        axis.title, [b._replace(papers=[p for p in b.papers if p != name]) for b in axis.branches]
                    )
                    assert surveys.place(axis, ROWS[name]) == each.id
                    assert surveys.place(unnamed, ROWS[name]) != each.id, (survey.id, axis.title, name)


def test_the_kinds_that_measure_stand_apart_on_every_axis() -> None:
    """Save for the two probes of what latent thought is, which the survey of it asks for."""
    apart = {
        (survey.id, name): surveys.place(axis, entry)
        for survey in surveys.surveys()
        for axis in survey.axes
        for name, entry in ROWS.items()
        if (entry.kind in {"benchmark", "analysis"}) != (surveys.place(axis, entry) == "measured")
    }
    probes = ("implicit_cot_probe", "mechanistic_probe")
    assert apart == {("survey_latent_cot", name): "analysed" for name in probes}


@pytest.mark.parametrize(
    ("branches", "said"),
    [
        ([branch("a"), branch("a")], "a stands twice among id"),
        ([branch("a", tags=["t"]), branch("b", tags=["t"])], "t stands twice among tags"),
        ([branch("a", kinds=["theory"]), branch("b", kinds=["theory"])], "theory stands twice among kinds"),
        ([branch("a", papers=["p"]), branch("b", papers=["p"])], "p stands twice among papers"),
        ([branch("a", papers=["*"]), branch("b")], "the rest is not the last"),
    ],
)
def test_a_file_in_which_something_could_never_count_is_refused(
    tmp_path: Path, branches: list[Branch], said: str
) -> None:
    def write(*axes: list[Branch], ids: tuple[str, ...] = ("s",)) -> Path:
        listed = [{"title": "Which", "branches": [each._asdict() for each in axis]} for axis in axes]
        path = tmp_path / "surveys.json"
        path.write_text(json.dumps({"surveys": [{"id": name, "says": "", "axes": listed} for name in ids]}))
        return path

    fine = [branch("a", tags=["t"], papers=["p"]), branch("b", papers=["*"])]
    assert surveys.surveys(write(fine, fine))[0].axes[1] == Axis("Which", fine)  # axes do not see each other
    with pytest.raises(ValueError, match=re.escape(said)):
        surveys.surveys(write(fine, branches))
    with pytest.raises(ValueError, match="s stands there twice"):
        surveys.surveys(write(fine, ids=("s", "s")))
    (tmp_path / "surveys.json").write_text('{"surveys": [{"id": "s", "says": "", "axes": [{"branches": []}]}]}')
    with pytest.raises(ValueError, match="a branch has id, title, description, tags, kinds, papers"):
        surveys.surveys(tmp_path / "surveys.json")


# places -----------------------------------------------------------------------------------------


def test_a_name_goes_before_the_order_of_the_file_and_the_rest_comes_last() -> None:
    second = branch("second", tags=["y"], papers=["named"])
    axis = Axis("Which", [branch("first", tags=["x"], kinds=["theory"]), second, branch("third", tags=["z"])])
    assert surveys.place(axis, paper("p", "y", "x")) == "first"  # the order of the branches, not of the tags
    assert surveys.place(axis, paper("p", "z", "y")) == "second"
    assert surveys.place(axis, paper("p", "z", kind="theory")) == "first"
    assert surveys.place(axis, paper("named", "x", kind="theory")) == "second"
    assert surveys.place(axis, paper("p", "w")) is None
    rest = Axis("Which", [*axis.branches, branch("rest", papers=[surveys.REST])])
    assert surveys.place(rest, paper("p", "w")) == "rest"
    assert surveys.place(rest, paper("p", "z")) == "third"
    assert surveys.places(Survey("s", "", [axis, rest]), paper("p", "w")) == [None, "rest"]


# liveness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, "live"),
        ({"tags": ["x", "elsewhere"]}, "live"),
        ({"tags": ["elsewhere"]}, "no plugin yet"),  # it has run, and stands nowhere
        ({"track": "other"}, "no plugin yet"),
        ({"kind": "survey"}, "no plugin yet"),
    ],
)
def test_a_survey_is_live_once_a_live_paper_stands_in_it(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], status: str
) -> None:
    survey = Survey("s", "says", [Axis("Which", [branch("a", tags=["x"])])])
    own = paper("s", kind="survey")
    entries = [own, paper("ran", "x")._replace(**changed), paper("idle", "x"), paper("t", "x", kind="survey")]
    infos = {name: plugin(name) for name in ("ran", "idle")}
    judged: dict[str, Any] = {name: {} for name in infos}

    def statuses(ran: str, ordering: list[Survey]) -> dict[str, str]:
        rows = [replace(row, method=ran) for row in grouped([MEASURED])]
        monkeypatch.setattr(surveys, "surveys", lambda: ordering)
        return {each.entry.id: each.status for each in coverage.covered(entries, infos, rows, judged)}

    assert statuses("ran", [survey]) == {"s": status, "ran": "live", "idle": "not run", "t": "no plugin yet"}
    assert statuses("ran", [])["s"] == "no plugin yet"  # no entry of the file, no place for anybody
    assert statuses("ran", [survey._replace(id="t")])["s"] == "no plugin yet"
    assert statuses("nobody", [survey]) == {
        "s": "no plugin yet",
        "ran": "not run",
        "idle": "not run",
        "t": "no plugin yet",
    }


def test_only_surveys_are_live_through_others(monkeypatch: pytest.MonkeyPatch) -> None:
    survey = Survey("s", "says", [Axis("Which", [branch("a", tags=["x"])])])
    infos = {"ran": plugin("ran")}
    entries = [paper("s", kind="theory"), paper("ran", "x")]
    rows = [replace(row, method="ran") for row in grouped([MEASURED])]
    monkeypatch.setattr(surveys, "surveys", lambda: [survey])
    found = coverage.covered(entries, infos, rows, {"ran": {}})
    assert [each.status for each in found] == ["no plugin yet", "live"]


def test_without_records_no_survey_is_live_and_all_have_a_page() -> None:
    found = make_board([])
    for survey in surveys.surveys():
        own = next(each for each in found.covered if each.entry.id == survey.id)
        assert own.status != "live"
        page = Text(page_of(found, survey))
        assert f"Of {len(ROWS)} papers none is live yet." in page.content
        assert survey.says in page.content
        assert "no plugin carries the id" not in page.content
        assert all(each.title in page.content for axis in survey.axes for each in axis.branches)
        # What there is to see is in lists that wrap, nothing in tables or fixed widths.
        assert not {"table", "pre", "svg"} & {tag for tag, _ in page.tags}
    other = next(each for each in found.covered if each.entry.id == "survey_faster_lighter_llms")
    bare = "\n".join(paper_pages.paper_page(found, other, [], (), surveys.surveys()))
    assert "How it orders" not in bare
    assert "no plugin carries the id" in bare


# pages ------------------------------------------------------------------------------------------


def test_a_page_tells_live_papers_apart_and_says_what_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = [
        Axis("Which", [branch("a", tags=["x"]), branch("b", tags=["y"]), branch("c", tags=["z"])]),
        Axis("When", [branch("all", papers=["*"])]),
    ]
    survey = Survey("s", "It says this.", axes)
    papers = [paper("free", "x"), paper("idle", "x"), paper("ran", "x"), paper("alone", "y"), paper("lost", "w")]
    found = toy_board(monkeypatch, survey, [*papers, paper("far", "x", track="other")], "ran")
    html = page_of(found, survey)
    which, when = (part.split("<h3")[0] for part in html.split("<h3>")[1:])
    a, b, c, lost = which.split("<div>")[1:]
    shown, folded = a.split("<details")
    assert re.findall(r"papers/(\w+)\.html", shown) == ["ran"]
    assert ">live</span>" in shown
    assert "2 more, not live yet" in folded
    assert re.findall(r"papers/(\w+)\.html", folded) == ["idle", "free"]  # what has a plugin comes first
    assert ">live<" not in folded
    assert "1 paper, none live yet" in b
    assert "No paper of the catalogue stands here." in c
    assert "<ul>" not in c
    assert "No place." in lost
    assert re.findall(r"papers/(\w+)\.html", lost) == ["lost"]
    assert sorted(re.findall(r"papers/(\w+)\.html", when)) == ["alone", "free", "idle", "lost", "ran"]
    content = Text(html).content
    assert "4 of 5 papers (80 %) have exactly one place on each of the 2 axes." in content
    assert "Of 5 papers 1 is live." in content
    assert "far" not in html
    listed = Text(survey_pages.listing(found)).content
    assert "On s" in listed
    assert "live It says this." in listed
    assert "The a (1/3); The b (0/1); The c (0/0)" in listed


def test_nothing_of_a_survey_or_a_paper_becomes_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = branch("a", papers=["*"], title=HOSTILE, description=HOSTILE)
    survey = Survey("s", HOSTILE, [Axis(HOSTILE, [hostile])])
    found = toy_board(monkeypatch, survey, [paper("ran", "x", title=HOSTILE), paper("idle", "x", title=HOSTILE)], "ran")
    page = Text(page_of(found, survey))
    assert not {"script", "em", "strong"} & {tag for tag, _ in page.tags}
    assert not any(address.startswith("javascript") for _, attributes in page.tags for address in attributes.values())
    assert not any("onclick" in attributes for _, attributes in page.tags)
    assert page.content.count("<script>alert(1)</script>") == 6  # says, axis, branch twice, two papers
    listed = Text(survey_pages.listing(found))
    assert {tag for tag, _ in listed.tags} == {"ul", "li", "a", "span", "br"}
    assert listed.content.count("<script>alert(1)</script>") == 3


def test_the_taxonomy_lists_the_surveys_with_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"<!-- node {node.id} -->\n" for node in taxonomy.nodes())
    found = make_board([])
    filled = taxonomy.fill(f"{text}<!-- surveys -->\n<!-- elsewhere -->", found)
    section = Text(filled.splitlines()[-2])
    hrefs = [attributes["href"] for tag, attributes in section.tags if tag == "a"]
    assert hrefs == [f"papers/{survey.id}.html" for survey in surveys.surveys()]
    assert all(survey.says in section.content for survey in surveys.surveys())
    with pytest.raises(ValueError, match="no place for the surveys"):
        taxonomy.fill(f"{text}<!-- elsewhere -->", found)
    monkeypatch.setattr(found, "covered", found.covered[:5])  # a catalogue without them
    assert survey_pages.listing(found) == '<p class="sm-note">No survey of the catalogue.</p>'
