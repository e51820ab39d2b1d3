"""What is prepared once and what for every seed: training seeds, and trainings that methods share (`session.once`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepmark import plugins, prepared, remote, runner
from stepmark.cell import Cell
from stepmark.method import Skip
from stepmark.run import measure
from stepmark.runner import Runner
from stepmark.session import derive_seed
from stepmark.task import Sealed

TASK = "sampling/mixtures_flow"
VERSION = plugins.tasks()[TASK][1].version
HEAD = '''
import os
import torch
from stepmark import Method
from stepmark.tracks import image


def note(word):
    with open(os.environ["NOTES"], "a") as handle:
        handle.write(word + " ")


def unrelated():
    return 0


def trained(session, width, factor):
    note("trained")
    x = session.train["x0"][:3]
    session.networks["teacher"](x, torch.ones(3), torch.zeros(3, dtype=torch.long))
    return {"w": torch.randn(width, generator=session.rng) + factor * torch.rand(width)}


def plain(session, width):
    note("plain")
    return {"w": torch.ones(width)}


def outer(session):
    note("outer")
    return {"w": session.once(trained, 4, 0.5)["w"] + session.once(plain, 4)["w"]}


class Toy(Method):
    """Toy."""

    tasks = ("sampling/mixtures_flow",)

    def run(self, session, batch, rung):
        return batch["noise"]
'''
USES = """
    def prepare(self, session):
        note("prepare")
        lead = torch.randn(3, generator=session.rng)
        return {
            "w": session.once(trained, 4, 0.5)["w"],
            "lead": lead, "after": torch.randn(2, generator=session.rng), "global": torch.rand(2),
        }
"""
ASKS = """
    def prepare(self, session):
        return {"w": session.once(trained, 4, 0.5)["w"]}
"""
Plugin = Callable[..., plugins.MethodInfo]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """Write a method with the given preparation and return what is known of it, under any id: a variant's file is its
    method's."""
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "m"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    (tmp_path / "m" / "image").mkdir(parents=True)
    (tmp_path / "notes").touch()
    remote.forget()

    def write(body: str, name: str = "toy", old: str = "", new: str = "") -> plugins.MethodInfo:
        (tmp_path / "m" / "image" / "toy.py").write_text((HEAD + body).replace(old, new) if old else HEAD + body)
        return replace(plugins.methods()["toy"], id=name)

    return write


def state_of(info: plugins.MethodInfo, seed: int = 0) -> tuple[dict[str, Tensor], Runner]:
    made = Runner(info, TASK, "smoke", seed=seed, show_progress=False)
    return made.session.state, made


def notes(tmp_path: Path) -> list[str]:
    return (tmp_path / "notes").read_text().split()


def test_once_for_two_variants_and_the_cost_is_both_ones(plugin: Plugin, tmp_path: Path) -> None:
    first, one = state_of(plugin(USES))
    second, two = state_of(plugin(USES, "toy_variant"))
    assert notes(tmp_path) == ["prepare", "trained", "prepare"]
    assert torch.equal(first["w"], second["w"])
    assert one.offline.evaluations == two.offline.evaluations == {"teacher": 3}
    (path,) = (tmp_path / "cache" / "once").glob("*.safetensors")
    cost = prepared.read(path).own.seconds
    assert cost > 0
    assert min(one.offline.seconds, two.offline.seconds) >= cost
    again, three = state_of(plugin(USES, "toy_variant"))
    assert three.offline == two.offline and torch.equal(again["w"], second["w"])


def test_streams_of_the_caller_go_on_and_seed_0_is_derived_as_ever(plugin: Plugin) -> None:
    state, made = state_of(plugin(USES))
    seed = derive_seed("prepare", TASK, VERSION)
    own, everyone = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed % 2**32)
    assert torch.equal(state["lead"], torch.randn(3, generator=own))
    assert torch.equal(state["after"], torch.randn(2, generator=own))
    assert torch.equal(state["global"], torch.rand(2, generator=everyone))
    assert made.offline.seed == 0
    later, made = state_of(plugin(USES), seed=2)
    assert torch.equal(later["lead"], torch.randn(3, generator=torch.Generator().manual_seed(seed + 2)))
    assert made.offline.seed == 2


def test_it_is_the_same_whoever_asks_first(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = state_of(plugin(USES))[0]["w"]
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "other"))
    second = state_of(plugin(ASKS, "toy_variant"))[0]["w"]
    assert notes(tmp_path).count("trained") == 2
    assert torch.equal(first, second)


def test_another_seed_or_another_source_trains_anew(plugin: Plugin, tmp_path: Path) -> None:
    first, made = state_of(plugin(ASKS))
    assert made.offline.seed == 0  # the numbers that the shared training drew are this method's too
    assert not torch.equal(first["w"], state_of(plugin(ASKS), seed=1)[0]["w"])
    assert notes(tmp_path) == ["trained", "trained"]
    state_of(plugin(ASKS, old="return 0", new="return 1"))  # of no use to the training
    assert notes(tmp_path) == ["trained", "trained"]
    state_of(plugin(ASKS, old="factor * torch", new="2 * factor * torch"))
    state_of(plugin(ASKS, old="word + ", new="word +  str() + "))  # what it calls
    assert notes(tmp_path) == ["trained"] * 4
    state_of(plugin(ASKS.replace("0.5", "0.25")))
    assert notes(tmp_path) == ["trained"] * 5


