"""The harness's side of a measurement: what is asked of a method, what its answers are worth, and whether to believe them.

Inputs and metrics are out of a plugin's reach; the networks of the metrics are copies that no method sees. What a plugin
says of itself is held against what can be seen from outside: bits of another process that ran the same call, work and
quality on inputs that nobody has seen, seconds of the processor that the counts explain.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.cell import cut, fingerprint, size_of, track_of
from stepmark.meter.counts import Ledger
from stepmark.meter.flops import Flops, count_flops
from stepmark.record import Offline
from stepmark.remote import Worker
from stepmark.runner import Call
from stepmark.session import derive_seed
from stepmark.stats import bootstrap_indices
from stepmark.task import Score, load_split

RESAMPLES = 100
LITTLE = 0.4  # of the work on unseen inputs: who does less than this on the known ones has kept answers
FEW = 8  # items of a batch below which one batch says little of how good the next will be
OTHERS = 64  # unseen items that are looked at where a batch took so little: one text in a hundred ends at once
SOME = 8  # one in so many unseen items goes through what must come out the same in two processes, call for call
SPREAD = 10.0  # standard deviations between the quality of known and unseen inputs that no luck explains
OWN = 100_000  # operations per item that a sampler of small things may need for itself
TOGETHER = 0.85  # of what an evaluation writes of texts together, what it must of each alone
PACKED = 1.5  # how much dearer than the reference an evaluation of the reference network may be
LOOKED = 400  # samples of which the share of copies is taken
ENOUGH = 100  # items whose quality is held against that of as many others: half as good again is not told by more
COPIED = {"points": 0.1, "images": 0.35}  # of the usual distance of an item to the nearest other one: nearer is a copy
HURRIED = 8.0  # standard errors between the evaluations of scored and of timed calls that no luck explains
CHEAPER = 0.95  # of the FLOPs of an evaluation on scored inputs: below that it is another network's
EXPLAINED = 3.0  # how often the seconds that the counts explain may be needed
SMALL = 1.0  # of what a call's evaluations explain, what its further operators may: whoever is watched can make more of them
BUSY = 4  # times more that is asked before they are not: on a busy machine the same work may cost several times as much
SLACK_NS = {"unseen": 3e6, "scored": 2e7}  # of the processor, beyond that: a process's first call warms it up


@dataclass(frozen=True)
class Seen:
    """A method at a rung, on known inputs and on inputs that nobody has seen before: the calls that are compared.

    Attributes:
        batch, of, first: a scored batch, its seed and its call. counted: a counted call on its first items.
        hidden, seed, there, watched: as many unseen items, the seed of their calls, a plain call and a counted one.
    """

    mine: Worker
    rung: int
    batch: dict[str, Any]
    of: int
    first: Call
    counted: Call
    hidden: dict[str, Any]
    seed: int
    there: Call
    watched: Call


class Judge:
    """One task on one device."""

    def __init__(self, task_id: str, device: torch.device | str = "cpu") -> None:
        self.track, self.task = track_of(task_id)
        self.device = torch.device(device)

    def inputs(self, n: int, seed: int, purpose: str = "test") -> dict[str, Any]:
        """n test inputs of a noise seed: the same for every method, on every machine. A seed beyond those of the task, of a
        method that is trained more often than it asks for, has the inputs of one of them."""
        seed = seed % self.task.seeds if purpose == "test" else seed
        generator = torch.Generator().manual_seed(derive_seed(purpose, self.task.id, self.task.version, seed))
        return self.track.inputs(self.task, n, generator, self.device)

    def unseen(self, n: int) -> dict[str, Any]:
        """n inputs that nobody can know: their seed is drawn when they are needed."""
        return self.inputs(n, secrets.randbits(60), "audit")

    def check(self, batch: Mapping[str, Any], outputs: Any) -> None:
        """Raise `BadOutput` if these are no outputs for this batch."""
        self.track.check(self.task, batch, outputs)

    def score(self, inputs: Mapping[str, Any], outputs: Any, seed: int) -> dict[str, Score]:
        """Every metric, over all items and over the resamples that all methods share."""
        drawn = derive_seed("resample", self.task.id, seed % self.task.seeds) % 2**32
        resample = bootstrap_indices(size_of(inputs), RESAMPLES, drawn)
        return self.track.score(self.task, inputs, outputs, self.networks(), resample)

    def networks(self) -> dict[str, nn.Module]:
        """Uncounted copies of the task's backbones, and the networks of its metrics."""
        roles = self.task.backbones | self.task.judges
        return {role: _network(name, backbones.digest(name), str(self.device)) for role, name in roles.items()}

    def reference_flops(self, probe: Mapping[str, Any]) -> float | None:
        """FLOPs per item of one reference evaluation; None where the task has no network or nothing is countable."""
        if not self.task.reference:
            return None
        flops, items = self._reference(probe)
        return (flops.total / items if items else 0) or None

    def _reference(self, probe: Mapping[str, Any]) -> tuple[Flops, int]:
        """What a reference evaluation takes, and of how many items it is."""
        networks, ledger = self.networks(), Ledger()
        with torch.no_grad(), count_flops(ledger, list(networks.values())) as flops:
            items = self.track.reference_call(self.task, networks, probe)
        return flops, items

    def _reference_ns(self, probe: Mapping[str, Any]) -> int:
        """Nanoseconds of this process's processor that a reference evaluation takes, the least of three."""
        networks = self.networks()
        taken = []
        with torch.no_grad():
            for _ in range(3):
                start = time.process_time_ns()
                self.track.reference_call(self.task, networks, probe)
                taken.append(time.process_time_ns() - start)
        return min(taken)

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

    def instead(self, mine: Worker, first: Call, rung: int) -> float:
        """Reference evaluations per item in whose place a method without a network, but with a state, may calculate."""
        return float(rung) if mine.offline.state_mib and not first.spent else 0.0

    def work(self, call: Call, reference: float | None, items: int, instead: float = 0.0) -> list[str]:
        """Flags of a counted call: work that no handle counts. `instead`: reference evaluations per item in whose place a
        method without a network may calculate."""
        flops = call.flops
        assert flops is not None
        flags = list(call.flags)
        if flops.strays:
            flags.append(f"calls modules that no handle counts: {', '.join(sorted(set(flops.strays))[:3])}")
        if flops.threads:
            flags.append(f"calls modules in another thread: {', '.join(sorted(set(flops.threads))[:3])}")
        if flops.unpriced:
            flags.append(f"uses operators whose FLOPs nobody knows: {', '.join(sorted(flops.unpriced)[:3])}")
        if reference and flops.outside >= 0.5 * reference * items:
            outside = flops.outside / reference / items
            flags.append(f"spends {outside:.1f} reference evaluations per item outside any handle")
        inside, role = flops.total - flops.outside, self.task.reference or ""
        asked = call.evaluations.get(role, 0.0)
        if reference and asked and self._images and flops.inside.get(role, 0) > PACKED * reference * asked:
            dear = flops.inside[role] / reference / asked
            flags.append(f"an evaluation costs {dear:.1f} times that of an item: several items in one row?")
        # Sums and products one by one: every sampler and decoder has some, a network written out in them has as many as
        # the networks that count.
        usual = max(OWN * items, 0.25 * inside, instead * items * (reference or 0.0))
        if reference and flops.arithmetic >= max(0.5 * reference * items, usual):
            beside = flops.arithmetic / reference / items
            flags.append(f"computes {beside:.1f} reference evaluations per item number by number, outside any handle")
        return flags

    @property
    def _images(self) -> bool:
        """Whether items are tensors of one size, so that every evaluation costs the same."""
        return isinstance(next(iter(self.inputs(1, 0).values())), Tensor)

    def nothing_asked(self, first: Call, offline: Offline) -> list[str]:
        """Flags: answers without a network or simulator ever having been asked, where those are the point, and without
        anything learned from the train split."""
        asked = sum(first.evaluations.values()) + sum(offline.evaluations.values()) + offline.state_mib
        if asked or (self.task.reference is None and "simulator" not in self.task.bounded):
            return []
        return ["asks neither a network nor a simulator and learns nothing: what answers here is not the method"]

    def copies(self, outputs: Any) -> list[str]:
        """Flags: samples that are items of the dataset, whichever split: the test split is anybody's to read."""
        if self.task.untrained or not {"fd", "sliced_w2", "gen_ppl", "minority_share"} & set(self.task.metrics):
            return []  # elsewhere nothing is gained by them
        if size_of({"outputs": outputs}) < FEW:
            return []
        found: dict[str, Tensor] = {}
        if isinstance(outputs, Tensor):
            kind = "images" if outputs.dim() > 2 else "points"
            # Some of them, which nobody knows beforehand, tell the share of all.
            drawn = outputs[np.random.default_rng(secrets.randbits(60)).permutation(len(outputs))[:LOOKED]]
            for name, split in splits(self.task.dataset).items():
                key = next((k for k, v in split.items() if _alike(v, outputs)), None)
                if key is not None and len(split[key]) > FEW:
                    some = max(1, min(256, len(split[key]) // 4))
                    usual = _nearest(split[key][:some], split[key][some:]).median()
                    found[name] = _nearest(drawn, split[key]) < COPIED[kind] * usual
        elif isinstance(outputs, list) and self.task.id.startswith("generation/"):
            from stepmark.backbones.lm import decode

            for name, split in splits(self.task.dataset).items():
                known = set(split.get("text", ()))
                found[name] = torch.tensor([decode(ids) in known for ids in outputs])
        if not found or float(torch.stack([*found.values()]).any(0).double().mean()) <= 0.5:
            return []
        name, copied = max(found.items(), key=lambda each: float(each[1].double().mean()))
        return [f"{float(copied.double().mean()):.0%} of the samples are items of the {name} split"]

    def planted(self, mine: Worker, rung: int) -> list[str]:
        """Flags: likelihoods of texts that no distribution can give them, where the track knows such texts."""
        make = getattr(self.track, "planted", None)
        if make is None:
            return []
        generator = torch.Generator().manual_seed(secrets.randbits(60))
        made = make(self.task, min(FEW, self.task.batch), generator, self.device)
        if made is None:
            return []
        batch, least = made
        found = mine.run(batch, rung, secrets.randbits(60)).outputs
        below = [f"{float(f):.4g}" for f, bar in zip(found, least, strict=True) if not f >= bar]
        return [f"gives {below[0]} nats to a text made at random: no probability distribution can"] if below else []

    def unseen_work(
        self, mine: Worker, other: Worker, batch: dict[str, Any], first: Call, counted: Call, rung: int, of: int,
        reference: float | None = None,
    ) -> list[str]:  # fmt: skip
        """Flags: on inputs that nobody has seen, the same method in the same process does other work or worse, in another
        process gives other bits, and under watch counts differently. `counted`: a counted call on the first items of
        `batch`, `first` the scored one on all of them, with seed `of`; `reference`: FLOPs per item of a reference
        evaluation."""
        size, seed = size_of(batch), secrets.randbits(60)
        hidden = self.unseen(size)
        there = mine.run(hidden, rung, seed)
        self.check(hidden, there.outputs)
        flags = [flag for flag in there.flags if flag not in counted.flags]
        flags += self._shared(mine, hidden, there, rung)

        few = cut(hidden, 0, max(1, size // SOME))
        brief = mine.run(few, rung, seed + 2)
        lesser = next((r for r in self.task.rungs if r != rung), rung)
        with contextlib.suppress(Exception):  # that rung's own cell reports its faults
            other.run(cut(hidden, 0, min(self.task.probe, size)), lesser, seed + 1)
        # The second time with whatever the first has left behind.
        unlike = [_unlike(brief, other.run(few, rung, seed + 2)) for _ in range(2)]
        flags += unlike[0] or unlike[1]
        watched = other.counted(hidden, rung, seed)
        if not flags and fingerprint(watched.outputs) != fingerprint(there.outputs):
            flags += _unlike(there, other.run(hidden, rung, seed))  # under watch some layers of torch go another way
        if watched.evaluations != there.evaluations:
            flags.append("counts differently while its FLOPs are counted")
        found = self.work(
            watched, reference, size, self.instead(mine, first, rung)
        )  # of more items than the counted ones
        flags += [flag for flag in found if flag not in [*flags, *counted.flags]]

        seen = Seen(mine, rung, batch, of, first, counted, hidden, seed, there, watched)
        flags += self._less(seen) + self._better(seen) + self._cheaper(seen)
        for call, which, inputs, number in ((there, "unseen", hidden, seed), (first, "scored", batch, of)):
            found = self._unexplained(call, seen, which)
            for _ in range(BUSY):
                if found:
                    with contextlib.closing(mine.template.worker()) as fresh:  # who has kept nothing
                        fresh.run(self.unseen(size), rung, number)  # but is no longer cold
                        found = self._unexplained(fresh.run(inputs, rung, number), seen, which, busy=True)
            flags += found
        return flags

    def _less(self, seen: Seen) -> list[str]:
        """Flags: less work on the known inputs than on any unseen ones. An adaptive method does less on some, by luck, the
        more so the fewer they are; who keeps answers does less than on all."""
        size = size_of(seen.batch)
        assert seen.counted.flops is not None
        assert seen.watched.flops is not None
        known = {
            "evaluations": seen.first.spent,
            "FLOPs": seen.counted.flops.total / min(self.task.probe, size) * size,
        }
        unseen = {"evaluations": [seen.there.spent], "FLOPs": [float(seen.watched.flops.total)]}
        if all(known[name] >= LITTLE * unseen[name][0] for name in known):
            return []
        whole = seen.mine.counted(seen.batch, seen.rung, seen.seed)  # the first items alone may be the short ones
        assert whole.flops is not None
        known["FLOPs"] = float(whole.flops.total)
        for _ in range(0, OTHERS, size):
            if all(known[name] >= LITTLE * min(unseen[name]) for name in known):
                return []
            more = seen.mine.counted(self.unseen(size), seen.rung, seen.seed)
            assert more.flops is not None
            unseen["evaluations"].append(more.spent)
            unseen["FLOPs"].append(float(more.flops.total))
        return [
            f"spends {known[name]:g} {name} on the test inputs but {min(unseen[name]):g} on unseen ones: answers kept?"
            for name in known
            if known[name] < LITTLE * min(unseen[name])
        ]

    def _shared(self, mine: Worker, hidden: dict[str, Any], there: Call, rung: int) -> list[str]:
        """Flags: an evaluation writes more of texts together than of each alone, as where one row holds several. Of texts
        that are drawn some get on better the second time, by luck; who packs them gains on all."""
        size = size_of(hidden)
        if size == 1 or not any(tokens_of(there.outputs)):
            return []

        def alone(texts: dict[str, Any], numbers: range) -> list[Call]:
            seeds = (secrets.randbits(60) for _ in numbers)  # with one seed all would have the same luck
            return [mine.run(cut(texts, i, i + 1), rung, each) for i, each in zip(numbers, seeds, strict=True)]

        def pace(calls: list[Call]) -> float:
            written = sum(n for call in calls for n in tokens_of(call.outputs))
            return written / max(sum(call.spent for call in calls), 1e-9)

        together, each = [there], alone(hidden, range(1))
        if pace(each) >= TOGETHER * pace(together):
            return []
        each += alone(hidden, range(1, size))
        for _ in range(0, OTHERS, size):
            if pace(each) >= TOGETHER * pace(together):
                return []
            more = self.unseen(size)
            together.append(mine.run(more, rung, secrets.randbits(60)))
            each += alone(more, range(size))
        paces = f"{pace(together):.3g} tokens an evaluation of texts together, {pace(each):.3g} of each alone"
        return [f"writes {paces}: several texts in one row?"]

    def _cheaper(self, seen: Seen) -> list[str]:
        """Flags: as many evaluations on unseen inputs as on the scored ones, but of a smaller network. Who tells the two
        apart, as anybody can, is timed on what is not scored. Texts differ in length, and drafts in how many are kept."""
        size = size_of(seen.batch)
        counted, watched = seen.counted.flops, seen.watched.flops
        assert counted is not None
        assert watched is not None
        if not self._images or seen.there.spent != seen.first.spent or not counted.total:
            return []
        if watched.total / size >= CHEAPER * counted.total / min(self.task.probe, size):
            return []
        whole = seen.mine.counted(seen.batch, seen.rung, seen.of).flops  # a fixed share weighs less in a larger batch
        assert whole is not None
        if watched.total >= CHEAPER * whole.total:
            return []
        return [f"spends {watched.total:g} FLOPs on unseen inputs, {whole.total:g} on the scored ones: two networks?"]

    def hurried(
        self, scored: list[float], timed: list[float], more: Callable[[], tuple[list[float], list[float]]]
    ) -> list[str]:
        """Flags: fewer evaluations in timed calls than in scored ones on batches of the same size, beyond what luck
        explains. `more`: further calls like the scored and like the timed ones, asked for where the first ones leave a
        doubt: of a few texts one that does not end tells nothing of the others, on either side."""

        def doubtful() -> bool:
            a, b = np.array(scored), np.array(timed)
            spread = math.sqrt(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / math.sqrt(
                max(len(a) + len(b) - 2, 1)
            )
            error = spread * math.sqrt(1 / len(a) + 1 / len(b))
            return bool(a.mean() - b.mean() > max(0.02 * a.mean(), HURRIED * error))

        if not scored or not timed or not doubtful():
            return []
        further = more()
        scored, timed = scored + further[0], timed + further[1]
        if not doubtful():
            return []
        means = np.mean(scored), np.mean(timed)
        return [
            f"spends {means[0]:.3g} evaluations on a batch that is scored, fewer evaluations when it is timed: {means[1]:.3g}"
        ]

    def _better(self, seen: Seen) -> list[str]:
        """Flags: answers to the known inputs that are better than luck allows."""
        if size_of(seen.batch) < FEW:
            return []
        # Which ones is drawn after they are answered: nobody can be honest on these alone.
        chosen = np.random.default_rng(secrets.randbits(60)).permutation(size_of(seen.batch))[:ENOUGH].tolist()
        known = self._quality(seen.batch, seen.first.outputs, chosen)
        unseen = self._quality(seen.hidden, seen.there.outputs, chosen)
        flags = []
        for name, better in self.task.metrics.items():
            mine, other = known[name], unseen[name]
            worse = other.value - mine.value if better == "lower" else mine.value - other.value
            spread = math.hypot(float(np.std(mine.resamples)), float(np.std(other.resamples)))
            if worse > max(SPREAD * spread, 0.5 * max(abs(mine.value), abs(other.value)), 1e-6):
                flags.append(
                    f"{name} is {mine.value:.4g} on the test inputs but {other.value:.4g} on unseen ones: answers kept?"
                )
        return flags

    def _quality(self, batch: dict[str, Any], outputs: Any, chosen: list[int]) -> dict[str, Score]:
        def some(values: Any) -> Any:
            return values[chosen] if isinstance(values, Tensor) else [values[i] for i in chosen]

        own = {name: some(value) for name, value in outputs.items()} if isinstance(outputs, Mapping) else some(outputs)
        return self.score({name: some(value) for name, value in batch.items()}, own, 0)

    def price(self, batch: Mapping[str, Any], busy: bool = False) -> Price | None:
        """What a batch's calls cost on this machine; None where there is no reference network, or on another device. `busy`:
        at the prices of this moment, should they be higher."""
        if self.task.reference is None or self.device.type != "cpu":
            return None
        return _priced(self, min(size_of(batch), self.task.batch), busy)

    def _unexplained(self, call: Call, seen: Seen, which: str, busy: bool = False) -> list[str]:
        counts, price = seen.watched.flops, self.price(seen.hidden, busy)
        assert counts is not None
        if price is None or call.processor_ns is None or counts.ranks:
            return []
        calls = sum(each.get("calls") or each.get("evaluations", 0.0) for each in call.handles.values())
        if seen.mine.offline.state_mib and not call.spent:  # no network, in the place of which it may calculate
            calls += seen.rung * size_of(seen.hidden)
        explained = price.explains(calls, counts)
        if call.processor_ns <= EXPLAINED * explained + SLACK_NS[which]:
            return []
        used, known = call.processor_ns / 1e6, explained / 1e6
        return [
            f"uses {used:.0f} ms of the processor on {which} inputs, of which its counts explain {known:.0f}: hidden work?"
        ]

    def clocks(self, calls: list[Call]) -> list[str]:
        """Flags of timed calls: the harness's clock, or the processor's, reads more than the process says."""
        least = min(call.ns for call in calls)
        beyond = [call.processor_ns - call.ns for call in calls if call.processor_ns is not None]
        if self.device.type == "cpu" and beyond and min(beyond) > max(3_000_000, least):
            used = (min(beyond) + least) / 1e6
            return [
                f"uses {used:.1f} ms of the processor, {least / 1e6:.1f} of them by its own clock: work off the clock?"
            ]
        hidden = min(call.outside_ns - call.ns - call.queued_ns for call in calls if call.outside_ns is not None)
        # What else a busy machine does to a call it does not do to all of them.
        if len(calls) >= 5 and hidden > max(5_000_000, 0.5 * least):
            return [f"takes {(least + hidden) / 1e6:.1f} ms by the harness's clock, {least / 1e6:.1f} by its process's"]
        return []


def _unlike(here: Call, there: Call) -> list[str]:
    """Flags: the same call in two processes has other outputs or other evaluations."""
    if fingerprint(here.outputs) != fingerprint(there.outputs):
        return ["the same call with the same seed gave other bits in another process: hidden state"]
    if here.evaluations != there.evaluations:
        return ["the same call counted differently the second time: answers kept between calls?"]
    return []


def tokens_of(outputs: Any) -> list[int]:
    """[how many tokens a call wrote], or [] where what it gave are no texts as lists of ids."""
    texts = isinstance(outputs, list) and all(isinstance(ids, list) for ids in outputs)
    return [sum(map(len, outputs))] if texts else []


def splits(dataset: str) -> dict[str, dict[str, Any]]:
    """The splits of a dataset that have a digest; the train split of one that names none."""
    known = plugins.datasets()
    names = tuple(known[dataset].digests) if dataset in known else ()
    return {name: load_split(dataset, name) for name in names or ("train",)}


def _alike(value: Any, outputs: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[1:] == outputs.shape[1:]


def _nearest(items: Tensor, known: Tensor) -> Tensor:
    """Distance of each item to the nearest of the known ones."""
    rows = known.flatten(1).float()
    return torch.cat([torch.cdist(part.flatten(1).float().cpu(), rows).amin(1) for part in items.split(64)])


@dataclass(frozen=True)
class Price:
    """What the reference network takes on this machine: nanoseconds of the processor for a call and for a FLOP, and the
    operators of a call."""

    call_ns: float
    flop_ns: float
    operators: int

    def explains(self, calls: float, counts: Flops) -> float:
        """Nanoseconds of the processor for so many calls, the FLOPs, and the operators beyond those of the calls."""
        further = max(0.0, counts.operators / self.operators - calls)
        return self.call_ns * (calls + min(further, SMALL * calls)) + self.flop_ns * counts.total


_prices: dict[tuple[str, int], Price | None] = {}


def _priced(judge: Judge, size: int, busy: bool) -> Price | None:
    """From the reference network on one item and on `size`. A FLOP costs not less than four times one of a product of
    matrices, for networks are never as fast. Where somebody else is `busy` on this machine, all costs more."""
    key = (judge.task.id, size)
    known = _prices.get(key)
    if key in _prices and not (busy and known):
        return known
    probe = judge.inputs(max(size, 2), 0, "audit")
    one = cut(probe, 0, 1)
    (few, items), (whole, _) = judge._reference(one), judge._reference(probe)
    if not items or not few.total:
        _prices[key] = None
        return None
    short, long = judge._reference_ns(one), judge._reference_ns(probe)
    slope = (long - short) / (whole.total - few.total) if whole.total > 1.5 * few.total else 0.0
    now = Price(float(short), max(slope, 4 * _product_ns()), few.operators)
    if known is None:
        _prices[key] = now
        return now
    return Price(max(known.call_ns, now.call_ns), max(known.flop_ns, now.flop_ns), now.operators)


@lru_cache(maxsize=1)
def _product_ns() -> float:
    """Nanoseconds of a FLOP in a product of matrices, in this process."""
    square, taken = torch.ones(384, 384), []
    for _ in range(5):
        start = time.process_time_ns()
        torch.mm(square, square)
        taken.append(time.process_time_ns() - start)
    return min(taken) / (2 * 384**3)


@lru_cache(maxsize=16)
def _network(backbone: str, digest: str, device: str) -> nn.Module:
    """An uncounted network of the metrics. `digest` stands for its weights."""
    return backbones.load(backbone, device)
