"""Models made cheaper: what is skipped was zero, what is folded changes nothing, integers are integers."""

from __future__ import annotations

import math
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.methods.decoding import relu_strikes_back
from stepmark.methods.decoding.mergequant import LEVELS, Int4Linear, pack, to_integers, unpack
from stepmark.methods.decoding.relu_strikes_back import SparseMlp, rectify
from torch import Tensor, nn

from stepmark import plugins
from stepmark.backbones import lm
from stepmark.meter.counts import Ledger, watch
from stepmark.meter.flops import count_flops
from stepmark.task import load_split
from stepmark.tracks.decoding import converted
from stepmark.tracks.decoding import models as decoding_models
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.models import write_greedily


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(seed: int = 0, width: int = 64, depth: int = 2) -> Any:
    """A random Llama over the vocabulary of the tasks, weights large enough for far from even outputs."""
    model = lm.build(width, depth, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


def module_of(method: str) -> Any:
    """The names that a method's file defines."""
    return SimpleNamespace(**plugins.load_class(plugins.methods()[method]).run.__globals__)


def made_by(method: str, target: Any) -> Any:
    """The student that a method prepares from a target, at full calibration on a few texts."""
    train = {"prompt": ["tom has 1 2 pears . how many pears does tom have ? <cot>"] * 12}
    train["target"] = [f"1 2 + {i % 9} = 2 {i % 7} . ans {i % 5}" for i in range(12)]
    session: Any = SimpleNamespace(
        networks={"target": target},
        train=train,
        scale=lambda embedded, smoke: embedded,
        clone=lambda _: deepcopy(target),
    )
    plugin = plugins.load_class(plugins.methods()[method])()
    session.networks |= plugin.networks(session)
    with torch.enable_grad():
        plugin.prepare(session)
    return session.networks["student"].eval().requires_grad_(False)


# -- sparse activations ---------------------------------------------------------------------------------------------


def flops_of(model: Any, ids: list[int]) -> int:
    """FLOPs of one more token after a text."""
    ledger = Ledger()
    watch(ledger, "student", model, list(model.model.layers))
    decoder = Decoder(model, 40)
    with torch.no_grad():
        decoder.forward(ids)
        with count_flops(ledger, [model]) as flops:
            decoder.forward([5])
    for part in model.modules():
        part.__dict__.pop("forward", None)
    return flops.total


def test_relufication_skips_what_is_zero_and_nothing_else() -> None:
    """Token by token, reading only live rows and columns, gives the logits of dense ReLUs in one pass."""
    ids = torch.randint(3, 100, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    model = rectify(tiny())
    plain = tiny()
    for layer in plain.model.layers:  # the same by the book: dense projections, hooks for the ReLUs
        layer.mlp.act_fn = nn.ReLU()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda module, inputs, output: output.relu())
    with torch.no_grad():
        wanted = plain(torch.tensor([ids])).logits[0]
        decoder = Decoder(model, 40)
        found = torch.cat([decoder.forward([token]) for token in ids])
        unlike = tiny()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - unlike).abs().max() > 0.1
    dense, sparse = flops_of(tiny(), ids), flops_of(model, ids)
    assert sparse < 0.75 * dense


def test_a_shut_gate_costs_nothing() -> None:
    """The FLOPs of a sparse block are those of its live inputs and open gates, to the multiply-add."""
    block = SparseMlp(deepcopy(tiny().model.layers[0].mlp))
    x = torch.zeros(1, 1, 64)
    x[0, 0, [2, 7, 30]] = torch.tensor([1.0, -2.0, 0.5])
    gate = block.gate_proj.weight @ x.flatten()
    wide, opened = len(gate), int((gate > 0).sum())
    ledger = Ledger()
    watch(ledger, "block", block)
    with torch.no_grad(), count_flops(ledger, [block]) as flops:
        found = block(x)
    assert flops.total == 2 * (3 * wide + 3 * opened + 64 * opened)
    wanted = block.down_proj.weight @ (gate.relu() * (block.up_proj.weight @ x.flatten()))
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-4, atol=1e-4)


def session_of(target: Any, rungs: tuple[int, ...] = (150, 450)) -> Any:
    """What preparing for some training steps sees."""
    session: Any = SimpleNamespace(
        networks={"target": target},
        task=SimpleNamespace(rungs=rungs),
        train={"prompt": ["1 <cot>"] * 9, "target": ["2"] * 9},
        seed=0,
        progress=None,
    )
    session.clone = lambda role: deepcopy(session.networks[role])
    session.scale = lambda embedded, smoke: embedded
    return session


