"""Methods in several processes: the group and its count, bands against the whole image, processes that fail."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from torch import Tensor, nn

from stepmark import backbones, plugins, remote
from stepmark.backbones.dit import ConditionalDiT
from stepmark.cell import track_of
from stepmark.distributed import SENT, Group, RankFailed
from stepmark.judge import Judge
from stepmark.meter.counts import BudgetExceeded, Ledger, Traffic, watch
from stepmark.runner import Runner
from stepmark.session import Session
from stepmark.tracks.image.patches import Bands
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step

torch.set_num_threads(1)

for name in ("digits_dit", "shapes16_flow"):
    backbones.recipe(name).build()  # imports of diffusers are lazy, and fail in threads that begin them at once

T = TypeVar("T")
SHAPES, DIGITS = "attributes_to_image/shapes16", "class_to_image/digits_flow"


class Posts:
    """Exchanges between threads, in place of a backend between processes: the n-th of one rank meets that of another."""

    def __init__(self, posts: dict[Any, Future[Tensor]], rank: int) -> None:
        self.posts, self.rank, self.number = posts, rank, 0

    def alltoall_base(self, got: Tensor, sent: Tensor, incoming: list[int], outgoing: list[int]) -> Any:
        self.number += 1
        number = self.number
        for peer, piece in enumerate(sent.split(outgoing)):
            self.posts[number, self.rank, peer].set_result(piece.clone())

        class Work:
            def wait(work) -> None:
                for peer, piece in enumerate(got.split(incoming)):
                    piece.copy_(self.posts[number, peer, self.rank].result(120))

        return Work()


class Letterbox(defaultdict[Any, "Future[Tensor]"]):
    """A dict of futures that threads may ask for at once."""

    def __init__(self) -> None:
        super().__init__(Future)
        self.lock = threading.Lock()

    def __getitem__(self, key: Any) -> Future[Tensor]:
        with self.lock:
            return super().__getitem__(key)


def in_step(size: int, part: Callable[[Group], T], ledgers: list[Ledger] | None = None) -> list[T]:
    """What each of `size` ranks, one thread each, gets from `part(group)`."""
    posts = Letterbox()

    def run(rank: int) -> T:
        with torch.no_grad():
            return part(Group(rank, size, Posts(posts, rank), ledgers[rank] if ledgers else None))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


def ledgers_of(size: int) -> list[Ledger]:
    """Ledgers that count what is sent."""
    found = [Ledger() for _ in range(size)]
    for ledger in found:
        ledger.entries[SENT] = Traffic()
    return found


def method_of(name: str) -> Any:
    """An instance of a method of the track image."""
    return plugins.load_class(plugins.methods()[name])()


def session_of(task: str, group: Group) -> Session:
    """A smoke session of one rank."""
    spec, ledger = track_of(task)[1], Ledger()
    teacher = watch(ledger, "teacher", backbones.load(spec.backbones["teacher"]))
    session = Session(spec, "smoke", torch.device("cpu"), torch.float32, {"teacher": teacher}, {}, ledger, False)
    session.group = group
    return session


def batch_of(task: str, n: int) -> dict[str, Tensor]:
    """Noise and conditions."""
    draw = torch.Generator().manual_seed(5)
    if task == SHAPES:
        condition = torch.stack([torch.arange(n) % 3, 3 + torch.arange(n) % 4], 1)
        return {"noise": torch.randn(n, 3, 16, 16, generator=draw), "condition": condition}
    return {"noise": torch.randn(n, 1, 8, 8, generator=draw), "condition": torch.arange(n) % 10}


def sampled(name: str, task: str, size: int, rung: int, **settings: Any) -> list[Tensor]:
    """The samples that every rank returns, with attributes of the method set to other values."""
    method, batch = method_of(name), batch_of(task, 3)
    for attribute, value in settings.items():
        setattr(method, attribute, value)
    return in_step(size, lambda group: method.run(session_of(task, group), batch, rung))


# --- the group -------------------------------------------------------------------------------------------------------


def test_every_rank_gets_what_was_meant_for_it_and_bytes_are_counted_once() -> None:
    ledgers = ledgers_of(3)

    def part(group: Group) -> tuple[dict[int, float], list[float]]:
        line = [rank for rank in (group.rank - 1, group.rank + 1) if 0 <= rank < 3]
        first = group.exchange({peer: torch.full((5,), 10.0 * group.rank + peer) for peer in line})
        everyone = [float(part[0]) for part in group.gather(torch.full((2,), float(group.rank)))]
        return {peer: float(got.mean()) for peer, got in first.wait().items()}, everyone

    found = in_step(3, part, ledgers)
    assert [got for got, _ in found] == [{1: 10.0}, {0: 1.0, 2: 21.0}, {1: 12.0}]
    assert all(everyone == [0.0, 1.0, 2.0] for _, everyone in found)
    assert [ledger.snapshot()[SENT] for ledger in ledgers] == [
        {"messages": 1 + 2, "bytes": 4 * (5 + 2 * 2)},
        {"messages": 2 + 2, "bytes": 4 * (10 + 2 * 2)},
        {"messages": 1 + 2, "bytes": 4 * (5 + 2 * 2)},
    ]
    fresh = ledgers_of(3)
    told = in_step(3, lambda group: group.spread(torch.full((4,), float(group.rank)), 1), fresh)
    assert all(bool((tensor == 1).all()) for tensor in told)
    assert [ledger.snapshot()[SENT]["bytes"] for ledger in fresh] == [0, 2 * 16, 0]
    with pytest.raises(ValueError, match="cannot send to itself"):
        Group(0, 2).exchange({0: torch.zeros(1)})


def test_an_evaluation_of_a_part_of_an_item_costs_its_share() -> None:
    ledger = Ledger(whole=64)
    network = watch(ledger, "teacher", nn.Identity())
    network(torch.zeros(5, 1, 4, 8))
    network(torch.zeros(5, 1, 8, 8))
    assert ledger.spent == 7.5


# --- bands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "size"), [(SHAPES, 2), (SHAPES, 4), (DIGITS, 2)])
def test_synchronous_bands_give_the_image_of_one_process(task: str, size: int) -> None:
    alone = method_of("euler").run(session_of(task, Group()), batch_of(task, 3), 3)
    for found in sampled("synchronous_patches", task, size, 3):
        torch.testing.assert_close(found, alone, atol=2e-4, rtol=1e-4)
    stale = sampled("distrifusion", task, size, 3)[0]
    assert (stale - alone).abs().max() > 1e-3  # what the tolerance above would not forgive


@pytest.mark.parametrize("size", [2, 4])
def test_synchronous_bands_of_tokens_give_the_image_of_one_process(size: int) -> None:
    torch.manual_seed(0)
    whole, batch = ConditionalDiT(8, 1, 24, 2, 3, 10).eval(), batch_of(DIGITS, 3)
    for weight in whole.parameters():
        if not weight.any():  # gates and the last layer start at zero
            nn.init.normal_(weight, std=0.1)

    def sample(network: nn.Module, bands: Bands) -> Tensor:
        denoise, x = Denoiser(network, batch["condition"]), bands.own(batch["noise"])
        with bands.on(network), torch.no_grad():
            for t, s in pairwise(uniform_times(3)):
                x = euler_step(x, bands.output(denoise, x, t), t, s)
        return bands.join(x)

    x, denoise = batch["noise"], Denoiser(whole, batch["condition"])
    with torch.no_grad():
        for t, s in pairwise(uniform_times(3)):
            x = euler_step(x, denoise.output(x, t), t, s)
    assert (x - batch["noise"]).abs().max() > 0.1
    for found in in_step(size, lambda group: sample(deepcopy(whole), Bands(group))):
        torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_only_steps_after_the_warm_up_are_stale() -> None:
    exact = sampled("synchronous_patches", SHAPES, 2, 4)[0]
    assert torch.equal(sampled("distrifusion", SHAPES, 2, 4, warm_up=1.0)[0], exact)
    assert torch.equal(sampled("distrifusion", SHAPES, 2, 1)[0], sampled("synchronous_patches", SHAPES, 2, 1)[0])
    late, early = (sampled("distrifusion", SHAPES, 2, 4, warm_up=share)[0] for share in (0.75, 0.25))
    assert 0 < (late - exact).norm() < (early - exact).norm()


def test_activations_that_did_not_change_are_not_stale() -> None:
    batch = batch_of(SHAPES, 3)
    whole = Denoiser(backbones.load("shapes16_flow"), batch["condition"]).output(batch["noise"], 0.7)

    def part(group: Group) -> Tensor:
        network, bands = backbones.load("shapes16_flow"), Bands(group)
        denoise = Denoiser(network, batch["condition"])
        with bands.on(network):
            bands.output(denoise, bands.own(batch["noise"]), 0.7)
            bands.synchronous = False
            return bands.join(bands.output(denoise, bands.own(batch["noise"]), 0.7))

    torch.testing.assert_close(in_step(2, part)[0], whole, atol=2e-4, rtol=1e-4)


class Layers(nn.Module):
    """One convolution or group norm that `Bands.on` finds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def twice(layer: nn.Module, old: Tensor, new: Tensor, size: int, reach: str | float = "all") -> list[Tensor]:
    """Every rank's output for its part of `new`, after evaluations of something older still, synchronous, and of `old`."""

    def part(group: Group) -> Tensor:
        bands, network = Bands(group, reach), deepcopy(Layers(layer))
        with bands.on(network):
            network(bands.own(old.flip(2) - 3))
            bands.synchronous = False
            network(bands.own(old))
            return network(bands.own(new))

    return in_step(size, part)


