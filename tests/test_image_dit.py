"""Diffusion transformers: the teacher's wrapper, bands of tokens, and the decoupled transformer with its shared steps."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch
from stepmark.methods.image import ddt
from stepmark.methods.image.ddt import DecoupledDiT, chosen_steps
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.backbones.dit import ConditionalDiT
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.meter.flops import count_flops
from stepmark.session import Session
from stepmark.tracks.image import solvers
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import euler_step

torch.set_num_threads(1)


def lively(network: nn.Module) -> nn.Module:
    """The network with weights that start at zero drawn anew: untrained, but nothing in it is idle."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                weight.copy_(0.2 * torch.randn(weight.shape, generator=draw))
    return network.eval().requires_grad_(False)


def dit() -> ConditionalDiT:
    """A small transformer of the teacher's kind."""
    torch.manual_seed(0)
    return lively(ConditionalDiT(8, 1, 24, 2, 3, 10))


def small_decoupled() -> DecoupledDiT:
    """A small decoupled transformer."""
    torch.manual_seed(0)
    return lively(DecoupledDiT(8, 1, 10, width=24))


def batch_of(n: int) -> dict[str, Tensor]:
    """Noise and classes."""
    return {"noise": torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)), "condition": torch.arange(n)}


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_the_transformer_heeds_class_time_and_position() -> None:
    network, batch = dit(), batch_of(4)
    x, label, t = batch["noise"], batch["condition"], torch.full((4,), 0.5)
    v = network(x, t, label)
    assert v.shape == x.shape
    assert not torch.allclose(v, network(x, t, network.null_condition(label)))
    assert not torch.allclose(v, network(x, t + 0.1, label))
    turned = network(x.flip(2), t, label).flip(2)
    assert not torch.allclose(v, turned, atol=1e-3)
    network.train()
    assert torch.equal(network(x, t, label), v)  # no label is dropped behind the trainer's back


def test_an_untrained_transformer_predicts_nothing() -> None:
    network, batch = backbones.recipe("digits_dit").build(), batch_of(3)
    assert not network(batch["noise"], torch.rand(3), batch["condition"]).any()


# --- the decoupled transformer ---------------------------------------------------------------------------------------


def ddt_session() -> Session:
    """A smoke session of `ddt` before prepare, whose task needs no teacher for it."""
    spec, ledger = track_of("class_to_image/digits_dit")[1], Ledger()
    session = Session(spec, "smoke", torch.device("cpu"), torch.float32, {}, {}, ledger, False)
    session.begin("prepare", 4)
    torch.manual_seed(4)
    own = plugins.load_class(plugins.methods()["ddt"])().networks(session)
    session.networks["ddt"] = watch(ledger, "ddt", own["ddt"])
    return session


