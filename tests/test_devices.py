"""Which device is meant, what it is called, how it calculates, how many cores there are: with devices made up."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepmark import devices, engine, places, plugins, remote, run, suite
from stepmark.cell import Cell, track_of
from stepmark.cli import main
from stepmark.meter import energy, latency, machine
from stepmark.method import Skip
from stepmark.runner import Runner

A100, L4 = "NVIDIA A100-SXM4-40GB", "NVIDIA L4"
SLICE = f"{A100} MIG 1g.5gb"
CELL = Cell("euler", "sampling/mixtures_flow", 2, 0, "smoke")
Box = Callable[..., None]


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    """A machine with these GPUs, as torch (`seen`, in its own order) and as NVML know them."""

    def make(*models: str, seen: tuple[int, ...] | None = None, torch_names: tuple[str, ...] = ()) -> None:
        order = tuple(range(len(models))) if seen is None else seen
        names = torch_names or tuple(models[i] for i in order)
        cards = [{"name": n, "uuid": f"GPU-{i}", "gpu_max_mhz": 1000 + i} for i, n in enumerate(models)]
        monkeypatch.setattr(machine, "_nvidia", lambda: {"cards": cards, "gpu_driver": "999"})
        machine._hardware.cache_clear()
        machine._constant.cache_clear()

        def index(device: str) -> int:
            return int(str(device).partition(":")[2])

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[index(device)])
        uuids = [f"MIG-{i}" if torch_names else f"{i}" for i in order]
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[index(device)])
        )

    yield make
    monkeypatch.undo()
    machine._hardware.cache_clear()
    machine._constant.cache_clear()


# which device -----------------------------------------------------------------------------------

NONSENSE = ["gpu", "GPU", "", "cuda:", "cuda:-1", "cuda:01", "cpu:1", "meta", "xpu", "cuda:0:1", "cuda 0"]


@pytest.mark.parametrize("name", [*NONSENSE, "cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_refused_before_anything_runs(
    name: str, box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    box()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(engine, "measured", lambda *_: pytest.fail("a cell ran"))
    selection = suite.Selection("smoke", methods=("euler",), rungs=(2,))
    with pytest.raises(ValueError, match=r"^--device .*: there is no such device here, but cpu$"):
        list(suite.walk(selection, suite.Options(tmp_path, device=name)))
    for command in ("run", "tour", "verify", "samples"):
        assert main([command, "--device", name, "--results", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"stepmark: --device {name}: there is no such device here, but cpu\n"
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("name", [*NONSENSE, "cuda:2", "cuda:7", "cuda:256", "cuda:128"])
def test_of_two_gpus_there_is_no_third(name: str, box: Box) -> None:
    box(A100, A100)
    with pytest.raises(ValueError, match=r"but cpu, cuda:0, cuda:1$"):
        devices.named(name)


def test_why_gpus_that_are_there_cannot_be_used_is_said(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old\n(found version 9).", stacklevel=1)
        return False

    box(A100, A100)
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    with pytest.raises(ValueError, match=r"but cpu \(The NVIDIA driver on your system is too old \(found version 9\)"):
        devices.named("cuda")


def test_cuda_and_its_number_are_one_device_one_lock_and_one_place(box: Box, tmp_path: Path) -> None:
    box(A100, A100)
    assert devices.named("cuda") == devices.named(torch.device("cuda:0")) == "cuda:0"
    assert machine.machine_id("cuda") == machine.machine_id("cuda:0") == machine.machine_id("cuda:1")
    for one, other in (("cuda", "cuda:0"), ("cuda:0", "cuda")):
        with engine.device_lock(one), pytest.raises(engine.DeviceBusy), engine.device_lock(other):
            pass
    with engine.device_lock("cuda"), engine.device_lock("cuda:1"), engine.device_lock("cpu"):
        pass


def test_a_lock_is_of_the_card_whatever_number_a_process_gives_it(box: Box) -> None:
    """CUDA_VISIBLE_DEVICES=1 makes the second card the first."""
    box(A100, A100)
    with engine.device_lock("cuda:1"):
        box(A100, A100, seen=(1,))
        with pytest.raises(engine.DeviceBusy), engine.device_lock("cuda:0"):
            pass
        box(A100, A100, seen=(0,))
        with engine.device_lock("cuda:0"):
            pass


def test_how_many_workers(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box(A100, L4)
    monkeypatch.setattr(machine, "usable_cores", lambda: 3)
    assert [engine.available(name) for name in ("cpu", "cuda", "cuda:1")] == [3, 2, 1]
    assert [engine.workers_of("cuda", n) for n in (0, 1, 2)] == [2, 1, 2]
    for device, wrong in (("cpu", -1), ("cpu", 4), ("cuda", 3), ("cuda:1", 2)):
        with pytest.raises(ValueError, match=f"--workers {wrong}: this machine offers 1 to"):
            engine.workers_of(device, wrong)
        with pytest.raises(ValueError, match=f"--workers {wrong}: this machine offers 1 to"):
            suite.todo([], suite.Options(tmp_path, device=device, workers=wrong))


# what it is called ------------------------------------------------------------------------------


def test_each_of_two_models_is_named_as_itself(box: Box) -> None:
    box(A100, L4, L4)
    first, second, third = (machine.environment(f"cuda:{i}") for i in range(3))
    assert [e["gpu"] for e in (first, second, third)] == [A100, L4, L4]
    assert [e["gpu_index"] for e in (first, second, third)] == ["0", "1", "2"]
    assert [e["gpu_max_mhz"] for e in (first, second, third)] == ["1000", "1001", "1002"]
    assert first["machine"] != second["machine"] == third["machine"]
    assert "-a100-" in first["machine"] and "-2x-l4-" in second["machine"]
    assert machine.machine_ids("cuda") == {first["machine"], second["machine"]}
    assert first["gpus"] == f"{A100}, {L4}, {L4}"
    box(A100, L4, seen=(1, 0))  # another order than NVML's
    assert machine.environment("cuda:0")["gpu"] == L4 and machine.environment("cuda:0")["gpu_max_mhz"] == "1001"


def test_on_a_box_of_one_model_the_place_is_the_boxs(box: Box) -> None:
    box(A100, A100)
    assert machine.machine_id() == machine.machine_id("cuda:1") and machine.machine_ids("cuda") == {
        machine.machine_id()
    }
    assert "gpu" not in machine.environment() and machine.environment()["gpu_max_mhz"] == "1000"
    box()
    assert "gpu" not in machine.environment() and machine.machine_ids("cpu") == {machine.machine_id()}


def test_a_slice_is_named_as_a_slice(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box(A100, torch_names=(SLICE,))
    found = machine.environment("cuda")
    assert found["gpu"] == SLICE and "gpu_max_mhz" not in found
    assert "-a100-mig-1g-5gb-" in found["machine"]
    assert found["machine"] != machine.machine_id()
    assert energy.missing_sensor("cuda:0") == "a MIG slice has no energy counter: the card's is that of all its slices"


def test_a_record_says_which_gpu(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box(A100, L4)
    heading = run._heading(CELL, track_of(CELL.task)[1], {}, "cuda:1")
    assert heading["device"] == "cuda" and heading["machine"] == machine.machine_id("cuda:1")
    assert (heading["environment"]["gpu"], heading["environment"]["gpu_index"]) == (L4, "1")


def test_cards_are_counted_as_their_counters_are(monkeypatch: pytest.MonkeyPatch, box: Box) -> None:
    box(A100, L4)
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert "unset CUDA_DEVICE_ORDER" in str(energy.missing_sensor("cuda"))


def test_results_of_each_model_are_looked_for_where_they_lie(box: Box, tmp_path: Path) -> None:
    box(A100, L4)
    ids = [machine.machine_id(f"cuda:{i}") for i in range(2)]
    options = suite.Options(tmp_path, device="cuda", workers=2)
    assert suite.places(options) == set(ids)
    assert suite.places(suite.Options(tmp_path, device="cuda:1")) == {ids[1]}
    assert suite.places(suite.Options(tmp_path)) == {machine.machine_id()}


# how it calculates ------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["cell", "runner"])
def test_single_precision_is_whole_in_whatever_measures(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def skipped(*_: object) -> None:
        raise Skip("not of interest here")

    monkeypatch.setattr(remote, "ready", skipped)
    had = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        assert devices.tf32() == "matmul, cudnn"
        if entry == "cell":
            run.measured(CELL, timing=False, show_progress=False)
        else:
            Runner(plugins.methods()["euler"], CELL.task, "smoke", show_progress=False)
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision != "tf32" and devices.tf32() == "off"
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = had


def test_whether_tf32_is_on_is_said_beside_a_gpus_figures(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box(L4)
    devices.settle()
    assert machine.environment("cuda")["tf32"] == "off" and "tf32" not in machine.environment()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert machine.environment("cuda")["tf32"] == "cudnn"


def test_waiting_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: waited.append(device))
    latency.synchroniser("cuda:1")()
    mine = Runner.__new__(Runner)
    mine.device = torch.device("cuda:1")
    mine._synchronise()
    assert waited == [torch.device("cuda:1")] * 2


# cores ------------------------------------------------------------------------------------------


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`usable_cores` of a process on 64 cores with these control groups: /proc/self/cgroup, then files by path."""

    def make(cgroup: str | None, **files: str) -> int:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in {"proc/self/cgroup": cgroup, **{f"sys/{k}": v for k, v in files.items()}}.items():
            if text is not None:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
        root.mkdir(exist_ok=True)
        monkeypatch.setattr(machine, "PROC", str(root / "proc"))
        monkeypatch.setattr(machine, "CGROUPS", str(root / "sys"))
        return machine.usable_cores()

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    return make


