"""What the harness hands to a method: counted networks and simulators, data, randomness, device, state, progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stepmark.distributed import Group
from stepmark.meter.counts import Ledger
from stepmark.method import skip
from stepmark.task import Sealed, Task, load_split

T = TypeVar("T")


def derive_seed(*coordinates: object) -> int:
    """A 63-bit seed from the coordinates of a cell: the same on every machine, unrelated between neighbours."""
    text = "\x1f".join(map(str, coordinates)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class Session:
    """One method on one task, for one stage (`prepare` or `run`).

    Attributes:
        task, tier: the problem; "smoke" | "embedded" | "hub".
        networks: role -> counted `nn.Module`, the task's backbones and those the method declared.
        simulators: name -> counted callable (simulators, likelihoods, verifiers), where the track has them.
        state: the tensors that `prepare` returned.
        rng, seed: the stage's `torch.Generator` on `device`, and an integer for numpy and scikit-learn.
        device, dtype: where tensors live.
        group: the processes that run the method together, as this one sees them; a single one unless the method sets
            `ranks`.
    """

    def __init__(
        self,
        task: Task,
        tier: str,
        device: torch.device,
        dtype: torch.dtype,
        networks: dict[str, nn.Module],
        simulators: dict[str, Callable[..., Any]],
        ledger: Ledger,
        show_progress: bool = True,
    ) -> None:
        self.task, self.tier, self.device, self.dtype = task, tier, device, dtype
        self.networks, self.simulators = networks, simulators
        self.state: dict[str, Tensor] = {}
        self.group = Group()
        self.rng = torch.Generator(device=device)
        self.seed = 0
        self._ledger = ledger
        self._show_progress = show_progress
        self._stage = ""
        self.reported: dict[str, float] = {}

    def begin(self, stage: str, seed: int, limit: float = float("inf")) -> None:
        """Harness only: start a stage with its own random stream and budget."""
        self._stage = stage
        self.seed = seed % (2**32)
        self.rng.manual_seed(seed)
        self._ledger.reset(limit)
        self.reported = {}

    @property
    def train(self) -> Mapping[str, Any]:
        """The dataset's train split. Only `prepare` may look at it."""
        if self._stage != "prepare":
            raise Sealed("session.train is for prepare; run gets its inputs as batch and its state as session.state")
        if self.task.untrained:
            skip(self.task.untrained)
        return load_split(self.task.dataset, "train")

    @property
    def spent(self) -> float:
        """Evaluations this `run` call has used so far, over the whole batch, in the unit of the rung."""
        return self._ledger.spent

    @property
    def limit(self) -> float:
        """Evaluations this `run` call may use over the whole batch: rung x items."""
        return self._ledger.limit

    def clone(self, name: str) -> nn.Module:
        """A trainable, uncounted copy of one of the networks, for `Method.networks` to return as a student."""
        copy = deepcopy(self.networks[name])
        for part in copy.modules():
            part.__dict__.pop("forward", None)  # the counter of the original
        return copy.requires_grad_(True)

    def scale(self, embedded: T, smoke: T) -> T:
        """`smoke` at tier smoke, else `embedded`: for training lengths and search budgets."""
        return smoke if self.tier == "smoke" else embedded

    def progress(self, iterable: Iterable[T], desc: str = "") -> Iterable[T]:
        """A progress bar around an offline loop; silent inside `run`."""
        if self._stage != "prepare" or not self._show_progress:
            return iterable
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its monitor thread would wake up inside timed calls
        return tqdm(iterable, desc=desc, leave=False, mininterval=0.5, dynamic_ncols=True)

    def report(self, **counts: float) -> None:
        """Counts the method took itself, per batch: kept beside the harness's, which they must match."""
        for name, value in counts.items():
            self.reported[name] = self.reported.get(name, 0.0) + float(value)
