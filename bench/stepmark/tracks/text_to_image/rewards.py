"""What a reader of pictures thinks of a caption: a reward that a method may climb, and may please with pictures that please it
alone. The eye, which judges, is another one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stepmark.backbones.scenes_judges import KINDS, parted
from stepmark.tracks.scenes.captions import read, texts


def log_probability(logits: Tensor, condition: Tensor) -> Tensor:
    """Log-probability [B] that a reader of logits [B, 224] gives to what captions int64 [B, 32] say: the mean over the objects,
    and over the background where it is named. Differentiable.

    An object lies where its caption says, or wherever it is most likely: log of the sum over places of the product of its
    attributes' probabilities there. An object of no named shape is anything but nothing. What must not be there is not asked.
    """
    read_out = {name: part.log_softmax(-1) for name, part in parted(logits).items()}
    found = []
    for row, text in enumerate(texts(condition)):
        objects, background = _said(text)
        terms = [_object(read_out, row, each) for each in objects]
        if background is not None:
            terms.append(read_out["background"][row, background])
        found.append(torch.stack(terms).mean() if terms else logits.new_zeros(()))
    return torch.stack(found)


def _object(read_out: dict[str, Tensor], row: int, said: tuple[tuple[str, int], ...]) -> Tensor:
    values = dict(said)
    place = values.pop("place", None)
    total = torch.zeros_like(read_out["shape"][row, :, 0])
    for name in KINDS:
        logs = read_out[name][row]  # [9, kinds + 1]
        if name in values:
            total = total + logs[:, values[name]]
        elif name == "shape":
            total = total + logs[:, :-1].logsumexp(1)
    return total.logsumexp(0) if place is None else total[place]


@lru_cache(maxsize=50_000)
def _said(text: str) -> tuple[tuple[tuple[tuple[str, int], ...], ...], int | None]:
    caption = read(text)
    return tuple(tuple(thing.named().items()) for thing in caption.objects), caption.background
