"""Images of twice the size that a network was trained on: pivots, feature upsamplers, and the rules that judge them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.datasets import shapes16, shapes32
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.session import Session
from stepmark.task import digest_of

torch.set_num_threads(1)

TASK = "attributes_to_image/shapes32"
cascade: Any = importlib.import_module("stepmark.methods.image.self_cascade_diffusion")
TUNED, FREE, INTERPOLATED = (
    plugins.load_class(plugins.methods()[name])
    for name in ("self_cascade_diffusion", "self_cascade_free", "upsampled_samples")
)


def session_of(network: nn.Module | None = None, **more: nn.Module) -> Session:
    """A smoke session on the task, with another teacher where given and further networks."""
    spec, ledger = track_of(TASK)[1], Ledger()
    networks = {"teacher": network or backbones.load("shapes16_flow_any")} | more
    watched = {name: watch(ledger, name, part) for name, part in networks.items()}
    session = Session(spec, "smoke", torch.device("cpu"), torch.float32, watched, {}, ledger, False)
    session.begin("run", 1)
    return session


def batch_of(n: int, seed: int = 3) -> dict[str, Tensor]:
    """Noise at the larger size, and balanced conditions."""
    index = torch.arange(n)
    noise = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "condition": torch.stack([index % 3, 3 + index // 3 % 4], 1)}


class Straight(nn.Module):
    """A flow from every noise to its half, in a straight line from any time; keeps what it was asked."""

    prediction = "flow"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, float]] = []

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.asked.append((x.clone(), float(t[0])))
        return x / (1 + t.view(-1, 1, 1, 1))


def test_the_network_at_its_own_size_is_the_one_that_was_trained() -> None:
    wide, named, batch = backbones.load("shapes16_flow_any"), backbones.load("shapes16_flow"), batch_of(4)
    small, t = cascade.halved(batch["noise"]), torch.full((4,), 0.6)
    with torch.no_grad():
        expected = named(small, t, batch["condition"])
        assert torch.equal(wide(small, t, batch["condition"]), expected)
        assert wide(batch["noise"], t, batch["condition"]).shape == batch["noise"].shape
        assert torch.equal(wide(small, t, batch["condition"]), expected)  # nothing of the other size is left


def test_the_large_image_starts_from_the_small_one_and_new_noise() -> None:
    """Against a flow whose samples are known: sizes, times, pivot and noise of every evaluation."""
    network, batch, method = Straight(), batch_of(40), FREE()
    session = session_of(network)
    session.begin("run", 1, 7 * 40)
    found = method.run(session, batch, 7)
    assert [x.shape[-1] for x, _ in network.asked] == [16] * 3 + [32] * 4
    times = [t for _, t in network.asked]
    assert times == pytest.approx([1, 2 / 3, 1 / 3, 0.5, 0.375, 0.25, 0.125])
    first, large = network.asked[0][0], network.asked[3][0]
    assert float(first.std()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(first, 2 * torch.nn.functional.avg_pool2d(batch["noise"], 2))
    pivot = torch.nn.functional.interpolate(first / 2, scale_factor=2, mode="bilinear")
    noise = (large - 0.5 * pivot) / 0.5
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert abs(float((noise * batch["noise"]).mean())) < 0.02  # the noise of the small sample is not used twice
    torch.testing.assert_close(found, large / 1.5, rtol=1e-4, atol=1e-4)


def test_the_control_spends_all_of_its_rung_on_the_small_image() -> None:
    network, batch = Straight(), batch_of(6)
    session = session_of(network)
    session.begin("run", 1, 5 * 6)
    found = INTERPOLATED().run(session, batch, 5)
    assert [x.shape[-1] for x, _ in network.asked] == [16] * 5
    small = torch.nn.functional.avg_pool2d(batch["noise"], 2)  # a half of the noise, which has unit variance
    torch.testing.assert_close(found, torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic"))


def test_only_the_tuned_cascade_has_networks_and_a_training() -> None:
    session = session_of()
    session.begin("prepare", 1)
    for kind in (FREE, INTERPOLATED):
        assert kind().networks(session) == {} and kind().prepare(session) is None
    assert set(TUNED().networks(session)) == {"cascade"}


def test_untrained_upsamplers_change_nothing_and_trained_ones_all_that_can() -> None:
    """At first the tuned method is the free one; training moves the upsamplers, which are few, and nothing else."""
    torch.manual_seed(0)
    session, batch = session_of(), batch_of(3)
    session.networks["cascade"] = adapted = cascade.Cascade(session.clone("teacher"))
    free = FREE().run(session, batch, 4)
    session.begin("run", 1)
    tuned = TUNED().run(session, batch, 4)
    torch.testing.assert_close(tuned, free)

    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    session.begin("prepare", 1)
    cascade.train_large(session, session.networks["cascade"], 0.6, tuned=True)
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("upsamplers.") for name in moved)
    assert {name.split(".")[1] for name in moved} == {"0", "1", "2"}
    own = sum(part.numel() for part in adapted.upsamplers.parameters())
    assert own < 0.1 * sum(part.numel() for part in adapted.parameters())
    assert not any(block._forward_hooks for block in adapted._blocks())


class Ideal(nn.Module):
    """The true flow to one image, but for a factor that is to be learned; keeps the times and pivots that it was given."""

    prediction = "flow"

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image, self.factor = image, nn.Parameter(torch.tensor(0.95))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, pivot: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.asked.append((pivot, t))
        return self.factor * (x - self.image) / t.view(-1, 1, 1, 1)


def test_upsamplers_learn_the_flow_of_the_times_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is least at the true flow, the pivots are the clean halves, no time lies beyond the start, and that is 0.5."""
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = {"x0": images, "condition": torch.tensor([[0, 3]])}
    monkeypatch.setattr("stepmark.session.load_split", lambda dataset, split: data)
    session, ideal = session_of(), Ideal(images[0])
    session.networks["cascade"] = ideal
    session.tier = "embedded"
    session.begin("prepare", 1)
    cascade.train_large(session, session.networks["cascade"], 0.3, tuned=True, steps=80, batch=8)
    assert float(ideal.factor.detach()) == pytest.approx(1, abs=0.01)
    times = torch.stack([t for _, t in ideal.asked])
    assert 0 < times.min() < 0.05 and 0.25 < times.max() < 0.3
    for pivot, _ in ideal.asked:
        torch.testing.assert_close(pivot, cascade.halved(images).expand_as(pivot))
    ideal.asked.clear()
    TUNED().prepare(session)
    assert 0.48 < torch.stack([t for _, t in ideal.asked]).max() < 0.5


