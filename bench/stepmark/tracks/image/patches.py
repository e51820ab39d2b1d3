"""Patch parallelism: one network on several processes, each with a horizontal band of every image (`Bands`)."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepmark.tracks.image.solvers import Denoiser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stepmark.distributed import Exchange, Group


class Bands:
    """A network evaluated on bands: every rank of a group holds a horizontal band of each image, and of each activation.

    Convolutions take the rows beyond the border, self-attention further keys and values and group norms the statistics
    from other ranks; while `synchronous` those of this evaluation, else those that were sent in the one before (Li et al.
    2024, displaced patch parallelism). The first convolution always takes fresh rows: latents, not activations.

    Args:
        group: the ranks, as many as there are bands, in order from the top.
        reach: whose keys and values attention sees beside its own. "all": those of every rank; a number f: of the
            neighbours the rows next to the border, as many as f of a band, and statistics of neighbours only; "none":
            nothing is exchanged at all, rows beyond the border are zero.

    Acts on diffusers' UNet2DModel and DiTTransformer2DModel in the wrappers of the backbones, inside `on(network)`.
    """

    def __init__(self, group: Group, reach: str | float = "all") -> None:
        self.group, self.reach, self.synchronous = group, reach, True
        self._sent: dict[nn.Module, Exchange] = {}
        self._statistics: dict[nn.Module, Tensor] = {}

    @property
    def neighbours(self) -> list[int]:
        """The ranks of the bands above and below."""
        return [rank for rank in (self.group.rank - 1, self.group.rank + 1) if 0 <= rank < self.group.size]

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of [..., height, width]."""
        return whole.chunk(self.group.size, -2)[self.group.rank]

    def join(self, band: Tensor) -> Tensor:
        """The whole [..., height, width] of everybody's bands."""
        return torch.cat(self.group.gather(band), -2)

    def output(self, denoise: Denoiser, band: Tensor, t: float) -> Tensor:
        """What the network predicts for this rank's band."""
        found = denoise.output(band, t)
        return found if found.shape == band.shape else self.own(found)

    @contextlib.contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Inside, the network takes and gives bands."""
        forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        for part in network.modules():
            kind = type(part).__name__
            if isinstance(part, nn.Conv2d) and part.padding[0]:
                first = part is getattr(getattr(network, "unet", None), "conv_in", None)
                forwards[part] = functools.partial(self._convolution, part, first)
            elif isinstance(part, nn.GroupNorm):
                forwards[part] = functools.partial(self._norm, part)
            elif kind == "Attention":
                forwards |= {linear: functools.partial(self._keys, linear) for linear in (part.to_k, part.to_v)}
            elif kind == "PatchEmbed":
                forwards[part] = functools.partial(self._tokens, part)
            elif kind == "DiTTransformer2DModel":
                forwards[part.proj_out_2] = functools.partial(self._in_place, part.proj_out_2)
        coordinates = getattr(network, "coordinates", None)
        try:
            for part, forward in forwards.items():
                part.forward = forward
            if coordinates is not None:
                network.coordinates = self.own(coordinates)
            yield
        finally:
            for part in forwards:
                part.__dict__.pop("forward", None)
            if coordinates is not None:
                network.coordinates = coordinates

    def _remote(self, part: nn.Module, outgoing: dict[int, Tensor], fresh: bool = False) -> dict[int, Tensor]:
        """Send, and return what the listed ranks sent for the same module: now, or in the evaluation before."""
        if self.reach == "none":
            return {}
        now = self.group.exchange(outgoing)
        before, self._sent[part] = self._sent.get(part, now), now
        return (now if self.synchronous or fresh else before).wait()

    def _convolution(self, part: nn.Conv2d, fresh: bool, x: Tensor) -> Tensor:
        edge, above, below = int(part.padding[0]), self.group.rank - 1, self.group.rank + 1
        rows = {above: x[:, :, :edge], below: x[:, :, -edge:]}
        got = self._remote(part, {rank: rows[rank] for rank in self.neighbours}, fresh)
        outside = torch.zeros_like(rows[above])
        padded = torch.cat([got.get(above, outside), x, got.get(below, outside)], 2)
        sides = (0, int(part.padding[1]))
        return torch.conv2d(padded, part.weight, part.bias, part.stride, sides, part.dilation, part.groups)

    def _norm(self, part: nn.GroupNorm, x: Tensor) -> Tensor:
        """Statistics of the whole image: of old ones, this rank's share is brought up to date (section 4.2)."""
        grouped = x.reshape(len(x), part.num_groups, -1)
        own = torch.stack([grouped.mean(-1), grouped.square().mean(-1)])
        peers = self.group.others if self.reach == "all" else self.neighbours
        before, self._statistics[part] = self._statistics.get(part, own), own
        got = self._remote(part, dict.fromkeys(peers, own))
        then = own if self.synchronous else before
        mean, square = torch.stack([then, *got.values()]).mean(0) + own - then
        variance = square - mean.square()
        variance = torch.where(variance < 0, own[1] - own[0].square(), variance)
        scale = (variance + part.eps).rsqrt()[..., None]
        normed = ((grouped - mean[..., None]) * scale).view(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return normed * part.weight.view(shape) + part.bias.view(shape)

    def _keys(self, part: nn.Linear, x: Tensor) -> Tensor:
        """Keys or values [B, L, d] of this band with those of other bands in their places."""
        own, rank = torch.nn.functional.linear(x, part.weight, part.bias), self.group.rank
        if isinstance(self.reach, str):
            outgoing = dict.fromkeys(self.group.others, own)
        else:
            width = math.isqrt(own.shape[1] * self.group.size)
            edge = width * max(1, round(self.reach * own.shape[1] / width))
            parts = {rank - 1: own[:, :edge], rank + 1: own[:, -edge:]}
            outgoing = {peer: parts[peer] for peer in self.neighbours}
        got = self._remote(part, outgoing) | {rank: own}
        return torch.cat([got[place] for place in sorted(got)], 1)

    def _tokens(self, part: nn.Module, x: Tensor) -> Tensor:
        """Patches of the band as tokens, with the position they have in the whole image."""
        tokens = part.proj(x).flatten(2).transpose(1, 2)
        return tokens + part.pos_embed.chunk(self.group.size, 1)[self.group.rank]

    def _in_place(self, part: nn.Linear, x: Tensor) -> Tensor:
        """The band's tokens of the output in their place among all, the others zero: diffusers builds a square of them."""
        out = torch.nn.functional.linear(x, part.weight, part.bias)
        whole = out.new_zeros(len(out), out.shape[1] * self.group.size, out.shape[2])
        whole.chunk(self.group.size, 1)[self.group.rank].copy_(out)
        return whole
