"""Networks that learn an edit from pairs of pictures: the pairs as latents, a UNet that is shown further latents beside the noisy
one, and how it is sampled.

`Editor` is a copy of the teacher with a wider first layer: what it is shown is concatenated to its channels. What another
picture looks like may also reach it by self-attention: `beside(network, kept(reference, x), ...)` is a network that looks at
the keys and values of another one of its kind, a reference network, beside its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from stepmark.session import Session
from stepmark.tracks.editing.attention import Control, Layer, controlled
from stepmark.tracks.image.schedules import Schedule, to_x0_eps, uniform_times
from stepmark.tracks.scenes.captions import LENGTH
from stepmark.tracks.text_to_image.sampling import noisy_step

CELL = 4  # pixels of a picture along a side of one latent
Maps = list[tuple[Tensor, Tensor]]  # keys and values [B, heads, n, channels] of layer after layer


# pictures ---------------------------------------------------------------------------------------


@torch.no_grad()
def encoded(session: Session, pictures: Tensor) -> Tensor:
    """Latents [..., 4, 8, 8] of pictures [..., 3, 32, 32]."""
    encode = session.networks["vae"].encode
    parts = pictures.flatten(0, -4).split(500)
    return torch.cat([encode(part.to(session.device, session.dtype)) for part in parts]).unflatten(
        0, pictures.shape[:-3]
    )


def on_grid(mask: Tensor) -> Tensor:
    """What share of each latent is masked, [..., 1, 8, 8], of masks bool [..., 32, 32]."""
    return avg_pool2d(mask.float(), CELL).unsqueeze(-3)


def blanked(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures [..., 3, 32, 32] that are 0 where masks [..., 32, 32] are true."""
    return pictures.masked_fill(mask.unsqueeze(-3), 0.0)


