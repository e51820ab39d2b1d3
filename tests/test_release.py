"""Releases are whole, refused when they should be, and stay what they were; what moved between versions is found."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rigs.records import few_seeds, whole
from stepmark.leaderboard import changes, ledger, release, site
from stepmark.leaderboard.groups import grouped
from stepmark.leaderboard.pages import Board
from stepmark.leaderboard.rows import Row

import stepmark
from stepmark import __version__, plugins
from stepmark import record as record_files
from stepmark.record import Latency, Quality, Record

TASK = "class_to_image/digits_eps"


def record(value: float, ms: float = 1.0, **fields: Any) -> Record:
    """A record of the task's first metric with 2 % spread."""
    metric = next(iter(plugins.tasks()[TASK][1].metrics))
    spread = np.random.default_rng(0).normal(0, 0.02, 100)
    full: dict[str, Any] = {
        "suite": __version__, "track": "image", "method": "ddim", "task": TASK, "rung": 4, "seed": 0,
        "tier": "embedded", "machine": "test-cpu", "status": "ok", "counts": {"nfe": 4.0},
        "quality": {metric: Quality(value=value, resamples=(value * (1 + spread)).tolist())},
        "latency": Latency(items=1, median_ms=ms, iqr_ms=0.0, p95_ms=ms, samples_ms=[ms * (1 + x) for x in spread]),
        "digests": plugins.source_digests(plugins.methods()["ddim"], plugins.tasks()[TASK][1]),
        "environment": {"lock": "a" * 64, "torch": "2.11"},
        "command": "stepmark run", "created": "2031-01-02T03:04:05Z", "commit": "abcdef1",
    }  # fmt: skip
    return whole(Record(**(full | fields)))


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite version after all those that the tests make up; one seed a task."""
    monkeypatch.setattr(stepmark, "__version__", "0.20.0")
    few_seeds(monkeypatch, 1)


def write(records: list[Record], root: Path) -> Path:
    """Records as files below a results folder."""
    for each in records:
        record_files.append(record_files.path_of(root, each), each)
    return root


# what moved -------------------------------------------------------------------------------------


def versions() -> dict[str, list[Row]]:
    """Two suite versions: rung 4 got better with another method file, 8 stays, 16 moved to another machine, 2 is new."""
    old = [record(2.0, suite="0.1.0"), record(1.5, suite="0.1.0", rung=8), record(1.0, suite="0.1.0", rung=16)]
    old.append(record(1.0, suite="0.1.0", method="dpm_solver_pp"))
    other = {**record(1.0).digests, "method": "0" * 64}
    new = [
        record(1.0, suite="0.2.0", digests=other, environment={"lock": "b" * 64, "torch": "2.12"}),
        record(1.51, ms=1.001, suite="0.2.0", rung=8),
        record(0.5, ms=50.0, suite="0.2.0", rung=16, machine="other-cpu"),
        record(3.0, suite="0.2.0", rung=2),
        record(3.0, suite="0.2.0", method="unipc"),
    ]
    return {"0.1.0": grouped(old), "0.2.0": grouped(new)}


def test_moves_are_those_whose_intervals_part_and_name_what_differs() -> None:
    (step,) = changes.steps(versions())
    metric = next(iter(plugins.tasks()[TASK][1].metrics))
    found = {(move.new.rung, move.metric): move for move in step.moves}
    assert set(found) == {(4, metric), (16, metric)}  # not the milliseconds of another machine
    assert found[4, metric].why == ("method", "library lock (torch 2.11 to 2.12)")
    assert found[16, metric].why == ("machine",)
    assert (step.compared, step.came, step.left) == (3, ("unipc",), ("dpm_solver_pp",))


def test_counts_and_latency_can_move_too() -> None:
    old, new = grouped([record(1.0)]), grouped([record(1.0, ms=3.0, counts={"nfe": 3.0})])
    (step,) = changes.steps({"1": old, "2": new})
    assert {move.metric for move in step.moves} == {"nfe", "latency_ms"}
    assert all(move.why == () for move in step.moves)


def test_pages_say_it() -> None:
    rows = versions()
    everything = [r for found in rows.values() for row in found for r in row.records.values()]
    found = Board(ledger.of(everything), plugins.methods(), plugins.tasks())
    text = "\n".join(changes.page(found))
    assert "library lock (torch 2.11 to 2.12)" in text
    assert "New methods: unipc" in text
    assert "No version has been released yet" in text
    assert list(found.versions) == ["0.1.0", "0.2.0"]
    table = changes.history(found.versions, "ddim")
    assert table == changes.history(rows, "ddim")  # though the raw numbers of the older version are gone
    assert ">0.1.0</th>" in table
    assert ">0.2.0</th>" in table
    assert changes.history(rows, "dpm_solver_pp") == "<p>Measured in suite version 0.1.0 only.</p>"


def test_the_changelog_tells_of_each_version_and_stands_before_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / changes.ACCOUNT).write_text(
        "# Changelog\n\n## 0.2.0\n\n- **Arms** are\n  equal.\n\n## 0.1.0\n\nFirst.\n"
    )
    assert changes.told("0.2.0", tmp_path) == ["- **Arms** are", "  equal."]
    assert changes.told("0.1.0", tmp_path) == ["First."]
    assert changes.told("0.3.0", tmp_path) == changes.told("0.1.0", tmp_path / "elsewhere") == []
    rows = versions()
    everything = [r for found in rows.values() for row in found for r in row.records.values()]
    board = Board(ledger.of(everything), plugins.methods(), plugins.tasks())
    assert list(board.versions) == ["0.1.0", "0.2.0"]
    monkeypatch.setattr(plugins, "checkout", lambda: tmp_path)
    text = "\n".join(changes.page(board))
    assert text.index("to 0\\.2\\.0") < text.index("- **Arms** are") < text.index("cells are in both")


def test_versions_come_in_the_order_of_their_numbers() -> None:
    found = ledger.of(record(1.0, suite=s) for s in ("0.10.0", "0.9.0"))
    assert list(found.versions) == ["0.9.0", "0.10.0"]
    assert {r.suite for r in found.records} == {"0.10.0"}


# releases ---------------------------------------------------------------------------------------


@dataclass
class Place:
    """A results folder with one record, and what git would say."""

    results: Path
    status: str | None = ""

    def git(self, root: Path, *words: str) -> str | None:
        """In place of git."""
        return self.status if words[0] == "status" else "f" * 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A release can be made at once: the pages are one small file, so that MkDocs need not run."""

    def build(results: Path, out: Path, **options: Any) -> Path:
        assert options == {"snapshot": __version__}
        (out / "methods").mkdir(parents=True)
        (out / "methods" / "ddim.html").write_text("ddim")
        (out / site.MARKER).touch()
        (out / "app.js.map").write_text("no page needs it")
        (out / "index.html").write_text(f"home of {__version__}")
        return out / "index.html"

    made = Place(write([record(1.0)], tmp_path / "results"))
    monkeypatch.setattr(site, "build", build)
    monkeypatch.setattr(release, "_git", made.git)
    return made


