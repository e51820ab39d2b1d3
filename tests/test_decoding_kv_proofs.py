"""Proofs of methods that let tokens go: what a run holds and when, what training asks for, in the papers' own numbers."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rigs.decoding import load, tiny
from torch import Tensor, nn

from stepmark.backbones import lm
from stepmark.meter.counts import held_bytes
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeldDecoder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def words_of(seed: int, length: int, most: int = 13) -> list[int]:
    return torch.randint(6, most, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def written_by(method: Any, ids: list[int], budget: int, task: str = "recall/needles", **networks: Any) -> Any:
    """The texts of a run on one prompt."""
    session = SimpleNamespace(
        networks=networks,
        task=SimpleNamespace(id=task, dataset=task.rpartition("/")[2]),
        rng=torch.Generator().manual_seed(0),
        state={},
    )
    with torch.no_grad():
        return method.run(session, {"prompt": [ids], "max_new_tokens": [40], "temperature": [0.0]}, budget)


# -- LazyLLM ----------------------------------------------------------------------------------------------------------


def test_lazyllm_prunes_behind_its_layers_and_its_controls_once(decoders: list[Decoder]) -> None:
    """A tenth is left behind after the second of six layers, most after the third. What was left behind is caught up with
    by LazyLLM and where shares are drawn anew; the control that looks drops what LazyLLM leaves behind in the prefill, those
    that draw whatever comes."""
    model, ids = tiny(3, layers=6, eos=99), words_of(3, 100)
    held: dict[str, list[list[set[int]]]] = {}
    for name in ("lazyllm", "static_prune", "random_prune", "random_revive"):
        held[name] = []
        for budget in (1, 9):
            decoders.clear()
            written_by(load(name), ids, budget, target=model)
            cache: Any = decoders[-1]
            held[name].append([set(cache.pruned.held(layer)[2][0].tolist()) for layer in range(6)])
        sizes = [len(layer) for layer in held[name][0]]
        assert sizes[:3] == [100, 100, 90]
        assert 1 <= sizes[5] <= sizes[4] <= sizes[3] < 0.25 * 90
    prompt, anew = set(range(100)), {"lazyllm", "random_revive"}
    for name, (first, last) in held.items():
        back = [(later - earlier) & prompt for earlier, later in zip(first, last, strict=True)]
        assert any(back) == (name in anew)
        assert name in anew or all(later - prompt == set(range(100, 108)) for later in last)
    assert held["lazyllm"][0] == held["static_prune"][0] != held["random_prune"][0]
    assert held["random_revive"][0] == held["random_prune"][0] and held["random_revive"][1] != held["lazyllm"][1]


# -- LESS -------------------------------------------------------------------------------------------------------------


def test_feature_maps_of_less_are_those_of_the_paper() -> None:
    """phi(q) = |gelu(gelu(q W1) W2)|, psi(k) = |u + (u W3) s2| with u = |s1| gelu(gelu(k U1) U2), of rank 8, s at 1e-4."""
    names = load("less_kv").run.__globals__
    maps = names["Kernels"](2, 4, 2, 16).requires_grad_(False)
    assert all(bool((scale == 1e-4).all()) for scale in (maps.s1, maps.s2))
    gelu, generator = nn.functional.gelu, torch.Generator().manual_seed(0)
    for scale in (maps.s1, maps.s2):
        scale.normal_(generator=generator)
    queries, keys = (torch.randn(heads, 7, 16, generator=generator) for heads in (4, 2))
    for layer in range(2):
        phi, psi = maps(layer, queries, "phi"), maps(layer, keys, "psi")
        assert phi.shape == (4, 7, 8) and psi.shape == (2, 7, 8)
        for head in range(4):
            wanted = gelu(gelu(queries[head] @ maps.w1[layer, head]) @ maps.w2[layer, head]).abs()
            torch.testing.assert_close(phi[head], wanted)
        for head in range(2):
            u = maps.s1[layer, head].abs() * gelu(gelu(keys[head] @ maps.u1[layer, head]) @ maps.u2[layer, head])
            torch.testing.assert_close(psi[head], (u + (u @ maps.w3[layer, head]) * maps.s2[layer, head]).abs())
        assert bool((phi >= 0).all() and (psi >= 0).all())


def test_less_takes_the_bytes_of_h2o_with_its_state(decoders: list[Decoder]) -> None:
    """A fifth of the prompt's tokens, four of them given up for the state of each head."""
    model, ids = tiny(0, layers=2, eos=99), words_of(0, 200)
    names = load("less_kv").run.__globals__
    size = model.config.hidden_size // 2
    kernels = names["Kernels"](2, 2, 1, size).requires_grad_(False)
    held, tokens = {}, {}
    for name in ("h2o", "less_kv"):
        decoders.clear()
        written_by(load(name), ids, 5, target=model, kernels=kernels)
        cache: Any = decoders[-1]
        cache.held_cache.kernels = None
        held[name], tokens[name] = held_bytes(cache.held_cache), cache.held_cache.held(0)[0].shape[1]
    assert tokens == {"h2o": 40, "less_kv": 36}
    assert 0.9 * held["h2o"] < held["less_kv"] <= 1.01 * held["h2o"]