def test_full_fine_tuning_learns_at_all_times_without_a_pivot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss on the same images, of the network itself and up to pure noise; it samples from noise directly."""
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = {"x0": images, "condition": torch.tensor([[0, 3]])}
    monkeypatch.setattr("stepmark.session.load_split", lambda dataset, split: data)

    class Whole(Ideal):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, t, condition)

    session, ideal, batch = session_of(), Whole(images[0]), batch_of(2)
    session.networks["student"] = ideal
    session.tier = "embedded"
    session.begin("prepare", 1)
    method = plugins.load_class(plugins.methods()["fully_finetuned"])()
    method.prepare(session)
    assert float(ideal.factor.detach()) == pytest.approx(1, abs=0.02)
    assert torch.stack([t for _, t in ideal.asked]).max() > 0.95
    session.begin("run", 1)
    with torch.no_grad():
        found = method.run(session, batch, 4)
    torch.testing.assert_close(found, images.expand_as(found), rtol=0.1, atol=0.1)


def test_corrections_are_made_of_the_small_image_where_it_belongs() -> None:
    """With every correction but one switched off, the features of that level are moved by exactly the upsampled ones."""
    torch.manual_seed(1)
    base, batch = backbones.load("shapes16_flow_any"), batch_of(2)
    adapted = cascade.Cascade(base)
    pivot, t = cascade.halved(batch["noise"]).flip(0), torch.full((2,), 0.4)
    for place, block in enumerate(adapted._blocks()):
        for other, upsampler in enumerate(adapted.upsamplers):
            nn.init.constant_(upsampler.widen.weight, 0.05 * (other == place))
        seen: list[Tensor] = []
        hook = block.register_forward_hook(
            lambda _, given, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            base(batch["noise"], t, batch["condition"])
            plain = seen[-1]
            base(pivot, t, batch["condition"])
            small = seen[-1]
            hook.remove()
            upsampled = adapted.upsamplers[place](small, t)
            later: list[Tensor] = []
            following = [*adapted._blocks(), base.named.unet.up_blocks[0]][place + 1]
            tail = following.register_forward_pre_hook(
                lambda _, given, named, later=later: later.append(
                    named.get("hidden_states", given[0] if given else None)
                ),
                with_kwargs=True,
            )
            adapted(batch["noise"], pivot, t, batch["condition"])
            tail.remove()
        assert upsampled.abs().max() > 1e-3
        torch.testing.assert_close(later[-1], plain + upsampled, rtol=1e-4, atol=1e-4)


def test_rules_tell_sharp_from_soft_and_one_from_two() -> None:
    for name, digest in shapes32.DATASET.digests.items():
        assert digest_of(shapes32.split(name)) == digest
    assert set(shapes32.DATASET.digests) == {"train", "test"}
    scenes = shapes32.split("test")
    images, condition = scenes["x0"], scenes["condition"]
    small = cascade.halved(images)
    assert float((shapes16.read_attributes(small) == condition).all(1).float().mean()) > 0.99
    sharp, soft = (shapes32.misfit(x, condition).mean() for x in (images, cascade.doubled(small)))
    assert sharp < 0.05 and soft > 2 * sharp
    assert shapes32.misfit(images, torch.stack([condition[:, 0], 3 + (condition[:, 1] - 2) % 4], 1)).mean() > 0.9
    assert (shapes32.objects(images) == 1).all()
    twice = torch.cat([small, small], 3)
    assert (shapes32.objects(torch.cat([twice, -torch.ones_like(twice)], 2)) == 2).all()

    module, task = track_of(TASK)
    judges, rows = {"classifier": backbones.load("shapes16_classifier")}, np.arange(500)[None]
    real = module.score(task, {"condition": condition}, images, judges, rows)
    assert {name: real[name].value for name in ("single", "alignment")} == pytest.approx(
        {"single": 1, "alignment": 1}, abs=0.01
    )
    assert set(real) == set(task.metrics)
    assert all(score.resamples == pytest.approx([score.value]) for score in real.values())