def test_a_release_is_frozen_and_unpacked_where_it_was(place: Place, tmp_path: Path) -> None:
    manifest = release.freeze(place.results)
    assert (manifest.suite, manifest.records, manifest.machines, manifest.forced) == (__version__, 1, ["test-cpu"], [])
    assert set(manifest.files["site.tar.xz"]) == {"index.html", "methods/ddim.html"}
    data = release.contents((place.results / __version__ / "release" / "data.tar.xz").read_bytes())
    assert set(data) >= {"requirements.lock", "catalogue.jsonl"}
    named = list(manifest.files["records"])
    assert named[1:] == ["test-cpu/image/ddim.jsonl"] and named[0].startswith("test-cpu/environments/")
    assert release.check_all(place.results) == []
    assert release.unpack_sites(place.results, tmp_path / "out") == [__version__]
    assert (tmp_path / "out" / "versions" / __version__ / "methods" / "ddim.html").read_text() == "ddim"
    assert release.summary(place.results) == [(__version__, manifest.released[:10], manifest.digest)]
    assert len(record_files.read_all(place.results)) == 1  # a release holds nothing that is read as a record
    with pytest.raises(ValueError, match="is released already"):
        release.freeze(place.results)


@pytest.mark.parametrize(
    ("status", "words"),
    [(" M methods/image/baselines/ddim.py", "differs from its commit in 1 files"), (None, "no git repository")],
)
def test_a_changed_tree_is_refused_or_said(place: Place, status: str | None, words: str) -> None:
    place.status = status
    with pytest.raises(ValueError, match=words):
        release.freeze(place.results)
    assert not (place.results / __version__ / "release").exists()
    assert words in release.freeze(place.results, force=True).forced[0]