def test_shared_trainings_may_ask_for_others_and_each_is_paid_once(plugin: Plugin, tmp_path: Path) -> None:
    body = """
    def prepare(self, session):
        return {"w": session.once(outer)["w"] - session.once(trained, 4, 0.5)["w"]}
    """
    state, made = state_of(plugin(body))
    assert torch.allclose(state["w"], torch.ones(4))
    assert notes(tmp_path) == ["outer", "trained", "plain"]
    assert made.offline.evaluations == {"teacher": 3}
    assert state_of(plugin(body, "toy_variant"))[1].offline.evaluations == {"teacher": 3}
    state_of(plugin(body), seed=1)
    assert notes(tmp_path)[3:] == ["outer", "trained"]  # the plain one draws nothing


COUNTS = """
    def prepare(self, session):
        note("prepare")
        return {"x": session.train["x0"].mean(0)}
"""
DRAWS = {
    "the stream": "torch.randn(2, generator=session.rng)",
    "the global generator": "torch.randn(2)",
    "the seed": "torch.tensor(session.seed % 7)",
}


def test_a_preparation_that_draws_nothing_is_shared_by_the_seeds(plugin: Plugin, tmp_path: Path) -> None:
    later, made = state_of(plugin(COUNTS), seed=2)
    first, _ = state_of(plugin(COUNTS))
    assert notes(tmp_path) == ["prepare"]
    assert torch.equal(first["x"], later["x"])
    assert made.offline.seed is None
    kept = remote.ready(plugin(COUNTS), TASK, "smoke", "cpu", 1)
    assert remote.ready(plugin(COUNTS), TASK, "smoke", "cpu", 2) is kept


@pytest.mark.parametrize("what", DRAWS)
def test_a_preparation_that_draws_is_done_for_every_seed(what: str, plugin: Plugin, tmp_path: Path) -> None:
    info = plugin(COUNTS.replace('session.train["x0"].mean(0)', DRAWS[what]))
    assert [state_of(info, seed)[1].offline.seed for seed in (0, 1, 0, 1)] == [0, 1, 0, 1]
    assert notes(tmp_path) == ["prepare", "prepare"]
    kept = remote.ready(info, TASK, "smoke", "cpu", 0)
    assert remote.ready(info, TASK, "smoke", "cpu", 1) is not kept


def test_first_weights_of_new_networks_count_as_drawn_and_records_name_the_seed(plugin: Plugin) -> None:
    info = plugin("""
    def networks(self, session):
        return {"new": torch.nn.Linear(2, 2)}
    """)
    weights = [state_of(info, seed)[1].networks["new"].weight for seed in (0, 1)]
    assert not torch.equal(*weights)
    found = [measure(Cell("toy", TASK, 2, seed, "smoke"), timing=False, show_progress=False) for seed in (0, 1)]
    assert [each.offline and each.offline.seed for each in found] == [0, 1]


def test_evaluations_of_a_copy_that_is_made_in_prepare_are_part_of_the_cost(plugin: Plugin) -> None:
    made = state_of(
        plugin("""
    def prepare(self, session):
        net, x = session.clone("teacher"), session.train["x0"][:6]
        net(x, torch.zeros(6), session.train["condition"][:6])
        return {}
    """)
    )[1]
    assert made.offline.evaluations == {"teacher": 6.0}


def test_networks_are_afterwards_as_they_were(plugin: Plugin) -> None:
    info = plugin(
        """
    def networks(self, session):
        return {"new": torch.nn.Linear(2, 2)}

    def prepare(self, session):
        before = session.networks["new"].weight.clone()
        found = session.once(filled)
        return {"same": (before == session.networks["new"].weight).all(), "w": found["weight"]}
    """,
        old="def plain",
        new="""def filled(session):
    network = session.networks["new"]
    with torch.no_grad():
        network.weight.fill_(3.0)
    return network.state_dict()


def plain""",
    )
    state, _ = state_of(info)
    assert state["same"] and (state["w"] == 3).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("session.once(lambda session: {})", "top level"),
        ("session.once(self.run)", "top level"),
        ("session.once(plain, torch.ones(2))", "plain literals after the function, not Tensor"),
        ("session.once(plain, [object()])", "plain literals"),
        ("session.once(endless)", "asks for itself"),
    ],
)
def test_what_cannot_be_shared_is_refused(call: str, words: str, plugin: Plugin) -> None:
    endless = "def endless(session):\n    return session.once(endless)\n\n\ndef plain"
    with pytest.raises(TypeError, match=words):
        state_of(plugin(f"\n    def prepare(self, session):\n        {call}\n", old="def plain", new=endless))


