"""The instruments against known quantities: the floor of the clock, a method against itself, counts, FLOPs, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from stepmark import plugins, remote
from stepmark.judge import Judge
from stepmark.meter import latency
from stepmark.meter.counts import BudgetExceeded, Ledger, watch, watch_function
from stepmark.meter.flops import FORMULAS, count_flops

TASK = "sampling/mixtures_flow"

HEAD = """
import torch
from stepmark import Method

class Plain(Method):
    '''A plugin to try the instruments on.'''
    tasks = ("sampling/mixtures_flow",)
    def run(self, session, batch, rung):
"""
NULL = """
        return batch["noise"]
"""
EULER = """
        x = batch["noise"]
        for i in range(rung):
            x = x - session.networks["teacher"](x, torch.full((len(x),), 1000 - 1000 * i / rung), batch["condition"]) / rung
        return x
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], remote.Worker]]:
    """Somebody who answers calls on a plugin with the given body."""
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "image").mkdir()

    def make(body: str) -> remote.Worker:
        (tmp_path / "image" / "plain.py").write_text(HEAD + body)
        return remote.ready(plugins.methods()["plain"], TASK, "smoke", "cpu").worker()

    yield make
    remote.forget()


def test_floor_of_the_timer() -> None:
    floor = latency.floor("cpu")
    print(f"\nfloor at the timer: {floor:.0f} ns per call")
    assert floor <= 2000 * 2.5  # the goal is 2 microseconds; a loaded machine may read more


def test_floor_of_a_null_method(worker: Callable[[str], remote.Worker]) -> None:
    mine, batch = worker(NULL), Judge(TASK).inputs(64, 0)

    def medians(count: int = 100) -> tuple[float, float, float]:
        inside, outside, whole = [], [], []
        for index in range(count):
            start = time.perf_counter_ns()
            call = mine.run(batch, 4, 0, index)
            whole.append(time.perf_counter_ns() - start)
            inside.append(call.ns)
            outside.append(call.outside_ns or 0)
        return tuple(sorted(values)[count // 2] for values in (inside, outside, whole))  # type: ignore[return-value]

    # A neighbour that wakes up in between can spoil one reading, not three.
    read, around, each = map(min, zip(*(medians() for _ in range(3)), strict=True))
    print(
        f"\nnull method: {read} ns by its own clock, {around} ns by the harness's, {each / 1e6:.3f} ms of bookkeeping a call"
    )
    assert read <= 5000 * 2  # the goal is 5 microseconds; a loaded machine may read more
    assert each / 1e6 <= 4.0


def test_a_baseline_against_itself_reads_one(worker: Callable[[str], remote.Worker]) -> None:
    first, second, batch = worker(EULER), worker(EULER), Judge(TASK).inputs(512, 0)

    def turn(mine: remote.Worker, number: int) -> tuple[int, None, None]:
        return mine.run(batch, 8, 0, abs(number)).ns, None, None

    for _ in range(3):  # a neighbour that wakes up in between can spoil one reading, not three
        read = latency.take_turns({"a": partial(turn, first), "b": partial(turn, second)}, 3, 60, 0.2, 8.0)
        ratio = latency.ratio(read["a"], read["b"])
        if ratio.low <= 1.0 <= ratio.high and 0.95 < ratio.value < 1.05:
            break
    print(f"\nagainst itself: {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
    assert ratio.low <= 1.0 <= ratio.high
    assert ratio.value == pytest.approx(1.0, abs=0.1)


def test_a_known_amount_of_work_is_read_by_the_processor_s_clock(worker: Callable[[str], remote.Worker]) -> None:
    mine = worker("""
        import time
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        time.sleep(0.05)
        return batch["noise"]
""")
    call = mine.run(Judge(TASK).inputs(8, 0), 4, 0)
    assert call.processor_ns is not None
    assert 0.05 <= call.processor_ns / 1e9 <= 0.08
    assert call.ns / 1e9 >= 0.1
    assert (call.outside_ns or 0) >= call.ns


def test_who_is_asked_stays_however_many_are_made_ready(
    worker: Callable[[str], remote.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, batch = worker(NULL), Judge(TASK).inputs(8, 0)
    monkeypatch.setattr(remote, "READY", 1)
    for name in ("euler", "heun"):
        remote.ready(plugins.methods()[name], TASK, "smoke", "cpu")
    assert torch.equal(mine.run(batch, 4, 0).outputs, batch["noise"])
    assert [key[0] for key in remote._ready] == ["plain", "heun"]


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
    with pytest.raises(BudgetExceeded, match="11 evaluations asked of a batch that may spend 10;"):
        simulate(torch.zeros(1, 2))


def test_a_budget_says_of_what_it_is_made() -> None:
    ledger = Ledger()
    net = watch(ledger, "net", nn.Linear(3, 3))
    ledger.reset(limit=4 * 16, items=16)
    for _ in range(4):
        net(torch.zeros(16, 3))
    with pytest.raises(
        BudgetExceeded, match=r"^80 evaluations asked of a batch that may spend rung 4 x 16 items = 64;"
    ):
        net(torch.zeros(16, 3))


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


def test_flops_are_those_of_torchs_own_counter() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.turn = nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 4, 2)
            self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
            self.fold, self.two = nn.GRU(4, 6, batch_first=True), nn.Bilinear(6, 6, 5)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.norm(self.turn(self.conv(x)).flatten(2).transpose(1, 2))
            rows = F.interpolate(rows.transpose(1, 2), scale_factor=0.5, mode="linear").transpose(1, 2)
            found, _ = self.fold(self.attention(rows, rows, rows)[0])
            return torch.einsum("btc,bsc->bts", self.two(found, found), self.two(found, found)) @ found

    net, x = Mixed().eval(), torch.randn(2, 3, 12, 12)
    for without in (torch.no_grad, torch.inference_mode):
        with without(), count_flops(Ledger(), [net]) as flops:
            net(x)
        theirs = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with without(), theirs:
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                net(x)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
        assert flops.total == theirs.get_total_flops() > 0, without
        assert not flops.unpriced


def test_a_formula_that_a_plugin_registers_prices_nothing() -> None:
    known = flop_registry.pop(torch.ops.aten.mm)
    register_flop_formula(torch.ops.aten.mm)(lambda *_, **__: 0)
    try:
        with count_flops(Ledger(), []) as flops:
            torch.zeros(4, 6) @ torch.zeros(6, 5)
    finally:
        flop_registry[torch.ops.aten.mm] = known
    assert flops.total == 2 * 4 * 6 * 5


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
    with torch.no_grad(), count_flops(Ledger(), []) as flops:
        nn.Bilinear(6, 7, 5, bias=False)(torch.zeros(3, 6), torch.zeros(3, 7))
    assert flops.total == 3 * 3 * 6 * 7 * 5