def test_stale_records_are_refused(place: Place) -> None:
    write([record(1.0, rung=8, digests={"method": "0" * 64})], place.results)
    with pytest.raises(ValueError, match="records of older sources: ddim on class_to_image/digits_eps"):
        release.freeze(place.results)
    with pytest.raises(ValueError, match="no records of suite version"):
        release.freeze(place.results / "nowhere")


def test_of_a_checkpoint_whose_folder_is_elsewhere_the_method_alone_can_be_old(place: Place) -> None:
    brought: dict[str, Any] = {"task": "checkpoint/tiny", "checkpoint": "ab" * 8, "tier": "hub"}
    write([record(1.0, **brought)], place.results)
    assert release.objections(place.results, Path()) == []
    write([record(1.0, rung=8, digests={"method": "0" * 64}, **brought)], place.results)
    (said,) = release.objections(place.results, Path())
    assert said == "records of older sources: ddim on checkpoint/tiny"


def test_a_machine_may_come_after_the_release(place: Place) -> None:
    release.freeze(place.results)
    write([record(1.0, machine="later-cpu")], place.results)
    assert release.check_all(place.results) == []
    write([record(1.0, method="unipc")], place.results)  # another file of a machine that the release has
    (said,) = release.check_all(place.results)
    assert said.endswith("differs from its release in test-cpu/image/unipc.jsonl")


def test_a_tampered_release_is_found(place: Place, tmp_path: Path) -> None:
    release.freeze(place.results)
    write([record(1.0, rung=8)], place.results)
    assert any("differs from its release in test-cpu/image/ddim.jsonl" in f for f in release.check_all(place.results))
    archive = place.results / __version__ / "release" / "site.tar.xz"
    archive.write_bytes(release.pack({"index.html": b"another"}))
    assert any("site.tar.xz: is not the archive" in fault for fault in release.check_all(place.results))
    with pytest.raises(ValueError, match="is not the archive"):
        release.unpack_sites(place.results, tmp_path / "out")


def test_the_digest_hangs_on_contents_alone() -> None:
    assert release.pack({"b": b"2", "a": b"1"}) == release.pack({"a": b"1", "b": b"2"})
    assert release.contents(release.pack({"a/b": b"1"})) == {"a/b": b"1"}
    files = {"data.tar.xz": {"a": "0" * 64}}
    assert release.digest_of(files) == release.digest_of(dict(files))
    assert release.digest_of(files) != release.digest_of({"data.tar.xz": {"a": "1" * 64}})


@pytest.mark.parametrize(("name", "kind"), [("../x", tarfile.REGTYPE), ("/x", tarfile.REGTYPE), ("x", tarfile.SYMTYPE)])
def test_an_archive_that_reaches_out_is_refused(name: str, kind: bytes) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match="no plain file inside it"):
        release.contents(stream.getvalue())


def test_what_this_checkout_has_released_is_what_it_was() -> None:
    root = plugins.checkout()
    assert root is not None
    published = root / "leaderboard" / "results"
    frozen = sorted(path.parent.name for path in published.glob("*/release"))  # none while the first version is open
    assert sorted(suite for suite, _, _ in release.summary(published)) == frozen
    assert release.check_all(published) == []
