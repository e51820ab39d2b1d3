"""What editors change inside the attention of a UNet while it runs: queries, keys, maps and features; and the exchange of maps
between two captions of Prompt-to-Prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.tracks.scenes.captions import END
from stepmark.tracks.text_to_image.inside import processed

KINDS = {"attn1": False, "attn2": True}  # layers by the end of their names: whether they look at the caption


@dataclass(frozen=True)
class Layer:
    """A layer of attention: `cross` if it looks at the caption, else at the picture itself; `up`, of the half of the UNet behind
    the middle; `attn`, the layer of diffusers."""

    name: str
    cross: bool
    up: bool
    attn: Any

    def heads(self, x: Tensor) -> Tensor:
        """[B, n, width] as [B, heads, n, channels]."""
        return x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)


class Control:
    """What is called in every layer of attention of a network inside `controlled`. As it stands it changes nothing.

    n is the number of pixels, m that of what is looked at: 32 words or n pixels.
    """

    def inputs(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, n, channels], keys and values [B, heads, m, channels]."""
        return query, key, value

    def scores(self, layer: Layer, scores: Tensor) -> Tensor:
        """What the softmax is taken of, [B, heads, n, m]."""
        return scores

    def maps(self, layer: Layer, maps: Tensor) -> Tensor:
        """What values are mixed with, [B, heads, n, m]."""
        return maps

    def found(self, layer: Layer, found: Tensor) -> Tensor:
        """What the layer gives, [B, n, width]."""
        return found


@contextmanager
def controlled(network: nn.Module, control: Control) -> Iterator[None]:
    """Inside, the attention of a network asks a control; afterwards it is as before."""
    layers = [
        Layer(name, KINDS[kind], "up_blocks" in name, part)
        for name, part in network.named_modules()
        if (kind := name.rpartition(".")[2]) in KINDS
    ]
    with processed([layer.attn for layer in layers], [_processor(layer, control) for layer in layers]):
        yield


def _processor(layer: Layer, control: Control) -> Any:
    def attend(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (layer.heads(x) for x in (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen)))
        query, key, value = control.inputs(layer, query, key, value)
        scores = control.scores(layer, query @ key.transpose(2, 3) * attn.scale)
        maps = control.maps(layer, scores.softmax(-1))
        return control.found(layer, attn.to_out[0]((maps @ value).transpose(1, 2).flatten(2)))

    return attend


# Prompt-to-Prompt -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Which words of a source caption stand for those of a target caption.

    mapper [B, 32, 32]: 1 where the source's word (second axis) stands for the target's (third). kept, exchanged [B, 32]: 1 for
    the target's words that are the same, and that stand in the place of another; a word that is neither is new.
    """

    mapper: Tensor
    kept: Tensor
    exchanged: Tensor

    @property
    def given_up(self) -> Tensor:
        """[B, 32]: 1 for the source's words that another takes the place of."""
        return (self.mapper * self.exchanged[:, None]).sum(2)


def corresponding(source: Tensor, target: Tensor) -> Words:
    """How the words of captions int64 [B, 32] correspond: those that both have in common order, and between them, where as many
    words stand in one as in the other, one for one. Padding corresponds as it lies behind the end."""
    mapper = torch.zeros(*source.shape, source.shape[1])
    kept, exchanged = torch.zeros(source.shape), torch.zeros(source.shape)
    for row, (before, after) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        ends = [ids.index(END) + 1 for ids in (before, after)]
        parts = SequenceMatcher(None, before[: ends[0]], after[: ends[1]], autojunk=False).get_opcodes()
        parts.append(("equal", ends[0], len(before), ends[1], len(after)))
        for kind, i, i_end, j, j_end in parts:
            if kind == "replace" and i_end - i != j_end - j:
                continue
            for one, other in zip(range(i, i_end), range(j, j_end), strict=False):
                mapper[row, one, other] = 1
                (exchanged if kind == "replace" else kept)[row, other] = 1
    return Words(*(each.to(source.device) for each in (mapper, kept, exchanged)))


class PromptToPrompt(Control):
    """Attention of one row taken over by another (Hertz et al. 2023): the maps of the words that two captions share, or that
    stand for each other, and the maps of the picture to itself, in the first steps.

    Args:
        words: how the captions correspond. steps: of the sampler. rows: (source, target, all), the numbers of the two groups of
            rows, and how many groups a call has, each of as many rows as `words`.
        kept, exchanged, own: shares of the steps in which maps of kept words, of exchanged words and of the picture are taken
            over. Counted as in the authors' code: int(share (steps + 1)) steps of maps to words, int(share steps) of the others.

    `step` is the number of the step that runs, from 0; who calls sets it.
    """

    def __init__(
        self, words: Words, steps: int, rows: tuple[int, int, int], kept: float, exchanged: float, own: float
    ) -> None:
        self.words, self.step = words, 0
        self.source, self.target, self.groups = rows
        self.until = int(kept * (steps + 1)), int(exchanged * (steps + 1)), int(own * steps)

    def maps(self, layer: Layer, maps: Tensor) -> Tensor:
        groups = list(maps.chunk(self.groups))
        source, target = groups[self.source], groups[self.target]
        kept, exchanged, own = (self.step < until for until in self.until)
        if not layer.cross:
            groups[self.target] = source if own else target
        else:
            share = (self.words.kept * kept + self.words.exchanged * exchanged)[:, None, None].to(maps.dtype)
            taken = source @ self.words.mapper[:, None].to(maps.dtype)
            groups[self.target] = torch.lerp(target, taken, share)
        return torch.cat(groups)