def test_the_stages_of_relufication_come_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are plain while the gates alone are new, and rectified in the second stage and for good."""
    seen = []

    def fit(model: Any, *_: Any, **kwargs: Any) -> None:
        layer = model.model.layers[0]
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        assert isinstance(layer.mlp, SparseMlp)
        seen.append((bool((layer.input_layernorm(x) < 0).any()), kwargs["steps"]))

    monkeypatch.setattr(relu_strikes_back, "fit", fit)
    session, method = session_of(tiny()), relu_strikes_back.ReluStrikesBack()
    session.networks |= method.networks(session)
    method.prepare(session)
    assert seen == [(True, 50), (False, 100), (True, 150), (False, 300)]


def test_the_controls_of_relufication_take_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned controls are trained on for as long, and through the activations that they run with."""
    kinds = {
        "silu_tuned": "LlamaMLP",
        "narrow_tuned": "NarrowMlp",
        "topk_tuned": "TopkMlp",
        "topk_activations": "TopkMlp",
    }
    for name, kind in kinds.items():
        method, taken = plugins.load_class(plugins.methods()[name])(), list[int]()
        used = type(method).prepare.__globals__
        monkeypatch.setitem(used, "fit", lambda *_, taken=taken, **given: taken.append(given["steps"]))
        session = session_of(tiny())
        session.networks |= method.networks(session)
        method.prepare(session)
        for rung in (150, 450):
            assert type(session.networks[f"after_{rung}"].model.layers[0].mlp).__name__ == kind
        assert taken == ([] if name == "topk_activations" else [50, 100, 150, 300])


def test_contexts_are_read_token_after_token() -> None:
    """The answers are those of one pass over the whole context, and every token is paid for by itself."""
    model = rectify(tiny())
    session: Any = SimpleNamespace(networks={"after_150": model})
    contexts, widths = [[5, 9, 20, 7], [30, 8]], []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    with torch.no_grad():
        found = relu_strikes_back.ReluStrikesBack().run(session, {"context": contexts}, 150)
    hook.remove()
    assert widths == [1] * 6
    with torch.no_grad():
        for row, context in zip(found, contexts, strict=True):
            wanted = model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(row, wanted, rtol=1e-3, atol=1e-3)


def test_a_narrow_block_is_the_dense_one_without_its_idle_neurons() -> None:
    """Where all but two fifths of the neurons write nothing, leaving them out changes nothing, and they are those left out."""
    own, target = module_of("narrow_tuned"), tiny()
    for layer in target.model.layers:
        wide = layer.mlp.down_proj.weight.shape[1]
        idle = torch.randperm(wide, generator=torch.Generator().manual_seed(wide))[: wide - round(own.KEPT * wide)]
        layer.mlp.down_proj.weight[:, idle] = 0.0
    student = deepcopy(target)
    for layer in student.model.layers:
        layer.mlp = own.NarrowMlp(layer.mlp)
    own.narrow(student, target, [[5, 9, 20], [7, 8]])
    ids = torch.tensor([[4, 9, 33, 12]])
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, target(ids).logits, rtol=1e-3, atol=1e-3)


def test_topk_keeps_the_greatest() -> None:
    """All neurons kept is the dense block; fewer are those of the greatest size."""
    own = module_of("topk_activations")
    dense = tiny().model.layers[0].mlp
    block = own.TopkMlp(deepcopy(dense))
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    hidden = nn.functional.silu(dense.gate_proj(x)) * dense.up_proj(x)
    kept = torch.zeros_like(hidden).scatter(-1, hidden.abs().topk(round(own.KEPT * hidden.shape[-1])).indices, 1.0)
    torch.testing.assert_close(block(x), dense.down_proj(hidden * kept))
    torch.testing.assert_close(torch.cat([block(x[:, i : i + 1]) for i in range(5)], 1), block(x), rtol=1e-4, atol=1e-5)


# -- integers -------------------------------------------------------------------------------------------------------


def test_two_integers_lie_in_a_byte() -> None:
    """Every pair of values comes back, and a projection's weights take half a byte each."""
    every = torch.cartesian_prod(*[torch.arange(-7, 8, dtype=torch.int8)] * 2).view(1, -1)
    assert torch.equal(unpack(pack(every)), every)
    assert pack(every).numel() * 2 == every.numel()
    model = made_by("mergequant", tiny())
    packed = [part.packed for part in model.modules() if type(part).__name__ == "Int4Linear"]
    bits = sum(8 * part.numel() * part.element_size() for part in packed)
    weights = sum(p.numel() for layer in tiny().model.layers for p in layer.parameters() if p.ndim == 2)
    assert bits == 4 * weights
    floats = sum(p.numel() for p in model.model.layers.parameters() if p.is_floating_point())
    assert floats < weights / 2  # steps, gains and the branches of low rank: no matrix is left in floats


