"""Recall with caches that let go: what is held is what is counted, positions survive every operation on a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rigs.caches import PROMPT, Masked, kernels, steps, text, tiny
from rigs.decoding import batch_of, module_of
from stepmark.methods.decoding.lazyllm import PrunedDecoder
from torch import Tensor, nn

from stepmark import plugins
from stepmark.backbones import lm
from stepmark.backbones.lm import rotate_by
from stepmark.meter.counts import Ledger, held_bytes, watch
from stepmark.meter.flops import count_flops
from stepmark.meter.memory import StorageTracker
from stepmark.task import load_split
from stepmark.tracks import decoding
from stepmark.tracks.decoding import recall as decoding_recall
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import BandCache, HeavyHitterCache, HeldCache, HeldDecoder, attend
from stepmark.tracks.decoding.speculation import write_plainly

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = next(task for task in decoding_recall.TASKS if task.id == "recall/needles")
ROOM = 10


def session_of(method: str, model: Any, seed: int = 0) -> Any:
    """What `run` sees: the target, and the method's own networks untrained, all counted."""
    ledger = Ledger(bounded=TASK.bounded)
    networks = {"target": model}
    if method in {"less_kv", "dms_hyper_scaling", "dms_immediate"}:
        networks["kernels" if method == "less_kv" else "evictor"] = kernels(method, model, seed)
    if method in {"longgen", "sink_window_trained", "full_attention_trained"}:
        networks = {"student": model}
    for name, network in networks.items():
        for part in network.modules():
            part.__dict__.pop("forward", None)
        watch(ledger, name, network, decoding.layers(TASK, name, network))
    return SimpleNamespace(
        task=TASK, networks=networks, rng=torch.Generator().manual_seed(seed), ledger=ledger, state={}
    )


# -- the meter ------------------------------------------------------------------------------------------------------


def test_held_bytes_are_those_of_the_storages() -> None:
    """A view holds all it looks into, a storage counts once, containers and objects are opened, networks are not."""
    whole = torch.zeros(4, 100)
    owner = SimpleNamespace(
        a=[whole[:, :1], whole[:, 50:]], b={"x": (torch.zeros(3, dtype=torch.int8),)}, c=nn.Linear(9, 9)
    )
    owner.d = SimpleNamespace(back=owner, t=torch.zeros(2, dtype=torch.float16))
    assert held_bytes(owner) == 1600 + 3 + 4
    assert held_bytes(SimpleNamespace(a=whole[:, :1].clone())) == 16


def counted(model: Any, cache: HeldCache, ids: list[int]) -> tuple[int, list[int]]:
    """Bytes that the harness reads during a run, and the text."""
    ledger = Ledger(bounded=("target",))
    watch(ledger, "target", model, decoding.layers(TASK, "target", model))
    decoder = HeldDecoder(model, len(ids) + ROOM, cache)
    decoder.eos = -1  # never: only passes after the first see a cache whose layers are all filled
    with torch.no_grad(), count_flops(ledger, [model]) as flops:
        written = write_plainly(decoder, ids, ROOM, 99, 0.0, torch.Generator())
    for part in model.modules():
        part.__dict__.pop("forward", None)
    return flops.held, written


@pytest.mark.parametrize("shared", [1, 2])
def test_h2o_drops_what_the_masking_form_masks_and_only_dropping_saves(shared: int) -> None:
    """Token by token the same logits as a cache that keeps everything and hides it; the bytes tell them apart."""
    for seed in range(2):
        model, ids = tiny(seed, shared=shared), text(seed, PROMPT + 5)
        dropped = steps(HeldDecoder(model, 99, HeavyHitterCache(3, 6, 5)), ids, PROMPT)
        masked = steps(HeldDecoder(model, 99, Masked(3, 6, 5)), ids, PROMPT)
        torch.testing.assert_close(dropped, masked, rtol=1e-4, atol=1e-4)
        full = steps(Decoder(model, 99), ids, PROMPT)
        assert (dropped - full).abs().max() > 0.01  # evictions are felt
    small, written = counted(model, HeavyHitterCache(3, 6, 5), ids)
    large, same = counted(model, Masked(3, 6, 5), ids)
    everything, _ = counted(model, HeldCache(3), ids)
    assert written == same and len(written) == ROOM
    assert large >= everything
    # 11 tokens for each of 3 layers (keys, values: 16 floats; a position and a score of 4 bytes), 12 while one is new
    assert 3 * 11 * shared * (2 * 16 * 4 + 8) <= small <= 3 * 12 * shared * (2 * 16 * 4 + 8)


