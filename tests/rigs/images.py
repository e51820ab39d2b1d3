"""What tests of image methods share: plugins by name, smoke sessions, noise, a run, and a flow that is known exactly."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.session import Session

DIGITS, GUIDED, POINTS = "class_to_image/digits_flow", "guided/digits_flow", "sampling/mixtures_flow"


def module_of(method: str) -> Any:
    """The module of a plugin, wherever below its track it stands."""
    path = plugins.methods()[method].path.relative_to(plugins.method_folders()[0])
    return importlib.import_module(".".join(("stepmark.methods", *path.with_suffix("").parts)))


def method_of(method: str, **attributes: Any) -> Any:
    """A method or variant, as the harness makes it, with some attributes of its class changed on the instance."""
    found = plugins.load_class(plugins.methods()[method])()
    for name, value in attributes.items():
        assert hasattr(found, name), f"{method} has no {name}"
        setattr(found, name, value)
    return found


def idle_session(task: str, **networks: nn.Module) -> Session:
    """A smoke session on a task, with other networks where given, in which nothing has begun; every network is counted."""
    spec, ledger = track_of(task)[1], Ledger()
    have = networks or {"teacher": backbones.load(spec.backbones["teacher"])}
    watched = {role: watch(ledger, role, network) for role, network in have.items()}
    return Session(spec, "smoke", torch.device("cpu"), torch.float32, watched, {}, ledger, show_progress=False)


def session_of(task: str, method: Any = None, seed: int = 1) -> Session:
    """A smoke session on a task, with the untrained networks of a method where given, at the start of prepare."""
    session = idle_session(task)
    session.begin("networks", seed)
    torch.manual_seed(seed)
    for name, network in (method.networks(session) if method else {}).items():
        session.networks[name] = watch(session._ledger, name, network)
    session.advance("prepare")
    return session


def batch_of(n: int, shape: tuple[int, ...], classes: int, seed: int = 3) -> dict[str, Tensor]:
    """Noise and balanced conditions."""
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "condition": torch.arange(n) % classes}


def noise_of(task: str, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Noise and balanced conditions for points of the plane or for digits, as the task has them."""
    points = task.startswith("sampling")
    return batch_of(n, (2,) if points else (1, 8, 8), 2 if points else 10, seed)


def ran(session: Session, method: Any, batch: dict[str, Tensor], rung: int) -> tuple[Tensor, float]:
    """Output of one run call and the evaluations per item it took."""
    session.begin("run", 5, rung * len(batch["noise"]))
    with torch.no_grad():
        out = method.run(session, batch, rung)
    return out, session.spent / len(batch["noise"])


class Gaussian(nn.Module):
    """The exact velocity of data N(0, 1/4)."""

    prediction = "flow"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Tensor) -> Tensor:
        t = t.view(-1, *[1] * (x.dim() - 1))
        return (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) * x