def test_integer_products_are_exact_and_counted() -> None:
    """A projection equals the float product of its rounded factors, and counts as many FLOPs."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 16, generator=generator), torch.randn(1, 5, 16, generator=generator)
    part = Int4Linear(16, 24)
    part.store(*to_integers(weight))
    step = x.abs().amax(-1, keepdim=True) / LEVELS
    wanted = (x / step).round() @ unpack(part.packed).float().t() * part.steps * step
    ledger = Ledger()
    watch(ledger, "part", part)
    with count_flops(ledger, [part]) as flops:
        found = part(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert flops.total == 2 * 5 * 16 * 24
    fixed = Int4Linear(16, 24)
    fixed.store(*to_integers(weight))
    fixed.input_step.fill_(0.25)
    wanted = (x / 0.25).round().clamp(-7, 7) @ unpack(part.packed).float().t() * part.steps * 0.25
    torch.testing.assert_close(fixed(x), wanted, rtol=1e-5, atol=1e-5)


def test_merged_steps_leave_the_function_as_it_was() -> None:
    """Norm with gain / s and weights times s, split channels and all: without rounding the dense projection exactly."""
    own = module_of("mergequant")
    generator = torch.Generator().manual_seed(0)
    weight, states = torch.randn(20, 16, generator=generator), torch.randn(50, 16, generator=generator)
    weight[:, 3] *= 9
    importance = states.square().mean(0) * weight.square().sum(0)
    importance[5] = 0.0
    steps = own.channel_steps(states)
    channels, parts = own.reconstruct(weight * steps, importance, 1)
    assert len(channels) == 16 and channels.tolist().count(3) == 2 and 5 not in channels.tolist()
    folded = (weight * steps)[:, channels] / parts
    weight[:, 5] = 0.0
    torch.testing.assert_close((states / steps)[:, channels] @ folded.t(), states @ weight.t(), rtol=1e-4, atol=1e-4)


def test_what_is_folded_into_a_norm_is_taken_out_of_its_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole layer, with split and pruned channels: before rounding, gains and weights give the dense projections."""
    target = tiny()
    dense = target.model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(dense.self_attn, name).weight
        weight[:, 3] *= 9  # stands out, so that it is split
        weight[:, [5, 6, 7, 8]] = 0.0  # of no importance, so that nothing is lost by pruning them
    plugin = plugins.load_class(plugins.methods()["mergequant"])()
    names = type(plugin).prepare.__globals__
    student = plugin.networks(SimpleNamespace(clone=lambda _: deepcopy(target)))["student"].model.layers[0]
    folded: list[tuple[Tensor, ...]] = []
    own = names["to_integers"]
    monkeypatch.setitem(names, "to_integers", lambda *given: folded.append(given) or own(*given))
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    normed, norm, group = dense.input_layernorm(hidden), "input_layernorm", names["GROUPS"]["input_layernorm"]
    names["merge"](dense, student, norm, group, hidden, normed)
    rounding = student.input_layernorm
    assert rounding.channels.tolist().count(3) > 1
    unrounded = (normed / dense.input_layernorm.weight)[:, rounding.channels] * rounding.gain
    for name, (weight, counts) in zip(group, folded, strict=True):
        torch.testing.assert_close(
            counts, rounding(hidden).float().square().mean(0)
        )  # errors of a column by its inputs
        wanted = dense.get_submodule(name)(normed)
        torch.testing.assert_close(unrounded @ weight.t(), wanted, rtol=1e-3, atol=1e-3)
        found = student.get_submodule(name)(rounding(hidden))
        assert (found - wanted).norm() < 0.3 * wanted.norm()