def test_once_is_for_prepare_and_needs_data_to_train(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = state_of(plugin(ASKS))
    made.session.begin("run", 0)
    with pytest.raises(Sealed, match="once is for prepare"):
        made.session.once(made.method.run)
    known = plugins.tasks()
    bare = replace(known[TASK][1], untrained="no data here")
    monkeypatch.setattr("stepmark.plugins.tasks", lambda: known | {TASK: (known[TASK][0], bare)})
    monkeypatch.setattr("stepmark.prepared.CONTRACT", "another")
    with pytest.raises(Skip, match="no data here"):
        state_of(plugin(ASKS))


# what the keys of states must not miss ------------------------------------------------------------------------------


def shared(info: plugins.MethodInfo, seed: int = 0) -> Tensor:
    return Runner(info, TASK, "smoke", seed=seed, show_progress=False).session.state["w"]


def test_a_decorated_training_is_known_by_what_it_holds(plugin: Plugin) -> None:
    """A decorator is another file's: the source that counts is inside."""
    decorated = "def plain(session, width):\n    note(", "@torch.no_grad()\ndef plain(session, width):\n    note("
    asks = '\n    def prepare(self, session):\n        return {"w": session.once(plain, 3)["w"]}\n'
    assert shared(plugin(asks, "toy", *decorated)).tolist() == [1, 1, 1]
    changed = (HEAD + asks).replace(*decorated).replace("torch.ones(width)", "2 * torch.ones(width)")
    info = plugin(asks)
    info.path.write_text(changed)
    assert shared(plugins.methods()["toy"]).tolist() == [2, 2, 2]


def test_a_training_in_a_plugin_folder_hangs_on_its_siblings(plugin: Plugin, tmp_path: Path) -> None:
    folder = tmp_path / "m" / "image" / "toy"
    folder.mkdir()
    (folder / "net.py").write_text("SIZE = 1.0\n")
    (folder / "__init__.py").write_text(
        HEAD.replace("import torch\n", "import torch\n\nfrom .net import SIZE\n").replace(
            "torch.ones(width)", "SIZE * torch.ones(width)"
        )
        + '\n    def prepare(self, session):\n        return {"w": session.once(plain, 2)["w"]}\n'
    )
    before = prepared.reach_digest([(folder / "__init__.py", ["plain"])])
    (folder / "net.py").write_text("SIZE = 2.0\n")
    assert prepared.reach_digest([(folder / "__init__.py", ["plain"])]) != before
    (folder / "net.py").write_text("SIZE = 1.0\nOTHER = 3\n")
    assert prepared.reach_digest([(folder / "__init__.py", ["plain"])]) == before


def test_no_training_while_networks_are_built(plugin: Plugin) -> None:
    body = "\n    def networks(self, session):\n        session.once(plain, 2)\n        return {}\n"
    with pytest.raises(Sealed, match=r"session\.once is for prepare"):
        Runner(plugin(body), TASK, "smoke", show_progress=False)


def test_a_tensor_may_have_any_name(plugin: Plugin) -> None:
    body = '\n    def prepare(self, session):\n        return {"w": session.once(plain, 2)["empty"]}\n'
    info = plugin(body, "toy", 'return {"w": torch.ones(width)}', 'return {"empty": torch.ones(width)}')
    assert shared(info).tolist() == [1, 1] and shared(info).tolist() == [1, 1], "made, and found"


def test_a_longer_ladder_is_prepared_for(plugin: Plugin) -> None:
    """A method may prepare for each rung: a state of before a rung was added has nothing for it."""
    info, task = plugin(ASKS), plugins.tasks()[TASK][1]
    cpu = torch.device("cpu")
    longer = replace(task, rungs=(*task.rungs, 128))
    assert runner.prepared_path("toy", task, {}, "smoke", cpu) != runner.prepared_path("toy", longer, {}, "smoke", cpu)
    assert shared(info) is not None


def test_numbers_from_elsewhere_are_random_numbers_too(plugin: Plugin) -> None:
    body = """
    def prepare(self, session):
        import numpy as np
        return {"w": torch.tensor(np.random.rand(2))}
"""
    assert Runner(plugin(body), TASK, "smoke", show_progress=False).offline.seed == 0


def test_a_damaged_state_is_made_again(plugin: Plugin, tmp_path: Path) -> None:
    info = plugin(ASKS)
    before = shared(info)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        head = path.read_bytes()[:40]
        path.unlink()  # what is loaded may still be read from the old one
        path.write_bytes(head)
    assert torch.equal(shared(info), before)


def test_updates_are_counted_where_they_are_made(plugin: Plugin) -> None:
    """By the harness, of shared trainings too, whether they were made or found."""
    steps = """    note("plain")
    w = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([w], 0.1)
    for _ in range(5):
        w.sum().backward()
        optimiser.step()
"""
    body = """
    def prepare(self, session):
        torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]).step()
        return {"w": session.once(plain, 2)["w"]}
"""
    info = plugin(body, "toy", '    note("plain")\n', steps)
    for name in ("toy", "again"):
        assert Runner(replace(info, id=name), TASK, "smoke", show_progress=False).offline.updates == 6
