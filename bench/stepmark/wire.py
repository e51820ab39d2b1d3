"""Plain data between the harness and a plugin's process, over a socket: JSON for the tree, raw bytes for the tensors.

Nothing that arrives is executed (no pickle), and what arrives has the exact types that are named here: a tensor subclass,
a view, an object with methods of its own do not get through.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_TREE, LARGEST_DATA = 2**28, 2**36  # bytes of a message: more is no answer to anything
DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
PLAIN = frozenset(DTYPES.values())
_HEAD = struct.Struct("<QQ")


class WireError(ValueError):
    """Something that cannot be sent, or that nobody of ours has sent. One line."""


class Closed(WireError):
    """The other side is gone."""


def settled(value: Any) -> Any:
    """A copy of outputs that nothing can change any more: exact types, tensors of their own, numpy scalars as numbers.

    Raises:
        WireError: a type that outputs are not made of.
    """
    kind = type(value)
    if kind is Tensor:
        if value.layout is not torch.strided or value.dtype not in PLAIN:
            raise WireError(f"a tensor of {value.layout}, {value.dtype}: return dense tensors of plain numbers")
        # Each step costs a microsecond of the floor of all times, so that what has nothing to do is left out.
        bare = value.detach() if value.requires_grad else value
        if bare.is_conj() or bare.is_neg():
            bare = bare.resolve_conj().resolve_neg()
        return bare.clone(memory_format=torch.contiguous_format)
    if kind in (list, tuple):
        if all(type(each) is int for each in value):  # tokens, mostly
            return kind(value)
        return kind(settled(each) for each in value)
    if kind is dict:
        return {_key(key): settled(each) for key, each in value.items()}
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is np.ndarray and value.dtype.kind in "biuf":
        return np.array(value, order="C")
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    raise WireError(
        f"{kind.__module__}.{kind.__qualname__} among the outputs: return plain tensors, lists, dicts, numbers and words"
    )


def _key(key: Any) -> str | int:
    if type(key) in (str, int):
        return key  # type: ignore[no-any-return]
    raise WireError(f"a key of type {type(key).__name__}: keys are words or integers")


def encode(tree: Any) -> list[bytes | memoryview]:
    """The parts of a message. Tensors may lie on any device.

    Raises:
        WireError: as `settled`.
    """
    data: list[memoryview] = []
    head = json.dumps(_plain(tree, data), separators=(",", ":")).encode()
    return [_HEAD.pack(len(head), sum(each.nbytes for each in data)), head, *data]


def _plain(value: Any, data: list[memoryview]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return value if all(type(each) is int for each in value) else [_plain(each, data) for each in value]
    if kind is tuple:
        return {"t": [_plain(each, data) for each in value]}
    if kind is dict:
        return {"d": [[_key(key), _plain(each, data)] for key, each in value.items()]}
    if isinstance(value, Tensor):
        bytes_of = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if bytes_of.size:
            data.append(bytes_of.data)
        return {"x": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if kind is np.ndarray and value.dtype.kind in "biuf":
        bytes_of = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        if bytes_of.size:
            data.append(bytes_of.data)
        return {"n": [value.dtype.str, list(value.shape)]}
    raise WireError(f"{kind.__module__}.{kind.__qualname__} cannot be sent")


def decode(head: bytes, data: bytearray) -> Any:
    """The tree of a message.

    Raises:
        WireError: it is none.
    """
    try:
        tree = json.loads(head)
        at = [0]
        found = _tree(tree, data, at)
        if at[0] != len(data):
            raise WireError("bytes that belong to nothing")
        return found
    except WireError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, RuntimeError, OverflowError) as error:
        raise WireError(f"no message: {error}") from None


def _tree(value: Any, data: bytearray, at: list[int]) -> Any:
    if isinstance(value, list):
        return [_tree(each, data, at) for each in value]
    if not isinstance(value, dict):
        return value
    ((mark, content),) = value.items()
    if mark == "t":
        return tuple(_tree(each, data, at) for each in content)
    if mark == "d":
        return {_key(key): _tree(each, data, at) for key, each in content}
    name, shape = content
    count = math.prod(_size(each) for each in shape)
    if mark == "x":
        kind = DTYPES[name]
        start, size = _piece(data, at, count * kind.itemsize)
        if not count:
            return torch.zeros(shape, dtype=kind)
        # A copy of torch's own making: aligned as every tensor, so that kernels take the same path on either side.
        return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=start).clone().view(kind).reshape(shape)
    if mark == "n":
        sort = np.dtype(name)
        if sort.kind not in "biuf":
            raise WireError(f"an array of {sort}")
        start, size = _piece(data, at, count * sort.itemsize)
        return np.frombuffer(bytes(memoryview(data)[start : start + size]), dtype=sort).reshape(shape).copy()
    raise WireError(f"no mark {mark!r}")


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_DATA:
        raise WireError(f"no size: {value!r}")
    return value


def _piece(data: bytearray, at: list[int], size: int) -> tuple[int, int]:
    start, at[0] = at[0], at[0] + size
    if at[0] > len(data):
        raise WireError("a message cut short")
    return start, size


class Link:
    """One end of a socket."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def send(self, tree: Any) -> None:
        """Send a message whole.

        Raises:
            WireError: it holds what cannot be sent. Closed: nobody is there.
        """
        self.send_encoded(encode(tree))

    def send_encoded(self, parts: list[bytes | memoryview]) -> None:
        """Send what `encode` made."""
        try:
            for part in parts:
                self.end.sendall(part)
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self) -> Any:
        """The next message.

        Raises:
            Closed: the other side is gone. WireError: no message.
        """
        sizes = _HEAD.unpack(self._bytes(_HEAD.size))
        if sizes[0] > LARGEST_TREE or sizes[1] > LARGEST_DATA:
            raise WireError(f"a message of {sum(sizes)} bytes")
        head = self._bytes(sizes[0])
        return decode(bytes(head), self._bytes(sizes[1]))

    def _bytes(self, count: int) -> bytearray:
        got = bytearray(count)
        view, done = memoryview(got), 0
        while done < count:
            try:
                read = self.end.recv_into(view[done:], min(count - done, 2**24))
            except OSError as error:
                raise Closed(str(error)) from None
            if not read:
                raise Closed("the process is gone")
            done += read
        return got

    def close(self) -> None:
        """Hang up."""
        self.end.close()