def test_steps_of_channels_err_less_than_unclipped_ones() -> None:
    """Each channel's step is the best of those tried: a channel with one far value is clipped, an even one is not."""
    states = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    states[0, 0] = 4.0
    states[:, 2] = torch.linspace(-1, 1, 400)
    steps = module_of("mergequant").channel_steps(states)
    for share in torch.linspace(0.4, 1.0, 13).tolist():
        other = share * states.abs().amax(0) / LEVELS
        errors = [((states / s).round().clamp(-LEVELS, LEVELS) * s - states).square().sum(0) for s in (steps, other)]
        assert bool((errors[0] <= errors[1] + 1e-6).all())
    assert steps[0] < 0.9 * 4.0 / LEVELS
    assert steps[2] > 0.9 / LEVELS
    importance = torch.ones(400)
    for first in (1.0, 1000.0):  # of a weight's rows likewise, errors weighed by column: what must be right is not cut
        importance[0] = first
        integers, steps = to_integers(states.t(), importance)
        found = ((integers * steps[:, None] - states.t()).square() * importance).sum(1)
        for share in torch.linspace(0.5, 1.0, 11).tolist():
            tried = share * states.abs().amax(0)[:, None] / LEVELS
            rounded = (states.t() / tried).round().clamp(-LEVELS, LEVELS) * tried
            assert bool((found <= ((rounded - states.t()).square() * importance).sum(1) + 1e-4).all())
        assert (float(steps[0]) < 0.9 * 4.0 / LEVELS) == (first == 1.0)


def test_the_compensation_is_the_best_of_its_rank() -> None:
    """An error of rank 2 is taken back whole by a branch of rank 2, and not by one of rank 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator)
    low = torch.randn(24, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    left = []
    for rank in (1, 2):
        part = Int4Linear(16, 24, rank)
        part.store(*to_integers(torch.randn(24, 16, generator=generator)))
        outputs = x @ (unpack(part.packed) * part.steps[:, None] + low).t()
        part.correct(x, outputs)
        branch = (x @ part.down.t()) @ part.up.t()
        left.append(float((x @ low.t() - branch).norm() / (x @ low.t()).norm()))
    assert left[1] < 0.03 < 0.3 < left[0]


def test_the_compensation_is_for_outputs_and_not_for_weights() -> None:
    """Where some inputs are large, the best of its rank on the inputs is not that of the error's weights."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 16, generator=generator) * torch.logspace(-1, 1, 16)
    error = torch.randn(24, 16, generator=generator)
    part = Int4Linear(16, 24, 3)
    part.store(*to_integers(torch.randn(24, 16, generator=generator)))
    part.correct(x, x @ (unpack(part.packed) * part.steps[:, None] + error).t())
    u, size, v = torch.linalg.svd(error)
    by_weights = (u[:, :3] * size[:3]) @ v[:3]
    left = [float((x @ (error - branch).t()).norm()) for branch in (part.up @ part.down, by_weights)]
    assert left[0] < 0.8 * left[1]
    best = torch.linalg.svdvals(x @ error.t())[3:].square().sum().sqrt()  # no map of rank 3 leaves less of the outputs
    assert left[0] < 1.05 * float(best)


