"""The ruler is tested before any method: its floor, known quantities, and plugins that cheat.

Every cheat below is a plugin that some measure would believe. Each must be caught: by a failed record, or by a flag.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from stepmark import plugins, remote
from stepmark.cell import Cell
from stepmark.judge import Judge
from stepmark.meter import latency
from stepmark.meter.counts import BudgetExceeded, Ledger, watch, watch_function
from stepmark.meter.flops import count_flops
from stepmark.record import Record
from stepmark.run import measure
from stepmark.runner import Runner

TASK = "sampling/mixtures_flow"
DIGITS = "class_to_image/digits_flow"

HEAD = """
import builtins, copy, subprocess, sys, threading
import numpy as np
import torch
from stepmark import Method
from stepmark.task import load_split

STATE = {{}}

def euler(net, batch, n, work=None):
    x = batch["noise"]
    for i in range(work or n):
        t = torch.full((len(x),), 1 - i / n)
        x = x - net(x, t * 1000, batch["condition"]) / n
    return x

class Cheat(Method):
    '''A plugin that looks better than it is.'''
    tasks = ("{task}",)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write a plugin with the given body outside the tree and forget what was prepared of an earlier one."""
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "image").mkdir()

    def make(body: str, task: str = TASK) -> None:
        text = HEAD.format(task=task) + textwrap.indent(textwrap.dedent(body), "    ")
        (tmp_path / "image" / "cheat.py").write_text(text)
        remote.forget()

    yield make
    remote.forget()


def record_of(rung: int = 4, seed: int = 0, task: str = TASK, timing: bool = False) -> Record:
    """The record of the planted plugin."""
    return measure(Cell("cheat", task, rung, seed, "smoke"), "cpu", timing, show_progress=False)


def caught(record: Record, words: str) -> None:
    """The record must be failed or flagged, and say why."""
    text = f"{record.message} {record.flags}"
    assert record.status in {"failed", "flagged"}, text
    assert words in text, text


HONEST = """
def run(self, session, batch, rung):
    return euler(session.networks["teacher"], batch, rung)
