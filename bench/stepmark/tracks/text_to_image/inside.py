"""What happens inside of a network while it runs: what its parts give, what stands in its attention, and its first half alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def outputs(*parts: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a list that takes what these parts give, call by call; of several things the first."""
    found: list[Tensor] = []

    def keep(part: nn.Module, given: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [part.register_forward_hook(keep) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def blocks(unet: Any) -> list[nn.Module]:
    """The blocks of a UNet before and behind its middle, in the order in which they run."""
    return [*unet.down_blocks, *unet.up_blocks]


def cross_attentions(network: nn.Module) -> list[Any]:
    """The cross-attention layers of a UNet, in the order of its modules."""
    return [part for name, part in network.named_modules() if name.endswith("attn2")]


@contextmanager
def processed(layers: Sequence[Any], processors: Iterable[Any]) -> Iterator[None]:
    """Inside, layers of attention have other processors, one each; afterwards their own."""
    before = [layer.processor for layer in layers]
    try:
        for layer, processor in zip(layers, processors, strict=True):
            layer.set_processor(processor)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.set_processor(own)


class _Reached(Exception):
    """A pass has come to where it is to end, with what it has found."""


def encoded(painter: Any, x: Tensor, time: Tensor, states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first half of a painter's UNet, with its middle: what goes up, and the maps that are kept for the way up, the finest
    first. time: [B], in the network's own unit.

    The painter itself is asked, and stopped behind the middle: where its evaluations are counted, so is this one.
    """
    unet, kept = painter.unet, list[Tensor]()

    def keep(part: nn.Module, given: Any, output: Any) -> None:
        kept.extend(output[1] if isinstance(output, tuple) else [output])

    def stop(part: nn.Module, given: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    last = unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block
    hooks = [part.register_forward_hook(keep) for part in (unet.conv_in, *unet.down_blocks)]
    hooks.append(last.register_forward_hook(stop))
    try:
        painter(x, time, states)
    except _Reached as reached:
        return reached.args[0], tuple(kept)
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError("the network has no middle to be stopped at")
