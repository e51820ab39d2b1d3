"""Editors that are trained on pairs: canvases, tokens side by side, triplets, bridges, bad noise."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from rigs.images import idle_session, module_of
from torch import Tensor, nn

from stepmark import plugins
from stepmark.backbones.scenes import Autoencoder, Painter, scaled_linear
from stepmark.meter.counts import watch
from stepmark.method import Skip
from stepmark.session import Session
from stepmark.task import digest_of
from stepmark.tracks.editing import pairs
from stepmark.tracks.editing.pairs import Editor, Pairs, beside, boxed, denoised, kept, on_grid
from stepmark.tracks.editing.transformer import Block, Routed, TokenTransformer, patched, route, unpatched
from stepmark.tracks.image.schedules import Schedule
from stepmark.tracks.text_to_image.sampling import noised

torch.set_num_threads(1)

TRYON, SWAPPING, REMOVING, CLIPS = "tryon/figures", "swapping/figures", "removing/scenes", "clips/scenes"
catvton, mc_vton, dreamid, lbm, minimax = (
    module_of(name) for name in ("catvton", "mc_vton", "dreamid", "lbm", "minimax_remover")
)
FLOW, EPS = Schedule("flow"), Schedule("epsilon", scaled_linear())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) - 1


def boxes(n: int) -> Tensor:
    """Masks [n, 32, 32] of boxes of different places and sizes."""
    found = torch.zeros(n, 32, 32, dtype=torch.bool)
    for k in range(n):
        found[k, 5 + k % 7 : 16 + k % 5, 6 + k % 4 : 19 + k % 9] = True
    return found


class Blocks(nn.Module):
    """An autoencoder that can be seen through: a latent is the mean of red, green and blue over 4x4 pixels, and 0. As with the
    true one both ways are evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4:
            return x[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)
        small = torch.nn.functional.avg_pool2d(x, 4)
        return torch.cat([small, torch.zeros_like(small[:, :1])], 1)


def given(**batch: Tensor) -> dict[str, Tensor]:
    """A batch as a method gets it: noise, and the latents of all pictures in it."""
    shown = {name: value for name, value in batch.items() if value.is_floating_point()}
    if "mask" in batch and batch["mask"].dim() == 4:
        shown["blanked"] = pairs.blanked(batch["source"], batch["mask"])
    latents = {
        f"{name}_latents": Blocks().encode(value.flatten(0, -4)).unflatten(0, value.shape[:-3])
        for name, value in shown.items()
    }
    return batch | latents | {"noise": drawn(*next(iter(latents.values())).shape)}