def test_a_convolution_sees_new_rows_inside_and_old_rows_outside() -> None:
    torch.manual_seed(0)
    layer, (old, new) = nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 1, 2, 8, 8)
    for rank, found in enumerate(twice(layer, old, new, 4)):
        mixed = old.clone()
        mixed[:, :, 2 * rank : 2 * rank + 2] = new[:, :, 2 * rank : 2 * rank + 2]
        with torch.no_grad():
            torch.testing.assert_close(found, layer(mixed)[:, :, 2 * rank : 2 * rank + 2])
    for rank, found in enumerate(twice(layer, old, new, 4, reach="none")):
        with torch.no_grad():
            torch.testing.assert_close(found, layer(new[:, :, 2 * rank : 2 * rank + 2]))


def test_latents_are_never_stale() -> None:
    torch.manual_seed(0)
    layer, (old, new) = nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 1, 2, 8, 8)
    layer.unet = nn.Module()
    layer.unet.conv_in = nn.Conv2d(2, 3, 3, padding=1)

    def part(group: Group) -> Tensor:
        bands, network = Bands(group), deepcopy(layer)
        with bands.on(network):
            network.unet.conv_in(bands.own(old))
            bands.synchronous = False
            return bands.join(network.unet.conv_in(bands.own(new)))

    with torch.no_grad():
        torch.testing.assert_close(in_step(2, part)[0], layer.unet.conv_in(new))