@pytest.mark.parametrize("task", ["recall/needles", "forced/stories"])
def test_lessons_of_less_are_read_as_the_cache_that_runs_would(task: str) -> None:
    """Needles: a prefill, then token by token, with the shares of a prompt that long; forced texts from the first word on,
    with the sizes of all rungs in turn. The maps learn from them: all of their parts move, and their error falls."""
    method, lessons, caches = load("less_kv"), list[tuple[int, ...]](), list[tuple[int, int]]()
    names, learnt = method.run.__globals__, list[tuple[Tensor, ...]]()
    own, cache = names["lesson"], names["RecurrentCache"]
    names["lesson"] = lambda seen, *given: lessons.append(given) or learnt.append(own(seen, *given)) or learnt[-1]
    names["RecurrentCache"] = lambda depth, *given: caches.append(given[:2]) or cache(depth, *given)
    model = lm.build(32, 2, 0).eval().requires_grad_(False)
    texts = [(lm.decode(words_of(seed, 90 + seed, 140)), lm.decode(words_of(50 + seed, 12, 140))) for seed in range(6)]
    rungs = (8, 16, 32)
    session = SimpleNamespace(
        networks={"target": model},
        task=SimpleNamespace(id=task, rungs=rungs),
        train={"prompt": [prompt for prompt, _ in texts], "target": [text for _, text in texts]},
        scale=lambda embedded, smoke: 6 if smoke == 1 else 30,
        rng=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
        progress=lambda steps, says: steps,
        state={},
    )
    session.networks |= method.networks(session)
    kernels = session.networks["kernels"]
    fresh = copy.deepcopy(kernels)
    with torch.enable_grad():
        method.prepare(session)
    for earlier, later in zip(fresh.parameters(), kernels.parameters(), strict=True):
        assert float((later - earlier).detach().abs().max()) > 0.01
    with torch.no_grad():
        after, before = (sum(float(maps.error(*one)) for one in learnt) for maps in (kernels, fresh))
    assert after < before
    lengths = [len(lm.encode(prompt)) + len(lm.encode(text)) for prompt, text in texts]
    for number, (first, count, *shares) in enumerate(lessons):
        if task == "forced/stories":
            assert (first, count) == (1, lengths[number] - 1)
            batch, rung = {"context": [[5, 9, 7]]}, rungs[number % 3]
        else:
            assert count == 24 and first + count <= lengths[number] and first >= lengths[number] // 2
            batch, rung = {"prompt": [words_of(0, first, 140)], "max_new_tokens": [2], "temperature": [0.0]}, 1
        caches.clear()
        with torch.no_grad():
            method.run(session, batch, rung)
        assert caches == [tuple(shares)]
    assert len(lessons) == 6
    ends = sum(first + 24 == whole for (first, *_), whole in zip(lessons, lengths, strict=True))
    assert task == "forced/stories" or ends >= 3, "no lesson asks where the answers are"