def test_every_branch_makes_up_for_the_integers_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each projection of a prepared model, on what it was fitted to: rank 8, and integers with their branch err less than
    the integers alone, which already are most of it."""
    given: list[tuple[Any, Tensor, Tensor]] = []
    plugin: Any = plugins.load_class(plugins.methods()["mergequant"])
    own = plugin.prepare.__globals__["Int4Linear"]
    monkeypatch.setattr(plugins, "load_class", lambda info: plugin)
    names, correct, counts = plugin.prepare.__globals__, own.correct, list[Tensor]()
    rounded = names["to_integers"]
    monkeypatch.setattr(own, "correct", lambda part, x, y: given.append((part, x, y)) or correct(part, x, y))
    monkeypatch.setitem(names, "to_integers", lambda weight, each: counts.append(each) or rounded(weight, each))
    student = made_by("mergequant", tiny())
    parts = [part for part in student.modules() if isinstance(part, own)]
    assert {id(part) for part in parts} == {id(part) for part, _, _ in given} and len(given) == len(parts) == 14
    for (part, x, y), count in zip(given, counts, strict=True):
        assert len(part.down) == 8
        assert (
            torch.cosine_similarity(count, x.square().mean(0), dim=0) > 0.99
        )  # the clip weighs columns by their inputs
        alone = x @ (unpack(part.packed) * part.steps[:, None]).t()
        whole = part(x.to(torch.int8) if torch.equal(x, x.round()) else x)
        assert (y - whole).norm() < 0.95 * (y - alone).norm() < 0.6 * y.norm()


def test_channels_are_split_by_what_is_left_of_their_parts_and_pruned_by_what_they_add() -> None:
    own = module_of("mergequant")
    folded = torch.tensor([[10.0, 6.0, 1.0, 2.0, 1.0, 4.0]])
    channels, parts = own.reconstruct(folded, torch.tensor([9.0, 8.0, 5.0, 0.1, 4.0, 0.2]), 2)
    assert channels.tolist() == [0, 0, 1, 1, 2, 4]  # 10 and 6 in two parts each; the fourth and the last add least
    assert parts.tolist() == [2, 2, 2, 2, 1, 1]


def test_one_step_for_a_tensor_is_set_by_the_greatest_input_of_the_calibration() -> None:
    target, greatest = tiny(), dict[str, float]()
    student = made_by("w4a4_static", target)
    parts = {name: part for name, part in student.named_modules() if type(part).__name__ == "Int4Linear"}

    def note(name: str, inputs: Any) -> None:
        greatest[name] = max(greatest.get(name, 0.0), float(inputs[0].abs().max()))

    for name in parts:
        target.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
    for i in range(12):
        text = f"tom has 1 2 pears . how many pears does tom have ? <cot> 1 2 + {i % 9} = 2 {i % 7} . ans {i % 5}"
        target(torch.tensor([[*lm.encode(text), lm.EOS]]))
    for name, part in parts.items():
        assert float(part.input_step) * LEVELS == pytest.approx(greatest[name], rel=1e-5)


def test_outlier_channels_leave_no_trace_where_steps_are_those_of_channels() -> None:
    """The same function with gains 32 times greater in some channels: the same outputs, unless steps are shared."""
    calm, wild = tiny(), tiny()
    factor = torch.ones(64)
    factor[[3, 20]] = torch.tensor([32.0, 16.0])
    for layer in wild.model.layers:
        layer.input_layernorm.weight *= factor
        layer.post_attention_layernorm.weight *= factor
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight /= factor
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight /= factor
    ids = torch.randint(3, 100, (1, 30), generator=torch.Generator().manual_seed(1))
    changes = {}
    with torch.no_grad():
        torch.testing.assert_close(calm(ids).logits, wild(ids).logits, rtol=1e-3, atol=1e-3)
        truth, errors = wild(ids).logits, {}
        for method in ("mergequant", "w4a4_smooth", "w4a4_static", "w4a4_dynamic"):
            before, after = (made_by(method, model)(ids).logits for model in (calm, wild))
            changes[method] = float((after - before).norm() / before.norm())
            errors[method] = float((after - truth).norm() / truth.norm())
    assert max(changes["mergequant"], changes["w4a4_smooth"]) < 1e-5
    assert min(changes["w4a4_static"], changes["w4a4_dynamic"]) > 0.1
    assert errors["mergequant"] < min(errors["w4a4_static"], errors["w4a4_dynamic"])


def test_greedy_writing_is_that_of_the_track() -> None:
    """A model's own greedy tokens, cut by the budget."""
    model, ids = tiny(), [5, 9, 20]
    batch = {"prompt": [ids], "max_new_tokens": [6], "temperature": [0.0]}
    for budget in (2, 9):
        (written,) = write_greedily(model, batch, budget)
        text = list(ids)
        with torch.no_grad():
            for _ in range(min(budget, 6)):
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
                if text[-1] == lm.EOS:
                    break
        assert written == text[3:]


def test_the_tasks_count_a_student_as_the_target() -> None:
    for task in decoding_models.TASKS:
        if "target" in task.backbones:
            assert task.bounded == ("target", "student")


def test_the_blend_scored_by_its_own_answers_has_no_excess() -> None:
    """The true next word of every kind of text, with the odds of the grammar in stories; another word costs its loss."""
    task = converted.TASKS[0]
    batch: dict[str, Any] = converted.inputs(task, 40, torch.Generator().manual_seed(0), torch.device("cpu"))
    number, kinds = {word: i for i, word in enumerate(lm.VOCABULARY)}, set()
    rows = torch.full((40, len(number)), 1e-9)
    data = load_split("blend", "test")
    for row, context in zip(rows, batch["context"], strict=True):
        text = lm.decode(context)
        whole, kind = next(
            (f"{prompt} {target} <eos>", kind)
            for prompt, target, kind in zip(data["prompt"], data["target"], data["kind"], strict=True)
            if f"{prompt} {target} <eos>".startswith(f"{text} ")
        )
        kinds.add(kind)
        expected = converted.following(task, context)
        assert whole[len(text) :].split()[0] in expected
        assert kind == "stories" or len(expected) == 1
        for word, p in expected.items():
            row[number[word]] = p
    assert len(kinds) == 4
    resample = np.arange(40)[None]
    found = converted.score(task, batch, (rows / rows.sum(1, keepdim=True)).log(), {}, resample)
    assert found["excess"].value == pytest.approx(0.0, abs=1e-5)
    even = torch.full((40, len(number)), -math.log(len(number)))
    assert converted.score(task, batch, even, {}, resample)["loss"].value == pytest.approx(math.log(len(number)))
