"""Paper pages, equations of docstrings, the taxonomy: computed from catalogue, plugins and records alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import markdown
import pytest
from rigs.pages import HOSTILE, Text, make_board, record
from stepmark.leaderboard import coverage, equations, markup, paper_pages, site, taxonomy
from stepmark.leaderboard.groups import grouped
from stepmark.leaderboard.rows import record_id
from stepmark.leaderboard.trust import Dispute

from stepmark import check, plugins
from stepmark.places import checkout

Carried = tuple[coverage.CatalogueEntry, list[plugins.MethodInfo]]


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> Carried:
    """A paper of the catalogue, and the plugins that carry it: two methods, and a variant of the first."""
    papers = {entry.id: entry for entry in coverage.catalogue()}
    plain = {name: info for name, info in plugins.methods().items() if info.base is None}
    first = next(info for info in plain.values() if info.paper and info.paper.id in papers and info.claims)
    assert first.paper is not None
    plain = {name: info for name, info in plain.items() if info.paper is None or info.paper.id != first.paper.id}
    control = replace(
        first, id=f"a_control_of_{first.id}", base=first.id, says="without the <i>good</i> part", paper=None,
        overrides={"good": False}, claims=(), baselines=(first.id,),
    )  # fmt: skip
    second = replace(first, id=f"{first.id}_too", doc="A second method.", claims=())
    mine = [first, control, second]
    found = plain | {info.id: info for info in mine}
    monkeypatch.setattr(plugins, "methods", lambda: found)
    return papers[first.paper.id], mine


def test_every_plugin_of_a_paper_counts_and_a_control_is_none(carried: Carried) -> None:
    entry, mine = carried
    rung = plugins.tasks()[mine[0].tasks[0]][1].rungs[0]
    for ran in mine:
        rows = grouped([record(ran.id, ran.tasks[0], rung, 1.0)])
        covered = next(c for c in coverage.covered(coverage.catalogue(), plugins.methods(), rows) if c.entry == entry)
        assert covered.status == ("live" if ran.base is None else "not run")
        assert list(covered.infos) == mine  # the variant after its method, though its name comes before
        assert covered.info == mine[0]
        assert sum(covered.states.values()) == sum(len(info.claims) for info in mine)
    idle = next(c for c in coverage.covered(coverage.catalogue(), plugins.methods(), []) if c.entry == entry)
    assert idle.status == "not run"


def test_a_paper_page_says_what_is_reported_and_what_was_measured(carried: Carried) -> None:
    entry, mine = carried
    task = mine[0].tasks[0]
    rung = plugins.tasks()[task][1].rungs[0]
    run = record(mine[0].id, task, rung, 1.0)
    objection = Dispute(record_id(run), "counts <b>wrong</b>", "https://example.org/1")
    found = make_board([run], {objection.record: objection})
    covered = next(c for c in found.covered if c.entry == entry)
    html = "\n".join(paper_pages.paper_page(found, covered, paper_pages.relatives(found.covered)[entry.id]))
    page = Text(html)
    for info in mine:
        assert info.title in page.content
        assert all(claim.says in page.content for claim in info.claims)
    assert all(figure in page.content for figure in entry.headline)
    assert "disputed" in page.content
    assert "counts <b>wrong</b>" in page.content
    hrefs = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {f"../methods/{info.id}.html" for info in mine} <= hrefs
    assert f"https://arxiv.org/abs/{entry.arxiv}" in hrefs or entry.arxiv is None
    # The variant stands under its method, before the next one, with what it changes.
    assert html.index(mine[0].title.split(":")[0]) < html.index("good = False") < html.index("A second method.")


def test_trust_on_a_task_is_counted_and_given_its_reasons() -> None:
    task = plugins.tasks()[TASK_OF["image"]][1]
    sound, doubtful = sorted(name for name, info in plugins.methods().items() if task.id in info.tasks)[:2]
    runs = [record(name, task.id, task.rungs[0], 1.0) for name in (sound, doubtful)]
    objection = Dispute(record_id(runs[1]), "too <i>good</i>", "https://example.org/1")
    html = paper_pages.trust_on_task(make_board(runs, {objection.record: objection}), task.id)
    page = Text(html)
    assert "Trust: 1 measured, 1 disputed" in page.content
    assert page.content.index(doubtful) < page.content.index(f"{sound} :")
    assert "too <i>good</i>" in page.content
    assert html.startswith("<details open>")
    assert paper_pages.trust_on_task(make_board([]), task.id) == ""


def test_a_paper_without_a_plugin_says_so() -> None:
    found = make_board([])
    covered = next(c for c in found.covered if not c.infos)
    page = Text("\n".join(paper_pages.paper_page(found, covered, [])))
    assert "no plugin carries the id" in page.content
    assert covered.entry.title in page.content


def test_the_table_holds_every_paper_and_stays_small() -> None:
    found = make_board([])
    html = "\n".join(paper_pages.index(found))
    assert len(html.encode()) < 600_000
    hrefs = {attributes.get("href") for _, attributes in Text(html).tags}
    assert all(f"papers/{entry.id}.html" in hrefs for entry in coverage.catalogue())
    assert 'data-picks="track kind status verdict year tag"' in html
    rows = [attributes for tag, attributes in Text(html).tags if tag == "tr"][1:]
    # What is live leads; within a status the order is that of the catalogue.
    ordered = sorted(found.covered, key=lambda each: ("live", "not run", "no plugin yet").index(each.status))
    assert len({each.status for each in ordered}) > 1
    for row, entry in zip(rows, [each.entry for each in ordered], strict=True):
        assert row["data-tag"].split(",") == entry.tags
        assert (row["data-track"], row["data-kind"]) == (entry.track, entry.kind)
        assert row["data-year"] == str(entry.year or "")
        assert row["data-status"] in {"no plugin yet", "not run"}


def test_relatives_share_tags_and_rare_ones_weigh_more() -> None:
    def covered(name: str, *tags: str) -> coverage.Covered:
        base = coverage.catalogue()[0]
        return coverage.Covered(base._replace(id=name, tags=list(tags)), (), "no plugin yet", Counter(), Counter())

    papers = [
        covered("a", "rare", "common"), covered("b", "common"), covered("c", "rare"), covered("d", "common"),
        covered("e", "other"),
    ]  # fmt: skip
    related = paper_pages.relatives(papers)
    assert [other.entry.id for other, _ in related["a"]] == ["c", "b", "d"]
    assert related["a"][0][1] == ["rare"]
    assert related["e"] == []


def test_a_hostile_title_stays_text(tmp_path: Path) -> None:
    site._page(tmp_path / "x.md", HOSTILE, ["end"], (), [])
    _, front, body = (tmp_path / "x.md").read_text(encoding="utf-8").split("---\n", 2)
    assert "<script" not in json.loads(front.splitlines()[0].removeprefix("title: "))
    page = Text(markdown.markdown(body, extensions=["attr_list", "tables", "toc"]))
    assert page.tags[0][0] == "h1"
    assert {tag for tag, _ in page.tags} == {"h1", "p"}
    assert set(page.tags[0][1]) == {"id"}
    assert page.content == f"{HOSTILE} end"


def test_the_catalogue_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    line = coverage.catalogue()[0]._asdict() | {"id": "../../index"}
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"c\.jsonl:1: an id is made of"):
        coverage.catalogue(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("plain", "html"),
    [
        ("x_s = alpha_s x0 + eps", "x<sub>s</sub> = α<sub>s</sub> x0 + ε"),
        ("sum_j s(theta, t, x_j)", "Σ<sub>j</sub> s(θ, t, x<sub>j</sub>)"),
        ("p(theta)^(1-n) e^-h X_{t-1}", "p(θ)<sup>1-n</sup> e<sup>-h</sup> X<sub>t-1</sub>"),
        ("a <= b -> sqrt(2)", "a ≤ b → √(2)"),
        ("alpha_bar, abar_tau", "α\u0304, α\u0304<sub>τ</sub>"),
        ("my_method and a beta-test of f_npse_2", "my_method and a beta-test of f_npse_2"),
        ("x' < <b>", "x&#x27; &lt; &lt;b&gt;"),
    ],
)
def test_equations_are_set(plain: str, html: str) -> None:
    assert equations.typeset(markup.esc(plain)) == html


def test_docstrings_of_all_methods_lose_no_word() -> None:
    for info in plugins.methods().values():
        page = Text(markup.docstring(info.doc))
        words = [word for word in page.content.split() if word.isalpha() and word.isascii()]
        assert len(words) > 20, info.id
        kept = [
            w for w in info.doc.split() if w.isalpha() and w not in {*equations.GREEK, "grad", "sqrt", "abar", "sum"}
        ]
        missing = set(kept) - set(page.content.split())
        assert not missing, (info.id, missing)


def test_code_in_a_docstring_is_left_alone() -> None:
    html = markup.docstring("Call `alpha_t` and ``x_s``.\n\n1. one x_s\n   more\n2. two\n\n    $ stepmark run alpha_t")
    assert "<code>alpha_t</code> and <code>x_s</code>" in html
    assert "<ol><li>one x<sub>s</sub> more</li><li>two</li></ol>" in html
    assert "<pre><code>$ stepmark run alpha_t</code></pre>" in html


# the taxonomy -----------------------------------------------------------------------------------


def test_no_live_method_and_no_paper_is_lost_from_the_taxonomy() -> None:
    lost = record("nobody_knows_it", TASK_OF["image"], 1, 1.0)
    records = [
        record(info.id, info.tasks[0], plugins.tasks()[info.tasks[0]][1].rungs[0], 1.0)
        for info in plugins.methods().values()
    ]
    found = make_board([*records, lost])
    assert [each.record.method for each in found.ledger.left_out] == ["nobody_knows_it"]
    methods, papers = taxonomy.place(found, taxonomy.nodes())
    own = {info.id for info in plugins.methods().values() if info.base is None}  # a variant stands with its method
    assert {name for names in methods.values() for name in names} == own
    assert {name for names in papers.values() for name in names} == {entry.id for entry in coverage.catalogue()}
    root = checkout()
    assert root is not None
    text = taxonomy.fill((root / "docs" / "taxonomy.md").read_text(encoding="utf-8"), found)
    hrefs = {attributes.get("href") for _, attributes in Text(text).tags}
    assert all(f"methods/{name}.html" in hrefs for name in own)
    assert "nobody_knows_it" not in text
    assert "<!-- node" not in text


TASK_OF = {track: task for task, (track, _) in plugins.tasks().items()}


def test_the_taxonomy_names_only_what_there_is() -> None:
    tags = {tag for entry in coverage.catalogue() for tag in entry.tags}
    known = taxonomy.nodes()
    assert {tag for node in known for tag in node.tags} <= tags
    assert all(
        node.saves in {"steps", "evaluations per step", "layers", "tokens", "training", "understanding"}
        for node in known
    )
    with pytest.raises(ValueError, match="do not name the same nodes"):
        taxonomy.fill("<!-- node solvers -->\n<!-- elsewhere -->", make_board([]))


def test_one_glance_at_a_track_shows_its_papers() -> None:
    """One file for a paper of the catalogue, named after it; whatever is nobody's row stands among the baselines."""
    assert not [text for info in plugins.methods().values() for text in check.misplaced(info)]


@pytest.mark.parametrize(
    ("name", "moved", "said"),
    [
        ("ddt", "baselines/ddt", "ddt is a paper of the catalogue, no reference point"),
        ("euler", "euler", "euler is no id of leaderboard/catalogue.jsonl"),
        ("ddt", "redi", "paper: write Paper(id='redi')"),
    ],
)
def test_a_file_that_stands_elsewhere_is_told_where_it_belongs(name: str, moved: str, said: str) -> None:
    info = plugins.methods()[name]
    root = checkout()
    assert root is not None
    path = root / "methods" / "image" / f"{moved}.py"
    (text,) = check.misplaced(replace(info, id=path.stem, path=path))
    assert text.startswith(said)


def test_every_paper_states_its_headline() -> None:
    """What the abstract boasts of, even where it fails; or why there is none."""
    assert not [text for info in plugins.methods().values() for text in check.headline(info)]
