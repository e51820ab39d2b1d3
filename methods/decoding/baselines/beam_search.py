"""Beam search: the likeliest texts are kept, side by side in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each

WIDTH = 4


class BeamSearch(Method):
    """Beam search of width 4: what the likeliest text does, at one forward a token as in greedy decoding.

    Each step all beams are read in one pass, under a mask that shows each its own past, and of all their continuations
    the 4 likeliest are kept; one that ends is put aside. The search stops when the best text that ended is as likely,
    per token, as the best that goes on, or when the rung or the room is used up; the best per token is written
    (length penalty 1). The temperature of the task is not asked for: nothing is drawn.
    """

    tasks = ("preference/colours", "greedy/words_weak", "greedy/hops_weak")

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(session.networks["target"], len(prompt) + WIDTH * room)
            return search(target, prompt, room, rung)

        return write_each(batch, write)


def search(target: Decoder, prompt: Sequence[int], room: int, budget: float) -> list[int]:
    """The best text found, per token, in at most `budget` forwards."""
    log_p = target.forward(prompt, last=1).log_softmax(-1)
    beams: list[tuple[float, list[int], list[int]]] = [(0.0, [], [])]  # log-likelihood, tokens, their slots
    ended: list[tuple[float, list[int]]] = []
    used, start = len(prompt), len(prompt)
    while True:
        totals = torch.tensor([score for score, _, _ in beams], device=target.device)[:, None] + log_p
        best, places = totals.flatten().topk(2 * WIDTH)
        grown = []
        for score, place in zip(best.tolist(), places.tolist(), strict=True):
            _, text, slots = beams[place // totals.shape[1]]
            token = place % totals.shape[1]
            if token == target.eos:
                ended.append((score / (len(text) + 1), [*text, token]))
            elif len(grown) < WIDTH:
                grown.append((score, [*text, token], slots))
        length = len(grown[0][1])
        surest = max(ended, default=(float("-inf"), []))
        if length >= room or target.spent + 1 > budget or surest[0] >= grown[0][0] / length:
            return max(surest, (grown[0][0] / length, grown[0][1]))[1]
        beams = [(score, text, [*slots, used + row]) for row, (score, text, slots) in enumerate(grown)]
        sees = torch.zeros(len(beams), used + len(beams), dtype=torch.bool, device=target.device)
        sees[:, :start] = True
        for row, (_, _, slots) in enumerate(beams):
            sees[row, slots] = True
        at = torch.full((len(beams),), start + length - 1, device=target.device)
        hidden = target.run(target.embed([text[-1] for _, text, _ in beams]), used, None, at, sees)
        log_p, used = target.logits(hidden).log_softmax(-1), used + len(beams)