V1 = {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}


def test_cores_are_no_more_than_a_container_has_time_for(container: Callable[..., int]) -> None:
    assert container("0::/\n") == container(None) == 64
    assert container("0::/\n", **{"cpu.max": "max 100000\n"}) == 64
    assert container("0::/\n", **{"cpu.max": "200000 100000\n"}) == 2
    assert container(None, **{"cpu.max": "200000 100000\n"}) == 2
    assert container("0::/\n", **{"cpu.max": "250000 100000\n"}) == 2
    assert container("0::/\n", **{"cpu.max": "50000 100000\n"}) == 1
    assert container("0::/\n", **{"cpu.max": "9900000 100000\n"}) == 64
    above = {"jobs/cpu.max": "400000 100000\n", "jobs/mine/cpu.max": "max 100000\n"}
    assert container("0::/jobs/mine\n", **above) == 4
    assert container("0::/jobs/mine\n", **above | {"jobs/mine/cpu.max": "150000 50000\n"}) == 3
    assert container("4:memory:/m\n1:cpu:/\n", **V1) == 2
    assert container("4:cpu,cpuacct:/docker/abc\n", **V1) == 2
    assert container("4:cpu,cpuacct:/slurm/7\n", **{f"cpu,cpuacct/slurm/7/{k[4:]}": v for k, v in V1.items()}) == 2
    assert container("1:cpu:/\n", **V1 | {"cpu/cpu.cfs_quota_us": "-1\n"}) == 64
    assert container("1:cpuset:/\n", **V1 | {"cpu/cpu.cfs_quota_us": "nonsense\n"}) == 64