# -- DMS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "window", "ratio"),
    [("dms_hyper_scaling", "needles", 32, 8), ("dms_hyper_scaling", "sums", 8, 4), ("dms_immediate", "needles", 1, 8)],
)
def test_dms_distils_the_target_while_the_ratio_grows(
    name: str, data: str, window: int, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of each step by its definition: the divergence of the student's words from the target's over the answer,
    KL(student || target), and what is missing of alpha = 1 - 1 / ratio, which goes from 1 to 8 (of sums to 4) in
    70 % of the steps; no more evictions than that are pulled back. In training tokens fade as old as a run evicts them."""
    model = lm.build(32, 2, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.eval().requires_grad_(False)
    texts = [(lm.decode(words_of(seed, 40, 140)), lm.decode(words_of(9 + seed, 6, 140))) for seed in range(2)]
    losses, backward = list[float](), Tensor.backward
    monkeypatch.setattr(Tensor, "backward", lambda self: losses.append(float(self.detach())) or backward(self))
    missing = list[bool]()
    for bias in (0.0, 10.0):
        method, softs, said = load(name), list[Any](), list[Tensor]()
        names = type(method).prepare.__globals__
        soft_cache, forward = names["SoftCache"], HeldDecoder.forward
        names["SoftCache"] = lambda *given, of=soft_cache, softs=softs: softs.append(of(*given)) or softs[-1]
        session = SimpleNamespace(
            networks={"target": model},
            task=SimpleNamespace(id={"needles": "recall/needles", "sums": "scaling/sums"}[data], dataset=data),
            train={"prompt": [prompt for prompt, _ in texts], "target": [text for _, text in texts]},
            scale=lambda embedded, smoke: 10,
            rng=torch.Generator().manual_seed(0),
            device=torch.device("cpu"),
            progress=lambda steps, says: steps,
        )
        session.networks |= method.networks(session)
        evictor = session.networks["evictor"]
        with torch.no_grad():
            hidden = torch.randn(1, 3, 32)
            assert bool((evictor(hidden, 0) == -5).all())  # the paper's offset: evictions are rare at first
            evictor.bias.fill_(bias)
        losses.clear()
        with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
            patch.setattr(
                HeldDecoder,
                "forward",
                lambda *given, of=forward, said=said: said.append(of(*given)) or said[-1],
            )
            method.prepare(session)
        assert len(losses) == len(softs) == len(said) == 10
        for step, (soft, logits) in enumerate(zip(softs, said, strict=True)):
            assert soft.window == window
            prompt, answer = texts[step % 2]
            text, count = lm.encode(f"{prompt} {answer}"), len(lm.encode(answer)) + 1
            with torch.no_grad():
                truth = model(torch.tensor([text]), use_cache=False).logits[0, -count:].log_softmax(-1)
            student = logits.detach().log_softmax(-1)
            assert student.shape == truth.shape
            divergence = float((student.exp() * (student - truth)).sum(-1).mean())
            alpha = 1 - 1 / (1 + (ratio - 1) * min(1.0, (step + 1) / 7))
            wanted = alpha - float(torch.cat(soft.decisions).detach().mean())
            missing.append(wanted > 0)
            assert losses[step] == pytest.approx(divergence + max(0.0, wanted), rel=1e-4, abs=1e-6)
    assert len(set(missing)) == 2


def test_relaxed_decisions_are_logistic_at_a_temperature() -> None:
    """a = sigmoid((logit + noise) / tau): half of the decisions of a logit of nought, and as wide as its temperature says."""
    names = load("dms_hyper_scaling").run.__globals__
    soft = names["SoftCache"](1, lambda hidden, layer: hidden[0].T, torch.Generator().manual_seed(0), 4)
    for logit, share in ((0.0, 0.5), (2.0, 1 / (1 + 2.718281828**-2))):  # P(noise > -logit), logistic
        soft.before(0, torch.full((1, 20_000, 1), logit))
        assert float((soft.decisions[-1] > 0.5).double().mean()) == pytest.approx(share, abs=0.015)
        spread = (soft.logits * 0.3 - logit).std()
        assert float(spread) == pytest.approx(3.14159265 / 3**0.5, rel=0.03)  # of the logistic distribution


def test_decisions_read_a_normalised_state() -> None:
    """As large as the residual stream may grow from layer to layer, a state in the same direction is decided on alike."""
    evictor = load("dms_hyper_scaling").run.__globals__["Evictor"](2, 16, 2).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    evictor.weight.normal_(generator=generator)
    hidden = torch.randn(1, 9, 16, generator=generator)
    wide = nn.functional.normalize(hidden[0], dim=1) * 4  # of mean square 1
    for layer in range(2):
        torch.testing.assert_close(evictor(hidden, layer), (wide @ evictor.weight[layer]).T - 5, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(evictor(7 * hidden, layer), evictor(hidden, layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "task", "read", "left"),
    [
        ("dms_hyper_scaling", "recall/needles", 65, 31),  # a budget of 6 forwards
        ("dms_hyper_scaling", "scaling/sums", 99, 7),  # one text, of all the room there is
        ("dms_immediate", "recall/needles", 65, 0),
        ("dms_immediate", "scaling/sums", 99, 0),
    ],
)
def test_a_run_of_dms_holds_the_doomed_for_their_window(
    name: str, task: str, read: int, left: int, decoders: list[Decoder]
) -> None:
    """With everything to be evicted the next token sees 31 old ones (of sums 7) and itself, or nothing old at all."""
    model, ids = tiny(0, layers=2, eos=99), words_of(0, 60)
    evictor = load(name).run.__globals__["Evictor"](2, 16, 1).requires_grad_(False)
    evictor.bias.fill_(9.0)
    decoders.clear()
    written_by(load(name), ids, 6, task, target=model, evictor=evictor)
    cache: Any = decoders[-1]
    for heads in cache.held_cache.heads:
        assert [head[2].tolist() for head in heads] == [list(range(read - left, read))]


def test_tova_holds_a_third_of_a_text_of_sums_and_an_eighth_of_others(decoders: list[Decoder]) -> None:
    """Shares of the prompt and the room after it, 100 tokens in all."""
    model, ids = tiny(0, layers=2, eos=99), words_of(0, 60)
    for task, left in (("scaling/sums", 34), ("recall/needles", 12)):
        decoders.clear()
        written_by(load("tova"), ids, 20, task, target=model)
        cache: Any = decoders[-1]
        assert [cache.held_cache.held(layer)[0].shape[1] for layer in range(2)] == [left, left]
