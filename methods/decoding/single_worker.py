"""One worker: greedy decoding of a list of questions, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.lm import encode
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import speculate

NAME = "tom"


class SingleWorker(Method):
    """One worker goes through the whole list of questions: plain greedy decoding.

    The model, its prompt and the name that its text begins with are those of Hogwild! inference; there is one block of
    text instead of two, so that nothing is shared out. Each forward gives one token, and a list takes as many forwards
    as its solutions have words: what workers who write at once are compared with.
    """

    tasks = ("parallel/friend_lists",)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The worker's text."""
        outputs = []
        for prompt, room in zip(batch["prompt"], batch["max_new_tokens"], strict=True):
            named = [*prompt, *encode(NAME)]
            target = Decoder(session.networks["target"], len(named) + room)
            outputs.append(speculate(target, named, room, rung, 0.0, lambda tokens, most: ([], None)))
        return outputs
