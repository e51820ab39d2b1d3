"""Samples: what is kept of a quality pass, how it is written and read, and that making it again gives the same bits."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rigs.records import whole
from stepmark.leaderboard import ledger, sample_pages
from stepmark.leaderboard.pages import Board

from stepmark import __version__, cell, migrate, plugins, samples
from stepmark import record as records
from stepmark.backbones.lm import encode
from stepmark.cli import main
from stepmark.judge import Judge
from stepmark.record import Offline, Record, RecordError
from stepmark.runner import Runner
from stepmark.verify import draw


def record(**fields: Any) -> Record:
    """A record without figures."""
    full: dict[str, Any] = {
        "suite": __version__, "track": "image", "method": "ddim", "task": "class_to_image/digits_flow", "rung": 4,
        "seed": 0, "tier": "embedded", "machine": "test-cpu", "status": "ok", "digests": {"method": "ab" * 16},
        "command": "stepmark run", "created": "2031-01-02T03:04:05Z",
    }  # fmt: skip
    return Record(**(full | fields))


def strip() -> samples.Pictures:
    """Three images of 2 x 4 pixels."""
    images = torch.linspace(-1.5, 1.5, 3 * 8).reshape(3, 1, 2, 4)
    shown = samples.of_outputs({"noise": torch.zeros(3, 1, 2, 4)}, images)
    assert isinstance(shown, samples.Pictures)
    return shown


def test_pictures_are_the_outputs_clamped_and_side_by_side() -> None:
    images = torch.linspace(-1.5, 1.5, 3 * 8).reshape(3, 1, 2, 4)
    pixels = torch.from_numpy(strip().pixels().copy())
    assert pixels.shape == (2, 12)
    wanted = ((images + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    assert torch.equal(pixels, torch.cat(list(wanted[:, 0]), dim=1))
    colour = samples.of_outputs({"noise": torch.zeros(20, 3, 5, 5)}, torch.rand(20, 3, 5, 5))
    assert isinstance(colour, samples.Pictures)
    assert colour.pixels().shape == (5, 5 * samples.IMAGES, 3)


def test_texts_and_points_and_nothing_else() -> None:
    prompts = [encode("tom has 3 pears"), encode("anna has 2 nuts"), encode("ben")]
    shown = samples.of_outputs({"prompt": prompts}, [encode("ans 3 <eos> ans"), encode("ans"), encode("a")])
    assert isinstance(shown, samples.Texts)
    assert shown.pairs == [("tom has 3 pears", "ans 3"), ("anna has 2 nuts", "ans")]
    batch = {"noise": torch.zeros(500, 2), "condition": torch.arange(500) % 2}
    points = samples.of_outputs(batch, torch.full((500, 2), 1 / 3))
    assert isinstance(points, samples.Points)
    assert points.points[0] == (0.333, 0.333)
    assert len(points.points) == len(points.classes) == samples.POINTS
    assert samples.of_outputs({"observations": torch.zeros(5, 2)}, torch.zeros(5, 2)) is None


def test_files_hold_one_sample_per_cell(tmp_path: Path) -> None:
    first = samples.keep(tmp_path, record(), strip())
    samples.keep(tmp_path, record(rung=2), strip())
    later = record(digests={"method": "cd" * 16})
    assert samples.keep(tmp_path, later, strip()) == first
    (file,) = samples.read_all(tmp_path)
    assert [(each.task, each.rung) for each in file.samples] == [(later.task, 2), (later.task, 4)]
    assert file.samples[1].source == samples.source_of(later.digests)
    assert [path.name for path in first.parent.iterdir()] == ["ddim.jsonl"]  # nothing half written is left
    assert records.read_all(tmp_path) == []  # samples are no records
    assert samples.lacking([record(), later, record(rung=8), record(rung=9, seed=1)], tmp_path) == [
        record(),
        record(rung=8),
    ]


def test_a_wild_file_is_refused(tmp_path: Path) -> None:
    path = samples.keep(tmp_path, record(), strip())
    good = json.loads(path.read_text())

    def refuse(words: str, **shown: Any) -> None:
        bad = json.loads(json.dumps(good))
        bad["shown"] |= shown
        path.write_text(json.dumps(bad))
        with pytest.raises(RecordError, match=words):
            samples.read(path)

    stream = io.BytesIO()
    Image.new("L", (9000, 10)).save(stream, "PNG")
    refuse("a picture is L of", png=base64.b64encode(stream.getvalue()).decode())
    refuse("cannot be read", png=base64.b64encode(b"GIF89a and no picture").decode())
    refuse("png", png='"><script>alert(1)</script>')
    refuse("shown", kind="nothing")
    path.write_text(json.dumps(good | {"method": "heun"}))
    with pytest.raises(RecordError, match="belongs elsewhere"):
        samples.read(path)


def test_samples_of_two_branches_merge_line_by_line(tmp_path: Path) -> None:
    path = samples.keep(tmp_path, record(), strip())
    base = path.read_text()
    samples.keep(tmp_path, record(rung=2), strip())
    left = path.read_text()
    path.write_text(base)
    newer = record(digests={"method": "cd" * 16}, created="2031-02-01T00:00:00Z")
    samples.keep(tmp_path, newer, strip())
    right = path.read_text()
    for merged in (left + right, right + left, f"<<<<<<< a\n{left}=======\n{right}>>>>>>> b\n"):
        path.write_text("\ufeff" + merged.replace("\n", "\r\n"))
        file = samples.read(path)
        assert [each.rung for each in file.samples] == [2, 4]
        assert file.samples[1].source == samples.source_of(newer.digests)
    samples.keep(tmp_path, record(rung=8), strip())
    assert len(path.read_text().splitlines()) == 3


def test_a_file_of_before_is_read_and_gives_its_place_to_lines(tmp_path: Path) -> None:
    path = samples.keep(tmp_path, record(), strip())
    old = path.with_suffix(".json")
    old.write_text(samples.read(path).model_dump_json(exclude={"samples": {"__all__": {"created"}}}))
    path.unlink()
    (before,) = samples.read_all(tmp_path)
    assert [each.rung for each in before.samples] == [4]
    samples.keep(tmp_path, record(rung=2), strip())
    assert [each.name for each in path.parent.iterdir()] == ["ddim.jsonl"]
    assert [each.rung for each in samples.read(path).samples] == [2, 4]
    path.unlink()
    old.write_text(before.model_dump_json())
    assert migrate.migrate(tmp_path).samples == 1
    assert samples.read_all(tmp_path) == [before]
    assert str(migrate.migrate(tmp_path)) == "nothing to migrate"


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "linked track"])
def test_what_is_no_file_of_samples_is_refused(tmp_path: Path, kind: str) -> None:
    path = samples.keep(tmp_path, record(), strip())
    for stray in ("._heun.jsonl", "heun.jsonl.orig", "heun.json~", "Thumbs.db", "heun_LOCAL_3.json"):
        path.with_name(stray).write_bytes(b"\x00")
    assert len(samples.read_all(tmp_path)) == 1
    if kind == "linked track":
        (path.parent.parent / "bayes").symlink_to(path.parent)
    else:
        other = path.with_name("heun.jsonl")
        {"fifo": os.mkfifo, "folder": Path.mkdir, "link": lambda p: p.symlink_to("/dev/zero")}[kind](other)
    with pytest.raises(RecordError):
        samples.read_all(tmp_path)


def test_what_a_page_shows_is_described_and_escaped() -> None:
    html = sample_pages.picture(strip(), 'ddim "at" rung 4')
    assert 'alt="3 samples of ddim &quot;at&quot; rung 4"' in html
    assert 'src="data:image/png;base64,' in html
    html = sample_pages.picture(samples.Texts(pairs=[("<b>q", "</p><script>")]), "x")
    assert "&lt;b&gt;q" in html
    assert "<script" not in html
    html = sample_pages.picture(samples.Points(points=[(0, 0), (1e9, 0)], classes=[0, 1]), "x")
    assert html.count("<circle") == 2
    assert 'cx="96.0"' in html  # what lies far out is drawn at the edge


@pytest.mark.parametrize("method", ["speculative", "lookahead_decoding", "jacobi", "llmcad", "medusa"])
def test_drafts_are_marked_as_the_decoder_judged_them(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    runner = Runner(plugins.methods()[method], "greedy/sums", "smoke", show_progress=False)
    inputs, rung = Judge("greedy/sums").inputs(1, 0), 16
    outputs = runner.run(inputs, rung, 0).outputs
    plain = samples.of_outputs(inputs, outputs)
    shown = samples.marked(plain, runner, inputs, rung, 0)
    assert isinstance(shown, samples.Texts)
    (pieces,) = shown.marks
    assert " ".join(words for words, mark in pieces if mark != "rejected") == shown.pairs[0][1]
    assert {mark for _, mark in pieces} == {"kept", "rejected", "own"}
    written = [len(words.split()) for words, mark in pieces if mark == "own"]
    assert set(written) == {1}  # one word of the target's own in each step ...
    assert len(written) <= rung  # ... and one evaluation
    html = sample_pages.picture(shown, "x")
    rejected = [len(words.split()) for words, mark in pieces if mark == "rejected"]
    assert html.count("<s title=") == sum(n <= sample_pages.SHORT for n in rejected)
    assert html.count('title="drafted and rejected') == len(rejected)


def test_what_was_drafted_beyond_the_end_is_no_part_of_the_text() -> None:
    def pieces(steps: list[tuple[list[int], list[int]]], length: int) -> list[tuple[str, list[int]]]:
        return [(mark, ids) for mark, ids in samples._pieces(steps, length) if ids]

    first = ([5, 6], [5, 7])  # one of two drafted words is kept, and a word of the target's own follows
    assert pieces([first], 2) == [("kept", [5]), ("rejected", [6]), ("own", [7])]
    # The text ends inside a kept draft: nothing after it was judged.
    assert pieces([first, ([8, 1, 9], [8, 1, 9, 4])], 4) == [
        ("kept", [5]), ("rejected", [6]), ("own", [7]), ("kept", [8, 1]),
    ]  # fmt: skip
    # It ends with a whole draft; the target's token after that is beyond.
    assert pieces([([8, 1], [8, 1, 4]), ([3], [3, 3])], 2) == [("kept", [8, 1])]
    # It ends with the target's own token.
    assert pieces([([8, 1], [8, 2]), ([3], [3, 3])], 2) == [("kept", [8]), ("rejected", [1]), ("own", [2])]


def test_of_a_tree_the_way_that_was_taken_is_shown_and_how_many_others() -> None:
    marks = [[("the fox", "kept"), (" ".join("abcdefgh"), "rejected"), ("ran", "own"), ("on it", "rejected")]]
    html = sample_pages.picture(samples.Texts(pairs=[("q", "the fox ran")], marks=marks), "x")
    assert 'title="drafted and rejected: a b c d e f g h">[8]</span> <b>ran</b> <s ' in html
    assert html.count("a b c") == 1


def test_a_method_that_drafts_nothing_has_no_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    runner = Runner(plugins.methods()["autoregressive"], "greedy/sums", "smoke", show_progress=False)
    inputs = Judge("greedy/sums").inputs(1, 0)
    plain = samples.of_outputs(inputs, runner.run(inputs, 8, 0).outputs)
    assert samples.marked(plain, runner, inputs, 8, 0) == plain
    assert samples.marked(None, runner, inputs, 8, 0) is None


def test_a_run_leaves_samples_and_making_them_again_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    choice = ["--tier", "smoke", "--method", "euler", "--task", "sampling/mixtures_flow", "--results", str(tmp_path)]
    assert main(["run", *choice, "--rung", "2", "--no-timing", "--quiet"]) == 0
    (file,) = samples.read_all(tmp_path)
    assert [each.rung for each in file.samples] == [2]
    (path,) = tmp_path.rglob("samples/*/*.jsonl")
    before = path.read_bytes()
    assert main(["samples", *choice]) == 0
    assert "0 samples written" in capsys.readouterr().out
    path.unlink()
    assert main(["samples", *choice]) == 0
    assert "1 samples written" in capsys.readouterr().out
    assert path.read_bytes() == before
    path.unlink()
    for cached in (tmp_path / "cache" / "prepared").glob("*.safetensors"):
        cached.unlink()
    assert main(["samples", *choice]) == 0  # euler prepares nothing, so nothing lacks
    assert path.read_bytes() == before


def test_nothing_is_trained_for_a_picture_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    task = plugins.tasks()["sampling/mixtures_flow"][1]
    long = Offline(seconds=60.0, evaluations={}, state_mib=1.0)
    digests = cell.digests(plugins.methods()["reflow"], task)
    found = record(method="reflow", task=task.id, digests=digests, offline=long)
    assert "not in the cache" in str(samples.remake(found))
    assert "sources have changed" in str(samples.remake(record(method="reflow", task=task.id)))


def test_a_sample_of_the_records_is_the_same_each_time_and_spread_over_methods() -> None:
    task = {"ddim": "class_to_image/digits_flow", "euler": "sampling/mixtures_flow", "heun": "sampling/mixtures_flow"}
    pool = [record(method=m, task=t, rung=rung) for m, t in task.items() for rung in range(1, 40)]
    pool += [record(rung=99, status="failed"), record(method="nobody", rung=1)]
    chosen = draw(pool, 6, 3)
    assert chosen == draw(pool[::-1], 6, 3)
    assert sorted(r.method for r in chosen) == ["ddim", "ddim", "euler", "euler", "heun", "heun"]
    assert len({r.key for r in chosen}) == 6
    assert chosen != draw(pool, 6, 4)
    assert len(draw(pool, 1000, 0)) == len(pool) - 2


def test_a_method_page_sets_its_samples_beside_those_of_the_baseline(tmp_path: Path) -> None:
    eps = "class_to_image/digits_eps"
    mine, other = (whole(record(method=name, task=eps)) for name in ("time_shift_sampler", "ddim"))
    samples.keep(tmp_path, mine, strip())
    samples.keep(tmp_path, other.model_copy(update={"digests": {"method": "0" * 32}}), strip())
    runs = [mine, other]
    found = Board(ledger.of(runs), plugins.methods(), plugins.tasks())
    html = "\n".join(sample_pages.section(found, samples.read_all(tmp_path), "time_shift_sampler"))
    own, beside = html.index("samples of time_shift_sampler at rung 4"), html.index("samples of ddim at rung 4")
    assert own < html.index("of other sources than the figures", beside)  # the baseline's picture is of another file
    assert html.count("of other sources") == 1
    assert "ddim (baseline)" in html
    assert sample_pages.section(found, [], "time_shift_sampler") == []
