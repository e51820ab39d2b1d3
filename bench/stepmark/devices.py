"""What `--device` means on this machine: which devices there are, which one is meant, how exactly it calculates.

A name is read here alone, so that a device that is not there is refused before anything runs on it, and `cuda` and
`cuda:0` are one device everywhere.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

# The runtime's own order is by speed: cuda:1 would not be the card that nvidia-smi, NVML and Zeus call 1.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

NAME = re.compile(r"(?P<kind>[a-z]+)(?::(?P<index>0|[1-9]\d{0,5}))?")


def kind_of(device: str) -> str:
    """The kind of a device: "cuda" of "cuda:1"."""
    return device.partition(":")[0]


def named(device: Any) -> str:
    """The one name of a device that is there: "cpu", "cuda:1"; "cuda" is the current one.

    Raises:
        ValueError: no device of this machine. One line that says which there are.
    """
    read = NAME.fullmatch(str(device))
    if str(device) == "cpu":
        return "cpu"
    found, why = _count(read["kind"]) if read else (0, "")
    if read is None or not (int(read["index"] or 0) < found):
        raise ValueError(f"--device {device}: there is no such device here, but {', '.join(offered())}{why}")
    if read["kind"] == "cpu":
        return "cpu"
    index = int(read["index"]) if read["index"] else _current(read["kind"])
    return f"{read['kind']}:{index}"


def offered() -> list[str]:
    """All devices of this machine by name."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    kinds = dict.fromkeys(["cuda", *([accelerator.type] if accelerator is not None else [])])
    return ["cpu", *(f"{kind}:{index}" for kind in kinds for index in range(_count(kind)[0]))]


def _count(kind: str) -> tuple[int, str]:
    """How many devices of a kind torch finds; what it says where it fails to use some that are there."""
    import torch

    if kind == "cpu":
        return 1, ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if kind == "cuda":
            found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        else:
            accelerator = torch.accelerator.current_accelerator()
            found = torch.accelerator.device_count() if accelerator is not None and accelerator.type == kind else 0
    why = f" ({' '.join(str(said[0].message).split())[:200]})" if said and not found else ""
    return found, why


def _current(kind: str) -> int:
    import torch

    return torch.cuda.current_device() if kind == "cuda" else torch.accelerator.current_device_index()


def count(device: str) -> int:
    """How many devices of this kind the machine has."""
    return _count(kind_of(device))[0]


def model_of(device: str) -> str | None:
    """What the driver calls a GPU; of a MIG slice the name of the slice, "NVIDIA A100-SXM4-40GB MIG 1g.5gb". None for
    devices that are no cards."""
    if kind_of(device) != "cuda":
        return None
    import torch

    return str(torch.cuda.get_device_name(named(device)))


def uuid_of(device: str) -> str | None:
    """What tells a GPU from all others whatever numbers processes give it; never written anywhere but into the names of
    locks. None where torch does not say."""
    if kind_of(device) != "cuda":
        return None
    import torch

    found = getattr(torch.cuda.get_device_properties(named(device)), "uuid", None)
    return str(found).lower().removeprefix("gpu-") if found is not None else None


def settle() -> None:
    """How every process that measures calculates: on one thread, in whole single precision. TensorFloat-32, which cuDNN
    uses unless told otherwise, keeps ten bits of 23."""
    import torch

    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def tf32() -> str:
    """Where TensorFloat-32 is on: "off", or the libraries."""
    import torch

    places = {"matmul": torch.backends.cuda.matmul, "cudnn": torch.backends.cudnn}
    return ", ".join(name for name, place in places.items() if getattr(place, "allow_tf32")) or "off"  # noqa: B009
