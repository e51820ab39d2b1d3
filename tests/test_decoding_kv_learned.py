"""Caches that learn what to let go: LESS's state in place of the evicted, the delayed evictions of DMS."""

from __future__ import annotations

import pytest
import torch
from rigs.caches import PROMPT, Masked, kernels, steps, text, tiny
from rigs.decoding import module_of
from torch import Tensor

from stepmark.meter.counts import held_bytes
from stepmark.tracks.decoding.held_cache import HeavyHitterCache, HeldCache, HeldDecoder, attend

pytestmark = pytest.mark.usefixtures("one_thread")


# -- LESS -----------------------------------------------------------------------------------------------------------


def test_the_state_of_less_is_attention_with_the_kernel_in_place_of_the_exponential() -> None:
    """Token by token against sums over everything: exp(q k) of the kept tokens, phi(q) psi(k) of the evicted ones."""
    names = module_of("less_kv")
    for shared in (1, 2):
        model, ids = tiny(6, shared=shared), text(6, PROMPT + 8)
        maps = kernels("less_kv", model)
        found = steps(HeldDecoder(model, 99, names.RecurrentCache(3, 6, 5, maps)), ids, PROMPT)

        class Sums(Masked):
            def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                gone = self.gone[layer]
                plain = super().attend_from(layer, queries, keys, values)
                if gone is None:
                    return plain
                k, v, _ = self.held(layer)
                late = torch.cat((gone, torch.zeros(len(k), 1, dtype=torch.bool)), 1).repeat_interleave(2 // shared, 0)
                k, v, psi = (part.repeat_interleave(2 // shared, 0) for part in (k, v, maps(layer, k, "psi")))
                exact = (queries @ k.transpose(1, 2) * k.shape[2] ** -0.5).exp()
                kernel = maps(layer, queries, "phi") @ psi.transpose(1, 2)
                mass = torch.where(late[:, None], kernel, exact)
                return mass @ v / mass.sum(-1, keepdim=True)

        truth = steps(HeldDecoder(model, 99, Sums(3, 6, 5)), ids, PROMPT)
        torch.testing.assert_close(found, truth, rtol=2e-3, atol=2e-3)
        alone = steps(HeldDecoder(model, 99, HeavyHitterCache(3, 6, 5)), ids, PROMPT)
        assert (found - alone).abs().max() > 0.01  # the state is felt


def test_the_lessons_of_less_are_what_the_cache_does_and_training_lowers_their_error() -> None:
    """Token after token, what a query of a lesson sees and hears of the evicted is what the cache gives it."""
    names = module_of("less_kv")
    for first, heavy, recent in ((1, 4, 6), (40, 6, 5)):
        model, ids = tiny(7, shared=2), text(7, 70)
        maps = kernels("less_kv", model)
        seen = names.Recorder(3)
        with torch.no_grad():
            HeldDecoder(model, 80, seen).forward(ids, last=1)
        lesson = names.lesson(seen, first, 70 - first, heavy, recent)
        _, _, _, visible, gone, truth = lesson
        said = torch.zeros_like(truth)
        for layer in range(3):
            q, k, v = seen.seen[layer]
            cache = names.RecurrentCache(3, heavy, recent, maps)
            for start, stop in ((0, first), *((t, t + 1) for t in range(first, 70))):
                cache.now = torch.arange(start, stop)
                if start == 0:
                    cache.attend_from(layer, q[:, :stop], k[:, :stop], v[:, :stop])
                    continue
                held = cache.held(layer)[2]
                for head in range(len(k)):
                    assert visible[layer, head, start - first].nonzero()[:, 0].tolist() == [*held[head].tolist(), start]
                    assert int(gone[layer, head, start - first].sum()) == start - held.shape[1]
                step = cache.attend_from(layer, q[:, start:stop], k[:, start:stop], v[:, start:stop])
                said[layer][:, start - first : stop - first] = step
            full, _ = attend(q, k, v, torch.arange(70) <= torch.arange(70)[:, None])
            torch.testing.assert_close(truth[layer], full[:, first:], rtol=1e-3, atol=1e-3)
        error, size = ((part**2).sum((1, 2, 3)) for part in (said - truth, truth))
        torch.testing.assert_close(maps.error(*lesson), (error / size).mean(), rtol=1e-2, atol=1e-3)
    maps.requires_grad_(True)
    optimiser = torch.optim.Adam(maps.parameters(), lr=3e-3)
    errors = []
    for _ in range(40):
        optimiser.zero_grad()
        error = maps.error(*lesson)
        error.backward()
        optimiser.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.7 * errors[0]


# -- DMS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [5, 1])
def test_eviction_is_delayed_and_real(window: int) -> None:
    """Token by token against full attention under the mask of the decisions; heads hold what their decisions leave."""
    names = module_of("dms_hyper_scaling")
    model, ids = tiny(8, shared=2), text(8, PROMPT + 8)
    evictor = kernels("dms_hyper_scaling", model)
    decided: dict[int, Tensor] = {}

    class Hidden(HeldCache):
        """Everything is held, and hidden from the query that comes `window` tokens later."""

        def before(self, layer: int, hidden: Tensor) -> None:
            decided[layer] = torch.cat((decided.get(layer, torch.zeros(2, 0)), evictor(hidden, layer)), 1)

        def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self.append(layer, keys, values)
            k, v, at = self.held(layer)
            age = self.now[:, None] - at[0]
            return attend(queries, k, v, (age >= 0) & ~((decided[layer] > 0)[:, None] & (age >= window)))[0]

    cache = names.EvictingCache(3, evictor, window)
    found = steps(HeldDecoder(model, 99, cache), ids, PROMPT)
    torch.testing.assert_close(found, steps(HeldDecoder(model, 99, Hidden(3)), ids, PROMPT), rtol=1e-3, atol=1e-3)
    sizes = set()
    for layer in range(3):
        for head in range(2):
            at = cache.heads[layer][head][2].tolist()
            # the next token is number 68: it sees the last of the window, and whoever was not doomed
            assert at == [t for t in range(68) if t > 68 - window or not decided[layer][head, t] > 0]
            sizes.add(len(at))
    assert len(sizes) > 1
    entry = 2 * 16 * 4 + 4 + 1
    held = sum(len(head[2]) for layer in cache.heads for head in layer)
    assert held_bytes(cache) == held * entry + cache.doomed.numel() + cache.now.numel() * 8
    assert held < 0.8 * 3 * 2 * 68


def test_relaxed_decisions_become_the_cache_that_runs() -> None:
    """With certain decisions training and inference write the same logits, and the first gradient opens evictions."""
    names = module_of("dms_hyper_scaling")
    model, ids = tiny(9, shared=2), text(9, 70)
    evictor = kernels("dms_hyper_scaling", model)
    with torch.no_grad():
        evictor.weight.mul_(300)  # far from 0 on both sides: the noise decides nothing
    soft = names.SoftCache(3, evictor, torch.Generator().manual_seed(0), 32)
    with torch.no_grad():
        relaxed = HeldDecoder(model, 99, soft).forward(ids)
        hard = HeldDecoder(model, 99, names.EvictingCache(3, evictor, 32)).forward(ids)
    assert 0.05 < float(torch.cat(soft.decisions).round().mean()) < 0.95
    torch.testing.assert_close(relaxed, hard, rtol=1e-2, atol=1e-2)
    fresh = names.Evictor(3, 32, 2)
    soft = names.SoftCache(3, fresh, torch.Generator().manual_seed(0), 32)
    HeldDecoder(model, 99, soft).forward(ids)
    mean = torch.cat(soft.decisions).mean()
    assert float(mean.detach()) < 0.05  # evictions are rare at first
    mean.backward()
    assert (fresh.bias.grad > 0).all()
