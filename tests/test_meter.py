"""Every meter against a quantity that is known."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from stepmark.meter import energy, latency, machine, memory

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MB = 1_000_000


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# latency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_known_sleeps_read_right(device):
    slept = {"short": [], "long": []}

    def sleep(name, seconds):
        began = time.perf_counter()
        time.sleep(seconds)
        # A busy neighbour wakes us late; the sleep that really happened is what must be read.
        slept[name].append((time.perf_counter() - began) * 1e3)

    subjects = {"short": lambda: sleep("short", 0.05), "long": lambda: sleep("long", 0.1)}
    read = latency.measure(subjects, device, warmup=1, min_rounds=9, min_seconds=0)
    for name, nominal in (("short", 50), ("long", 100)):
        assert read[name].median_ms == pytest.approx(np.median(slept[name][1:]), rel=0.02)
        assert min(read[name].samples_ms) == pytest.approx(nominal, rel=0.02)
    found = latency.ratio(read["long"], read["short"])
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_subject_against_itself_reads_one(device):
    weight = torch.randn(96, 96, generator=torch.Generator().manual_seed(0)).to(device)

    def work():
        product = weight
        for _ in range(10):
            product = torch.tanh(product @ weight)
        return product

    read = latency.measure({"a": work, "b": work}, device, warmup=20, min_rounds=200, min_seconds=0.1)
    # 99.9 %: at 95 % one run in twenty would fail on a sound ruler. Rounds are not independent on a shared machine, and an
    # interval of a thousandth may miss one by a hair: within a hundredth of it is one.
    found = latency.ratio(read["a"], read["b"], level=0.999)
    assert found.low <= 1.01 and found.high >= 0.99
    assert 0.9 < found.value < 1.1
    assert torch.equal(read["a"].output, read["b"].output)


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"] or ["cpu"])
def test_events_are_taken_on_cuda_and_null_with_a_reason_elsewhere(device):
    read = latency.measure({"a": lambda: torch.ones(9, device=device)}, device, min_rounds=3, min_seconds=0)["a"]
    if device == "cpu":
        assert read.cuda_samples_ns is None
        assert read.cuda_median_ms is None
        assert "CUDA device" in read.cuda_reason
    else:
        assert len(read.cuda_samples_ns) == read.rounds
        assert 0 < read.cuda_median_ms <= read.median_ms


def test_rounds_interleave_and_alternate():
    order = []
    subjects = {name: lambda name=name: order.append(name) for name in "abc"}
    read = latency.measure(subjects, "cpu", warmup=2, min_rounds=4, min_seconds=0)
    assert "".join(order) == "abcabc" + "abc" + "cba" + "abc" + "cba"
    assert [read[name].rounds for name in "abc"] == [4, 4, 4]


def test_setups_run_before_every_call_and_outside_the_clock(monkeypatch):
    now, order = 0, []
    monkeypatch.setattr(latency, "clock", lambda: now)

    def step(name, ns):
        nonlocal now
        order.append(name)
        now += ns

    read = latency.measure(
        {"a": lambda: step("a", 10), "b": lambda: step("b", 20)},
        "cpu",
        warmup=1,
        min_rounds=2,
        min_seconds=0,
        setups={"a": lambda: step("A", 1000)},
    )
    assert "".join(order) == "Aab" + "Aab" + "bAa"
    assert (read["a"].samples_ns, read["b"].samples_ns) == ((10, 10), (20, 20))


def test_drift_falls_on_both(monkeypatch):
    """A clock of our own on which every call takes longer than the one before it."""
    now, calls = 0, 0
    monkeypatch.setattr(latency, "clock", lambda: now)

    def work():
        nonlocal now, calls
        calls += 1
        now += 1_000_000 + 10_000 * calls

    read = latency.measure({"a": work, "b": work}, "cpu", warmup=1, min_rounds=50, min_seconds=0)
    found = latency.ratio(read["a"], read["b"])
    assert found.value == pytest.approx(1.0, abs=0.005)
    assert found.low <= 1.0 <= found.high
    # The same calls one subject after the other would have read a difference of a third.
    both = np.sort(read["a"].samples_ns + read["b"].samples_ns)
    assert np.median(both[50:]) / np.median(both[:50]) > 1.3


def test_minimum_seconds_and_the_limit(monkeypatch):
    now = 0
    monkeypatch.setattr(latency, "clock", lambda: now)

    def work():
        nonlocal now
        now += 100_000_000

    read = latency.measure({"a": work}, "cpu", min_rounds=3, min_seconds=1.0)["a"]
    assert read.rounds == 10
    assert read.note is None
    read = latency.measure({"a": work}, "cpu", min_rounds=3, min_seconds=0)["a"]
    assert read.rounds == 3
    read = latency.measure({"a": work}, "cpu", min_rounds=30, max_seconds=0.5)["a"]
    assert read.rounds == 5
    assert read.note == "stopped after 5 rounds at the limit of 0.5 s"
    read = latency.measure({"a": work}, "cpu", min_rounds=30, max_seconds=0)["a"]
    assert read.rounds == latency.FEWEST_ROUNDS


def test_summaries_of_known_samples():
    read = latency.Latency(samples_ns=tuple(range(1_000_000, 102_000_000, 1_000_000)))
    assert (read.median_ms, read.iqr_ms, read.p95_ms) == (51.0, 50.0, 96.0)
    assert read.samples_ms[0] == 1.0
    assert read.rounds == 101
    with pytest.raises(ValueError, match="at least one sample"):
        latency.Latency(samples_ns=())


def test_ratio_interval_covers_as_promised():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        drift = rng.lognormal(0, 0.3, 40)  # common to a round
        a = latency.Latency(tuple((3e6 * drift * rng.lognormal(0, 0.05, 40)).astype(int).tolist()))
        b = latency.Latency(tuple((2e6 * drift * rng.lognormal(0, 0.05, 40)).astype(int).tolist()))
        found = latency.ratio(a, b, B=400)
        inside += found.low <= 1.5 <= found.high
    assert inside >= 180  # medians of 40 are lumpy: the interval errs on the wide side


def test_ratio_refuses_what_was_not_interleaved():
    with pytest.raises(ValueError, match="interleaved"):
        latency.ratio(latency.Latency((1, 2, 3)), latency.Latency((1, 2)))


def test_the_collector_is_off_inside_a_sample_and_as_it_was_after():
    inside = []
    latency.measure({"a": lambda: inside.append(gc.isenabled())}, "cpu", warmup=1, min_rounds=3, min_seconds=0)
    assert inside == [False, False, False, False]  # the warm-up is a call like the others
    assert gc.isenabled()

    def fails():
        if not gc.isenabled():
            raise RuntimeError("in the sample")

    with pytest.raises(RuntimeError, match="in the sample"):
        latency.measure({"a": fails}, "cpu")
    assert gc.isenabled()


def test_the_output_is_that_of_the_last_timed_call():
    calls = iter(range(100))
    read = latency.measure({"a": lambda: next(calls)}, "cpu", warmup=3, min_rounds=4, min_seconds=0)["a"]
    assert read.output == 6


def test_the_floor_is_below_two_microseconds():
    # The best of three: a neighbour on a shared machine can only add.
    assert 0 < min(latency.floor("cpu") for _ in range(3)) <= 2000


def test_a_device_that_is_not_there_is_refused():
    if torch.accelerator.is_available():
        latency.synchroniser(torch.accelerator.current_accelerator())()
    else:
        with pytest.raises(RuntimeError, match="no accelerator"):
            latency.measure({"a": lambda: None}, "cuda")


def test_pytest_benchmark_adapter(benchmark):
    calls = []
    output, read = latency.with_pytest_benchmark(benchmark, lambda: calls.append(time.sleep(0.01)) or len(calls), 5)
    if benchmark.stats is None:  # --benchmark-disable
        assert read is None
        assert output == len(calls)
    else:
        assert read.rounds == 5
        assert output == len(calls) == 7
        assert 10 <= read.median_ms < 20


def test_pytest_benchmark_adapter_when_switched_off():
    fixture = types.SimpleNamespace(stats=None, pedantic=lambda call, **options: call())
    assert latency.with_pytest_benchmark(fixture, lambda: "out", 5) == ("out", None)


# memory -------------------------------------------------------------------------------------------------


def two_at_once(device="cpu"):
    """50 MB freed at once, then 2 x 50 MB together: a peak of 100 MB."""
    torch.empty(50 * MB, dtype=torch.uint8, device=device).fill_(1)
    first = torch.empty(50 * MB, dtype=torch.uint8, device=device).fill_(1)
    second = torch.empty(50 * MB, dtype=torch.uint8, device=device).fill_(2)
    return int(first[0]) + int(second[0])


@pytest.mark.parametrize("device", DEVICES)
def test_known_allocation(device):
    two_at_once(device)
    state = torch.ones(30 * MB, dtype=torch.uint8, device=device)
    read = memory.measure(lambda: two_at_once(device), device)
    assert read.reason is None
    assert state.numel() == 30 * MB
    if device == "cpu":
        assert read.method == "cpu_storages"
        assert 0 <= read.bytes - 100 * MB < 64  # scalars of a few bytes beside it
    else:
        assert read.method == "cuda_allocator"
        assert read.bytes == pytest.approx(100 * MB, rel=0.05)  # blocks are rounded up to 2 MiB


@pytest.mark.parametrize(
    ("call", "elements"),
    [
        (lambda x: torch.empty(1000), 1000),
        (lambda x: x.view(10, 100).t()[3:].unsqueeze(0), 0),
        (lambda x: x.mul_(2).add_(1), 0),
        (lambda x: torch.add(x, 1, out=x), 0),
        (lambda x: [torch.empty(1000).view(-1)[:5] for _ in range(5)], 5000),  # a view keeps the whole
        (lambda x: sum(float(torch.empty(1000).zero_()[0]) for _ in range(5)), None),  # never two at a time
        (lambda x: x.clone().view(10, 100).mul_(2), 1000),
        (lambda x: (x + 1) + 1, 2000),
        (lambda x: ((x + 1) + 1) + 1, 2000),
        (lambda x: torch.cat([x, x]), 2000),
        (lambda x: torch.tensor([1.0] * 1000), 1000),
        (lambda x: torch.empty(0).resize_(1000), 1000),
        (lambda x: x.detach().chunk(4), 0),
        (lambda x: torch.nn.Parameter(torch.empty(1000)), 1000),
    ],
)
def test_cpu_tracker_known_answers(call, elements):
    read = memory.measure(lambda: call(torch_argument), "cpu")
    if elements is None:
        assert 4000 <= read.bytes < 8000
    else:
        assert read.bytes == 4 * elements


torch_argument = torch.zeros(1000)


def test_cpu_tracker_counts_growth_of_what_was_there():
    grows = torch.zeros(100)
    read = memory.measure(lambda: grows.resize_(1000), "cpu")
    assert read.bytes == 4 * 900


def test_cpu_tracker_sees_autograd_and_modules():
    layer = torch.nn.Linear(100, 100, bias=False)
    x = torch.zeros(50, 100)
    with torch.no_grad():
        assert memory.measure(lambda: layer(x), "cpu").bytes == 4 * 50 * 100

    def chain():
        return layer(x).tanh().tanh().tanh()

    # The graph keeps every tanh; without it two neighbours are alive at a time.
    assert memory.measure(chain, "cpu").bytes == 3 * 4 * 50 * 100
    with torch.no_grad():
        assert memory.measure(chain, "cpu").bytes == 2 * 4 * 50 * 100


def test_cpu_tracker_is_deterministic_and_leaves_nothing_behind():
    def work():
        torch.nn.functional.scaled_dot_product_attention(*(torch.ones(2, 4, 64, 16) for _ in range(3)))

    assert len({memory.measure(work, "cpu").bytes for _ in range(4)}) == 1
    tracker = memory.StorageTracker()
    with tracker:
        kept = torch.empty(1000)
        del kept
        assert tracker.live == 0
        assert tracker.peak == 4000
        kept = torch.empty(500)
    assert (tracker.live, tracker.peak) == (2000, 4000)
    del kept
    torch.empty(10**6)
    assert tracker.peak == 4000


def test_cpu_tracker_unfolds_subclasses():
    class Boxed(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            box = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            box.inner = inner
            return box

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            plain = [arg.inner if isinstance(arg, Boxed) else arg for arg in args]
            return Boxed(func(*plain, **(kwargs or {})))

    boxed = Boxed(torch.zeros(1000))
    assert memory.measure(lambda: boxed + 1, "cpu").bytes == 4000


def test_peak_rss_cross_checks_the_tracker(tmp_path, monkeypatch):
    (tmp_path / "rss_target.py").write_text(RSS_TARGET)
    monkeypatch.syspath_prepend(str(tmp_path))
    read = memory.peak_rss_in_subprocess("rss_target:load", 80 * MB, warmup=1)
    assert read.reason is None
    assert read.method == "rss_high_water"
    assert read.bytes == pytest.approx(100 * MB, rel=0.05)


RSS_TARGET = """
import torch

