"""Several texts of a prompt, their vote, and what they cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stepmark import plugins
from stepmark.backbones import lm
from stepmark.backbones.lm import EOS, encode
from stepmark.task import BadOutput, load_split
from stepmark.tracks.decoding import chains
from stepmark.tracks.decoding.held_cache import HeldCache, HeldDecoder

TASK = chains.TASKS[0]


def ending(answer: str) -> list[int]:
    return [*encode(f"1 ans {answer}"), EOS]


def test_the_most_frequent_answer_counts_and_unfinished_texts_have_no_vote() -> None:
    data = load_split("sums", "test")
    prompts, right, wrong = [encode(p) for p in data["prompt"][:3]], data["answer"][:3], "0"
    assert wrong not in right
    outputs = [
        [ending(right[0]), ending(wrong), ending(right[0]), ending(wrong)[:-1]],
        [ending(wrong), ending(right[1]), ending(right[1])[:-1], ending(right[1])[:-1]],  # a tie: what came first
        [[EOS], ending(right[2])],
    ]
    batch: dict[str, Any] = {"prompt": prompts, "max_new_tokens": [64] * 3}
    chains.check(TASK, batch, outputs)
    found = chains.score(TASK, batch, outputs, {}, np.arange(3)[None])
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["single"].value == pytest.approx((0.5 + 0.25 + 0.5) / 3)


@pytest.mark.parametrize("bad", [None, [[]], [[[1] * 65]], [[[EOS, 5]]], [[5]], [[[5]], [[5]]]])
def test_what_is_no_text_is_refused(bad: Any) -> None:
    with pytest.raises(BadOutput):
        chains.check(TASK, {"prompt": [[3]], "max_new_tokens": [64]}, bad)


def test_a_rung_is_as_many_texts_as_it_has_room_for() -> None:
    """Texts differ, each starts on a cache of its own, and none takes more forwards than its share."""
    model, caches = lm.build(32, 3, 0).eval(), []

    def decoder(network: Any, length: int, capacity: int) -> HeldDecoder:
        caches.append(HeldDecoder(network, capacity, HeldCache(3)))
        return caches[-1]

    session: Any = SimpleNamespace(networks={"target": model}, rng=torch.Generator().manual_seed(0))
    batch = {"prompt": [[3, 4, 5]], "max_new_tokens": [64], "temperature": [1.8]}
    with torch.no_grad():
        (texts,) = chains.write_chains(session, batch, 200, decoder)
    assert len(texts) == len(caches) == 3 and len({tuple(text) for text in texts}) == 3
    assert all(cache.spent == len(text) <= 64 for cache, text in zip(caches, texts, strict=True))


def test_the_arms_differ_in_their_cache_alone() -> None:
    found = {name: plugins.load_class(plugins.methods()[name])() for name in ("dms_hyper_scaling", "full_cache")}
    assert found["dms_hyper_scaling"].evicts and not found["full_cache"].evicts
    assert plugins.load_class(plugins.methods()["dms_immediate"])().window("needles") == 1
    assert found["dms_hyper_scaling"].window("needles") == 32
