"""A folder on the command line, in records and in the processes that are started; and folders that cannot be used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepmark import engine, hub, plugins, record, run
from stepmark.cell import Cell
from stepmark.cell import digests as digests_of
from stepmark.check import _fresh_outputs
from stepmark.cli import main
from stepmark.hub import Choice, image_tasks, source, tasks, text_tasks
from stepmark.judge import Judge
from stepmark.method import Skip
from stepmark.runner import Networks, Runner


def measured(method: str, task: str, rung: int, seed: int = 0) -> record.Record:
    """Without timing; at a seed above 0 without the audit too, which calls a method six times."""
    return run.measure(Cell(method, task, rung, seed, "smoke"), timing=False, show_progress=False)


def command(made: Path, name: str, results: Path, *more: str) -> int:
    return main(["run", "--backbone", str(made / name), "--tier", "smoke", "--items", "2", "--no-timing",
                 "--results", str(results), *more])  # fmt: skip


def test_one_command_from_a_folder_to_a_table(
    made: Path, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records are written, resumed and shown by a process that knows nothing of the folder."""
    options = ("--method", "unipc", "--method", "unipc_best_grid", "--method", "mmd_ddm", "--rung", "4")
    assert command(made, "dit", tmp_path, *options) == 0
    assert hub.VARIABLE not in os.environ
    capsys.readouterr()
    records = {r.method: r for r in record.read_all(tmp_path)}
    assert {name: r.status for name, r in records.items()} == dict.fromkeys(
        ("unipc_best_grid", "mmd_ddm"), "skipped"
    ) | {"unipc": "ok"}
    assert records["unipc_best_grid"].message == "needs training data, and a checkpoint folder brings none"
    assert str(records["mmd_ddm"].message).startswith("trains a network of its own")
    assert records["unipc"].command == (
        "stepmark run --method unipc --backbone dit --items 2 --rung 4 --seed 0 --tier smoke"
    )
    assert main(["show", "--tier", "smoke", "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint/dit v1" in shown
    assert "Follow DiTTransformer2DModel in dit (v prediction)" in shown
    assert "endpoint_error (lower is better)" in shown
    assert main(["verify", str(next(tmp_path.rglob("unipc.jsonl")))]) == 2
    assert "name it by --backbone FOLDER" in capsys.readouterr().err
    again = ["--backbone", str(made / "dit"), "--items", "2"]
    assert main(["verify", str(next(tmp_path.rglob("unipc.jsonl"))), *again]) == 0
    assert "1 of 1 records agree" in capsys.readouterr().out
    assert command(made, "dit", tmp_path, *options) == 0
    assert "0 records written" in capsys.readouterr().out or len(list(tmp_path.rglob("*.jsonl"))) == 3


def test_the_site_leaves_out_what_the_table_shows(made: Path, tmp_path: Path, alone: None) -> None:
    from stepmark.leaderboard import groups

    from stepmark import admission

    assert command(made, "llama", tmp_path, "--method", "autoregressive", "--quiet") == 0
    records = record.read_all(tmp_path)
    assert [r.task for r in records] == ["checkpoint/llama"]
    assert groups.grouped(records) == []  # the site shows what anybody can run again
    assert [row.task for row in groups.grouped(records, admission.from_folders(records))] == ["checkpoint/llama"]


IN_A_WORKER = """
from stepmark import cell, hub, plugins
assert "checkpoint/llama_t4" not in plugins.tasks()
hub.restore()
task = plugins.tasks()["checkpoint/llama_t4"][1]
print(sorted(cell.digests(plugins.methods()["jacobi"], task).items()))
print(cell.Cell("jacobi", task.id, 2, 0, "smoke").command())
print(cell.track_of(task.id)[0].__name__, task.rungs)
"""


def test_processes_that_are_started_know_the_checkpoint(made: Path, alone: None) -> None:
    """Workers get the same task by the environment that they inherit."""
    with hub.using(Choice(str(made / "llama"), items=2, new_tokens=4, rungs=(2,))) as target:
        done = subprocess.run([sys.executable, "-c", IN_A_WORKER], capture_output=True, text=True, check=False)
        digests = sorted(digests_of(plugins.methods()["jacobi"], target.task).items())
        command = Cell("jacobi", target.task.id, 2, 0, "smoke").command()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [str(digests), command, "stepmark.hub.decoding (2,)"]


def change(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("dit", lambda folder: (folder / "config.json").unlink(), "config.json is not there; give a folder"),
    (
        "dit",
        rename("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        "can run code when it is loaded",
    ),
    ("llama", rename("model.safetensors", "pytorch_model.bin"), "can run code when it is loaded"),
    ("llama", lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors; download"),
    ("dit", change(_class_name="HunyuanDiT2DModel"), "HunyuanDiT2DModel cannot be measured; UNet2DModel, UNet2DCond"),
    ("dit", change(num_layers=3), "the weights lack transformer_blocks.2"),
    ("dit", change(num_attention_heads=4), "cannot be loaded"),
    ("llama", change(intermediate_size=32), "other shapes than config.json asks for"),
    ("llama", change(num_hidden_layers=2), "the weights hold model.layers.2"),
    ("dit", lambda folder: shutil.rmtree(folder / "scheduler"), "has no scheduler/scheduler_config.json"),
    ("unet_text", change(in_channels=9), "takes 9 channels and gives 4"),
    ("llama", change(model_type="own", auto_map={"AutoConfig": "own.Own"}), "ask for no code of their own"),
    ("llama", lambda folder: (folder / "config.json").write_text("{") and None, "is no JSON"),
]


@pytest.mark.parametrize(("name", "spoil", "words"), BAD)
def test_a_folder_that_cannot_be_used_is_one_line(
    made: Path,
    tmp_path: Path,
    alone: None,
    name: str,
    spoil: Callable[[Path], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(made / name, tmp_path / name)
    spoil(tmp_path / name)
    assert command(tmp_path, name, tmp_path / "results") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("stepmark: ") and words in said[-1]
    assert sum(line.startswith("stepmark: ") for line in said) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--guidance", "2", "--rung", "3"), "give even rungs"),
        (("--method", "euler"), "euler does not apply to checkpoint/dit"),
        (("--draft", "x"), "--draft is for language models"),
        (("--prompts", "/nowhere"), "--prompts /nowhere is no file"),
        (("--tier", "embedded"), "leave out --tier embedded"),
        (("--task", "sampling/mixtures_eps"), "leave out --task"),
    ],
)
def test_wrong_options_are_one_line(
    made: Path, tmp_path: Path, alone: None, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(made, "dit", tmp_path, *options) == 2
    assert words in capsys.readouterr().err


def test_hub_without_a_folder_and_options_without_one_are_refused(
    alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--tier", "hub"]) == 2
    assert "add --backbone FOLDER" in capsys.readouterr().err
    assert main(["run", "--guidance", "2"]) == 2
    assert "--guidance is for a checkpoint of your own" in capsys.readouterr().err


def test_networks_share_their_weights_but_not_their_counts(opened: Callable[..., hub.Made]) -> None:
    target = opened("llama_tied")
    first, second = (source.load("checkpoint/target") for _ in range(2))
    assert first.model.embed_tokens.weight is second.model.embed_tokens.weight
    first.model.layers[0].forward = None
    assert callable(second.model.layers[0].forward)
    with pytest.raises(Skip, match="--draft FOLDER"):
        Networks({}, target.task.absent)["draft"]
    assert plugins.tasks()[target.task.id][1] == target.task


# -- two checkpoints, and processes ---------------------------------------------------------------------------------


def test_two_folders_of_one_name_are_two_checkpoints(made: Path, tmp_path: Path, alone: None) -> None:
    """Their task has one id; the digest tells them apart, and nothing of one is left when the other is open."""
    for place, name in (("a", "dit"), ("b", "pixart"), ("c", "dit")):
        shutil.copytree(made / name, tmp_path / place / "dit")
    checkpoints, outputs, judged = [], [], []
    for place in "abc":
        with hub.using(Choice(str(tmp_path / place / "dit"), items=2, rungs=(2,))) as target:
            assert target.task.id == "checkpoint/dit"
            checkpoints.append(target.task.checkpoint)
            outputs.append(measured("ddim", target.task.id, 2, 1).outputs)
            judged.append(type(Judge(target.task.id).networks()["teacher"].model).__name__)
    for found in (checkpoints, outputs, judged):
        assert found[0] == found[2] != found[1]
    assert judged == ["DiTTransformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel"]
    assert "checkpoint/dit" not in plugins.tasks()
    assert not any("checkpoint/dit" in info.tasks for info in plugins.methods().values())


def test_all_that_was_brought_is_in_the_digest(made: Path, tmp_path: Path, alone: None) -> None:
    """Guidance, length of the texts, draft, weights and how many items, which are paired; not the rungs."""

    def brought(name: str, **options: Any) -> tuple[str, str]:
        task = tasks.made_from(Choice(str(made / name), **options)).task
        assert len(task.checkpoint) == 64 and task.words and task.origin
        return task.checkpoint, task.id

    texts = [brought("llama"), brought("llama", new_tokens=16), brought("llama", draft=str(made / "draft"))]
    images = [brought("dit"), brought("dit", guidance=2.0), brought("dit", guidance=1e20)]
    assert len({checkpoint for checkpoint, _ in texts + images}) == 6
    assert texts[0] == brought("llama", rungs=(2,)) == brought("llama", new_tokens=64)
    assert texts[0][0] != brought("llama", items=3)[0]
    assert [name for _, name in texts + images] == [
        "checkpoint/llama", "checkpoint/llama_t16", "checkpoint/llama",
        "checkpoint/dit", "checkpoint/dit_w2", "checkpoint/dit_w1e20",
    ]  # fmt: skip


def test_prompts_of_one_name_are_told_apart(made: Path, tmp_path: Path, alone: None) -> None:
    found = []
    for words in ("once upon", "a time", "a time"):
        (tmp_path / "prompts.txt").write_text(words)
        found.append(tasks.made_from(Choice(str(made / "llama"), prompts=str(tmp_path / "prompts.txt"))).task)
    assert found[0].checkpoint != found[1].checkpoint == found[2].checkpoint


def test_names_of_other_scripts_are_ids_of_their_own() -> None:
    names = ["模型", "модель", "模型-v1", "網-v1", "v1", "V1", "x" * 90]
    ids = [Choice(f"/somewhere/{name}").id for name in names]
    assert len(set(ids)) == len(names) - 1  # v1 and V1 read the same; their digests differ
    assert ids[4] == ids[5] == "checkpoint/v1"
    assert all(re.fullmatch("checkpoint/[a-z0-9][a-z0-9_]{0,63}", each) for each in ids)
    assert Choice("/elsewhere/模型").id == ids[0]


def test_families_name_tasks_that_there_are() -> None:
    fixed = plugins.fixed_tasks()
    for track, names in (("decoding", text_tasks.FAMILY), *(("image", f) for f in image_tasks.FAMILIES.values())):
        assert all(any(owner == track and i.startswith(name) for i, (owner, _) in fixed.items()) for name in names)


def test_a_method_that_needs_training_is_skipped_with_the_reason(opened: Callable[..., hub.Made]) -> None:
    target = opened("dit", items=2, rungs=(4,))
    trains_a_network, searches = measured("mmd_ddm", target.task.id, 4), measured("unipc_best_grid", target.task.id, 4)
    assert trains_a_network.status == searches.status == "skipped"
    assert searches.message == target.task.untrained == "needs training data, and a checkpoint folder brings none"
    assert str(trains_a_network.message).startswith("trains a network of its own")
    assert str(trains_a_network.message).endswith("a checkpoint folder brings none")


def test_started_processes_measure_the_same_checkpoint(made: Path, alone: None) -> None:
    """An engine's worker, and the fresh process of `stepmark check`."""
    with hub.using(Choice(str(made / "llama"), items=1, new_tokens=4, rungs=(2,))) as target:
        cell = Cell("autoregressive", target.task.id, 2, 0, "smoke")
        here = run.measure(cell, timing=False, show_progress=False)
        there = [record for record, _ in engine.pool([cell], "cpu", False, 1)]
        assert (here.status, here.message) == ("ok", None)
        assert [each.outputs for each in there] == [here.outputs]
        assert there[0].digests == here.digests
        assert _fresh_outputs(cell, "cpu") == here.outputs


ON_TWO = """
from stepmark import Method


class Both(Method):
    \"\"\"Plain steps of the network, the same in two processes.

    Rank 0 answers with what rank 1 found.
    \"\"\"

    tasks = ("class_to_image/digits_eps",)
    ranks = 2

    def run(self, session, batch, rung):
        x = batch["noise"]
        out = session.networks["teacher"](x, x.new_full((len(x),), 500.0), batch["condition"])
        return session.group.gather(out)[1]
"""


def test_the_ranks_of_a_method_have_the_checkpoint(
    made: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "both.py").write_text(ON_TWO)
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path))
    with hub.using(Choice(str(made / "dit"), items=2, rungs=(2,))) as target:
        runner = Runner(plugins.methods()["both"], target.task.id, "smoke", show_progress=False)
        assert runner.pool is not None
        try:
            batch = Judge(target.task.id).inputs(2, 0)
            found = runner.run(batch, 2, 0).outputs
        finally:
            runner.pool.close()
        with torch.no_grad():
            expected = source.load("checkpoint/teacher")(batch["noise"], torch.full((2,), 500.0), batch["condition"])
    assert torch.equal(found, expected)


def test_restoring_is_for_processes_that_were_told(made: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.restore()
    assert source.opened() is None
    monkeypatch.setenv(hub.VARIABLE, "no choice")
    with pytest.raises(ValueError, match=r"\$STEPMARK_BACKBONE is for Stepmark itself; unset it"):
        hub.restore()
    with hub.using(Choice(str(made / "llama"))) as outer:
        before = os.environ[hub.VARIABLE]
        with hub.using(Choice(str(made / "dit"))):
            assert "checkpoint/llama" not in plugins.tasks()
        assert source.current() == outer
        assert os.environ[hub.VARIABLE] == before
        hub.restore()
        assert source.current() is outer  # what is open already stays as it is
    assert os.environ[hub.VARIABLE] == "no choice"
    with pytest.raises(KeyError, match="name it by --backbone FOLDER"):
        source.current()