def test_a_kept_z_leaves_the_encoder_out_and_changes_nothing_at_the_same_point() -> None:
    network, batch = small_decoupled(), batch_of(4)
    x, label, t = batch["noise"], batch["condition"], torch.full((4,), 0.5)
    with torch.no_grad():
        v, z = network(x, t, label)
        again, kept = network(x, t, label.flip(0), z)
        assert torch.equal(again, v) and kept is z  # the decoder knows of the class by z alone
        assert not torch.allclose(network(x, t, label.flip(0))[0], v)
        assert not torch.allclose(network(-x, t, label, z)[0], v)
    calls: list[int] = []
    ends: list[Tensor] = []
    network.encoder[-1].register_forward_hook(lambda _, inputs, out: ends.append(out))
    network(x, t, label)
    torch.testing.assert_close(z, torch.nn.functional.silu(network.time(ddt.sinusoids(t, 64))[:, None] + ends[0]))
    network.encoder[0].register_forward_hook(lambda *_: calls.append(0))
    network.decoder[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        samples, states = ddt.sample_decoupled(network, x, label, 6, [0, 3, 4])
    assert (calls.count(0), calls.count(1)) == (3, 6)
    assert [torch.equal(a, b) for a, b in pairwise(states)] == [True, True, False, False, True]
    with torch.no_grad():
        every = ddt.sample_decoupled(network, x, label, 6, range(6))[0]
        slow = x
        for u, s in pairwise(uniform_times(6)):
            slow = euler_step(slow, network(slow, torch.full((4,), u), label)[0], u, s)
    assert torch.equal(every, slow)
    assert not torch.allclose(samples, every)


def test_the_undivided_arm_has_the_same_weights_and_no_z() -> None:
    """Every block and the last layer are modulated by time and class, each token alike; a z is not looked at."""
    divided, batch = small_decoupled(), batch_of(4)
    torch.manual_seed(0)
    whole = lively(ddt.UndividedDiT(8, 1, 10, width=24))
    assert all(
        torch.equal(a, b) for a, b in zip(divided.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    x, label, t = batch["noise"], batch["condition"], torch.full((4,), 0.5)
    given: list[Tensor] = []
    for block in (*whole.encoder, *whole.decoder):
        block.register_forward_hook(lambda _, inputs, out: given.append(inputs[1]))
    v, last = whole(x, t, label)
    c = torch.nn.functional.silu(whole.time(ddt.sinusoids(t, 64)) + whole.kind(label))[:, None]
    assert len(given) == 6 and all(torch.equal(one, c) for one in given)
    torch.testing.assert_close(v, whole.velocity(last, c, 4))
    assert torch.equal(whole(x, t, label, last + 1)[0], v)
    own = {name: plugins.load_class(plugins.methods()[name])() for name in ("ddt_undivided", "ddt_every_step")}
    kinds = {name: type(method.networks(ddt_session())["ddt"]).__name__ for name, method in own.items()}
    assert kinds == {"ddt_undivided": "UndividedDiT", "ddt_every_step": "DecoupledDiT"}


def test_the_steps_are_the_best_there_are() -> None:
    """Against every choice there is, on similarities without any order in them."""
    similarity = torch.rand(8, 8, generator=torch.Generator().manual_seed(2))
    similarity.fill_diagonal_(1.0)

    def worth(steps: tuple[int, ...]) -> float:
        return float(sum(similarity[i, max(j for j in steps if j <= i)] for i in range(8)))

    for count in (1, 2, 3, 4, 8):
        found = tuple(chosen_steps(similarity, count))
        best = max(worth((0, *rest)) for rest in itertools.combinations(range(1, 8), count - 1))
        assert len(set(found)) == count and found[0] == 0 and list(found) == sorted(found)
        assert worth(found) == pytest.approx(best)
    assert chosen_steps(similarity, 4) != [0, 2, 4, 6]


def test_similarity_is_the_mean_cosine_of_tokens() -> None:
    session, network = ddt_session(), small_decoupled()
    similarity = ddt.state_similarity(session, network, 4)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(4))
    torch.testing.assert_close(similarity, similarity.T)
    session.begin("prepare", 4)
    label = session.train["condition"]
    condition = label[torch.randint(len(label), (8,), generator=session.rng)]
    noise = torch.randn(8, 1, 8, 8, generator=session.rng)
    with torch.no_grad():
        z = ddt.sample_decoupled(network, noise, condition, 4, range(4))[1]
    expected = torch.nn.functional.cosine_similarity(z[0], z[3], dim=-1).mean()
    torch.testing.assert_close(similarity[0, 3], expected)


@pytest.mark.parametrize(("rung", "equal"), [(16, [0, 5, 10]), (50, list(range(0, 50, 5))), (4, [0])])
def test_a_fifth_of_the_encoders_run_wherever_the_steps_are_from(
    rung: int, equal: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at equal distances as by dynamic programming, so that the two are compared at one cost."""
    session, batch = ddt_session(), batch_of(2)
    network = session.networks["ddt"]
    calls: list[int] = []
    network.encoder[0].register_forward_hook(lambda *_: calls.append(len(taken)))
    taken: list[Tensor] = []
    step = solvers.euler_step
    found = []
    for name in ("ddt_uniform_fifth", "ddt_fifth"):
        method = plugins.load_class(plugins.methods()[name])()
        own = type(method).steps.__globals__
        monkeypatch.setitem(own, "euler_step", lambda *given: taken.append(given[0]) or step(*given))
        if name == "ddt_fifth":
            monkeypatch.setattr(session, "scale", lambda embedded, smoke: (rung,) if smoke == (4,) else smoke)
            session.begin("prepare", 4)
            session.state = method.prepare(session)
        session.begin("run", 1, 2 * rung)
        calls.clear(), taken.clear()
        method.run(session, batch, rung)
        assert len(taken) == rung
        found.append(list(calls))
    assert found[0] == equal
    assert len(found[1]) == len(equal) and found[1][0] == 0
    assert found[1] == session.state[f"steps_{rung}"].tolist()


def test_variants_run_the_encoder_where_they_say() -> None:
    found = {}
    for name in ("ddt", "ddt_every_step", "ddt_uniform"):
        method, session = plugins.load_class(plugins.methods()[name])(), ddt_session()
        session.begin("prepare", 4)
        session.state = method.prepare(session) or {}
        found[name] = method.steps(session, 4)
    assert found["ddt_every_step"] == [0, 1, 2, 3] and found["ddt_uniform"] == [0, 2]
    assert len(found["ddt"]) == 2 and found["ddt"][0] == 0


def test_every_variant_asks_for_the_training_of_its_own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that ask for the same function share its weights, which have the same names and shapes in both networks."""
    asked: dict[str, str] = {}
    for name in ("ddt", "ddt_every_step", "ddt_undivided", "ddt_uniform", "ddt_fifth", "ddt_uniform_fifth"):
        method, session = plugins.load_class(plugins.methods()[name])(), ddt_session()
        weights = session.networks["ddt"].state_dict()
        monkeypatch.setattr(
            session, "once", lambda function, name=name: asked.update({name: function.__name__}) or weights
        )
        method.prepare(session)
    assert asked.pop("ddt_undivided") == "fit_undivided"
    assert len(asked) == 5 and set(asked.values()) == {"fit_decoupled"}


def test_a_block_is_attention_and_layers_each_normed_shifted_scaled_and_gated() -> None:
    torch.manual_seed(1)
    block = lively(ddt.DecoupledBlock(12, 3))
    x, c = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.modulation(c).split(12, -1)
    norm = torch.nn.functional.layer_norm
    q, k, v = block.qkv(norm(x, (12,), eps=1e-6) * (1 + scale) + shift).split(12, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    middle = x + gate * block.out(torch.cat(heads, -1))
    expected = middle + gate_mlp * block.mlp(norm(middle, (12,), eps=1e-6) * (1 + scale_mlp) + shift_mlp)
    torch.testing.assert_close(block(x, c), expected)


def test_half_the_encoders_cost_less_than_three_quarters() -> None:
    ledger = Ledger()
    network = watch(ledger, "ddt", lively(DecoupledDiT(8, 1, 10)))
    batch, spent = batch_of(2), []
    for steps in (range(10), range(0, 10, 2), range(0, 10, 5)):
        with torch.no_grad(), count_flops(ledger, [network]) as flops:
            ddt.sample_decoupled(network, batch["noise"], batch["condition"], 10, steps)
        spent.append(flops.total)
    assert 0.6 < spent[1] / spent[0] < 0.75
    assert 0.4 < spent[2] / spent[0] < 0.55


def test_training_lowers_the_loss_and_aligns_encoder_tokens_to_the_clean_image(monkeypatch: pytest.MonkeyPatch) -> None:
    cosines: list[float] = []
    reached: list[list[bool]] = []
    networks: list[nn.Module] = []
    cosine = torch.nn.functional.cosine_similarity

    def noted(*given: Tensor, **options: int) -> Tensor:
        found = cosine(*given, **options)
        cosines.append(float(found.detach().mean()))
        weights = [block.mlp[0].weight for block in networks[-1].encoder]
        slopes = torch.autograd.grad(found.mean(), weights, retain_graph=True, allow_unused=True)
        reached.append([slope is not None and bool(slope.any()) for slope in slopes])
        return found

    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", noted)
    errors, alike = [], []
    for weight in (0.0, 5.0):
        session = ddt_session()
        session.scale = lambda embedded, smoke: min(embedded, 20)
        network = session.networks["ddt"]
        networks.append(network)
        x0, label = (session.train[key][:64] for key in ("x0", "condition"))
        eps, t = torch.randn(x0.shape, generator=session.rng), torch.full((64,), 0.5)
        for trained in (False, True):
            if trained:
                ddt.fit_decoupled(session, weight=weight)
            with torch.no_grad():
                v = network(0.5 * (x0 + eps), t, label)[0]
            errors.append(float((v - eps + x0).square().mean()))
        alike.append(cosines[-1])
        assert not network.encoder[1]._forward_hooks
    assert errors[1] < 0.9 * errors[0]
    assert alike[1] > alike[0] + 0.2
    assert reached[-1] == [True, True, False, False]  # of four blocks the second is aligned


def test_training_sees_noised_images_at_the_paper_s_times_and_aligns_to_clean_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = ddt_session()
    session.scale = lambda embedded, smoke: 20
    network, train = session.networks["ddt"], session.train["x0"]
    clean: list[Tensor] = []
    asked: list[tuple[Tensor, ...]] = []

    def features(x: Tensor) -> Tensor:
        clean.append(x)
        return torch.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)

    monkeypatch.setattr(ddt, "masked_features", lambda session: features)
    network.register_forward_pre_hook(lambda _, given: asked.append(given))
    ddt.fit_decoupled(session)
    x0 = torch.cat(clean[1:])  # the first call asks how wide they are
    assert all((train == one).flatten(1).all(1).any() for one in x0[::50])
    times = torch.cat([given[1] for given in asked])
    logit = times.logit()
    assert abs(float(logit.mean())) < 0.1 and float(logit.std()) == pytest.approx(1, abs=0.1)
    noise = (torch.cat([given[0] for given in asked]) - (1 - times).view(-1, 1, 1, 1) * x0) / times.view(-1, 1, 1, 1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