"""


def test_an_honest_plugin_is_not_flagged(plugin: Callable[..., None]) -> None:
    plugin(HONEST)
    record = record_of()
    assert (record.status, record.flags, record.message) == ("ok", [], None)
    assert record.counts["nfe"] == 4
    assert record.counts["nfe_equivalent"] == pytest.approx(4)


CHEATS: dict[str, tuple[str, str]] = {
    "a stripped copy of the network": (
        """
        def run(self, session, batch, rung):
            spare = copy.deepcopy(session.networks["teacher"])
            for part in spare.modules():
                part.__dict__.pop("forward", None)
            return euler(spare, batch, 8 * rung)
        """,
        "no handle counts",
    ),
    "a plain copy still counts": (
        """
        def run(self, session, batch, rung):
            return euler(copy.deepcopy(session.networks["teacher"]), batch, 8 * rung)
        """,
        "BudgetExceeded",
    ),
    "a deepcopy made in prepare": (
        """
        def prepare(self, session):
            spare = copy.deepcopy(session.networks["teacher"])
            for part in spare.modules():
                part.__dict__.pop("forward", None)
            builtins.spare = spare
        def run(self, session, batch, rung):
            return euler(builtins.spare, batch, 8 * rung)
        """,
        "no handle counts",
    ),
    "the class's forward instead of the instance's": (
        """
        def run(self, session, batch, rung):
            net = session.networks["teacher"]
            return euler(lambda *a: type(net).forward(net, *a), batch, 8 * rung)
        """,
        "outside any handle",
    ),
    "prepare works on the test split": (
        """
        def prepare(self, session):
            return {"answers": load_split(session.task.dataset, "test")["x0"]}
        def run(self, session, batch, rung):
            return session.state["answers"][: len(batch["noise"])]
        """,
        "Sealed",
    ),
    "prepare makes the test inputs": (
        """
        def prepare(self, session):
            from stepmark.tracks import image
            return image.inputs(session.task, 8, torch.Generator(), session.device)
        def run(self, session, batch, rung):
            return batch["noise"]
        """,
        "Sealed",
    ),
    "run reads the test split": (
        """
        def run(self, session, batch, rung):
            return load_split(session.task.dataset, "test")["x0"][: len(batch["noise"])].clone()
        """,
        "Sealed",
    ),
    "run asks the metric": (
        """
        def run(self, session, batch, rung):
            from stepmark.tracks import image
            x = batch["noise"]
            image.score(session.task, batch, x, {}, np.zeros((1, len(x)), dtype=int))
            return x
        """,
        "Sealed",
    ),
    "run trains": (
        """
        def run(self, session, batch, rung):
            return session.train["x0"][: len(batch["noise"])].clone()
        """,
        "Sealed",
    ),
    "answers cached across calls": (
        """
        def run(self, session, batch, rung):
            key = float(batch["noise"].sum()), rung
            kept = builtins.__dict__.setdefault("kept", {})
            if key not in kept:
                kept[key] = euler(session.networks["teacher"], batch, rung)
            return kept[key].clone()
        """,
        "answers kept",
    ),
    "a global carries state between rungs": (
        """
        def run(self, session, batch, rung):
            x = euler(session.networks["teacher"], batch, rung)
            x = 0.5 * (x + STATE["x"][0]) if "x" in STATE else x
            STATE["x"] = x
            return x
        """,
        "hidden state",
    ),
    "the third call is lazy": (
        """
        def run(self, session, batch, rung):
            STATE["calls"] = STATE.get("calls", 0) + 1
            return euler(session.networks["teacher"], batch, rung, work=rung if STATE["calls"] < 3 else 1)
        """,
        "hidden state",
    ),
    "more evaluations than the rung": (
        """
        def run(self, session, batch, rung):
            return euler(session.networks["teacher"], batch, rung + 1)
        """,
        "BudgetExceeded",
    ),
    "a swallowed BudgetExceeded": (
        """
        def run(self, session, batch, rung):
            x = batch["noise"]
            for i in range(4 * rung):
                try:
                    x = euler(session.networks["teacher"], {**batch, "noise": x}, 1)
                except Exception:
                    x = x * 1.0
            return x
        """,
        "BudgetExceeded",
    ),
    "false self-reported counts": (
        """
        def run(self, session, batch, rung):
            session.report(nfe=1)
            return euler(session.networks["teacher"], batch, rung)
        """,
        "reports 1 nfe",
    ),
    "fewer items": (
        """
        def run(self, session, batch, rung):
            return euler(session.networks["teacher"], batch, rung)[:-1]
        """,
        "BadOutput",
    ),
    "NaN outputs": (
        """
        def run(self, session, batch, rung):
            return euler(session.networks["teacher"], batch, rung) * float("nan")
        """,
        "BadOutput",
    ),
    "a fixed seed": (
        """
        def run(self, session, batch, rung):
            x = euler(session.networks["teacher"], batch, rung)
            return x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        """,
        "generator of its own",
    ),
    "the global random state": (
        """
        def run(self, session, batch, rung):
            torch.manual_seed(7)
            x = euler(session.networks["teacher"], batch, rung)
            return x + 0.01 * torch.randn(x.shape)
        """,
        "global random state",
    ),
    "a fixed numpy seed": (
        """
        def run(self, session, batch, rung):
            x = euler(session.networks["teacher"], batch, rung)
            return x + 0.01 * torch.from_numpy(np.random.default_rng(7).standard_normal(x.shape)).float()
        """,
        "seeds numpy",
    ),
    "work in a thread": (
        """
        def run(self, session, batch, rung):
            found = []
            worker = threading.Thread(target=lambda: found.append(euler(session.networks["teacher"], batch, rung)))
            worker.start()
            worker.join()
            return found[0]
        """,
        "starts a thread",
    ),
    "work in a subprocess": (
        """
        def run(self, session, batch, rung):
            subprocess.run([sys.executable, "-c", "1 + 1"], check=True)
            return euler(session.networks["teacher"], batch, rung)
        """,
        "starts a process",
    ),
    "answers kept in a file": (
        """
        def run(self, session, batch, rung):
            with open("/dev/shm/stepmark-cheat", "w") as handle:
                handle.write("answers")
            return euler(session.networks["teacher"], batch, rung)
        """,
        "opens a file",
    ),
    "gradients and weights changed in run": (
        """
        def run(self, session, batch, rung):
            x = euler(session.networks["teacher"], batch, rung)
            for buffer in session.networks["teacher"].buffers():
                if buffer.is_floating_point():
                    buffer.mul_(0.5)
            return x
        """,
        "hidden state",
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_caught(name: str, plugin: Callable[..., None]) -> None:
    import builtins

    body, words = CHEATS[name]
    try:
        plugin(body)
        caught(record_of(), words)
    finally:
        for left in ("spare", "kept"):
            builtins.__dict__.pop(left, None)


def test_answers_memorised_for_the_published_inputs_are_caught(plugin: Callable[..., None]) -> None:
    plugin(HONEST)
    known = float(Judge(TASK).inputs(64, 0)["noise"].flatten()[0])
    plugin(f"""
        def run(self, session, batch, rung):
            if abs(float(batch["noise"].flatten()[0]) - {known!r}) < 1e-6:
                return batch["noise"] * 0.9  # as if looked up
            return euler(session.networks["teacher"], batch, rung)
    """)
    caught(record_of(), "unseen")


def test_a_cheaper_network_does_not_hide_behind_the_count(plugin: Callable[..., None]) -> None:
    # A student 20 times as large as the teacher costs one NFE; NFE-equivalents tell.
    plugin(
        """
        def networks(self, session):
            class Big(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layer = torch.nn.Linear(64, 4096, bias=False)
                def forward(self, x, t, c):
                    return (self.layer(x.flatten(1)) @ self.layer.weight).reshape(x.shape)
            return {"big": Big()}
        def run(self, session, batch, rung):
            return euler(session.networks["big"], batch, rung)
        """,
        DIGITS,
    )
    record = record_of(rung=2, task=DIGITS)
    assert record.status == "ok", record
    assert record.counts["nfe"] == 2
    flops = 2 * 2 * (2 * 64 * 4096)
    assert record.counts["flops"] == pytest.approx(flops)
    mine = Runner(plugins.methods()["cheat"], DIGITS, "smoke")
    assert record.counts["nfe_equivalent"] == pytest.approx(flops / mine.reference_flops(Judge(DIGITS).inputs(2, 0)))


NULL = """
def run(self, session, batch, rung):
    return batch["noise"]
"""


def test_floor_of_the_timer() -> None:
    floor = latency.floor("cpu")
    print(f"\nfloor at the timer: {floor:.0f} ns per call")
    assert floor <= 2000 * 2.5  # the goal is 2 microseconds; a loaded machine may read more


def test_floor_of_a_null_method(plugin: Callable[..., None]) -> None:
    plugin(NULL)
    mine = Runner(plugins.methods()["cheat"], TASK, "smoke")
    batch = Judge(TASK).inputs(64, 0)
    call: Callable[[], object] = lambda: mine.call(batch, 4)  # noqa: E731
    begin: Callable[[], object] = lambda: mine.begin(batch, 4, 0)  # noqa: E731
    read = latency.measure({"null": call}, "cpu", 10, 2000, 0.0, setups={"null": begin})["null"]
    overheads = []
    for index in range(200):
        start = time.perf_counter_ns()
        mine.run(batch, 4, 0, index)
        overheads.append(time.perf_counter_ns() - start)
    bookkeeping = sorted(overheads)[len(overheads) // 2] / 1e6
    print(f"\nnull method: {read.median_ns:.0f} ns per run, {bookkeeping:.3f} ms of bookkeeping per call")
    assert read.median_ns <= 2000 * 2.5
    assert bookkeeping <= 2.0


def test_a_baseline_against_itself_reads_one(plugin: Callable[..., None]) -> None:
    plugin(HONEST)
    mine = Runner(plugins.methods()["cheat"], TASK, "smoke")
    batch = Judge(TASK).inputs(512, 0)
    call: Callable[[], object] = lambda: mine.call(batch, 8)  # noqa: E731
    begin: Callable[[], object] = lambda: mine.begin(batch, 8, 0)  # noqa: E731
    for _ in range(3):  # a neighbour that wakes up in between can spoil one reading, not three
        read = latency.measure({"a": call, "b": call}, "cpu", 3, 60, 0.2, setups={"a": begin, "b": begin})
        ratio = latency.ratio(read["a"], read["b"])
        if ratio.low <= 1.0 <= ratio.high and 0.95 < ratio.value < 1.05:
            break
    print(f"\nagainst itself: {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
    assert ratio.low <= 1.0 <= ratio.high
    assert ratio.value == pytest.approx(1.0, abs=0.1)


# -- counters against known quantities ------------------------------------------------------------------------------


def test_every_way_to_call_a_network_counts() -> None:
    import copy

    ledger = Ledger()
    net = watch(ledger, "net", nn.Linear(3, 3))
    x = torch.zeros(5, 3)
    net(x)
    net.forward(x)
    torch.func.functional_call(net, dict(net.named_parameters()), (x,))
    copy.deepcopy(net)(x)
    nn.Sequential(net)(x)
    net(input=x)
    assert (ledger.entries["net"].calls, ledger.entries["net"].rows) == (6, 30)


def test_layers_cost_their_share_and_the_budget_holds() -> None:
    ledger = Ledger()
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    watch(ledger, "net", net, list(net))
    x = torch.zeros(2, 3)
    ledger.reset(limit=2 * 1.5)
    net(x)
    net[0](x)
    net[1](x)
    assert ledger.spent == pytest.approx(2 * 1.5)
    with pytest.raises(BudgetExceeded, match=r"3\.5 evaluations asked"):
        net[2](x)


def test_positions_are_tokens() -> None:
    ledger = Ledger()
    net = watch(ledger, "net", nn.Embedding(10, 4))
    net(torch.zeros(2, 7, dtype=torch.long))
    assert ledger.entries["net"].positions == 14


def test_simulators_count_rows_and_are_bounded() -> None:
    ledger = Ledger(bounded=("simulator",))
    simulate = watch_function(ledger, "simulator", lambda theta: theta)
    ledger.reset(limit=10)
    simulate(torch.zeros(10, 2))
    with pytest.raises(BudgetExceeded, match="11 evaluations asked"):
        simulate(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: nn.Linear(8, 16, bias=False), (4, 8), 2 * 4 * 8 * 16),
        (lambda: nn.Conv2d(3, 5, 3, padding=1, bias=False), (2, 3, 6, 6), 2 * 2 * 36 * 3 * 5 * 9),
        (lambda: nn.LSTM(4, 4, bias=False), (7, 1, 4), 7 * 2 * (2 * 4 * 16)),
    ],
)
def test_known_flops(make: Callable[[], nn.Module], shape: tuple[int, ...], expected: int) -> None:
    net = make().eval()
    ledger = Ledger()
    watch(ledger, "net", net)
    with torch.no_grad(), count_flops(ledger, [net]) as flops:
        net(torch.zeros(shape))
    assert (flops.total, flops.outside) == (expected, 0)


def test_flops_of_the_fused_attention_and_of_vectors_are_seen() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=False).eval()
    ledger = Ledger()
    watch(ledger, "net", attention)
    x = torch.zeros(1, 5, 8)
    with torch.no_grad(), count_flops(ledger, [attention]) as flops:
        attention(x, x, x, need_weights=False)
    assert flops.total >= 2 * 5 * 8 * (3 * 8 + 8) + 2 * (2 * 5 * 5 * 8)
    with count_flops(ledger, []) as flops:
        torch.zeros(4, 6) @ torch.zeros(6)
        torch.dot(torch.zeros(6), torch.zeros(6))
    assert flops.total == 2 * 4 * 6 + 2 * 6


def test_another_seed_gives_another_stream_and_the_same_seed_the_same(plugin: Callable[..., None]) -> None:
    plugin("""
        def run(self, session, batch, rung):
            x = euler(session.networks["teacher"], batch, rung)
            return x + 0.1 * torch.randn(x.shape, generator=session.rng)
    """)
    first, again, other = record_of(), record_of(), record_of(seed=1)
    assert first.status == "ok", first
    assert first.outputs == again.outputs != other.outputs
