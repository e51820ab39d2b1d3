"""The networks of the captioned scenes as methods call them: captions or their states, what passes the counter, and truths."""

from __future__ import annotations

import pytest
import torch
from stepmark.datasets import scenes32
from torch import nn

from stepmark.backbones import recipe, scenes_judges
from stepmark.meter.counts import Ledger, watch

torch.set_num_threads(1)


@pytest.mark.parametrize("backbone", ["scenes_eps", "scenes_flow"])
def test_captions_may_be_given_by_their_states(backbone: str) -> None:
    network = recipe(backbone).build().eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "cond_proj" not in name:  # an untrained last layer may be zero and hide everything
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    ids = scenes32.split("protected")["tokens"][:2]
    draw = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 4, 8, 8, generator=draw), torch.full((2,), 0.5)
    with torch.no_grad():
        states = network.words(ids)
        said = network(x, t, ids)
        torch.testing.assert_close(network(x, t, states), said)
        nothing = network.null_condition(ids)
        torch.testing.assert_close(network.null_condition(states), network.words(nothing))
        assert not torch.allclose(network(x, t, nothing), said, atol=1e-3)
        if backbone == "scenes_eps":  # a teacher that is told a scale does not heed it
            torch.testing.assert_close(network(x, t, ids, torch.tensor([1.5, 7.0])), said)


def test_encoding_and_decoding_are_evaluations() -> None:
    ledger = Ledger()
    network = watch(ledger, "vae", recipe("scenes_vae").build().eval())
    x = scenes32.split("protected")["x0"][:3]
    with torch.no_grad():
        z = network.encode(x)
        assert z.shape == (3, 4, 8, 8)
        assert network.decode(z).shape == x.shape
    assert ledger.entries["vae"].rows == 6


def test_a_reader_is_taught_what_lies_where() -> None:
    """The truths that the readers of scenes learn are those of the data, place by place, and the rest is nothing."""
    data = scenes32.split("protected")
    truth = scenes_judges._truth(data["objects"], data["background"])
    things = scenes32.PROTECTED.objects
    places = [thing.place for thing in things]
    for name, kinds in scenes_judges.KINDS.items():
        assert (truth[name][:, places] == torch.tensor([getattr(thing, name) for thing in things])).all(), name
        others = [place for place in range(9) if place not in places]
        assert (truth[name][:, others] == kinds - 1).all()
    assert (truth["background"] == scenes32.PROTECTED.background).all()
    logits = torch.arange(2 * scenes_judges.LOGITS).view(2, -1)
    parts = scenes_judges.parted(logits)
    assert torch.equal(torch.cat([part.flatten(1) for part in parts.values()], 1), logits)