def load(size):
    state = torch.ones(size, dtype=torch.uint8)  # loaded: must not count
    def call():
        torch.ones(50_000_000, dtype=torch.uint8)
        first, second = (torch.ones(50_000_000, dtype=torch.uint8) for _ in range(2))
        return int(first[0]) + int(second[0]) + int(state[0])
    return call
"""


def test_peak_rss_of_a_process_that_fails_is_null_with_its_last_line(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'OSError: no such thing' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    failed = memory.peak_rss_in_subprocess("rss_target:load")
    assert failed == memory.Memory(None, reason="the measured process failed: OSError: no such thing")
    python.write_text("#!/bin/sh\nexec sleep 20\n")
    slow = memory.peak_rss_in_subprocess("rss_target:load", timeout_s=0.2)
    assert slow == memory.Memory(None, reason="the measured process ran past 0.2 s")


def test_peak_rss_without_a_reset_is_good_only_above_earlier_peaks(monkeypatch):
    marks = iter([500, 300, 500])  # high-water mark, resident set, high-water mark

    def refuse(self, text):
        raise PermissionError("clear_refs")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(memory, "_status", lambda field: next(marks))
    read = memory.peak_rss(lambda: None)
    assert read.bytes is None
    assert "cannot be reset" in read.reason
    marks = iter([500, 300, 800])
    assert memory.peak_rss(lambda: None) == memory.Memory(500, "rss_high_water")


def test_memory_of_an_absent_device_is_null_with_a_reason():
    assert memory.measure(lambda: None, "meta") == memory.Memory(
        None, reason="no memory meter for devices of type meta"
    )
    if not torch.cuda.is_available():
        read = memory.measure(lambda: None, "cuda")
        assert read.bytes is None
        assert read.mib is None
        assert "no CUDA device" in read.reason


# energy -------------------------------------------------------------------------------------------------


class FakeMonitor:
    """A counter that gains `watts` while the clock runs and `joules` a call, read through Zeus's calls."""

    def __init__(self, watts=10.0, joules=5.0, seconds=0.5):
        self.now = self.counter = 0.0
        self.watts, self.joules, self.seconds = watts, joules, seconds
        self.windows, self.gpu_indices, self.cpu_indices, self.calls = {}, [], [0], 0

    def sleep(self, seconds):
        self.now += seconds
        self.counter += self.watts * seconds

    def call(self):
        self.calls += 1
        self.sleep(self.seconds)
        self.counter += self.joules

    def begin_window(self, key):
        self.windows[key] = (self.now, self.counter)

    def end_window(self, key):
        now, counter = self.windows.pop(key)
        spent = self.counter - counter
        return types.SimpleNamespace(
            time=self.now - now, gpu_energy={}, cpu_energy={0: 0.75 * spent}, dram_energy={0: 0.25 * spent}
        )


