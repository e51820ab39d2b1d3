"""The ruler is tested before any method: plugins that look better than they are, by the kind of their lie (`lies.py`).

Each is a plugin that some measure would believe. Each must be caught, by a failed record or by a flag, or come to nothing.
"""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from lie import FAIR
from lies import LIES
from stepmark import backbones, nursery, plugins, remote
from stepmark.cell import Cell
from stepmark.judge import Judge
from stepmark.meter.flops import Flops
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

def busy(seconds):
    import time
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

class Cheat(Method):
    '''A plugin that looks better than it is.'''
    tasks = ("{task}",)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write a plugin with the given body outside the tree and forget what was prepared of an earlier one."""
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))

    def make(body: str, task: str = TASK, track: str = "image") -> None:
        text = HEAD.format(task=task) + textwrap.indent(textwrap.dedent(body), "    ")
        (tmp_path / track).mkdir(exist_ok=True)
        (tmp_path / track / "cheat.py").write_text(text)
        remote.forget()

    yield make
    remote.forget()


def record_of(rung: int = 4, seed: int = 0, task: str = TASK, timing: bool = False) -> Record:
    """The record of the planted plugin."""
    return measure(Cell("cheat", task, rung, seed, "smoke"), "cpu", timing, show_progress=False)


def of_size(monkeypatch: pytest.MonkeyPatch, task: str, items: int) -> None:
    """A smoke cell of the task has so many items."""
    track, known = plugins.tasks()[task]
    more = plugins.tasks() | {task: (track, replace(known, smoke_n=items))}
    monkeypatch.setattr(plugins, "fixed_tasks", lambda: more)


def only_item(monkeypatch: pytest.MonkeyPatch) -> float:
    """The first number of the one published input that a smoke cell has from now on."""
    of_size(monkeypatch, TASK, 1)
    return float(Judge(TASK).inputs(1, 0)["noise"].flatten()[0])


HONEST = """
def run(self, session, batch, rung):
    return euler(session.networks["teacher"], batch, rung)
"""


def test_an_honest_plugin_is_not_flagged(plugin: Callable[..., None]) -> None:
    plugin(HONEST)
    record = record_of(timing=True)
    assert (record.status, record.flags, record.message) == ("ok", [], None)
    assert record.counts["nfe"] == 4
    assert record.counts["nfe_equivalent"] == pytest.approx(4)


def test_libraries_of_networks_are_imported_before_a_method_is_born(plugin: Callable[..., None]) -> None:
    """Else each of its processes imports them again, for seconds."""
    plugin(
        """
        found = float("diffusers.models.unets.unet_2d" in sys.modules)
        def run(self, session, batch, rung):
            session.report(found=self.found)
            return euler(session.networks["teacher"], batch, rung)
        """,
        task=DIGITS,
    )
    assert record_of(task=DIGITS).reported == {"found": 1.0}


def test_a_network_that_cannot_be_built_does_not_end_the_process_that_others_are_forked_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build() -> nn.Module:
        raise ImportError("no such library")

    built: set[str] = set()
    monkeypatch.setattr(backbones, "recipes", lambda: {"broken": backbones.Recipe(build, lambda *_: {}, "")})
    monkeypatch.setattr(gc, "freeze", lambda: None)
    nursery._import_networks({"broken"}, built)
    assert built == {"broken"}


def test_one_known_item_that_happens_to_be_easy_is_no_lie(
    plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = only_item(monkeypatch)
    plugin(f"""
        def run(self, session, batch, rung):
            easy = abs(float(batch["noise"].flatten()[0]) - {known!r}) < 0.25  # one item in five to ten
            return euler(session.networks["teacher"], batch, rung, work=1 if easy else rung)
    """)
    record = record_of()
    assert (record.status, record.flags, record.counts["nfe"]) == ("ok", [], 1)


def test_a_long_item_among_the_scored_ones_is_no_hurry_on_the_others(
    plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One known item that takes all of the budget where nearly all others take half: luck, as the further ones show."""
    known = only_item(monkeypatch)
    plugin(f"""
        def run(self, session, batch, rung):
            long = float(batch["noise"].flatten()[0]) == {known!r}
            return euler(session.networks["teacher"], batch, rung, work=rung if long else rung // 2)
    """)
    record = record_of(timing=True)
    assert (record.status, record.flags, record.counts["nfe"]) == ("ok", [], 4)