def test_a_group_norm_brings_old_statistics_up_to_date_by_its_own_share() -> None:
    torch.manual_seed(0)
    layer, (old, new) = nn.GroupNorm(2, 4), torch.randn(2, 3, 4, 8, 8)
    old[:, :, :4] *= 5
    new *= 0.1
    nn.init.normal_(layer.weight)

    def moments(x: Tensor) -> Tensor:
        groups = x.reshape(3, 2, -1)
        return torch.stack([groups.mean(2), groups.square().mean(2)])

    for rank, found in enumerate(twice(layer, old, new, 2)):
        band, own = new.chunk(2, 2)[rank], moments(new.chunk(2, 2)[rank])
        mean, square = moments(old) + own - moments(old.chunk(2, 2)[rank])
        variance = square - mean**2
        assert bool((variance < 0).all()) == (rank == 0)  # the band that was loud before
        variance = torch.where(variance < 0, own[1] - own[0] ** 2, variance)
        normed = (band.reshape(3, 2, -1) - mean[..., None]) / (variance + layer.eps).sqrt()[..., None]
        expected = normed.view(band.shape) * layer.weight.detach().view(-1, 1, 1) + layer.bias.detach().view(-1, 1, 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reach", ["all", 0.25, 0.5])
def test_attention_sees_its_own_new_tokens_and_the_old_ones_within_reach(reach: str | float) -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer, (old, new) = Attention(8, heads=2, dim_head=4), torch.randn(2, 3, 64, 8)  # tokens of 8 x 8
    ledgers = ledgers_of(2)

    def part(group: Group) -> Tensor:
        bands, network = Bands(group, reach), deepcopy(Layers(layer))
        with bands.on(network):
            network(old.flip(1).chunk(2, 1)[group.rank])
            bands.synchronous = False
            network(old.chunk(2, 1)[group.rank])
            return network(new.chunk(2, 1)[group.rank])

    rows = 4 if reach == "all" else round(4 * reach)
    found = in_step(2, part, ledgers)
    context = [
        torch.cat([new[:, :32], old[:, 32 : 32 + 8 * rows]], 1),
        torch.cat([old[:, 32 - 8 * rows : 32], new[:, 32:]], 1),
    ]
    for rank in range(2):
        with torch.no_grad():
            expected = layer(new.chunk(2, 1)[rank], encoder_hidden_states=context[rank])
        torch.testing.assert_close(found[rank], expected)
        assert ledgers[rank].snapshot()[SENT]["bytes"] == 3 * 2 * 3 * 8 * rows * 8 * 4  # evaluations, K and V, floats


def test_two_whole_neighbours_are_all_there_is() -> None:
    assert torch.equal(sampled("pcpp", SHAPES, 2, 4, fraction=1.0)[0], sampled("distrifusion", SHAPES, 2, 4)[0])
    assert not torch.equal(sampled("pcpp", SHAPES, 2, 4)[0], sampled("distrifusion", SHAPES, 2, 4)[0])


def test_a_tenth_of_the_steps_is_synchronous_with_parts_of_neighbours_too() -> None:
    """Of 16 steps two, which is neither the least, one, nor all of a short run."""
    found, two, one = (
        sampled(name, DIGITS, 2, 16, **settings)[0]
        for name, settings in (
            ("pcpp", {"fraction": 1.0}),
            ("distrifusion", {"warm_up": 2 / 16}),
            ("distrifusion", {"warm_up": 1 / 16}),
        )
    )
    assert torch.equal(found, two) and not torch.equal(found, one)


@pytest.mark.parametrize(("name", "rungs"), [("distrifusion", {50: 5, 16: 2, 4: 1, 1: 1}), ("naive_patches", {50: 50})])
def test_so_many_steps_are_synchronous_and_they_are_the_first(
    name: str, rungs: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, asked = plugins.load_class(plugins.methods()[name])(), []

    class Idle(Bands):
        def output(self, denoise: Denoiser, x: Tensor, t: float) -> Tensor:
            asked.append(self.synchronous)
            return 0 * x

    monkeypatch.setitem(type(method).run.__wrapped__.__globals__, "Bands", Idle)
    spec, network = track_of(DIGITS)[1], backbones.load(track_of(DIGITS)[1].backbones["teacher"])
    for rung, count in rungs.items():
        session = Session(spec, "smoke", torch.device("cpu"), torch.float32, {"teacher": network}, {}, Ledger(), False)
        session.begin("run", 1)
        method.run(session, {"noise": torch.zeros(1, 1, 8, 8), "condition": torch.zeros(1, dtype=torch.int64)}, rung)
        assert asked == [True] * count + [False] * (rung - count)
        asked.clear()


def test_naive_bands_know_nothing_of_each_other() -> None:
    batch, method = batch_of(SHAPES, 2), method_of("naive_patches")
    other = {**batch, "noise": torch.cat([batch["noise"][:, :, :8], torch.zeros(2, 3, 8, 16)], 2)}
    a, b = (
        in_step(2, lambda group, given=given: method.run(session_of(SHAPES, group), given, 3))[0]
        for given in (batch, other)
    )
    assert torch.equal(a[:, :, :8], b[:, :, :8])
    assert not torch.equal(a[:, :, 8:], b[:, :, 8:])


def test_steps_on_several_ranks_are_those_of_one_batch() -> None:
    """ParaStep with a worker in each process against its form for one device, and what it sends."""
    task, batch, ledgers = "class_to_image/digits_eps", batch_of(DIGITS, 3), ledgers_of(2)
    together, alone = method_of("parastep_processes"), method_of("parastep")
    alone.workers = 2
    for rung in (4, 12, 16):  # warm-up only; rounds with one step left; no step left
        expected = alone.run(session_of(task, Group()), batch, rung)
        for ledger in ledgers:
            ledger.reset()
        for found in in_step(2, lambda group: together.run(session_of(task, group), batch, rung), ledgers):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        rounds, latents = -(-max(0, rung - 5) // 2), 3 * 64 * 4
        sent = [ledger.snapshot()[SENT]["bytes"] for ledger in ledgers]
        assert sent == [(min(rung, 5) + rounds) * latents, rounds * latents]


def test_a_network_is_itself_again_afterwards() -> None:
    network, batch = backbones.load("shapes16_flow"), batch_of(SHAPES, 2)
    denoise = Denoiser(network, batch["condition"])
    before = denoise.output(batch["noise"], 0.5)
    with pytest.raises(RuntimeError), Bands(Group()).on(network):
        raise RuntimeError("on purpose")
    assert torch.equal(denoise.output(batch["noise"], 0.5), before)
    assert not any("forward" in part.__dict__ for part in network.modules())


# --- processes -------------------------------------------------------------------------------------------------------

FAULTY = '''
import torch
from stepmark import Method


class Faulty(Method):
    """A method in two processes whose second fails if it is asked to.

    At rung 2. Each rank evaluates whole images, which at rung 1 is one too many.
    """

    tasks = ("class_to_image/digits_flow",)
    ranks = 2

    def run(self, session, batch, rung):
        x = batch["noise"]
        if rung == 2 and session.group.rank == 1:
            raise ValueError("on purpose")
        session.networks["teacher"](x[:, :, :4].repeat(1, 1, 2, 1), torch.ones(len(x)), batch["condition"])
        return torch.stack(session.group.gather(x)).mean(0)
'''


@pytest.fixture
def runner_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Runner]]:
    """Runners at tier smoke, with a faulty method among the known ones; their processes end with the test."""
    (tmp_path / "m" / "image").mkdir(parents=True)
    (tmp_path / "m" / "image" / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "m"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    made: list[Runner] = []

    def make(name: str) -> Runner:
        made.append(Runner(plugins.methods()[name], DIGITS, "smoke", show_progress=False))
        return made[-1]

    yield make
    for runner in made:
        runner.pool.close()
    assert multiprocessing.active_children() == []


def test_processes_give_what_threads_in_step_give_and_their_work_is_counted(runner_of: Any) -> None:
    runner = runner_of("distrifusion")
    batch = Judge(DIGITS).inputs(6, 0)
    found = runner.run(batch, 3, seed=0).outputs
    method, ledgers = method_of("distrifusion"), ledgers_of(2)
    expected = in_step(2, lambda group: method.run(session_of(DIGITS, group), batch, 3), ledgers)
    assert torch.equal(found, expected[0])
    assert torch.equal(expected[0], expected[1])
    counts = runner.ledger.snapshot()
    assert counts["teacher"] == {"calls": 3, "evaluations": 18, "positions": 18}
    assert counts[SENT]["bytes"] == sum(ledger.snapshot()[SENT]["bytes"] for ledger in ledgers)
    call = runner.counted(batch, 3, seed=0)
    flops = call.flops
    alone = runner.reference_flops(batch)
    assert call.flags == [] and len(flops.ranks) == 2
    assert flops.total == sum(flops.ranks)
    assert 3 * alone * 6 <= flops.total < 3.3 * alone * 6
    assert torch.equal(runner.run(batch, 3, seed=0).outputs, found)


def test_a_rank_that_fails_or_dies_is_named_and_the_next_call_starts_afresh(runner_of: Any) -> None:
    runner = runner_of("faulty")
    batch = Judge(DIGITS).inputs(4, 0)
    with pytest.raises(RankFailed, match=r"^rank 1 of 2: ValueError: on purpose$"):
        runner.run(batch, 2, seed=0)
    assert multiprocessing.active_children() == []
    assert torch.equal(runner.run(batch, 3, seed=0).outputs, batch["noise"])
    assert runner.ledger.spent == 8  # four images in each of two ranks
    with pytest.raises(BudgetExceeded):
        runner.run(batch, 1, seed=0)
    runner.begin(batch, 1, 0)
    runner.pool._processes[0].kill()
    with pytest.raises(RankFailed, match=r"rank 1 of 2: died \(exit code -9\)"):
        runner.call(batch, 1)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError])