def measure_energy(fake, **options):
    options.setdefault("monitor", fake)
    return energy.measure(fake.call, "cpu", clock=lambda: fake.now, sleep=fake.sleep, **options)


def test_energy_of_a_known_counter():
    fake = FakeMonitor()
    read = measure_energy(fake, min_window_s=4.0)
    assert read.reason is None
    assert read.calls == 8
    assert read.window_s == pytest.approx(4.0)
    assert read.idle_watts == pytest.approx(10.0)
    assert read.joules == pytest.approx(10.0 * 0.5 + 5.0)
    assert read.joules_above_idle == pytest.approx(5.0)
    assert read.sensors == pytest.approx({"cpu0": 60.0, "dram0": 20.0})
    assert read.method == "zeus: cpu0, dram0"
    assert fake.windows == {}


def test_energy_window_is_never_short():
    fake = FakeMonitor(seconds=0.01)
    read = measure_energy(fake, min_window_s=0.0, idle_s=0.0)
    assert read.window_s >= energy.SHORTEST_WINDOW_S >= 2.0
    slow = measure_energy(FakeMonitor(seconds=50.0))
    assert slow.calls == 1
    assert slow.joules == pytest.approx(505.0)


def test_energy_counter_that_stands_still_is_null():
    fake = FakeMonitor(watts=0.0, joules=0.0)
    read = measure_energy(fake)
    assert read.joules is None
    assert "did not advance" in read.reason


