"""What a model's own forward calls its layers with, heard by listeners in their place: nothing runs but what is around them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache


class Unfit(Exception):
    """A model cannot be driven in some way; one line says why."""


class Seen(DynamicCache):
    """An empty cache that says it holds `length` tokens in every layer."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a pass comes after."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same, where masks ask."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask, and the position of the first."""
        return self.length + query_length, 0


class Listener(nn.Module):
    """Stands in the place of a layer and notes what it is called with. `answers`: of how many parts, None: a tensor."""

    def __init__(self, real: nn.Module, answers: int | None) -> None:
        super().__init__()
        self.real, self.answers = real, answers
        self.names = list(inspect.signature(type(real).forward).parameters)[1:]
        self.heard: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("real"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states as they came."""
        self.heard = dict(zip(self.names, args, strict=False)) | kwargs
        hidden = self.heard.pop(self.names[0])
        self.heard[""] = hidden
        return hidden if self.answers is None else (hidden, *[None] * (self.answers - 1))


class Stage:
    """The base of a model with listeners for layers: what each layer is called with in a pass, and what follows the last."""

    def __init__(self, base: nn.Module, path: Sequence[str], answers: int | None) -> None:
        shell = top = shallow(base)
        for name in path[:-1]:
            inner = shallow(getattr(shell, name))
            shell._modules[name] = inner
            shell = inner
        real = getattr(shell, path[-1])
        self.listeners = [Listener(layer, answers) for layer in real]
        shell._modules[path[-1]] = nn.ModuleList(self.listeners)
        self.shell, self.inner = top, shell
        self.asked: tuple[Tensor, Any] | None = None
        self.width = 0  # of hidden states

    def ask(self, hidden: Tensor, positions: Tensor, start: int) -> Tensor:
        """Have the listeners hear what layers are called with for `hidden` [1, T, D] at `positions` [1, T] behind `start`
        slots; returns the last hidden state of the base, the layers having changed nothing."""
        cache = Seen(start)
        found = self.shell(inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=True)
        for listener in self.listeners:
            listener.heard = {
                name: CACHE if isinstance(value, Seen) else value for name, value in listener.heard.items()
            }
        return found[0]

    def heard(self, index: int, hidden: Tensor, positions: Tensor, start: int, same: Any) -> dict[str, Any]:
        """What layer `index` is called with, "" being the hidden states that come to the first layer. Passes are told
        apart by the identity of `positions` and `same`."""
        if self.asked is None or self.asked[0] is not positions or self.asked[1] is not same:
            self.ask(hidden, positions, start)
            self.asked = (positions, same)
        return self.listeners[index].heard


CACHE = object()  # in what a layer is called with: its cache


def shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.__dict__.pop("forward", None)
    return twin
