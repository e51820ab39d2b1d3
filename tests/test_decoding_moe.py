"""Mamba, switch layers and attention: the recurrent step is the scan, nothing looks ahead, one expert a token."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.methods.decoding.moe_mamba import (
    STATE,
    STEP_RANK,
    WIDTH,
    BlockModel,
    MambaBlock,
    SelectiveScan,
    SwitchLayer,
    next_words,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stepmark import plugins
from stepmark.backbones import lm
from stepmark.meter.counts import held_bytes
from stepmark.task import BadOutput, load_split
from stepmark.tracks.decoding import forced as decoding_forced
from stepmark.tracks.decoding import moe as decoding_moe
from stepmark.tracks.decoding.attention import CausalAttention, States
from stepmark.tracks.decoding.texts import story_walk

METHODS = ("moe_mamba", "mamba_lm", "transformer_moe")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def session_of(method: str) -> tuple[Any, Any]:
    """(plugin, session with its untrained networks)."""
    plugin: Any = plugins.load_class(plugins.methods()[method])()
    session: Any = SimpleNamespace(
        task=decoding_moe.TASKS[0],
        train=load_split("tongues", "train"),
        scale=lambda embedded, smoke: smoke,
        seed=0,
        device=torch.device("cpu"),
        progress=lambda steps, _: steps,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        session.networks = plugin.networks(session)
    return plugin, session


def model_of(method: str) -> BlockModel:
    """An untrained model of a method with weights that make its parts felt."""
    model = session_of(method)[1].networks["after_1600"].eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "log_decay" not in name:
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def test_the_scan_and_its_gradients_are_those_of_the_recurrence() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5, 2, 3, generator=generator, dtype=torch.double).requires_grad_() for _ in range(2))
    first = torch.rand(2, 3, generator=generator, dtype=torch.double).requires_grad_()
    h, states = first, []
    for t in range(5):
        h = a[t] * h + b[t]
        states.append(h)
    torch.testing.assert_close(SelectiveScan.apply(a, b, first), torch.stack(states))
    assert torch.autograd.gradcheck(SelectiveScan.apply, (a, b, first))


def test_the_mamba_block_is_the_discretised_system_of_its_paper() -> None:
    torch.manual_seed(0)
    block = MambaBlock(8).requires_grad_(False)
    block.log_decay += 0.1 * torch.randn_like(block.log_decay)
    x = torch.randn(1, 6, 8)
    signal, gate = (x[0] @ block.enter.weight.t()).chunk(2, 1)
    h, rows = torch.zeros(16, STATE), []
    for t in range(6):
        seen = torch.stack([signal[t - k] if t >= k else torch.zeros(16) for k in (3, 2, 1, 0)], 1)
        u = F.silu((seen * block.convolution[:, 0]).sum(1))
        selected = block.select.weight @ u
        step = F.softplus(block.widen.weight @ selected[:STEP_RANK] + block.widen.bias)
        write, read = selected[STEP_RANK : STEP_RANK + STATE], selected[STEP_RANK + STATE :]
        h = torch.exp(-step[:, None] * block.log_decay.exp()) * h + step[:, None] * write[None] * u[:, None]
        rows.append(block.leave.weight @ ((h @ read + block.skip * u) * F.silu(gate[t])))
    torch.testing.assert_close(block(x, None, 0)[0], torch.stack(rows), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_steps_from_the_states_are_the_whole_text_at_once(method: str) -> None:
    model, ids = model_of(method), torch.arange(10, 22)[None]
    whole = model(ids)
    for cuts in ((7, 5), (1, 2, 9), (1,) * 12):
        states = States()
        parts = [model(part, states) for part in ids.split(cuts, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
        assert states.length == 12


@pytest.mark.parametrize("method", METHODS)
def test_no_position_sees_a_later_word(method: str) -> None:
    model, ids = model_of(method), torch.arange(10, 22)[None]
    other = ids.clone()
    other[0, 8:] = 50
    before, after = model(ids), model(other)
    torch.testing.assert_close(after[:, :8], before[:, :8], atol=1e-5, rtol=0)
    assert float((after[:, 8:] - before[:, 8:]).abs().max()) > 0.1
    early = ids.clone()
    early[0, 2] = 50  # and what came early is still felt at the end
    assert float((model(early)[:, -1] - before[:, -1]).abs().max()) > 1e-4


def test_a_token_gets_its_likeliest_expert_times_its_probability() -> None:
    torch.manual_seed(0)
    switch = SwitchLayer(8, 16, 4).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    p = F.softmax(x @ switch.router.weight.t(), -1)
    every = torch.stack([F.relu(x @ switch.up[e]) @ switch.down[e] for e in range(4)], 2)
    chosen = p.argmax(-1)
    wanted = every.gather(2, chosen[..., None, None].expand(-1, -1, 1, 8))[:, :, 0] * p.amax(-1, keepdim=True)
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(switch(x, None, 0), wanted)


def test_full_experts_let_later_tokens_pass_while_training() -> None:
    switch = SwitchLayer(4, 8, 2).requires_grad_(False)
    switch.router.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    x = torch.ones(1, 6, 4)
    written = switch.train()(x, None, 0)[0].abs().sum(1) > 0
    assert written.tolist() == [True, True, True, False, False, False]  # room for 6 / 2
    assert bool((switch.eval()(x, None, 0)[0].abs().sum(1) > 0).all())


def test_the_balance_loss_is_one_where_routing_is_even_and_grows_with_collapse() -> None:
    switch = SwitchLayer(2, 4, 2).train()
    with torch.no_grad():
        switch.router.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    switch(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), None, 0)
    assert float(switch.balance.detach()) == pytest.approx(1.0)
    switch(torch.tensor([[[3.0, 0.0], [3.0, 0.0]]]), None, 0)
    assert float(switch.balance.detach()) == pytest.approx(2 / (1 + math.exp(-6)), rel=1e-5)
    switch.balance.backward()
    gradient = switch.router.weight.grad
    assert gradient is not None
    assert float(gradient[0, 0]) > 0  # going down it makes the crowded expert less likely


def weights_of(mixer: nn.Module) -> int:
    return sum(p.numel() for p in mixer.parameters())


def test_a_token_meets_as_many_weights_in_an_expert_as_in_a_mamba_block() -> None:
    square = WIDTH * WIDTH
    mamba, (switch, wide) = MambaBlock(WIDTH), (SwitchLayer(WIDTH, n * WIDTH, 8) for n in (3, 4))
    active = (switch.up.numel() + switch.down.numel()) / 8
    assert active == 6 * square
    assert active + switch.router.weight.numel() <= weights_of(mamba) <= 1.3 * active
    assert weights_of(CausalAttention(WIDTH)) + (wide.up.numel() + wide.down.numel()) / 8 == 12 * square
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        switch(torch.randn(1, 1, WIDTH), None, 0)
    assert flops.get_total_flops() == 2 * (active + 8 * WIDTH)


def test_mamba_holds_as_much_of_a_long_text_as_of_a_short_one() -> None:
    held: dict[str, list[int]] = {}
    for method in METHODS:
        for length in (20, 80):
            states = States()
            with torch.no_grad():
                model_of(method)(torch.full((1, length), 30), states)
            held.setdefault(method, []).append(held_bytes(states))
    block = 2 * WIDTH * (STATE + 3) * 4
    assert held == {
        "moe_mamba": [2 * block] * 2,
        "mamba_lm": [4 * block] * 2,
        "transformer_moe": [2 * 2 * WIDTH * 4 * length for length in (20, 80)],
    }


def test_training_keeps_the_weights_of_every_rung() -> None:
    plugin, session = session_of("moe_mamba")
    before = {name: network.embed.weight.detach().clone() for name, network in session.networks.items()}
    plugin.prepare(session)
    after = {name: network.embed.weight.detach() for name, network in session.networks.items()}
    assert list(after) == ["after_400", "after_800", "after_1200", "after_1600"]
    moved = [float((after[name] - before["after_1600"]).norm()) for name in after]
    assert 0 < moved[0] < moved[1] < moved[2] < moved[3]


def test_next_words_are_those_of_the_model_without_states() -> None:
    _, session = session_of("moe_mamba")
    contexts = [[20, 21, 22, 23, 24], [30, 31, 32]]
    with torch.no_grad():
        found = next_words(session, {"context": contexts}, 800)
        for row, context in zip(found, contexts, strict=True):
            whole = session.networks["after_800"].train(False)(torch.tensor([context]))[0, -1].log_softmax(-1)
            torch.testing.assert_close(row, whole, atol=1e-5, rtol=1e-5)


def test_the_grammar_itself_has_no_excess_loss() -> None:
    task = decoding_forced.TASKS[0]
    batch: dict[str, Any] = decoding_forced.inputs(task, 40, torch.Generator().manual_seed(0), torch.device("cpu"))
    number = {word: i for i, word in enumerate(lm.VOCABULARY)}

    def outputs(sharpness: float) -> Tensor:
        rows = torch.full((40, len(number)), 1e-9)
        for row, context in zip(rows, batch["context"], strict=True):
            opening, _, told = lm.decode(context).partition(" <story>")
            walk = story_walk(opening)
            expected = next(walk)
            for word in told.split():
                expected = walk.send(word)
            for word, p in expected.items():
                row[number[word]] = p**sharpness
        return (rows / rows.sum(1, keepdim=True)).log()

    resample = np.arange(40)[None]
    decoding_forced.check(task, batch, outputs(1.0))
    found = decoding_forced.score(task, batch, outputs(1.0), {}, resample)
    assert found["excess"].value == pytest.approx(0.0, abs=1e-5)
    assert found["copies"].value == pytest.approx(1.0, abs=1e-5)
    assert 0.1 < found["loss"].value < 1.5
    even = torch.full((40, len(number)), -math.log(len(number)))
    worst = decoding_forced.score(task, batch, even, {}, resample)
    assert worst["loss"].value == pytest.approx(math.log(len(number)))
    assert worst["copies"].value == pytest.approx(1 / len(number))
    with pytest.raises(BadOutput, match="add up to 1"):
        decoding_forced.check(task, batch, even + 0.1)


def test_the_tongue_itself_has_no_excess_loss() -> None:
    from stepmark.datasets import tongues

    task = decoding_moe.TASKS[0]
    batch: dict[str, Any] = decoding_moe.inputs(task, 30, torch.Generator().manual_seed(0), torch.device("cpu"))
    number = {word: i for i, word in enumerate(lm.VOCABULARY)}
    assert all(len(context) == tongues.LENGTH - 1 for context in batch["context"])

    def outputs(shift: int) -> Tensor:
        rows = torch.full((30, len(number)), 1e-9)
        for row, context in zip(rows, batch["context"], strict=True):
            words = [lm.VOCABULARY[i] for i in context]
            tongue = tongues.TONGUES[(tongues.TONGUES.index(words[0]) + shift) % len(tongues.TONGUES)]
            for word, p in tongues.following(tongue, words[-1]).items():
                row[number[word]] = p
        return (rows / rows.sum(1, keepdim=True)).log()

    resample = np.arange(30)[None]
    found = decoding_moe.score(task, batch, outputs(0), {}, resample)
    assert found["excess"].value == pytest.approx(0.0, abs=1e-5)
    assert found["allowed"].value == pytest.approx(1.0, abs=1e-5)
    assert found["loss"].value == pytest.approx(-sum(p * math.log(p) for p in tongues.SHARES), abs=1e-5)
    other = decoding_moe.score(task, batch, outputs(1), {}, resample)  # the words of another tongue are of no use
    assert other["loss"].value > 10
    assert other["allowed"].value < 0.3
    even = torch.full((30, len(number)), -math.log(len(number)))
    assert decoding_moe.score(task, batch, even, {}, resample)["loss"].value == pytest.approx(math.log(len(number)))


def test_texts_of_a_tongue_keep_to_its_table() -> None:
    from stepmark.datasets import tongues

    texts = [text.split() for text in load_split("tongues", "test")["text"]]
    ranks = [0] * 4
    for words in texts:
        for word, after in itertools.pairwise(words[1:]):
            ranks[tongues.rows()[words[0], word].index(after)] += 1
    np.testing.assert_allclose(np.array(ranks) / sum(ranks), tongues.SHARES, atol=0.02)
    assert {words[0] for words in texts} == set(tongues.TONGUES)
    assert len(set(tongues.rows().values())) == 16 * 60, "two rows are the same: there is a rule to find"


def test_training_reads_every_text_before_any_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, session = session_of("mamba_lm")
    session.task = SimpleNamespace(rungs=(1, 3))
    session.networks = {f"after_{rung}": session.networks["after_1600"] for rung in (1, 3)}
    session.scale = lambda embedded, smoke: embedded
    session.train = {"text": session.train["text"][:64]}
    seen: list[tuple[int, ...]] = []
    kind = plugin.prepare.__globals__["BlockModel"]
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, ids, *rest: seen.extend(map(tuple, ids.tolist())) or forward(self, ids)
    )
    plugin.prepare(session)
    assert len(seen) == 96
    assert len(set(seen[:64])) == 64


def test_training_aims_at_the_next_word_and_at_even_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step: words read against the words after them, and a hundredth of the mean imbalance of the layers."""
    plugin, session = session_of("moe_mamba")
    session.task, session.networks = SimpleNamespace(rungs=(1,)), {"after_1": session.networks["after_1600"]}
    kind, words, losses = plugin.prepare.__globals__["BlockModel"], list[Tensor](), list[Tensor]()
    forward, entropy, backward = kind.forward, F.cross_entropy, Tensor.backward
    monkeypatch.setattr(kind, "forward", lambda self, ids: words.append(ids) or forward(self, ids))

    def told(logits: Tensor, wanted: Tensor) -> Tensor:
        words.append(wanted)
        return entropy(logits, wanted)

    monkeypatch.setattr(F, "cross_entropy", lambda *given: losses.append(told(*given)) or losses[-1])
    monkeypatch.setattr(Tensor, "backward", lambda self: losses.append(self) or backward(self))
    plugin.prepare(session)
    read, wanted = words
    text = {tuple(lm.encode(row)) for row in session.train["text"]}
    rows = torch.cat((read, wanted.view(read.shape)[:, -1:]), 1)
    assert {tuple(row) for row in rows.tolist()} <= text  # the last word is told, all others are read
    assert torch.equal(wanted.view(read.shape)[:, :-1], read[:, 1:])
    switches = [part for part in session.networks["after_1"].modules() if type(part).__name__ == "SwitchLayer"]
    uneven = sum(float(part.balance.detach()) for part in switches) / len(switches)
    assert len(switches) == 2 and uneven > 1
    assert float(losses[1].detach()) - float(losses[0].detach()) == pytest.approx(0.01 * uneven, rel=1e-3)