def test_energy_with_a_stubbed_zeus(monkeypatch):
    """The way through the search for a sensor and Zeus's own constructor."""
    fake = FakeMonitor()
    asked = []
    module = types.ModuleType("zeus.monitor")
    module.ZeusMonitor = lambda **options: asked.append(options) or fake
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    monkeypatch.setattr(energy, "missing_sensor", lambda device: None)
    assert measure_energy(fake, monitor=None).joules == pytest.approx(10.0)
    assert asked == [{"gpu_indices": []}]
    fake.cpu_indices = []  # what Zeus gives on a machine without sensors: no error, and a sum of nought
    fake.calls = 0
    read = measure_energy(fake, monitor=None)
    assert read.joules is None
    assert "finds no sensor" in read.reason
    assert fake.calls == 0


def test_energy_without_readings_is_null():
    fake = FakeMonitor()
    fake.end_window = lambda key: types.SimpleNamespace(time=1.0, gpu_energy={}, cpu_energy=None, dram_energy=None)
    read = measure_energy(fake)
    assert read.joules is None
    assert "finds no sensor" in read.reason


@pytest.mark.parametrize("where", ["constructor", "begin_window", "end_window"])
def test_energy_faults_of_the_sensor_become_a_reason(monkeypatch, where):
    fake = FakeMonitor()

    def refuse(*_, **__):
        raise PermissionError("no\nrights")

    module = types.ModuleType("zeus.monitor")
    module.ZeusMonitor = refuse if where == "constructor" else lambda **options: fake
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    monkeypatch.setattr(energy, "missing_sensor", lambda device: None)
    if where != "constructor":
        setattr(fake, where, refuse)
    read = measure_energy(fake, monitor=None)
    assert read.joules is None
    assert read.reason == "Zeus cannot read a sensor: PermissionError: no rights"


