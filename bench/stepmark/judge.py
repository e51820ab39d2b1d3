"""The harness's side of a measurement: what is asked of a method, what its answers are worth, and whether to believe them.

Inputs and metrics are sealed while a plugin's code runs; the networks of the metrics are copies that no method sees. The
comparisons hold calls against each other: same seed same bits, nothing carried over between calls or rungs, the same
work on inputs that nobody has seen, and counts that agree with what the method reports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from stepmark import backbones
from stepmark.cell import cut, fingerprint, size_of, source_digest, track_of
from stepmark.runner import Call, Runner
from stepmark.session import derive_seed
from stepmark.stats import bootstrap_indices
from stepmark.task import Score

RESAMPLES = 100
LITTLE = 0.4  # of the work on unseen inputs: who does less than this on the known ones has kept answers


class Judge:
    """One task on one device."""

    def __init__(self, task_id: str, device: torch.device | str = "cpu") -> None:
        self.track, self.task = track_of(task_id)
        self.device = torch.device(device)

    def inputs(self, n: int, seed: int, purpose: str = "test") -> dict[str, Any]:
        """n test inputs of a noise seed: the same for every method, on every machine."""
        generator = torch.Generator().manual_seed(derive_seed(purpose, self.task.id, self.task.version, seed))
        return self.track.inputs(self.task, n, generator, self.device)

    def check(self, batch: Mapping[str, Any], outputs: Any) -> None:
        """Raise `BadOutput` if these are no outputs for this batch."""
        self.track.check(self.task, batch, outputs)

    def score(self, inputs: Mapping[str, Any], outputs: Any, seed: int) -> dict[str, Score]:
        """Every metric, over all items and over the resamples that all methods share."""
        resample = bootstrap_indices(size_of(inputs), RESAMPLES, derive_seed("resample", self.task.id, seed) % 2**32)
        return self.track.score(self.task, inputs, outputs, self.networks(), resample)

    def networks(self) -> dict[str, nn.Module]:
        """Uncounted copies of the task's backbones, and the networks of its metrics."""
        roles = self.task.backbones | self.task.judges
        return {role: _network(name, backbones.digest(name), str(self.device)) for role, name in roles.items()}

    # comparisons of calls --------------------------------------------------------------------------------------

    def reports(self, first: Call) -> list[str]:
        """Flags: what the method reports and the harness did not count."""
        flags = []
        for name, value in first.reported.items():
            own = first.spent if name == "nfe" else first.evaluations.get(name)
            if own is None:
                flags.append(f"reports {name}, which the harness does not count; report nfe or a handle's name")
            elif abs(own - value) > 1e-6:
                flags.append(f"reports {value:g} {name} for the batch, the harness counted {own:g}")
        return flags

    def work(self, runner: Runner, batch: dict[str, Any], rung: int, seed: int) -> tuple[Call, float | None, list[str]]:
        """A counted call on the first items of a batch, the FLOPs of a reference evaluation, and flags: work that no
        handle counts, and less of it than on inputs that nobody has seen."""
        probe = cut(batch, 0, min(self.task.probe, size_of(batch)))
        items = size_of(probe)
        call = runner.counted(probe, rung, seed)
        reference = runner.reference_flops(probe)
        assert call.flops is not None
        flags = list(call.flags)
        if call.flops.strays:
            flags.append(f"calls modules that no handle counts: {', '.join(sorted(set(call.flops.strays))[:3])}")
        if call.flops.threads:
            flags.append(f"calls modules in another thread: {', '.join(sorted(set(call.flops.threads))[:3])}")
        if reference and call.flops.outside >= 0.5 * reference * items:
            outside = call.flops.outside / reference / items
            flags.append(f"spends {outside:.1f} reference evaluations per item outside any handle")

        # Inputs that nobody has seen: their seed hangs on the method's own source, so no source can contain it.
        number = int(source_digest(runner.info.path)[:12], 16)
        hidden = runner.counted(self.inputs(items, number, "audit"), rung, seed)
        flags += [flag for flag in hidden.flags if flag not in flags]
        seen, unseen = _spent(call), _spent(hidden)
        if any(a < LITTLE * b for a, b in zip(seen, unseen, strict=True)) and size_of(batch) > items:
            # One short text beside a long one is no sign of anything: a whole batch is.
            seen = _spent(runner.counted(batch, rung, seed))
            unseen = _spent(runner.counted(self.inputs(size_of(batch), number, "audit"), rung, seed))
        for name, known, new in zip(("FLOPs", "evaluations"), seen, unseen, strict=True):
            if known < LITTLE * new:
                flags.append(f"spends {known:g} {name} on the test inputs but {new:g} on unseen ones: answers kept?")
        return call, reference, flags

    def again(self, runner: Runner, batch: dict[str, Any], first: Call, rung: int, seed: int) -> list[str]:
        """Flags: the same call gives something else after another rung has run in between."""
        other = next((r for r in self.task.rungs if r != rung), rung)
        with contextlib.suppress(Exception):  # that rung's own cell reports its faults
            runner.run(cut(batch, 0, min(self.task.probe, size_of(batch))), other, seed + 1)
        again = runner.run(batch, rung, seed)
        if fingerprint(again.outputs) != fingerprint(first.outputs):
            return ["the same call with the same seed gave other bits after another rung had run: hidden state"]
        if again.evaluations != first.evaluations:
            return ["the same call counted differently the second time: answers kept between calls?"]
        return []


def _spent(call: Call) -> tuple[float, float]:
    """FLOPs and evaluations."""
    assert call.flops is not None
    return call.flops.total, call.spent


@lru_cache(maxsize=16)
def _network(backbone: str, digest: str, device: str) -> nn.Module:
    """An uncounted network of the metrics. `digest` stands for its weights."""
    return backbones.load(backbone, device)