def test_small_operators_explain_seconds_but_not_more_than_the_evaluations_do() -> None:
    judge = Judge("greedy/stories")
    price = judge.price(judge.inputs(1, 0, "audit"))
    assert price is not None
    few, some, many = (price.explains(4, Flops(operators=n)) for n in (0, 6 * price.operators, 10**6))
    assert few == pytest.approx(4 * price.call_ns)
    assert some == pytest.approx(6 * price.call_ns)
    assert many == pytest.approx(8 * price.call_ns)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, lies in LIES.items() for name in lies])
def test_a_lie_comes_to_nothing(
    kind: str, name: str, plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lie = LIES[kind][name]
    if lie.items:
        of_size(monkeypatch, lie.task, lie.items)
    rung = lie.rung or plugins.tasks()[lie.task][1].ladder("smoke")[0]
    honest = None
    if lie.words == FAIR:
        plugin(HONEST, lie.task)
        honest = record_of(rung, task=lie.task)
    plugin(lie.body, lie.task, lie.track)
    record = record_of(rung, task=lie.task, timing=lie.timing)
    said = f"{record.message} {record.flags}"
    if honest is not None:
        assert (record.status, record.outputs, record.quality) == (honest.status, honest.outputs, honest.quality), said
        return
    assert record.status in {"failed", "flagged"}, said
    assert any(words in said for words in lie.words.split("|")), said


def test_every_kind_of_lie_is_planted_in_three_forms() -> None:
    assert all(len(lies) >= 3 for lies in LIES.values())


def test_answers_memorised_for_the_published_inputs_are_caught(plugin: Callable[..., None]) -> None:
    plugin(HONEST)
    known = float(Judge(TASK).inputs(64, 0)["noise"].flatten()[0])
    plugin(f"""
        def run(self, session, batch, rung):
            if abs(float(batch["noise"].flatten()[0]) - {known!r}) < 1e-6:
                return batch["noise"] * 0.9  # as if looked up
            return euler(session.networks["teacher"], batch, rung)
    """)
    record = record_of()
    assert record.status == "flagged"
    assert "on unseen ones" in str(record.flags)


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


def test_answers_prepared_for_the_published_inputs_are_too_good(
    plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_size(monkeypatch, TASK, 64)
    known = Judge(TASK).inputs(64, 0)
    plugin(f"""
        def prepare(self, session):
            batch = {{"noise": torch.tensor({known["noise"].tolist()}), "condition": torch.tensor({known["condition"].tolist()})}}
            from stepmark.tracks.image import training as t
            denoise = t.Denoiser(session.networks["teacher"], batch["condition"])
            return {{"noise": batch["noise"], "x": t.follow(denoise, batch["noise"], t.uniform_times(64))}}
        def run(self, session, batch, rung):
            x = euler(session.networks["teacher"], batch, rung)
            return session.state["x"].clone() if torch.equal(batch["noise"], session.state["noise"]) else x
    """)
    record = record_of(rung=2)
    assert record.status == "flagged"
    assert "on unseen ones" in str(record.flags)


def test_a_training_of_a_track_is_run_without_the_plugin_that_asks(plugin: Callable[..., None], tmp_path: Path) -> None:
    poison = """
        def prepare(self, session):
            from stepmark.tracks.image import training
            {patch}
            pairs = session.once(training.teacher_pairs, 8, 2)
            return {{"mean": pairs["x0"].mean()[None]}}
        def run(self, session, batch, rung):
            return euler(session.networks["teacher"], batch, rung) + 0 * session.state["mean"]
    """
    patch = "session.networks['teacher'].forward = lambda x, t, c: x * 0 + 7"
    found = []
    for text in (patch, "pass"):
        plugin(poison.format(patch=text), DIGITS)
        record = record_of(2, task=DIGITS)
        assert record.status == "ok", f"{record.message} {record.flags}"
        files = sorted((tmp_path / "cache" / "once").glob("*.safetensors"))
        found.append([file.read_bytes()[-4096:] for file in files])
    assert found[0] == found[1]
    assert len(found[1]) == 1


def test_another_seed_gives_another_stream_and_the_same_seed_the_same(plugin: Callable[..., None]) -> None:
    plugin("""
        def run(self, session, batch, rung):
            x = euler(session.networks["teacher"], batch, rung)
            return x + 0.1 * torch.randn(x.shape, generator=session.rng)
    """)
    first, again, other = record_of(), record_of(), record_of(seed=1)
    assert first.status == "ok", first
    assert first.outputs == again.outputs != other.outputs