def test_energy_errors_of_the_call_are_raised():
    fake = FakeMonitor()
    fake.call = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measure_energy(fake)


def test_energy_of_a_gpu_without_a_counter_is_null(monkeypatch):
    fake = FakeMonitor()
    fake.gpu_indices = [0]
    fake.gpus = types.SimpleNamespace(supports_get_total_energy_consumption=lambda index: False)
    monkeypatch.setattr(energy, "missing_sensor", lambda device: None)
    monkeypatch.setattr(energy, "_monitor", lambda device: fake)
    assert measure_energy(fake, monitor=None).reason == "GPU 0 has no energy counter"


def test_missing_sensors(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL_FILES", (str(tmp_path / "intel-rapl:*" / "energy_uj"),))
    assert energy.missing_sensor("cpu") == "the machine shows no RAPL energy counter"
    read = energy.measure(lambda: pytest.fail("called without a sensor"), "cpu")
    assert read.joules is None
    assert read.joules_above_idle is None
    assert read.reason
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1")
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: object())
    assert energy.missing_sensor("cpu") is None
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in energy.missing_sensor("cpu")
    monkeypatch.setattr(energy.os, "access", lambda *_: False)
    for name in [name for name in os.environ if name.startswith("ZEUSD_")]:
        monkeypatch.delenv(name)
    assert "may not be read by this user" in energy.missing_sensor("cpu")
    assert energy.missing_sensor("mps") == "no energy meter for devices of type mps"
    if not torch.cuda.is_available():
        assert "no CUDA device" in energy.missing_sensor("cuda:0")


@pytest.mark.parametrize("device", DEVICES)
def test_energy_on_this_machine_is_a_reading_or_a_reason(device):
    if energy.missing_sensor(device) is None:
        read = energy.measure(lambda: time.sleep(0.05), device, min_window_s=2.0, idle_s=2.0)
    else:
        read = energy.measure(lambda: pytest.fail("called without a sensor"), device)
    assert (read.joules is None) == (read.reason is not None)
    assert read.joules is None or read.joules > 0


# machine ------------------------------------------------------------------------------------------------

PROBE = """
import json, sys, time
from stepmark.meter import machine
began = time.perf_counter()
found = machine.fingerprint()
again = time.perf_counter()
machine.fingerprint()
ended = time.perf_counter()
print(json.dumps([machine.machine_id(), found, "torch" in sys.modules, again - began, ended - again]))
"""


def test_machine_id_is_stable_cheap_and_needs_no_torch():
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONHASHSEED": "99",
        "HOSTNAME": "elsewhere",
    }
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    elsewhere, found, torch_imported, first, second = json.loads(done.stdout)
    assert elsewhere == machine.machine_id() == found["machine"]
    assert not torch_imported
    assert found["torch_threads"] is None
    assert first < 0.5
    assert second < 0.05
    assert machine.fingerprint()["torch_threads"] == 1