N = 16
TRAIN = {"mask": boxes(N), "kind": torch.arange(N) % 8}
TRAIN |= {name: pictures(N, seed=k) for k, name in enumerate(("x0", "person", "agnostic", "garment", "source"))}
TRAIN["attributes"] = torch.stack([torch.arange(N) % 2, *(torch.arange(N) // 2 % 2,) * 3], 1)
CLIP = {"mask": boxes(4 * 8).unflatten(0, (4, 8))} | {
    n: pictures(4, 8, seed=k) for k, n in enumerate(("x0", "without"))
}


@pytest.fixture(autouse=True)
def _small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here draws the pictures of a train split, which takes seconds."""
    monkeypatch.setattr(Session, "train", property(lambda self: CLIP if self.task.id == CLIPS else TRAIN))


def method_of(name: str, **attributes: Any) -> Any:
    """A method or variant of the modules above, in which names may be exchanged, with some attributes changed."""
    info = plugins.methods()[name]
    found = getattr(module_of(info.base or name), info.class_name)()
    for key, value in (info.overrides | attributes).items():
        assert hasattr(found, key)
        setattr(found, key, value)
    return found


def training(task: str, method: Any = None, **networks: nn.Module) -> Session:
    """A smoke session in which a training may begin, with the networks of a method."""
    session = idle_session(task, **({"vae": Blocks()} | networks))
    session.begin("networks", 1)
    torch.manual_seed(1)
    for name, network in (method.networks(session) if method else {}).items():
        session.networks[name] = watch(session._ledger, name, network)
    session.advance("prepare")
    return session


def running(session: Session, method: Any, batch: dict[str, Tensor], rung: int) -> Tensor:
    session.begin("run", 5, rung * len(batch["noise"]), len(batch["noise"]))
    return method.run(session, batch, rung)


@pytest.fixture(scope="module")
def painter() -> Painter:
    torch.manual_seed(0)
    return Painter().requires_grad_(False).eval()


def editor(painter: Painter, *arguments: Any, **named: Any) -> Editor:
    return Editor(deepcopy(painter), *arguments, **named).eval()


# what they share --------------------------------------------------------------------------------


def test_a_box_is_stretched_over_another() -> None:
    """Where a picture grows evenly along rows and columns, so does what is stretched, from side to side of the new box."""
    source, target = torch.zeros(2, 32, 32, dtype=torch.bool), torch.zeros(2, 32, 32, dtype=torch.bool)
    source[0, 10:14, 4:20], source[1, 3:9, 8:12] = True, True
    target[0, 8:16, 10:18], target[1, 20:32, 5:7] = True, True
    ramp = torch.stack(torch.meshgrid(*(torch.arange(32.0) + 0.5,) * 2, indexing="ij"))
    moved = boxed(torch.cat([ramp, ramp[:1]]).expand(2, -1, -1, -1), source, target)
    row, column = moved[0, 0, 8:16, 12], moved[0, 1, 12, 10:18]
    torch.testing.assert_close(row, 10 + 4 * (torch.arange(8) + 0.5) / 8)
    torch.testing.assert_close(column, 4 + 16 * (torch.arange(8) + 0.5) / 8)
    torch.testing.assert_close(moved[1, 0, 20:32, 5], 3 + 6 * (torch.arange(12) + 0.5) / 12)
    torch.testing.assert_close(moved[1, 1, 25, 5:7], torch.tensor([9.0, 11.0]))
    same = boxed(pictures(2), source, source)
    torch.testing.assert_close(same, pictures(2), rtol=1e-4, atol=1e-4)


def test_what_is_shown_changes_nothing_until_it_is_learnt_and_text_can_be_taken_away(painter: Painter) -> None:
    x, t, shown = drawn(2, 4, 8, 8), torch.tensor([30.0, 700.0]), drawn(2, 5, 8, 8, seed=1)
    with torch.no_grad():
        wide = editor(painter, 5)
        wanted = painter(x, t, painter.null_condition(torch.ones(2, 32, dtype=torch.int64)))
        torch.testing.assert_close(wide(x, t, shown), wanted, rtol=1e-4, atol=1e-5)
        wide.unet.conv_in.weight[:, 4:] = 0.1
        assert (wide(x, t, shown) - wanted).abs().max() > 1e-3
        silent = editor(painter, 5, text=False)
        tall = silent(drawn(2, 4, 16, 8), t, drawn(2, 5, 16, 8))
        assert tall.shape == (2, 4, 16, 8)
        assert not any("attn2" in name for name, _ in silent.named_parameters())
        assert "states" not in silent.state_dict()


def test_a_reference_that_sees_the_same_adds_nothing(painter: Painter) -> None:
    """Keys and values that stand there twice leave a softmax as it is; those of another picture do not."""
    network, x, zero = editor(painter), drawn(2, 4, 8, 8), torch.zeros(2)
    with torch.no_grad():
        wanted = network(x, zero)
        maps = kept(network, x)
        assert len(maps) == 7
        torch.testing.assert_close(beside(network, maps, x, zero), wanted, rtol=1e-4, atol=1e-5)
        assert (beside(network, kept(network, drawn(2, 4, 8, 8, seed=1)), x, zero) - wanted).abs().max() > 1e-3
        torch.testing.assert_close(network(x, zero), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("schedule", "eta"), [(EPS, 0.0), (EPS, 1.0), (FLOW, 0.0)], ids=["DDIM", "ancestral", "Euler"])
def test_data_at_one_point_are_found_in_any_number_of_steps(schedule: Schedule, eta: float) -> None:
    told: list[float] = []

    def evaluate(x: Tensor, time: Tensor) -> Tensor:
        told.append(float(time[0]))
        t = float(time[0]) if schedule.flow else (float(time[0]) + 1) / 1000
        eps = (x - schedule.alpha(t) * 0.7) / schedule.sigma(t)
        return eps - 0.7 if schedule.flow else eps

    for steps in (1, 4):
        told.clear()
        rng = torch.Generator().manual_seed(0)
        found = denoised(evaluate, schedule, drawn(2, 3, 4, 8, 8), steps, eta, rng)
        torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=1e-4, atol=1e-3)
        assert told == pytest.approx([schedule.network_time(1 - k / steps) for k in range(steps)])


def test_times_of_training_are_those_of_the_teacher() -> None:
    session = training(TRYON)
    x, t, eps = noised(session, EPS, torch.zeros(4000, 1, 1, 1))
    assert torch.equal((t * 1000).round() / 1000, t) and float(t.min()) > 0 and float(t.max()) == 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(x, EPS.sigma(t).view(-1, 1, 1, 1) * eps)


def test_pairs_stay_pairs() -> None:
    session = training(REMOVING)
    some = Pairs(session, ("source", "x0"), torch.tensor([3, 9, 14]))
    everything = Pairs(session, ("source",))
    for place, row in enumerate(some.rows.tolist()):
        torch.testing.assert_close(some.latents["source"][place], Blocks().encode(TRAIN["source"][row][None])[0])
        torch.testing.assert_close(some.latents["x0"][place], Blocks().encode(TRAIN["x0"][row][None])[0])
    assert sorted(some.rows.tolist()) == [3, 9, 14] and torch.equal(everything.rows, torch.arange(N))
    assert set(some.draw(60).tolist()) == {0, 1, 2}
    mask = torch.zeros(1, 2, 32, 32, dtype=torch.bool)
    mask[0, 1, 4:6, 8:12] = True
    share = torch.zeros(1, 2, 1, 8, 8)
    share[0, 1, 0, 1, 2] = 0.5
    assert torch.equal(on_grid(mask), share)
    assert torch.equal(pairs.blanked(pictures(1, 2), mask)[0, 1, :, 4:6, 8:12], torch.zeros(3, 2, 4))


# tokens -----------------------------------------------------------------------------------------


def moving(network: TokenTransformer) -> TokenTransformer:
    """With a last layer that is not zero."""
    torch.manual_seed(3)
    nn.init.normal_(network.out.weight, std=0.1)
    return network.requires_grad_(False)


def test_tokens_are_patches_of_two_by_two() -> None:
    frames = drawn(2, 3, 5, 8, 8)
    tokens = patched(frames)
    assert torch.equal(unpatched(tokens), frames)
    assert torch.equal(tokens[1, 16 + 4 * 2 + 3], frames[1, 1, :, 4:6, 6:8].flatten())


def test_frames_are_known_by_their_places_and_times_alone() -> None:
    """Frames that change places with all that is told of them change places in the answer; a place or a time alone matters."""
    torch.manual_seed(0)
    network = moving(TokenTransformer(width=48, depth=2, tokens=2))
    frames, times = drawn(2, 3, 4, 8, 8), torch.tensor([[0.9, 0.0, 0.3], [0.2, 0.5, 0.0]])
    at, order = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 4]]), [2, 0, 1]
    found = network(frames, times, at)
    torch.testing.assert_close(
        network(frames[:, order], times[:, order], at[order]), found[:, order], rtol=1e-4, atol=1e-5
    )
    assert (network(frames, times, at[order]) - found).abs().max() > 1e-3
    even = patched(network(torch.ones(1, 1, 4, 8, 8), torch.ones(1, 1), at[:1]))[0]
    assert torch.cdist(even, even).fill_diagonal_(1).min() > 1e-5  # tokens that are alike lie in sixteen places
    assert (network(frames, times[:, order], at) - found).abs().max() > 1e-3
    told = [network(frames, times, at, torch.tensor([k, k])) for k in (0, 1)]
    assert found.shape == told[0].shape and (told[0] - told[1]).abs().max() > 1e-6


def test_tokens_of_a_reference_are_looked_at_beside_the_own() -> None:
    torch.manual_seed(0)
    network = moving(TokenTransformer(width=48, depth=3))
    frames, times, at = drawn(2, 1, 4, 8, 8), torch.zeros(2, 1), torch.zeros(1, 3, dtype=torch.int64)
    alone = network(frames, times, at)
    seen = network(frames, times, at, keep=True)
    torch.testing.assert_close(network(frames, times, at, further=seen), alone, rtol=1e-4, atol=1e-5)
    other = network(drawn(2, 1, 4, 8, 8, seed=1), times, at, keep=True)
    assert (network(frames, times, at, further=other) - alone).abs().max() > 1e-4


def test_adapters_act_on_the_tokens_of_their_own_frame() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), drawn(2, 48, 6)
    routed = Routed(layer, {1: 2, 2: 3})
    assert torch.equal(routed(x), layer(x))
    nn.init.normal_(routed.up["2"].weight)
    change = routed(x) - layer(x)
    assert change[:, :32].abs().max() == 0
    product = routed.up["2"].weight @ routed.down["2"].weight
    torch.testing.assert_close(change[:, 32:], x[:, 32:] @ product.T)
    network = moving(TokenTransformer(width=48, depth=2))
    frames, times, at = drawn(2, 3, 4, 8, 8), torch.rand(2, 3), torch.zeros(3, 3, dtype=torch.int64)
    plain = network(frames, times, at)
    route(network, {1: 2, 2: 3})
    torch.testing.assert_close(network(frames, times, at), plain)
    assert all((".up." in n or ".down." in n) == p.requires_grad for n, p in network.named_parameters())
    assert sum(isinstance(part, Routed) for part in network.modules()) == 2 * 4


def test_a_block_without_gates_does_nothing() -> None:
    torch.manual_seed(0)
    block, x, time = Block(48, 2), drawn(2, 5, 48), drawn(2, 5, 6, 48)
    block.table.data[[2, 5]] = 0
    time[..., [2, 5], :] = 0
    out, seen = block(x, time)
    assert torch.equal(out, x)
    shift, scale = (block.table + time).unbind(-2)[:2]
    torch.testing.assert_close(seen, nn.functional.layer_norm(x, (48,)) * (1 + scale) + shift)


# CatVTON ----------------------------------------------------------------------------------------


class Fitted(nn.Module):
    """Predicts the noise of a canvas whose upper half is the garment that is shown below, and whose lower half is -1."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod, self.asked = scaled_linear(), []

    def forward(self, x: Tensor, time: Tensor, shown: Tensor) -> Tensor:
        self.asked.append(shown)
        garment = shown[:, 1:, 8:]
        t = (time.view(-1, 1, 1, 1) + 1) / 1000
        return (x - EPS.alpha(t) * torch.cat([garment, torch.full_like(garment, -1)], 2)) / EPS.sigma(t)


def tryon(garment: Tensor | None = None, n: int = 2) -> dict[str, Tensor]:
    garment = pictures(n, seed=2) if garment is None else garment
    return given(agnostic=pictures(n, seed=1), garment=garment, mask=boxes(n))


def test_the_upper_half_of_the_canvas_is_the_answer() -> None:
    """Guided, it is 2.5 times the garment where the network without a garment says 0; a single evaluation is unguided."""
    batch, garment = tryon(), Blocks().encode(pictures(2, seed=2))
    for rung, times, rows in ((1, 1.0, 2), (2, 2.5, 4), (8, 2.5, 4)):
        network = Fitted()
        session = idle_session(TRYON, vae=Blocks(), dresser=network)
        found = running(session, method_of("catvton"), batch, rung)
        torch.testing.assert_close(found, times * garment, rtol=1e-3, atol=1e-3)
        assert session.spent == 2 * rung and len(network.asked) == rung * 2 // rows
        shown = network.asked[0]
        assert torch.equal(shown[-2:, :1, :8], on_grid(batch["mask"])) and shown[:, :1, 8:].abs().max() == 0
        torch.testing.assert_close(shown[-2:, 1:, :8], Blocks().encode(batch["agnostic"]))
        torch.testing.assert_close(shown[-2:, 1:, 8:], garment)
        if rows == 4:
            assert torch.equal(shown[:2, :, :8], shown[2:, :, :8]) and shown[:2, 1:, 8:].abs().max() == 0
    blind = Fitted()
    found = running(idle_session(TRYON, vae=Blocks(), dresser=blind), method_of("catvton_blind"), batch, 4)
    assert len(blind.asked) == 4 and blind.asked[0][:, 1:, 8:].abs().max() == 0 and found.abs().max() < 1e-3


class Halved(Fitted):
    """Half of what it sees is noise."""

    def forward(self, x: Tensor, time: Tensor, shown: Tensor) -> Tensor:
        return 0.5 * x


def test_steps_throw_fresh_noise_as_long_as_any_follows() -> None:
    """What is below does not reach the upper half of such a network: from the same noise only eta = 1 leads elsewhere."""
    session, batch, found = idle_session(TRYON, vae=Blocks(), dresser=Halved()), tryon(), []
    for rung in (2, 2, 8, 8):
        session.begin("run", len(found), rung * 2)
        found.append(method_of("catvton").run(session, batch, rung))
    torch.testing.assert_close(found[0], found[1])
    assert (found[2] - found[3]).abs().max() > 0.1


def test_dream_moves_noise_and_latents_together() -> None:
    """x' is alpha x0 + sigma eps' again; without an error nothing moves, and with power 0 the whole error counts."""
    x0, eps, predicted = drawn(3, 4, 8, 8), drawn(3, 4, 8, 8, seed=1), drawn(3, 4, 8, 8, seed=2)
    t = torch.tensor([0.1, 0.5, 1.0])
    alpha, sigma = (each(t).view(-1, 1, 1, 1) for each in (EPS.alpha, EPS.sigma))
    x = alpha * x0 + sigma * eps
    for power in (0.0, 10.0):
        moved, noise = catvton.rectified(x, eps, predicted, sigma, power)
        torch.testing.assert_close(moved, alpha * x0 + sigma * noise)
        torch.testing.assert_close(noise, eps + sigma**power * (eps - predicted))
    assert all(torch.equal(a, b) for a, b in zip(catvton.rectified(x, eps, eps, sigma, 10.0), (x, eps), strict=True))


def test_one_garment_in_ten_is_not_shown_and_the_loss_is_of_the_whole_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs belong together; of a network that says 0 the plain loss is the noise's power, on both halves."""
    asked: list[tuple[Tensor, Tensor]] = []

    class Zero(Fitted):
        def forward(self, x: Tensor, time: Tensor, shown: Tensor) -> Tensor:
            asked.append((x, shown))
            return torch.zeros_like(x)

    method, session = method_of("catvton_plain"), training(TRYON, dresser=Zero())
    monkeypatch.setattr(Session, "scale", lambda self, embedded, smoke: (400, 1) if embedded == (16, 250) else smoke)
    monkeypatch.setattr(Session, "once", lambda self, f, *a: f(self, *a) if f is pairs.field else {})
    losses: list[float] = []
    monkeypatch.setattr(catvton, "fit", lambda session, network, loss, *_, **__: losses.append(float(loss())))
    clean: list[Tensor] = []
    monkeypatch.setattr(
        catvton, "noised", lambda session, schedule, x0: clean.append(x0) or noised(session, schedule, x0)
    )
    method.prepare(session)
    (x, shown), garment = asked[0], Blocks().encode(TRAIN["garment"])
    assert x.shape == (400, 4, 16, 8) and losses[0] == pytest.approx(1, abs=0.02)
    below, hole = shown[:, 1:, 8:], shown[:, 1:, :8]
    unseen = below.abs().amax((1, 2, 3)) == 0
    assert float(unseen.float().mean()) == pytest.approx(0.1, abs=0.04)
    rows = (hole[:, None] - Blocks().encode(TRAIN["agnostic"])).abs().amax((2, 3, 4)).argmin(1)
    torch.testing.assert_close(below[~unseen], garment[rows][~unseen])
    torch.testing.assert_close(clean[0], torch.cat([Blocks().encode(TRAIN["x0"])[rows], garment[rows]], 2))
    assert torch.equal(shown[:, :1, :8], on_grid(TRAIN["mask"])[rows])


def test_self_attention_alone_learns(painter: Painter) -> None:
    method = method_of("catvton")
    session = training(TRYON, method, teacher=painter)
    base = session.once(catvton.inpainter, 1, 4, method.base_rate)
    method.prepare(session)
    after = session.networks["dresser"].state_dict()
    assert after.keys() == base.keys()
    for name, value in after.items():
        assert torch.equal(value, base[name]) != ("attn1" in name and "to_" in name), name
    learnt = sum(value.numel() for name, value in after.items() if "attn1" in name)
    assert learnt == 115_136 and 0.06 < learnt / sum(map(Tensor.numel, after.values())) < 0.08
    reference = method_of("catvton_reference")
    assert set(reference.networks(session)) == {"dresser", "wardrobe"}
    assert all(weight.requires_grad for weight in reference.networks(session)["wardrobe"].parameters())


def test_the_base_is_a_copy_of_the_teacher_that_is_counted(painter: Painter) -> None:
    session = training(TRYON, teacher=painter)
    catvton.inpainter(session, 1, 4, 5e-4)
    assert session._ledger.evaluations()["teacher"] == 4


def test_a_reference_network_is_asked_once(painter: Painter) -> None:
    method = method_of("catvton_reference")
    session = training(TRYON, method, teacher=painter)
    for rung, first, steps in ((2, 1, 1), (4, 2, 1), (8, 2, 3)):
        running(session, method, tryon(), rung)
        spent = session._ledger.evaluations()
        assert spent["wardrobe"] == 2 * first and spent["dresser"] == 2 * steps * first
    with pytest.raises(Skip):
        running(session, method, tryon(), 1)


def test_a_paste_fills_the_hole_with_the_garment() -> None:
    garment = torch.ones(2, 3, 32, 32)
    garment[:, :, 8:26, 8:26] = -0.5
    batch = tryon(garment)
    session = idle_session(TRYON, vae=Blocks())
    found = running(session, method_of("catvton_pasted"), batch, 1)
    wanted = torch.where(batch["mask"][:, None], torch.tensor(-0.5), batch["agnostic"])
    inside = Blocks().encode(batch["mask"][:, None].float().expand(-1, 3, -1, -1)) == 1
    assert inside.any()
    torch.testing.assert_close(found[inside], Blocks().encode(wanted)[inside])
    assert session.spent == 2


# MC-VTON ----------------------------------------------------------------------------------------


class Worn(nn.Module):
    """The velocity of pictures that are to become the garment, (x - garment) / t; says what it was asked."""

    prediction = "flow"

    def __init__(self, pull: float = 1.0) -> None:
        super().__init__()
        self.pull, self.asked = pull, []

    def forward(self, frames: Tensor, times: Tensor, places: Tensor) -> Tensor:
        self.asked.append((times, places))
        gone = self.pull * (frames - frames[:, 2:]) / times[:, :1, None, None, None]
        return torch.cat([gone[:, :1], torch.full_like(gone[:, 1:], 9.0)], 1)


def test_figure_and_garment_are_clean_and_lie_beside_the_picture() -> None:
    batch = tryon()
    for name, rung, spent in (("mc_vton", 28, 8), ("mc_vton", 4, 4), ("mc_vton_multistep", 28, 28)):
        network = Worn()
        session = idle_session(TRYON, vae=Blocks(), dresser=network)
        found = running(session, method_of(name), batch, rung)
        torch.testing.assert_close(found, Blocks().encode(batch["garment"]), rtol=1e-4, atol=1e-4)
        assert session.spent == 2 * spent and len(network.asked) == spent
        for k, (times, places) in enumerate(network.asked):
            assert times[0].tolist() == pytest.approx([1 - k / spent, 0, 0])
            assert places.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 4]]


def test_one_step_is_to_land_where_four_land() -> None:
    """Of a velocity x pull / t the steps are known, x (1 - pull h / t) (1 - pull h / (t - h)) ...; with pull 1 paths are straight
    and there is nothing to learn."""
    x, zero = drawn(3, 4, 8, 8), torch.zeros(3, 4, 8, 8)
    t = torch.tensor([1.0, 0.5, 0.25])
    for pull in (1.0, 0.5):
        network, h = Worn(pull), 1 / 32
        found = mc_vton.landed(network, x, t, 1 / 8, 4, zero, zero)
        shrunk = torch.ones(3)
        for k in range(4):
            shrunk = shrunk * (1 - pull * h / (t - k * h))
        torch.testing.assert_close(found, 8 * (1 - shrunk).view(-1, 1, 1, 1) * x, rtol=1e-4, atol=1e-5)
        straight = (found - pull * x / t.view(-1, 1, 1, 1)).abs().max()
        assert straight < 1e-4 if pull == 1 else straight > 0.01


def test_each_stage_trains_its_own_adapters() -> None:
    """The first those of figure and garment, the second those of the picture; a control trains the latter without a teacher."""
    method = method_of("mc_vton_multistep")
    session = training(TRYON, method)
    method.prepare(session)
    first = session.networks["dresser"].state_dict()
    base = session.once(mc_vton.painter, 1, 4, method.base_rate)
    for name, value in base.items():
        layer, _, last = name.rpartition(".")
        assert torch.equal(first[name if name in first else f"{layer}.base.{last}"], value), name
    assert {name.split(".")[-2] for name in first if ".up." in name} == {"1", "2"}
    assert all(value.abs().max() > 0 for name, value in first.items() if ".up." in name and ".0.attn" in name)
    learnt = sum(value.numel() for name, value in first.items() if ".up." in name or ".down." in name)
    assert learnt == 6 * 4 * (4 + 8) * 2 * 96 and 0.06 < learnt / sum(map(Tensor.numel, base.values())) < 0.08
    for name in ("mc_vton", "mc_vton_undistilled"):
        method = method_of(name)
        session = training(TRYON, method)
        method.prepare(session)
        second = session.networks["dresser"].state_dict()
        assert all(torch.equal(second[key], value) for key, value in first.items())
        assert {key.split(".")[-2] for key in second if ".up." in key and key not in first} == {"0"}
        assert any(value.abs().max() > 0 for key, value in second.items() if ".up.0." in key)


def test_the_student_is_taught_by_the_first_stage_on_its_own_eight_times(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of("mc_vton")
    session = training(TRYON, method)
    student, asked = session.networks["dresser"], []
    monkeypatch.setattr(mc_vton, "fit", lambda session, network, loss, *_, **__: asked.append(float(loss().detach())))

    def noted(
        teacher: nn.Module, x: Tensor, t: Tensor, step: float, parts: int, hole: Tensor, garment: Tensor
    ) -> Tensor:
        asked.append((teacher, t, step, parts, hole, garment))
        return torch.zeros_like(x)

    monkeypatch.setattr(mc_vton, "landed", noted)
    method.finish(session, mc_vton.pairs_of(session), student, 1, 300)
    (teacher, t, step, parts, hole, garment), loss = asked
    assert teacher is not student and not any(p.requires_grad for p in teacher.parameters())
    assert (step, parts) == (1 / 8, 4) and set((8 * t).tolist()) == set(range(1, 9))
    rows = (hole[:, None] - Blocks().encode(TRAIN["agnostic"])).abs().amax((2, 3, 4)).argmin(1)
    torch.testing.assert_close(garment, Blocks().encode(TRAIN["garment"])[rows])
    assert loss == pytest.approx(0, abs=1e-6)  # its last layer is zero, as the target here


def test_the_reference_network_is_shown_figure_and_garment_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch, seen = method_of("mc_vton_reference"), tryon(), []
    session, looked = training(TRYON, method), mc_vton.looked

    def noted(network: nn.Module, *told: Tensor) -> Any:
        seen.append((network, *told))
        return looked(network, *told)

    monkeypatch.setattr(mc_vton, "looked", noted)
    running(session, method, batch, 8)
    ((network, hole, garment),) = seen
    assert network is session.networks["wardrobe"]
    assert torch.equal(hole, batch["agnostic_latents"]) and torch.equal(garment, batch["garment_latents"])
    spent = session._ledger.evaluations()
    assert spent["wardrobe"] == 2 and spent["dresser"] == 2 * 7


# DreamID ----------------------------------------------------------------------------------------


def test_triplets_are_two_in_the_same_garment_and_one_in_another() -> None:
    triplets = dreamid.Triplets(training(SWAPPING))
    real, one, other = triplets.draw(400)
    worn = TRAIN["attributes"]
    assert torch.equal(worn[real], worn[one]) and bool((real != one).all())
    assert torch.equal(worn[real, 0], worn[other, 0]) and bool((worn[real] != worn[other]).any())
    assert len(set(zip(real.tolist(), one.tolist(), strict=True))) > 40 and len(set(other.tolist())) == N


def test_a_pseudo_target_has_the_real_figure_and_the_garment_of_another() -> None:
    triplets = dreamid.Triplets(training(SWAPPING))
    real, other = torch.tensor([0, 5]), torch.tensor([3, 2])
    found = triplets.swapped(real, other)
    outside = ~TRAIN["mask"][real][:, None].expand_as(found)
    assert torch.equal(found[outside], TRAIN["x0"][real][outside])
    same = boxed(TRAIN["x0"][other], TRAIN["mask"][other], TRAIN["mask"][real])
    torch.testing.assert_close(found[~outside], same[~outside])
    triplets.mask = TRAIN["mask"][[7] * N]
    found = triplets.swapped(real, other)
    wanted = torch.where(TRAIN["mask"][7], TRAIN["x0"][other], TRAIN["x0"][real])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Face(nn.Module):
    """Recognises a picture by the means of its colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_the_truth_has_no_loss_and_without_it_only_the_identity_counts() -> None:
    coarse = Blocks()(Blocks().encode(pictures(2)))
    z, who = Blocks().encode(coarse), Face()(coarse)
    session, method = training(SWAPPING, recogniser=Face()), method_of("dreamid")
    everything, nothing = torch.tensor([True, True]), torch.tensor([False, False])
    assert float(method.loss(session, z, coarse, everything, who)) == pytest.approx(0, abs=1e-6)
    off = z.clone()
    off[:, 3] += 0.2  # which no picture shows
    assert float(method.loss(session, off, coarse, everything, who)) == pytest.approx(0.2**2 / 4, rel=1e-4)
    off = z + torch.tensor([0.3, 0.0, 0.0, 0.0]).view(1, -1, 1, 1)
    apart = 1 - torch.cosine_similarity(who + torch.tensor([0.3, 0, 0]), who)
    wanted = 0.3**2 / 4 + 10 * 0.3**2 / 3 + 0.5 * apart.mean()
    assert float(method.loss(session, off, coarse, everything, who)) == pytest.approx(float(wanted), rel=1e-4)
    half = torch.tensor([True, False])
    wanted = (0.3**2 / 4 + 10 * 0.3**2 / 3) / 2 + 0.5 * apart.mean()
    assert float(method.loss(session, off, coarse, half, who)) == pytest.approx(float(wanted), rel=1e-4)
    assert float(method.loss(session, off, coarse, nothing, who)) == pytest.approx(float(0.5 * apart.mean()), rel=1e-4)
    latent = method_of("dreamid_latent")
    assert float(latent.loss(session, off, coarse, everything, who)) == pytest.approx(0.3**2 / 4, rel=1e-4)


def test_who_is_given_what(monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    """Explicit: the pseudo target in, the real picture wanted of all. Implicit: real pictures in, of which one half is wanted."""
    real, one, other = torch.tensor([0, 5, 6, 9]), torch.tensor([8, 13, 14, 1]), torch.tensor([3, 2, 1, 4])
    monkeypatch.setattr(dreamid.Triplets, "draw", lambda self, n: (real, one, other))
    seen: list[Any] = []
    monkeypatch.setattr(dreamid, "fit", lambda session, network, loss, *_, **__: loss())
    monkeypatch.setattr(Session, "once", lambda self, *_: dreamid.Recogniser().state_dict())
    x0, mask = TRAIN["x0"], TRAIN["mask"]
    for name, known in (("dreamid", [True] * 4), ("dreamid_implicit", [True, False, True, False])):
        method, seen[:] = method_of(name), []
        session = training(SWAPPING, method, teacher=painter)
        monkeypatch.setattr(
            method, "swap", lambda parts, schedule, *asked: seen.append(asked) or torch.zeros(4, 4, 8, 8)
        )
        monkeypatch.setattr(method, "loss", lambda session, z, *wanted: seen.append(wanted) or z.sum())
        method.prepare(session)
        (noise, target, source, identity), (wanted, told, who) = seen
        pseudo = torch.where(mask[real][:, None], boxed(x0[other], mask[other], mask[real]), x0[real])
        mixed = torch.where(torch.tensor(known).view(-1, 1, 1, 1), x0[real], x0[other])
        torch.testing.assert_close(target, Blocks().encode(pseudo if name == "dreamid" else mixed))
        torch.testing.assert_close(source, Blocks().encode(x0[one]))
        torch.testing.assert_close(identity, session.networks["recogniser"](x0[one]))
        assert torch.equal(wanted, x0[real]) and told.tolist() == known and torch.equal(who, identity)
        assert noise.shape == (4, 4, 8, 8)


def swapping() -> dict[str, Tensor]:
    return given(target=pictures(2), identity=pictures(2, seed=1))


def test_three_evaluations_make_a_swap(painter: Painter) -> None:
    batch = swapping()
    for name, spent in (("dreamid", 3), ("dreamid_multistep", 8)):
        method = method_of(name)
        session = training(SWAPPING, method, teacher=painter)
        found = running(session, method, batch, 8)
        assert session.spent == 2 * spent and found.shape == (2, 4, 8, 8)
        assert (found.abs().max() == 0) == (name == "dreamid")  # the last layer begins at zero
        with pytest.raises(Skip):
            running(session, method, batch, 2)
    network = session.networks["swapper"]
    with torch.no_grad():
        asked = drawn(2, 4, 8, 8), torch.full((2,), 999.0), drawn(2, 4, 8, 8, seed=1)
        one, two = (network(*asked, drawn(2, 64, seed=k)) for k in (2, 3))
    assert (one - two).abs().max() > 1e-4  # the identity is heard


def test_the_target_is_swapped_into_and_the_other_says_what_it_is_to_wear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The swapping network is shown the target, the second one the other figure, whom the recogniser sees as a picture."""
    method, batch, asked = method_of("dreamid"), swapping(), []
    session = idle_session(SWAPPING, vae=Blocks(), recogniser=Face(), swapper=Still(), wearer=Still())
    monkeypatch.setattr(method, "swap", lambda parts, schedule, *told: asked.extend(told) or told[0])
    running(session, method, batch, 3)
    noise, target, source, identity = asked
    assert torch.equal(noise, batch["noise"]) and torch.equal(target, batch["target_latents"])
    assert torch.equal(source, batch["identity_latents"]) and torch.equal(identity, Face()(batch["identity"]))


# LBM --------------------------------------------------------------------------------------------


def test_a_bridge_hangs_on_both_ends_and_swings_between() -> None:
    start, end, noise = (drawn(5, 4, 40, 40, seed=k) for k in range(3))
    t = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    found = lbm.bridged(start, end, t, 0.3, noise)
    assert torch.equal(found[0], end[0]) and torch.equal(found[4], start[4])
    away = found - t.view(-1, 1, 1, 1) * start - (1 - t.view(-1, 1, 1, 1)) * end
    torch.testing.assert_close(away.std((1, 2, 3)), 0.3 * (t * (1 - t)).sqrt(), rtol=0.03, atol=1e-6)


def test_the_drift_leads_from_one_end_to_the_other_in_any_number_of_steps() -> None:
    """The bridge's own noise stands in between, as much of it as the bridge has there, and none at the end."""
    start, end, told, thrown = drawn(2, 4, 8, 8), drawn(2, 4, 8, 8, seed=1), [], []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        told.append((float(t[0]), x))
        return start - end

    for steps in (1, 2, 4):
        told.clear()
        found = lbm.crossed(velocity, start, steps, 0.0, torch.randn_like)
        torch.testing.assert_close(found, end, rtol=1e-5, atol=1e-5)
        assert [t for t, _ in told] == [1 - k / steps for k in range(steps)]
    told.clear()

    def ones(x: Tensor) -> Tensor:
        thrown.append(x)
        return torch.ones_like(x)

    found = lbm.crossed(velocity, start, 4, 0.1, ones)
    spreads = [0.1 * math.sqrt(s * (1 - s)) for s in (0.75, 0.5, 0.25)]
    assert len(thrown) == 3
    torch.testing.assert_close(found, end + sum(spreads), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told[1][1], start + 0.25 * (end - start) + spreads[0], rtol=1e-5, atol=1e-5)


class Still(nn.Module):
    """Predicts one half, and says what it was asked."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod, self.asked = scaled_linear(), []

    def forward(self, x: Tensor, time: Tensor, shown: Tensor) -> Tensor:
        self.asked.append((x, time, shown))
        return torch.full_like(x, 0.5)


@pytest.mark.parametrize("name", ["lbm", "lbm_flow", "lbm_regression", "lbm_diffusion"])
def test_pairs_of_a_removal_are_learnt_and_those_of_an_addition_backwards(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network that says 1/2 the loss is known: |1/2 - (start - end)|^2, ten times that of the point it leads to, decoded; of
    noise 5/4."""
    from stepmark.datasets.edits32 import KINDS

    assert (KINDS[lbm.ADD], KINDS[lbm.REMOVE]) == ("add", "remove")
    losses: list[float] = []
    monkeypatch.setattr(lbm, "fit", lambda session, network, loss, *_, **__: losses.append(float(loss())))
    network, method = Still(), method_of(name)
    session = training(REMOVING, bridge=network)
    monkeypatch.setattr(session, "scale", lambda embedded, smoke: 200 if embedded == 16 else smoke)
    method.prepare(session)
    x, time, shown = network.asked[0]
    data = {key: TRAIN[key] for key in ("source", "x0")}
    before = torch.cat([data["x0"][4::8], data["source"][5::8]])  # 4: added, 5: taken away
    after = torch.cat([data["source"][4::8], data["x0"][5::8]])
    masks = on_grid(torch.cat([TRAIN["mask"][4::8], TRAIN["mask"][5::8]]))
    row = (shown[:, :1, None] - masks.unsqueeze(0).transpose(1, 2)).abs().amax((1, 3, 4)).argmin(1)
    assert torch.equal(shown[:, :1], masks[row]) and set(row.tolist()) == {0, 1, 2, 3}
    source, end = (Blocks().encode(each)[row] for each in (before, after))
    if name in ("lbm_flow", "lbm_diffusion"):
        torch.testing.assert_close(shown[:, 1:], source)
    if name == "lbm_diffusion":
        assert losses[0] == pytest.approx(1.25, abs=0.02) and len(set(time.tolist())) > 100
        return
    t = (time + 1) / 1000
    assert set((4 * t).round(decimals=3).tolist()) == ({4.0} if name == "lbm_regression" else {1.0, 2.0, 3.0, 4.0})
    start, full = source, t == 1
    if name == "lbm_flow":
        spread = t.view(-1, 1, 1, 1)
        start = (x - (1 - spread) * end) / spread
        assert float(start.std()) == pytest.approx(1, abs=0.02)
    else:
        assert torch.equal(x[full], source[full])
        away = (x - t.view(-1, 1, 1, 1) * source - (1 - t.view(-1, 1, 1, 1)) * end)[~full]
        assert not len(away) or 0.001 < float(away.std()) < 0.003
    pixels = (Blocks()(x - 0.5 * t.view(-1, 1, 1, 1)).clamp(-1, 1) - after[row]).square().mean()
    wanted = (0.5 - start + end).square().mean() + 10 * pixels
    assert name != "lbm_flow" or (x - 0.5 * t.view(-1, 1, 1, 1)).abs().max() > 1.5, "some of it is cut off"
    assert losses[0] == pytest.approx(float(wanted), rel=1e-3)


def removing() -> dict[str, Tensor]:
    return given(source=pictures(2), mask=boxes(2))


def test_a_hole_gets_the_median_colour_of_all_else() -> None:
    source = torch.tensor([0.2, -0.4, 0.9]).view(1, 3, 1, 1).repeat(2, 1, 32, 32)
    source[:, :, 20:30, 20:30] = -1.0  # a thing beside the hole, and one in it
    source[:, :, 6:14, 8:16] = 1.0
    batch = given(source=source, mask=boxes(2))
    wanted = torch.where(boxes(2)[:, None], source[:, :, :1, :1], source)
    torch.testing.assert_close(pairs.plastered(source, boxes(2)), wanted)
    session = idle_session(REMOVING, vae=Blocks())
    found = running(session, method_of("lbm_plastered"), batch, 1)
    torch.testing.assert_close(found, Blocks().encode(wanted))
    assert session.spent == 2


def test_a_removal_begins_with_the_source_and_takes_four_steps_at_most() -> None:
    batch = removing()
    for name, rung, spent in (
        ("lbm", 1, 1),
        ("lbm", 64, 4),
        ("lbm_regression", 64, 1),
        ("lbm_flow", 2, 2),
        ("lbm_diffusion", 32, 32),
    ):
        network = Still()
        session = idle_session(REMOVING, vae=Blocks(), bridge=network)
        running(session, method_of(name), batch, rung)
        assert session.spent == 2 * spent
        x, time, shown = network.asked[0]
        torch.testing.assert_close(x, batch["noise"] if shown.shape[1] == 5 else Blocks().encode(batch["source"]))
        assert float(time[0]) == 999 and torch.equal(shown[:, :1], on_grid(batch["mask"]))
        assert shown.shape[1] == 1 or torch.equal(shown[:, 1:], batch["source_latents"])


# MiniMax-Remover --------------------------------------------------------------------------------


def test_bad_noise_climbs_and_keeps_its_variance() -> None:
    """Of a linear loss the step is known: e = unit(eps + step unit(c))."""
    eps, fresh, slope = drawn(3, 8, 4, 8, 8), drawn(3, 8, 4, 8, 8, seed=1), 1e-3 * drawn(3, 8, 4, 8, 8, seed=2)

    def rms(x: Tensor) -> Tensor:
        return x.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1, 1)

    with torch.no_grad():  # as inside of a training that has no gradient here
        found = minimax.bad_noise(lambda e: (slope * e).sum(), eps, fresh, 1.0, 0.5)
    moved = eps + slope / rms(slope)
    torch.testing.assert_close(found, (moved / rms(moved) + fresh) / math.sqrt(2), rtol=1e-4, atol=1e-5)
    assert float(found.std()) == pytest.approx(1, abs=0.03) and not found.requires_grad
    torch.testing.assert_close(
        rms(minimax.bad_noise(lambda e: (slope * e).sum(), eps, fresh, 1.0, 0.0)), torch.ones(3, 1, 1, 1, 1)
    )


class Silent(nn.Module):
    """A velocity of 0."""

    def forward(self, frames: Tensor, times: Tensor, places: Tensor, token: Tensor | None = None) -> Tensor:
        return torch.zeros_like(frames[:, :, :4])


def test_noise_goes_up_the_loss_of_the_removal_or_down_that_of_the_object() -> None:
    """Of a velocity of 0 the loss is |eps - x0|^2: its gradient leads away from the clean clip, and the other to the object's."""
    session = training(CLIPS)
    x0, whole, eps = (drawn(2, 8, 4, 8, 8, seed=k) for k in range(3))
    told, t = drawn(2, 8, 5, 8, 8), torch.tensor([0.3, 0.8])
    for name, way in (("minimax_remover", eps - x0), ("minimax_object", whole - eps)):
        method = method_of(name, fresh=0.0)
        found = method.astray(session, Silent(), x0, whole, told, t, eps)
        torch.testing.assert_close(found, minimax.unit(eps + minimax.unit(way)), rtol=1e-4, atol=1e-4)
    network = moving(minimax.remover())
    loss = minimax.matching(network, x0, told, t, eps)
    bad = method_of("minimax_remover", fresh=0.0, step=0.05).astray(session, network, x0, whole, told, t, eps)
    assert bool((minimax.matching(network, x0, told, t, bad) > loss).all())
    good = method_of("minimax_object", fresh=0.0, step=0.05).astray(session, network, x0, whole, told, t, eps)
    assert bool(
        (minimax.matching(network, whole, told, t, good) < minimax.matching(network, whole, told, t, eps)).all()
    )


class Told(nn.Module):
    """The velocity to a clip of +1 under one token, of -1 under the other, of 0 without; says what it was told."""

    prediction = "flow"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def forward(self, frames: Tensor, times: Tensor, places: Tensor, token: Tensor | None = None) -> Tensor:
        self.asked.append((frames, places, token))
        point = 0 if token is None else 2 * token[0] - 1
        return (frames[:, :, :4] - point) / times[:, :, None, None, None]


def clip(n: int = 2) -> dict[str, Tensor]:
    return given(source=pictures(n, 8), mask=boxes(8 * n).unflatten(0, (n, 8)))


def test_stage_one_is_guided_by_tokens_and_stage_two_by_nothing() -> None:
    """-1 + 2 (1 - -1) = 3; two evaluations a step."""
    batch = clip()
    for name, rung, spent, end in (
        ("minimax_remover", 6, 6, 0.0),
        ("minimax_plain", 6, 6, 1.0),
        ("minimax_stage1", 6, 6, 3.0),
        ("minimax_stage1", 1, 1, 1.0),
    ):
        network = Told()
        session = idle_session(CLIPS, vae=Blocks(), remover=network)
        found = running(session, method_of(name), batch, rung)
        torch.testing.assert_close(found, torch.full_like(found, end), rtol=1e-4, atol=1e-4)
        assert session.spent == 2 * spent
        frames, places, token = network.asked[0]
        hole = torch.where(batch["mask"][:, :, None], torch.tensor(0.0), batch["source"])
        torch.testing.assert_close(frames[:, :, 4:8], Blocks().encode(hole.flatten(0, 1)).unflatten(0, (2, 8)))
        assert torch.equal(frames[:, :, 8:], on_grid(batch["mask"])) and places[:, 0].tolist() == list(range(8))
        assert (token is None) == (name == "minimax_remover")


def test_the_token_says_whether_the_object_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of noise that is taken out of x_t what is left is the clip without the object under one token, with it under the other."""
    asked: list[Any] = []
    monkeypatch.setattr(minimax, "fit", lambda session, network, loss, *_, **__: loss())
    monkeypatch.setattr(minimax, "asked", lambda network, x, t, told, token: asked.append((x, t, told, token)) or 0 * x)
    noises: list[Tensor] = []

    def noted(session: Session, schedule: Schedule, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noises.append(x0)
        return noised(session, schedule, x0)

    monkeypatch.setattr(minimax, "noised", noted)
    minimax.first(training(CLIPS), 4, 1, 8, 1e-3)
    assert [token for *_, token in asked] == [minimax.REMOVE, minimax.KEEP]
    encode = Blocks().encode
    hole = encode(torch.where(CLIP["mask"][:, :, None], torch.tensor(0.0), CLIP["x0"]).flatten(0, 1)).unflatten(
        0, (4, 8)
    )
    for (_, _, told, _), x0, name in zip(asked, noises, ("without", "x0"), strict=True):
        rows = (told[:, None, :, :4] - hole).abs().amax((2, 3, 4, 5)).argmin(1)
        torch.testing.assert_close(x0, encode(CLIP[name].flatten(0, 1)).unflatten(0, (4, 8))[rows])


def test_the_better_half_of_the_removals_is_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors outside the hole do not count."""
    monkeypatch.setattr(Session, "once", lambda self, *_: minimax.remover().state_dict())
    found = Blocks().encode(CLIP["without"].flatten(0, 1)).unflatten(0, (4, 8))
    inside = on_grid(CLIP["mask"])
    wrong = torch.tensor([0.3, 0.1, 0.4, 0.2]).view(-1, 1, 1, 1, 1)
    made = found + wrong * (inside > 0) + 5 * wrong.flip(0) * (inside == 0)

    def row_of(told: Tensor) -> Tensor:
        return (told[:, None, :, 4:] - inside).abs().amax((2, 3, 4, 5)).argmin(1)

    monkeypatch.setattr(minimax, "guided", lambda network, x, told, steps, guidance: made[row_of(told)])
    have = minimax.successes(training(CLIPS), (4, 1, 4, 1e-3), 4, 1, 2.0, 0.5)
    rows = row_of(have["told"])
    assert rows.tolist() == [1, 3]
    torch.testing.assert_close(have["x0"], made[rows])
    whole = Blocks().encode(CLIP["x0"].flatten(0, 1)).unflatten(0, (4, 8))
    torch.testing.assert_close(have["whole"], whole[rows])


def test_propagation_finds_a_background_that_stands_still() -> None:
    still = pictures(2)[:, None].repeat(1, 8, 1, 1, 1)
    mask = torch.zeros(2, 8, 32, 32, dtype=torch.bool)
    for k in range(8):
        mask[:, k, 8:16, 2 * k : 2 * k + 8] = True
    source = torch.where(mask[:, :, None], torch.tensor(7.0), still)
    torch.testing.assert_close(minimax.propagated(source, mask), still)
    always = torch.ones_like(mask)
    always[:, :, :4] = False
    filled = minimax.propagated(torch.where(always[:, :, None], torch.tensor(7.0), still), always)
    wanted = still[:, 0, :, :4].mean((2, 3))
    torch.testing.assert_close(filled[:, 3, :, 20, 20], wanted)
    session, batch = idle_session(CLIPS, vae=Blocks()), clip()
    found = running(session, method_of("minimax_propagated"), batch, 12)
    wanted = minimax.propagated(batch["source"], batch["mask"])
    torch.testing.assert_close(found.flatten(0, 1), Blocks().encode(wanted.flatten(0, 1)))
    assert session.spent == 2 * 8
    with pytest.raises(Skip):
        running(session, method_of("minimax_propagated"), batch, 6)


def test_stage_two_learns_from_the_noise_that_its_arm_is_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random noise is learnt from as it was drawn, bad noise in its place; the target is always the clip without the object."""
    have = {"x0": drawn(3, 8, 4, 8, 8), "told": drawn(3, 8, 5, 8, 8), "whole": drawn(3, 8, 4, 8, 8, seed=1)}
    learnt: list[tuple[Tensor, Tensor]] = []

    def noted(network: nn.Module, x0: Tensor, told: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        learnt.append((x0, eps))
        return torch.zeros(len(x0))

    def once(session: Session, function: Any, *_: Any) -> Any:
        return minimax.remover().state_dict() if function is minimax.first else have

    monkeypatch.setattr(Session, "once", once)
    monkeypatch.setattr(minimax, "fit", lambda session, network, loss, *_, **__: loss())
    monkeypatch.setattr(minimax, "matching", noted)
    for name, bad in (("minimax_remover", True), ("minimax_object", True), ("minimax_random", False)):
        method = method_of(name)
        monkeypatch.setattr(method, "astray", lambda session, network, x0, *_: torch.full_like(x0, 7.0))
        method.prepare(training(CLIPS, method))
        x0, eps = learnt[-1]
        assert bool((eps == 7).all()) == bad
        assert (x0[:, None] - have["x0"]).abs().amax((2, 3, 4, 5)).amin(1).max() == 0
    for name in ("minimax_stage1", "minimax_plain"):
        method_of(name).prepare(training(CLIPS, method_of(name)))
    assert len(learnt) == 3


# all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "task"), [("catvton", TRYON), ("mc_vton", TRYON), ("minimax_remover", CLIPS)])
def test_what_is_shared_is_asked_for_before_a_network_is_changed(
    name: str, task: str, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be another training: what is kept hangs on the weights of all networks as they stand."""
    method = method_of(name)
    session = training(task, method, teacher=painter)

    def stand() -> str:
        return digest_of({role: network.state_dict() for role, network in session.networks.items()})

    built, asked, once = stand(), list[str](), Session.once

    def noted(self: Session, function: Any, *literals: Any) -> Any:
        asked.append(function.__name__)
        assert stand() == built, function.__name__
        return once(self, function, *literals)

    monkeypatch.setattr(Session, "once", noted)
    method.prepare(session)
    assert len(asked) > 2 and stand() != built


BATCHES = {
    TRYON: tryon,
    SWAPPING: swapping,
    REMOVING: removing,
    CLIPS: clip,
}


@pytest.mark.parametrize(
    ("name", "task", "rung"),
    [
        ("catvton", TRYON, 8),
        ("catvton_reference", TRYON, 8),
        ("mc_vton_reference", TRYON, 8),
        ("mc_vton_full", TRYON, 8),
        ("dreamid", SWAPPING, 4),
        ("dreamid_multistep", SWAPPING, 4),
        ("lbm", REMOVING, 1),
        ("lbm_diffusion", REMOVING, 4),
        ("minimax_remover", CLIPS, 2),
        ("minimax_stage1", CLIPS, 2),
    ],
)
def test_untrained_networks_learn_and_answer(name: str, task: str, rung: int, painter: Painter) -> None:
    """At tier smoke: prepared with an update or two, within the rung; what was not to be trained is as it was."""
    method = method_of(name)
    torch.manual_seed(0)
    session = training(task, method, teacher=painter, vae=Autoencoder().requires_grad_(False))
    first = {
        role: {key: value.clone() for key, value in network.state_dict().items()}
        for role, network in session.networks.items()
    }
    method.prepare(session)
    for role, before in first.items():
        after = session.networks[role].state_dict()
        moved = any(not torch.equal(after[key], value) for key, value in before.items())
        assert moved == (role not in ("teacher", "vae")), role
    batch = BATCHES[task]()
    found = running(session, method, batch, rung)
    assert found.shape == batch["noise"].shape and bool(found.isfinite().all())
    assert 0 < session.spent <= rung * len(found)
