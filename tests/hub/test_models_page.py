"""The page of real models: every checkpoint that somebody brought stands for itself, beside the board and not on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from stepmark import hub, plugins, run
from stepmark.cell import Cell
from stepmark.record import Quality, Record, append, path_of


def records(task: str) -> list[Record]:
    """Two methods at two rungs, said to be of the tier that the page shows."""
    found = [
        run.measure(Cell(method, task, rung, 0, "smoke"), show_progress=False)
        for method in ("autoregressive", "prompt_lookup")
        for rung in (1, 4)
    ]
    return [each.model_copy(update={"tier": "hub"}) for each in found]


def test_each_checkpoint_has_a_table_and_none_is_ranked(made: Path, opened: Callable[..., hub.Made]) -> None:
    from stepmark.leaderboard import ledger, models_page, pace
    from stepmark.leaderboard.estimates import figure
    from stepmark.leaderboard.pages import Board

    target = opened("llama", items=2, new_tokens=8, rungs=(1, 4))
    mine = records(target.task.id)
    hostile = "<script>alert(1)</script>"
    other = [
        each.model_copy(update={"checkpoint": "ab" * 8, "environment": each.environment | {"checkpoint": hostile}})
        for each in mine
    ]
    kept = ledger.of([*mine, *other])
    assert len(kept.brought) == 8 and not kept.rows and not kept.left_out
    text = "\n".join(models_page.page(Board(kept, plugins.methods(), plugins.tasks())))
    assert (
        text.count("<table") == 2
        and text.count("{ #") == len({line for line in text.splitlines() if "{ #" in line}) == 2
    )
    assert mine[0].checkpoint in text and "ab" * 8 in text
    assert hostile not in text
    for name in pace.HEAD:
        assert (f">{name}<" in text or f"{name}</abbr>" in text.replace("<wbr>", "")) is not name.startswith("J/")
    row = next(
        r for r in kept.brought if (r.method, r.rung, r.place.checkpoint) == ("prompt_lookup", 4, mine[0].checkpoint)
    )
    per_token = pace.pace(row, kept.brought).ms_per_token
    assert per_token is not None and f">{figure(per_token)}<" in text
    nothing = models_page.page(Board(ledger.of([]), plugins.methods(), plugins.tasks()))
    assert "make real-model" in nothing[-1]


def test_a_lossless_method_that_departs_from_a_real_model_is_told(
    opened: Callable[..., hub.Made], tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("real_model", Path(__file__).parents[2] / "bench" / "real_model.py")
    assert spec and spec.loader
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    shown = records(opened("llama", items=2, new_tokens=8, rungs=(1, 4)).task.id)
    task = f"checkpoint/{real.NAME.replace('-', '_')}_t8"
    named = [each.model_copy(update={"task": task, "method": name}) for each in shown for name in real.LOSSLESS]
    wrong = Quality(value=0.5, resamples=[0.5] * len(shown[0].quality["exact_match"].resamples))
    for each in named:
        spoilt = each.method == "jacobi" and each.rung == 4
        kept = each.model_copy(update={"quality": each.quality | {"exact_match": wrong}}) if spoilt else each
        if each.method != "lookahead_small":
            append(path_of(tmp_path, kept), kept)
    lacking, departed = real.departed(tmp_path)
    assert lacking.startswith("lookahead_small: no record")
    assert departed == "jacobi at rung 4: ok, exact_match 0.5"