def test_as_many_test_workers_as_cores(container: Callable[..., int]) -> None:
    root = plugins.checkout()
    if root is None:
        pytest.skip("needs a checkout")
    found = {}
    exec((root / "conftest.py").read_text(), found)
    assert container("0::/\n", **{"cpu.max": "300000 100000\n"}) == found["pytest_xdist_auto_num_workers"]() == 3


def test_fewer_cores_to_be_on_than_time_for(container: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3})
    assert container("0::/\n", **{"cpu.max": "800000 100000\n"}) == 2
    assert machine.cores() == [3, 5]
    with pytest.raises(ValueError, match="1 to 2 on cpu"):
        engine.workers_of("cpu", 3)


def test_a_system_without_affinity_runs_and_locks_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has neither: workers there have a core each to lock, though the system places them."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "_quota", lambda: None)
    assert machine.cores() == [0, 1, 2, 3] and engine.available("cpu") == 4
    one, other = engine.device_lock("cpu", [0]), engine.device_lock("cpu", [1])
    with one, other, pytest.raises(engine.DeviceBusy), engine.device_lock("cpu"):
        pass


# folders ----------------------------------------------------------------------------------------


def test_folders_that_cannot_be_written_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "measured", lambda *_: pytest.fail("a cell ran"))
    (tmp_path / "file").write_text("")
    command = ["run", "--tier", "smoke", "--method", "euler", "--rung", "2"]
    assert main([*command, "--results", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written (Not a directory); name a folder with --results" in error and error.count("\n") == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("euler.jsonl"))
    cells = suite.cells(suite.Selection("smoke", methods=("euler",), rungs=(2,)))
    theirs = suite._file(cells[0], tmp_path / "results", machine.machine_id())
    theirs.parent.mkdir(parents=True)
    theirs.write_text("")
    with pytest.raises(ValueError, match=r"euler.jsonl cannot be written; it is another user's"):
        suite.todo(cells, suite.Options(tmp_path / "results"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "file"))
    for other in (command, ["verify", "x"], ["samples"], ["check", "x.py"]):
        assert main(other) == 2
        error = capsys.readouterr().err
        assert "cannot be written" in error and "STEPMARK_CACHE" in error and error.count("\n") == 1
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\); do this"):
        places.writable(tmp_path, "do this")


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("STEPMARK_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(FileNotFoundError, match="name a folder in STEPMARK_CACHE"):
        places.writable_cache()
    assert main(["list", "tracks"]) == 0
