"""`stepmark migrate`: the first schema becomes the second, with the same figures, whole files or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rigs.records import whole

import stepmark
from stepmark import plugins, samples
from stepmark import record as records
from stepmark.cell import digests
from stepmark.cli import main
from stepmark.migrate import migrate
from stepmark.record import Quality, Record, RecordError

ENVIRONMENT = {"cpu": "a", "device": "cpu", "lock": "ef" * 32} | {f"library_{i}": "1.2.3" for i in range(20)}


def old(**changes: Any) -> str:
    """A line as the first schema wrote it."""
    fields: dict[str, Any] = {
        "schema_version": 1, "suite": "0.1.0", "track": "image", "method": "euler", "task": "sampling/mixtures_flow",
        "rung": 4, "seed": 0, "tier": "embedded", "machine": "epyc-2c-00000000", "status": "ok", "message": None,
        "flags": [], "counts": {"nfe": 4.0}, "handles": {}, "reported": {},
        "quality": {"fd": {"value": 1.4871603735539443, "resamples": [1.5059, 1.47797, 1.48998]}},
        "latency": {"items": 8, "median_ms": 2.5, "iqr_ms": 0.1, "p95_ms": 3.0, "samples_ms": [2.5], "cuda_ms": None},
        "memory": None, "energy": None, "offline": {"seconds": 1.0, "evaluations": {}, "state_mib": 0.0},
        "reasons": {}, "outputs": "ab" * 32, "digests": {"method": "cd" * 32, "task": "01" * 32},
        "environment": ENVIRONMENT, "command": "stepmark run", "created": "2026-01-01T00:00:00Z", "commit": None,
    }  # fmt: skip
    return json.dumps(fields | changes, separators=(",", ":"))


def write(root: Path, *lines: str, method: str = "euler", suite: str = "0.1.0") -> Path:
    path = root / suite / "epyc-2c-00000000" / "image" / f"{method}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_records_in_less_room_and_a_second_call_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, old(), old(rung=8), old(rung=8))
    (path.parent.parent / "machine.json").write_text("{}")
    before, size = list(records.read(path)), path.stat().st_size
    assert main(["migrate", "--results", str(tmp_path)]) == 0
    assert "1 files with 3 records" in capsys.readouterr().out
    records.environment_of.cache_clear()
    assert list(records.read(path)) == before
    assert path.stat().st_size < 0.6 * size
    assert all(json.loads(line)["schema_version"] == 2 for line in path.read_text().splitlines())
    (kept,) = (path.parent.parent / "environments").iterdir()
    assert json.loads(kept.read_text()) == {k: v for k, v in ENVIRONMENT.items() if k != "device"}
    now = tree(tmp_path)
    assert not any("machine.json" in name for name in now)
    assert main(["migrate", "--results", str(tmp_path)]) == 0
    assert "nothing to migrate" in capsys.readouterr().out
    assert tree(tmp_path) == now


def test_both_schemas_in_one_file_and_a_torn_tail(tmp_path: Path) -> None:
    path = write(tmp_path, old())
    new = next(records.read(path)).model_copy(update={"rung": 16})
    records.append(path, new)
    with path.open("a") as stream:
        stream.write(old(rung=32)[:100])
    assert migrate(tmp_path).records == 2
    assert [r.rung for r in records.read(path)] == [4, 16]
    assert path.read_text().splitlines()[1] == records.line_of(new)


def test_a_file_that_cannot_be_read_is_left_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, old(), old(status="great"))
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"euler.jsonl:2: field status"):
        migrate(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["euler.jsonl"]  # nothing half written is left


def test_a_stop_in_the_middle_leaves_whole_files_and_the_next_call_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path, old(method=name), method=name) for name in ("ddim", "euler", "heun")]
    before = records.read_all(tmp_path)
    real, calls = records.replace_whole, iter(range(100))

    def stop(path: Path, text: str) -> None:
        if path.suffix == ".jsonl" and next(calls) == 1:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(records, "replace_whole", stop)
    with pytest.raises(KeyboardInterrupt):
        migrate(tmp_path)
    assert records.read_all(tmp_path) == before
    monkeypatch.setattr(records, "replace_whole", real)
    assert migrate(tmp_path).files == 2
    assert records.read_all(tmp_path) == before
    assert all(path.read_text().startswith('{"schema_version":2,') for path in paths)


def test_samples_stay_with_their_records(tmp_path: Path) -> None:
    path = write(tmp_path, old())
    shown = samples.Points(points=[(0.0, 1.0)], classes=[0])
    record = next(records.read(path))
    whole = {"method": "cd" * 32, "task": "01" * 32}
    file = samples.keep(tmp_path, record.model_copy(update={"digests": whole}), shown)
    samples.keep(tmp_path, record.model_copy(update={"digests": {"method": "99" * 32}, "rung": 8}), shown)  # an old one
    assert migrate(tmp_path).samples == 1
    first, stale = samples.read(file).samples
    assert first.source == samples.source_of(record.digests)
    assert stale.source == samples.source_of({"method": "99" * 32})
    assert samples.lacking(records.read_all(tmp_path), tmp_path) == []


def test_what_is_released_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = write(tmp_path, old(suite="0.0.9"), suite="0.0.9")
    (tmp_path / "0.0.9" / "release").mkdir()
    (tmp_path / "0.0.9" / "release" / "manifest.json").write_text("{}")
    write(tmp_path, old())
    before = frozen.read_bytes()
    assert main(["migrate", "--results", str(tmp_path)]) == 0
    assert "left as released: 0.0.9" in capsys.readouterr().out
    assert frozen.read_bytes() == before
    assert {r.suite for r in records.read_all(tmp_path)} == {"0.0.9", "0.1.0"}


def test_published_records_are_small_and_of_the_second_schema() -> None:
    from stepmark.places import results_folder

    root = results_folder("embedded")
    lines = [line for path in records.files(root) for line in path.read_bytes().splitlines()]
    kept = sum(path.stat().st_size for path in root.glob("*/*/environments/*.json"))
    assert (sum(map(len, lines)) + len(lines) + kept) / len(lines) <= 3000
    assert all(line.startswith(b'{"schema_version":2,') for line in lines)
    for folder in root.glob("*/*/environments"):  # of every machine
        line = next(folder.parent.glob("[!s]*/*.jsonl")).read_bytes().splitlines()[0]
        assert isinstance(records.parse(line.decode(), "here:1", folder), Record)


def test_a_new_version_takes_over_what_its_sources_still_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records that are as new as their sources, once; not what failed, what is older, nor over one of the new version."""
    info, task = plugins.methods()["euler"], plugins.tasks()["sampling/mixtures_flow"][1]
    now = digests(info, task)

    def made(rung: int, **fields: Any) -> Record:
        metrics = {name: Quality(value=1.0, resamples=[1.0] * 100) for name in task.metrics}
        common: dict[str, Any] = {
            "suite": stepmark.__version__, "track": "image", "method": "euler", "task": task.id, "rung": rung, "seed": 0,
            "tier": "embedded", "machine": "epyc-2c-00000000", "status": "ok", "quality": metrics, "command": "x",
            "digests": now, "created": "2026-01-01T00:00:00Z", "commit": "abcdef1",
        }  # fmt: skip
        return whole(Record(**common | fields))

    past = [
        made(task.rungs[0]), made(task.rungs[1]), made(task.rungs[2], status="failed", quality={}, message="no memory"),
        made(task.rungs[3], digests=now | {"method": "ab" * 8}),
    ]  # fmt: skip
    for each in past:
        records.append(records.path_of(tmp_path, each), each)
    monkeypatch.setattr(stepmark, "__version__", "9.9.9")
    mine = made(task.rungs[1], created="2026-02-02T00:00:00Z")
    records.append(records.path_of(tmp_path, mine), mine)
    for _ in range(2):
        assert main(["migrate", "--carry", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in said if "carried" in line] == ["1", "0"]
    found = {r.rung: r for r in records.everything(tmp_path) if r.suite == "9.9.9"}
    assert found.keys() == {task.rungs[0], task.rungs[1]}
    assert found[task.rungs[1]].created == "2026-02-02T00:00:00Z"
    assert found[task.rungs[0]] == past[0].model_copy(update={"suite": "9.9.9"})
    assert len([r for r in records.everything(tmp_path) if r.suite != "9.9.9"]) == 4
