"""`stepmark.frame`: a tidy table of the records, and the page that shows how to use it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stepmark.leaderboard import groups

from stepmark import __version__, frame, plugins
from stepmark import record as records
from stepmark.dataframe import COLUMNS
from stepmark.places import results_folder
from stepmark.record import Record

PAGE = Path(__file__).parent.parent / "docs" / "records.md"


def record(**fields: Any) -> Record:
    """A record with a metric whose resamples read higher than its value."""
    full: dict[str, Any] = {
        "suite": __version__, "track": "image", "method": "ddim", "task": "class_to_image/digits_eps", "rung": 4,
        "seed": 0, "tier": "embedded", "machine": "test-cpu", "status": "ok", "counts": {"nfe": 4.0},
        "quality": {"fd": {"value": 1.0, "resamples": [1.5 + x / 100 for x in range(-20, 21)]}},
        "offline": {"seconds": 2.0, "evaluations": {"teacher": 30.0, "judge": 12.0}, "state_mib": 0.0},
        "command": "stepmark run", "created": "2031-01-02T03:04:05Z",
    }  # fmt: skip
    return Record(**(full | fields))


def write(root: Path, *found: Record) -> Path:
    for each in found:
        records.append(records.path_of(root, each), each)
    return root


def test_one_row_per_record_and_figure(tmp_path: Path) -> None:
    timed = {
        "items": 10, "median_ms": 50.0, "iqr_ms": 1.0, "p95_ms": 60.0, "samples_ms": [40.0, 50.0, 60.0],
        "speedup": 2.0, "speedup_low": 1.5, "speedup_high": 2.5,
    }  # fmt: skip
    table = frame(write(tmp_path, record(latency=timed), record(seed=1, device="cuda")))
    assert tuple(table.columns) == COLUMNS
    assert len(table) == len(table[["seed", "figure"]].drop_duplicates()) == 6 + 4
    first = table[table.seed == 0].set_index("figure")
    assert set(first.index) == {"fd", "nfe", "latency_ms", "speedup", "offline_s", "offline_evaluations"}
    assert first.value.to_dict() == {
        "fd": 1.0, "nfe": 4.0, "latency_ms": 5.0, "speedup": 2.0, "offline_s": 2.0, "offline_evaluations": 42.0,
    }  # fmt: skip
    assert tuple(first.loc["speedup", ["low", "high"]]) == (1.5, 2.5)
    assert 4.0 <= first.low["latency_ms"] <= 5.0 <= first.high["latency_ms"] <= 6.0
    assert np.isnan(first.low["nfe"])
    # About the value, although every resample lies above it.
    assert first.low["fd"] == pytest.approx(0.81)
    assert first.high["fd"] == pytest.approx(1.19)
    assert first.unit["latency_ms"] == "ms per item"
    assert (first.better["fd"], first.rung_unit["fd"]) == ("lower", "NFE")
    assert first.better.isna().sum() == 5
    assert set(table.device[table.seed == 1]) == {"cuda"}
    assert table.value.dtype == "float64"
    assert str(table.created.dtype).endswith("UTC]")


def test_a_record_without_figures_is_one_row(tmp_path: Path) -> None:
    nothing = record(status="failed", message="ValueError", counts={}, quality={}, offline=None, tier="smoke")
    root = write(tmp_path, nothing, record(rung=8))
    table = frame(root)
    failed = table[table.status == "failed"]
    assert len(failed) == 1
    assert failed.figure.isna().all() and failed.value.isna().all()
    assert set(frame(root, "embedded").rung) == {8}
    assert len(frame(tmp_path / "nowhere")) == 0


def test_a_variant_names_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    known = plugins.methods()
    variant = dataclasses.replace(known["ddim"], id="ddim_coarse", base="ddim")
    monkeypatch.setattr(plugins, "methods", lambda: known | {"ddim_coarse": variant})
    table = frame(write(tmp_path, record(method="ddim_coarse"), record(), record(method="gone", task="a/gone")))
    assert table.groupby("method").base.first().to_dict() == {"ddim_coarse": "ddim", "ddim": "ddim", "gone": "gone"}


def test_the_published_figures_are_those_of_the_board() -> None:
    table = frame()
    everything = records.read_all(results_folder("embedded"))
    assert len(table) > 5 * len(everything)  # a line a figure: seeds that are not timed have fewer
    assert (table.low.isna() | ((table.low <= table.value) & (table.value <= table.high))).all()
    mine = [r for r in everything if r.method == "ddim" and r.task == "class_to_image/digits_eps" and r.latency]
    theirs = {row.rung: row for row in groups.grouped(mine)}
    for name, of in (("latency_ms", lambda row: row.latency_ms), ("memory_mib", lambda row: row.memory_mib)):
        found = table[(table.figure == name) & (table.method == "ddim") & (table.task == "class_to_image/digits_eps")]
        found = found[[theirs[line.rung].place.machine == line.machine for line in found.itertuples()]]
        assert len(found) == len(theirs)
        for line in found.itertuples():
            wanted = of(theirs[line.rung])
            assert (line.value, line.low, line.high) == wanted if name == "latency_ms" else line.value == wanted


def test_without_pandas_the_extra_is_named() -> None:
    code = "import sys; sys.modules['pandas'] = None; import stepmark; stepmark.frame()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'stepmark[frame]'" in done.stderr.splitlines()[-1]


def test_the_page_names_every_column_and_field_and_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert named >= set(COLUMNS) | set(Record.model_fields)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), {})
    drawn, committed = (
        path.read_text(encoding="utf-8") for path in (tmp_path / "records.svg", PAGE.with_suffix(".svg"))
    )
    for name in ("ddim", "dpm_solver_pp", "unipc"):
        assert name in capsys.readouterr().out or name in drawn
        assert f">{name}<" in drawn
        assert f">{name}<" in committed