def test_tova_keeps_what_the_newest_token_looks_at_most() -> None:
    """Step by step by definition: the weights of the last query, mean over all heads, rank a layer's tokens."""
    cache = module_of("tova").TovaCache(1, 6)
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(heads, 12, 8, generator=generator) for heads in (2, 2, 4))
    held: list[int] = []
    for first, last in ((0, 9), (9, 10), (10, 11), (11, 12)):
        cache.now = torch.arange(first, last)
        cache.attend_from(0, queries[:, first:last], keys[:, first:last], values[:, first:last])
        held += range(first, last)
        logits = torch.stack([queries[h, last - 1] @ keys[h // 2, held].T * 8**-0.5 for h in range(4)])
        looks = logits.softmax(-1).mean(0).tolist()
        held = sorted(sorted(held, key=lambda t: -looks[held.index(t)])[:6])
        assert cache.held(0)[2].tolist() == [held, held]


def test_reads_are_what_every_layer_finds_in_its_cache() -> None:
    """Plain decoding on a cache without gaps: keys, values and positions of all earlier tokens, once a layer and step."""
    model, ids = tiny(), text()
    ledger = Ledger(bounded=("target",))
    watch(ledger, "target", model, decoding.layers(TASK, "target", model))
    decoder = HeldDecoder(model, 99, HeldCache(3))
    with torch.no_grad(), count_flops(ledger, [model]) as flops:
        for token in ([*ids], [3], [4], [5]):
            decoder.forward(token, last=1)
    for part in model.modules():
        part.__dict__.pop("forward", None)
    entry = 2 * 16 * 4 + 4
    # While a layer runs its newest token is not held yet, and those of the layers below are: half of them on average.
    grown = sum(3 * before * entry + sum(below * new * entry for below in range(3)) / 3
                for before, new in ((0, PROMPT), (PROMPT, 1), (PROMPT + 1, 1), (PROMPT + 2, 1)))  # fmt: skip
    assert flops.read == pytest.approx(grown, rel=0.02)


def test_tokens_dropped_at_random_are_as_many_and_others() -> None:
    model, ids = tiny(5, layers=4), text(5, 40)
    kept = []
    for rng in (None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)):
        decoder = PrunedDecoder(model, 99, [(0, 0.5), (2, 0.4)], False, rng)
        with torch.no_grad():
            decoder.forward(ids, last=1)
        kept.append([decoder.pruned.held(i)[2][0].tolist() for i in range(4)])
        assert [len(layer) for layer in kept[-1]] == [40, 20, 20, 8] and kept[-1][3][-1] == 39
    assert kept[0] != kept[1] != kept[2]


@pytest.mark.parametrize(
    "method",
    ["h2o", "sink_window", "kv_int8", "less_kv", "lazyllm", "dms_hyper_scaling", "dms_immediate", "tova", "longgen"],
)
def test_nothing_is_held_outside_the_cache_that_is_counted(method: str) -> None:
    """Storages alive between two forwards, followed by torch itself, are those the harness reads from the cache."""
    model, ids = tiny(layers=6, shared=2), text(length=120)
    session = session_of(method, model)
    alive: list[tuple[int, int]] = []
    embed = model.model.embed_tokens
    tracker = StorageTracker()
    ledger = session.ledger

    def between(module: nn.Module, inputs: Any) -> None:
        alive.append((tracker.live, held_bytes(list(ledger.caches))))

    hook = embed.register_forward_pre_hook(between)
    with torch.no_grad(), tracker, count_flops(ledger, list(session.networks.values())):
        plugins.load_class(plugins.methods()[method])().run(session, batch_of([ids], ROOM), 4)
    hook.remove()
    _, *later = alive
    assert later
    # Tables of positions and of the causal mask belong to every decoder; ids and flags are small.
    tables = 130 * 130 + 2 * 130 * 16 * 4 + 130 * 8
    assert all(cache > 0 and cache <= live <= cache + tables + 4096 for live, cache in later)


# -- positions ------------------------------------------------------------------------------------------------------


def test_a_rotation_moves_a_key_to_where_it_would_have_been_written() -> None:
    """Keys of one layer computed at other positions are the rotated ones, forwards, backwards and each its own way."""
    model = tiny(shared=2)
    seen: dict[int, Tensor] = {}

    class Note(HeldCache):
        def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if layer == 0:
                seen[int(self.now[0])] = keys
            return super().attend_from(layer, queries, keys, values)

    for start in (0, 7, 40):
        decoder = HeldDecoder(model, 99, Note(3))
        with torch.no_grad():
            decoder.run(decoder.embed(text(length=9)), start)
    rotary = model.model.rotary_emb
    nine = torch.ones(9, dtype=torch.long)
    torch.testing.assert_close(rotate_by(seen[7], 33 * nine, rotary), seen[40], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate_by(seen[40], -40 * nine, rotary), seen[0], rtol=1e-4, atol=1e-4)
    squeezed = rotate_by(seen[40], torch.stack((-33 * nine, -40 * nine)), rotary)  # one amount for each head
    torch.testing.assert_close(squeezed, torch.stack((seen[7][0], seen[0][1])), rtol=1e-4, atol=1e-4)


class Streaming(HeldCache):
    """Sinks and a window as in the paper: keys without positions, rotated for the cache at every step."""

    def __init__(self, depth: int, sinks: int, window: int, rotary: nn.Module) -> None:
        super().__init__(depth)
        self.sinks, self.window, self.rotary = sinks, window, rotary

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.append(layer, keys, values)
        k, v, _ = self.held(layer)
        if k.shape[1] > self.sinks + self.window:  # evict for the newcomer
            kept = [*range(self.sinks), *range(k.shape[1] - self.window, k.shape[1])]
            self.keep(layer, torch.tensor(kept).expand(len(k), -1))
            k, v, _ = self.held(layer)
        at = torch.arange(k.shape[1])
        return attend(rotate_by(queries, at[-1:], self.rotary), rotate_by(k, at, self.rotary), v)[0]


@pytest.mark.parametrize("shared", [1, 2])
def test_one_banded_pass_is_token_by_token_streaming_with_positions_of_the_cache(shared: int) -> None:
    """The last logits of a prompt read at once, and all later ones, against a cache of unrotated keys."""
    model, ids = tiny(3, shared=shared), text(3, PROMPT + 8)
    rotary = model.model.rotary_emb
    decoder = HeldDecoder(model, 99, Streaming(3, 4, 9, rotary))
    zero = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():  # position 0 is no rotation
        truth = torch.cat([decoder.logits(decoder.run(decoder.embed([token]), 0, positions=zero)) for token in ids])
    found = steps(HeldDecoder(model, 99, BandCache(3, 4, 9, rotary)), ids, PROMPT)
    torch.testing.assert_close(found, truth[PROMPT - 1 :], rtol=1e-3, atol=1e-3)
    for prompt in (1, 3, 4, 12, 13, 14):  # shorter than, just as long as, and just longer than the cache
        found = steps(HeldDecoder(model, 99, BandCache(3, 4, 9, rotary)), ids[:20], prompt)
        torch.testing.assert_close(found, truth[prompt - 1 : 20], rtol=1e-3, atol=1e-3)
    unmoved = steps(HeldDecoder(model, 99, BandCache(3, 4, 9)), ids, PROMPT)
    assert (unmoved - truth[PROMPT - 1 :]).abs().max() > 0.01  # the rotation is felt


def test_longgen_with_all_layers_full_is_plain_decoding() -> None:
    """The control that is trained on as it is differs from the target in nothing but its training."""
    model, ids = tiny(layers=6, shared=2), text(length=120)
    written = {}
    for method in ("full_attention_trained", "sink_window_trained", "longgen"):
        with torch.no_grad():
            session = session_of(method, model)
            written[method] = plugins.load_class(plugins.methods()[method])().run(session, batch_of([ids], ROOM), 9)[0]
    with torch.no_grad():
        plain = write_plainly(Decoder(model, 140), ids, ROOM, 9, 0.0)
    assert written["full_attention_trained"] == plain
    assert written["sink_window_trained"] != plain


def test_longgen_trains_with_what_its_cache_will_hold() -> None:
    """The loss of the first step is that of the held caches, token by token; the full layers are the middle third."""
    own, model, ids = plugins.load_class(plugins.methods()["longgen"])(), tiny(5, layers=6), text(5)
    full = own.full_layers(model)
    assert list(full) == [2, 3]
    decoder = HeldDecoder(model, 99, BandCache(6, 2, 7, full=full))
    with torch.no_grad():
        logits = torch.cat([decoder.forward([token]) for token in ids[:-1]])[19:]
        wanted = float(nn.functional.cross_entropy(logits, torch.tensor(ids[20:])))
    train = own.run.__globals__["train_band"]
    with torch.enable_grad():
        found = train(tiny(5, layers=6).requires_grad_(True), [(ids[:20], ids[20:])], full, 2, 7, 1, 0, lambda r, _: r)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_a_band_without_rotation_is_full_attention_under_a_mask() -> None:
    """Layers of both kinds against the model's own attention with a mask, read at once and token by token."""
    model, ids, full = tiny(1, layers=3), text(1), (1,)
    at = torch.arange(PROMPT)
    near = (at <= at[:, None]) & ((at > at[:, None] - 7) | (at < 2))
    hidden = model.model.embed_tokens(torch.tensor([ids]))
    rotary = model.model.rotary_emb(hidden, at[None])
    for i, layer in enumerate(model.model.layers):
        hidden = layer(hidden, attention_mask=None if i in full else near[None, None], position_embeddings=rotary)
    truth = model.lm_head(model.model.norm(hidden))[0]
    for prompt in (PROMPT, 20, 1):
        cache = BandCache(3, 2, 7, full=full)
        torch.testing.assert_close(
            steps(HeldDecoder(model, 99, cache), ids, prompt), truth[prompt - 1 :], rtol=1e-3, atol=1e-3
        )
        assert [cache.held(layer)[0].shape[1] for layer in range(3)] == [8, PROMPT, 8]


@pytest.mark.parametrize("shared", [1, 2])
def test_a_cache_that_keeps_everything_is_plain_decoding(shared: int) -> None:
    """Full caches, heavy hitters with room, and pruning that keeps all tokens: the logits of `Decoder`."""
    model, ids = tiny(2, shared=shared), text(2, PROMPT + 6)
    truth = steps(Decoder(model, 99), ids, PROMPT)
    for decoder in (
        HeldDecoder(model, 99, HeldCache(3)),
        HeldDecoder(model, 99, HeavyHitterCache(3, 99, 99)),
        PrunedDecoder(model, 99, [(0, 1.0), (1, 1.0)]),
        PrunedDecoder(model, 99, [(0, 1.0), (1, 1.0)], revive=False),
    ):
        torch.testing.assert_close(steps(decoder, ids, PROMPT), truth, rtol=1e-3, atol=1e-3)


# -- integers -------------------------------------------------------------------------------------------------------


def test_integers_are_held_and_err_by_half_a_step() -> None:
    """Every channel within half a step; a quarter of the bytes; and whole numbers of the scale come back exactly."""
    names = module_of("kv_int8")
    states = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    integers, scales = names.quantise(states)
    assert integers.dtype == torch.int8 and scales.dtype == torch.float16
    assert ((integers * scales.float() - states).abs() <= scales.float() * 0.5001).all()
    assert int(integers.abs().max()) == 127
    assert not names.quantise(torch.zeros(1, 1, 8))[0].any()
    model, ids = tiny(), text()
    cache = names.Int8Cache(3)
    near = steps(HeldDecoder(model, 99, cache), ids, PROMPT - 3)
    truth = steps(Decoder(model, 99), ids, PROMPT - 3)
    assert 0 < (near - truth).square().mean().sqrt() < 0.15 * truth.std()
    assert held_bytes(cache) == 3 * PROMPT * (2 * 16 + 2 * 2 + 4) + 8


# -- LazyLLM --------------------------------------------------------------------------------------------------------


class Reference:
    """Pruning by its definition: every token keeps the states it stopped with, and each layer's keys in dictionaries."""

    def __init__(self, model: Any, cuts: list[tuple[int, float]]) -> None:
        self.model, self.cuts = model, dict(cuts)
        self.keys: list[dict[int, Tensor]] = [{} for _ in model.model.layers]
        self.values: list[dict[int, Tensor]] = [{} for _ in model.model.layers]
        self.stopped: dict[int, tuple[int, Tensor]] = {}  # token -> (layers it has run, hidden state)
        self.work = 0

    def step(self, ids: list[int], start: int) -> Tensor:
        """Logits after the last of `ids`."""
        inner = self.model.model
        for i, token in enumerate(ids):
            self.stopped[start + i] = (0, inner.embed_tokens(torch.tensor([[token]])))
        newest = start + len(ids) - 1
        chosen = list(range(newest + 1))
        for depth, layer in enumerate(inner.layers):
            attention = layer.self_attn
            running = [t for t in chosen if self.stopped[t][0] == depth]
            self.work += len(running)
            for t in running:
                x = layer.input_layernorm(self.stopped[t][1])
                rotary = inner.rotary_emb(x, torch.tensor([[t]]))
                self.keys[depth][t] = self.turn(attention.k_proj(x), rotary)
                self.values[depth][t] = attention.v_proj(x).view(-1, attention.head_dim)
            looks = torch.zeros(0)
            for t in running:
                hidden = self.stopped[t][1]
                x = layer.input_layernorm(hidden)
                q = self.turn(attention.q_proj(x), inner.rotary_emb(x, torch.tensor([[t]])))
                before = [c for c in sorted(chosen) if c <= t]
                group = len(q) // len(self.keys[depth][t])
                k = torch.stack([self.keys[depth][c] for c in before], 1).repeat_interleave(group, 0)
                v = torch.stack([self.values[depth][c] for c in before], 1).repeat_interleave(group, 0)
                weights = (q[:, None] @ k.transpose(1, 2) * attention.head_dim**-0.5).softmax(-1)
                hidden = hidden + attention.o_proj((weights @ v).reshape(1, 1, -1))
                self.stopped[t] = (depth + 1, hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
                looks = weights[:, 0].mean(0)  # of the newest token in the end: it runs last
            if depth in self.cuts:
                order = looks[:-1].argsort(descending=True).tolist()
                most = max(1, round(self.cuts[depth] * len(chosen)))
                chosen = sorted([sorted(chosen)[i] for i in order[: most - 1]] + [newest])
        return self.model.lm_head(inner.norm(self.stopped[newest][1]))[0]

    def turn(self, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated heads [H, d] of one token."""
        size = rotary[0].shape[-1]
        heads = states.view(-1, size)
        first, second = heads.chunk(2, -1)
        return heads * rotary[0][0] + torch.cat((-second, first), -1) * rotary[1][0]


@pytest.mark.parametrize("shared", [1, 2])
def test_lazyllm_is_its_definition_token_by_token(shared: int) -> None:
    """Same logits and same work as dictionaries of states; tokens come back, and none runs twice through a layer."""
    cuts = [(1, 0.5), (2, 0.5)]
    model, ids = tiny(4, layers=5, shared=shared), text(4, 48)
    decoder, reference = PrunedDecoder(model, 99, cuts), Reference(model, cuts)
    runs: list[tuple[int, int]] = []

    def note(layer: int, hidden: Tensor) -> None:
        runs.extend((layer, t) for t in decoder.pruned.now.tolist())

    decoder.pruned.before = note  # type: ignore[method-assign]
    with torch.no_grad():
        for start, stop in ((0, 40), *((i, i + 1) for i in range(40, 48))):
            found = decoder.forward(ids[start:stop], last=1)
            torch.testing.assert_close(found, reference.step(ids[start:stop], start), rtol=1e-3, atol=1e-3)
            if start == 0:
                assert len(runs) == 2 * 40 + 20 + 2 * 10
    assert len(runs) == len(set(runs)) == reference.work
    assert len(runs) > 2 * 48 + 20 + 2 * 10 + 8 * 3  # some tokens of the prompt were caught up with
    assert decoder.spent == pytest.approx(9)
    waiting = sum(len(at) for at, _ in decoder.pruned.waiting.values())
    assert waiting == 48 - decoder.pruned.held(4)[0].shape[1]


def test_static_pruning_never_looks_back() -> None:
    """After the prefill only new tokens run, and what was dropped is held nowhere."""
    model, ids = tiny(5, layers=4), text(5, 40)
    decoder = PrunedDecoder(model, 99, [(0, 0.5), (2, 0.4)], revive=False)
    with torch.no_grad():
        decoder.forward(ids, last=1)
        for token in text(6, 5):
            decoder.forward([token], last=1)
            assert decoder.pruned.now.tolist() == [decoder.length - 1]
    assert [decoder.pruned.held(i)[0].shape[1] for i in range(4)] == [45, 25, 25, 13]
    assert not any(len(at) for at, _ in decoder.pruned.waiting.values())


# -- the tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h2o", "sink_window", "less_kv", "autoregressive"])
def test_forced_texts_are_read_token_after_token(name: str) -> None:
    """The next word as plain passes give it where the cache holds the whole text; at most as many tokens held as the rung."""
    model, texts = tiny(3), [text(1, 9), text(2, 14)]
    session: Any = SimpleNamespace(networks={"target": model}, rng=torch.Generator())
    if name == "less_kv":
        session.networks["kernels"] = kernels("less_kv", model)
    method = plugins.load_class(plugins.methods()[name])()
    with torch.no_grad():
        found = method.run(session, {"context": texts}, 40)
        for row, ids in zip(found, texts, strict=True):
            plain = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(row, plain, rtol=1e-3, atol=1e-3)
        few = method.run(session, {"context": [text(1, 40)]}, 12)
    plain = model(torch.tensor([text(1, 40)])).logits[0, -1].log_softmax(-1)
    assert (float((few[0] - plain).abs().max()) > 0.01) == (name != "autoregressive")


def test_prompts_hold_the_facts_they_ask_for() -> None:
    """Every answer follows its name in the text once, far from the end for most; splits and lengths as declared."""
    test, train = load_split("needles", "test"), load_split("needles", "train")
    room = decoding_recall.MAX_NEW_TOKENS
    far = 0
    for prompt, answer in zip(test["prompt"][:50], test["answer"], strict=False):
        words = prompt.split()
        assert 1000 <= len(words) <= 1030 and words[-1] == "<dir>" and lm.UNKNOWN not in lm.encode(f"{prompt} {answer}")
        assert len(lm.encode(answer)) + 1 <= room
        asked = words[words.index("?") + 1 : -1]
        facts = [" ".join(answer.split()[i + 1 : i + 3]) for i in range(0, 12, 3)]
        assert asked == [word for i, fact in enumerate(facts, 1) for word in (str(i), fact.split()[0])]
        for fact in facts:
            assert prompt.count(f" friend {fact} .") + prompt.startswith(f"friend {fact} .") == 1
            assert words.count(fact.split()[0]) == 2
            far += len(words) - words.index(fact.split()[0]) > 200
    assert far > 120  # a window of a fifth of the text does not reach them
    assert not set(test["prompt"]) & set(train["prompt"])


@pytest.mark.parametrize(
    "method",
    [
        "h2o",
        "tova",
        "sink_window",
        "kv_int8",
        "less_kv",
        "lazyllm",
        "static_prune",
        "random_prune",
        "random_revive",
        "dms_hyper_scaling",
        "longgen",
    ],
)
def test_a_run_keeps_to_its_budget_and_leaves_the_model_as_it_was(method: str) -> None:
    """One forward for each token, whatever the layers run over; the model attends by itself again afterwards."""
    model, ids = tiny(layers=6, shared=2), text(length=120)
    before = model.config._attn_implementation
    for budget in (1, 4):
        session = session_of(method, model)
        session.ledger.reset(limit=2 * budget)
        with torch.no_grad():
            written = plugins.load_class(plugins.methods()[method])().run(session, batch_of([ids, ids], ROOM), budget)
        assert all(1 <= len(text) <= budget for text in written)
        assert written[0] == written[1] or method.startswith("random_")  # they draw anew for each text
        assert session.ledger.spent == pytest.approx(sum(map(len, written)))
    assert model.config._attn_implementation == before
