"""Prompting alone: the wish stands in the prompt and the model samples as ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draw
from stepmark.tracks.decoding.texts import nucleus

TOP_P = 0.8


class WishPrompting(Method):
    """Prompting alone: nucleus sampling after a prompt that holds the wish.

    What linear alignment does at ratio 0, in one pass a token: the same nucleus of 0.8. A nucleus of next to nothing holds
    the likeliest word alone.
    """

    tasks = ("preference/colours",)

    mass = TOP_P
    variants = (Variant("wish_greedy", says="the likeliest word instead of a drawn one: greedy decoding", mass=1e-9),)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target, written = Decoder(session.networks["target"], len(prompt) + room), list(prompt)
            while True:
                p = (target.forward(written[target.length :], last=1)[0] / temperature).softmax(-1)
                u = float(torch.rand((), generator=session.rng, device=target.device))
                written.append(draw(nucleus(p, self.mass), u))
                if written[-1] == target.eos or target.length == len(prompt) + room - 1 or target.spent + 1 > rung:
                    return written[len(prompt) :]

        return write_each(batch, write)