def test_no_process_outlives_a_fault_of_the_measuring_rank(runner_of: Any, fault: type[BaseException]) -> None:
    runner = runner_of("distrifusion")
    batch = Judge(DIGITS).inputs(2, 0)
    runner.begin(batch, 2, 0)
    started = [process.pid for process in runner.pool._processes]

    def fail(*_: Any) -> None:
        raise fault("on purpose")

    runner.method.run = fail  # the other rank waits for an exchange with this one
    with pytest.raises(fault):
        runner.call(batch, 2)
    assert started and multiprocessing.active_children() == []
    assert gone(started)


def test_no_process_outlives_a_group_that_cannot_be_joined(runner_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of("faulty")

    def refuse(*_: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("stepmark.distributed._backend", refuse)
    with pytest.raises(RuntimeError, match="no network"):
        runner.begin(Judge(DIGITS).inputs(2, 0), 3, 0)
    assert multiprocessing.active_children() == []
    assert gone([process.pid for process in runner.pool._processes])
    monkeypatch.undo()
    runner.pool.close()  # of nothing


KILLED = """
import os, signal
from stepmark import plugins
from stepmark.judge import Judge
from stepmark.runner import Runner

runners = [Runner(plugins.methods()[name], task, "smoke", show_progress=False) for name in names]
for runner in runners:
    runner.begin(Judge(task).inputs(2, 0), 2, 0)
runners[0].pool._links[0].send(False)  # the first worker is in the middle of an exchange, the second has nothing to do
link.send([process.pid for runner in runners for process in runner.pool._processes])
link.recv()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_killed_harness(runner_of: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    given = {"task": DIGITS, "link": theirs, "names": ("distrifusion", "synchronous_patches")}
    harness = context.Process(target=exec, args=(KILLED, given))
    harness.start()
    theirs.close()
    try:
        assert ours.poll(300)
        workers = ours.recv()
        assert len(workers) == 2 and not gone(workers[:1], 0.2) and not gone(workers[1:], 0.2)
        ours.send(None)
        harness.join(10)
        assert harness.exitcode == -signal.SIGKILL
        assert gone(workers)
    finally:
        harness.kill()
        harness.join()


def gone(processes: list[int], seconds: float = 30.0) -> bool:
    """Whether none of these runs any more, within a while that is shorter than a lost exchange's own limit."""

    def runs(process: int) -> bool:
        try:
            return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.monotonic() + seconds
    while any(runs(process) for process in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(("name", "several"), [("distrifusion", 2), ("parastep", 1), ("tarp", 1), ("euler", 1)])
def test_only_a_method_of_several_processes_may_open_connections(name: str, several: int) -> None:
    """What counts is the attribute of its class, not that the word stands somewhere in the file."""
    assert remote._ranks_of(plugins.methods()[name]) == several
    (more,) = [info for info in plugins.methods().values() if info.base == "parastep" and "ranks" in info.overrides]
    assert remote._ranks_of(more) == 2