def plastered(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures [B, 3, h, w] that have the median colour of all else where masks [B, h, w] are true: how a hole is filled without
    a network, where backgrounds have one colour."""
    around = pictures.masked_fill(mask.unsqueeze(1), torch.nan).flatten(2).nanmedian(2).values
    return torch.where(mask.unsqueeze(1), around[..., None, None], pictures)


def field(session: Session, name: str, most: int) -> dict[str, Tensor]:
    """The first pictures of a field of the train split as latents, {"x0": [N, ..., 4, 8, 8]}: for `session.once`."""
    return {"x0": encoded(session, session.train[name][:most])}


class Pairs:
    """Pictures of the train split as latents, by the names of their fields, for `prepare`.

    Args:
        names: of the fields. rows: which of the examples; default: all, which are encoded once for all who ask.

    Attributes:
        latents: name -> [N, ..., 4, 8, 8]. rows: int64 [N], their numbers in the split, fewer at tier smoke.
    """

    def __init__(self, session: Session, names: Iterable[str], rows: Tensor | None = None) -> None:
        data, self._rng, self._device = session.train, session.rng, session.device
        if rows is None:
            most = session.scale(len(data["mask"]), 16)
            self.rows = torch.arange(most)
            self.latents = {name: session.once(field, name, most)["x0"] for name in names}
        else:
            self.rows = rows[torch.randperm(len(rows), generator=self._rng)[: session.scale(len(rows), 16)]]
            self.latents = {name: encoded(session, data[name][self.rows]) for name in names}

    def draw(self, n: int) -> Tensor:
        """n random places in `rows` and in the latents."""
        return torch.randint(len(self.rows), (n,), generator=self._rng, device=self._device)


def boxed(picture: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Pictures [n, 3, 32, 32], moved and stretched so that what lies in the box around source [n, 32, 32] lies in that around
    target: bilinear, box to box, of everything."""
    (row, column, height, width), (to_row, to_column, to_height, to_width) = _box(source), _box(target)
    along, down, zero = width / to_width, height / to_height, torch.zeros_like(row)
    aside, below = column - along * to_column, row - down * to_row
    turn = torch.stack([torch.stack([along, zero, aside], 1), torch.stack([zero, down, below], 1)], 1)
    grid = affine_grid(turn.to(picture), list(picture.shape), align_corners=False)
    return grid_sample(picture, grid, padding_mode="border", align_corners=False)


def _box(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column of the middle, height and width of the box around what is true, in halves of a side, [n] each."""
    size = mask.shape[-1]
    ends = []
    for there in (mask.any(2), mask.any(1)):
        first, last = there.float().argmax(1), size - 1 - there.flip(1).float().argmax(1)
        ends += [((first + last + 1) / size - 1), (last - first + 1) / size * 2]
    return ends[0], ends[2], ends[1], ends[3]


# networks ---------------------------------------------------------------------------------------


def grown(conv: nn.Conv2d, extra: int) -> nn.Conv2d:
    """A convolution that takes so many further channels, whose weights are 0: it does as it did."""
    like = conv.weight
    found = nn.Conv2d(
        conv.in_channels + extra,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,  # type: ignore[arg-type]
    ).to(like.device, like.dtype)
    with torch.no_grad():
        found.weight.zero_()
        found.weight[:, : conv.in_channels] = like
        found.bias.copy_(conv.bias)
    return found


def silence(unet: nn.Module) -> None:
    """Take cross-attention from a UNet, in place: no layer of it is left."""
    for block in unet.modules():
        if getattr(block, "attn2", None) is not None:
            block.attn2 = block.norm2 = None


class Editor(nn.Module):
    """A `UNet2DConditionModel` that is shown further latents, network(x [B, 4, h, w], time [B], shown [B, shown, h, w]).

    Args:
        painter: the network that it is a copy of, which is used up. shown: further channels of its first layer.
        text: whether it has cross-attention, over the states of the empty caption where it is given no others.

    `unet` is the wrapped model. `prediction` and `alphas_cumprod` are the painter's.
    """

    def __init__(self, painter: Any, shown: int = 0, text: bool = True) -> None:
        super().__init__()
        self.unet, self.prediction, self.alphas_cumprod = painter.unet, painter.prediction, painter.alphas_cumprod
        if shown:
            self.unet.conv_in = grown(self.unet.conv_in, shown)
        states = None
        if text:
            ids = torch.zeros(1, LENGTH, dtype=torch.int64, device=self.unet.conv_in.weight.device)
            with torch.no_grad():
                states = painter.words(painter.null_condition(ids))
        self.states: Tensor | None
        self.register_buffer("states", states)
        if not text:
            silence(self.unet)

    def forward(self, x: Tensor, time: Tensor, shown: Tensor | None = None, states: Tensor | None = None) -> Tensor:
        """What it predicts [B, 4, h, w]. states [B, n, 64]: what cross-attention looks at."""
        if states is None and self.states is not None:
            states = self.states.expand(len(x), -1, -1)
        return self.unet(x if shown is None else torch.cat([x, shown], 1), time, states, return_dict=False)[0]


class _Keep(Control):
    """Keeps the keys and values of all layers of self-attention, in the order of the calls."""

    def __init__(self) -> None:
        self.seen: Maps = []

    def inputs(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not layer.cross:
            self.seen.append((key, value))
        return query, key, value


class _Give(Control):
    """Puts such keys and values beside those of a network of the same kind, call by call."""

    def __init__(self, maps: Maps) -> None:
        self.left = list(maps)

    def inputs(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layer.cross:
            return query, key, value
        further = self.left.pop(0)
        return query, torch.cat([key, further[0]], 2), torch.cat([value, further[1]], 2)


def kept(reference: nn.Module, x: Tensor, *shown: Tensor) -> Maps:
    """Keys and values of the self-attention of a reference network that looks at latents x [B, 4, h, w], at timestep 0."""
    keep = _Keep()
    with controlled(reference, keep):
        reference(x, torch.zeros_like(x[:, 0, 0, 0]), *shown)
    return keep.seen


def beside(network: nn.Module, maps: Maps, *arguments: Tensor) -> Tensor:
    """What a network predicts whose self-attention also looks at what a reference network of the same kind has kept."""
    with controlled(network, _Give(maps)):
        return network(*arguments)


# sampling ---------------------------------------------------------------------------------------


@torch.no_grad()
def denoised(
    evaluate: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x: Tensor,
    steps: int,
    eta: float = 0.0,
    rng: torch.Generator | None = None,
) -> Tensor:
    """x [B, ...] from noise to data in so many even steps of DDIM, of a flow of Euler's, with fresh noise for eta > 0.

    evaluate(x, time [B]) is what the network predicts, in the time that the schedule gives it.
    """
    for t, s in pairwise(uniform_times(steps)):
        time = torch.full((len(x),), schedule.network_time(t), dtype=x.dtype, device=x.device)
        x0, eps = to_x0_eps(schedule.prediction, evaluate(x, time), x, schedule.alpha(t), schedule.sigma(t))
        x = noisy_step(schedule, x0, eps, t, s, eta, rng)
    return x
