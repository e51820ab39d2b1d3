"""Embedded reference models: loader, trainer and manifest. The recipes stand in the modules beside this one.

`weights/<id>.safetensors` are committed, `weights/manifest.json` holds their sha256; `stepmark backbones train ID`
runs a recipe again. An analytic backbone (exact score of a mixture) has a recipe without training and no weights.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepmark.digests import reach_digest

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights"
FAMILIES = (
    "unet", "dit", "rgbd", "classifier", "lm", "mdlm", "reasoners", "deducers",
    "demonstrators", "analogists", "proceduralists", "knowers",
)  # fmt: skip

Progress = Callable[[Iterable[int], str], Iterable[int]]
Load = Callable[["str", "torch.device | str"], "nn.Module"]

_sources: dict[str, tuple[Load, Callable[[str], str]]] = {}  # prefix of ids -> load, digest


@dataclass(frozen=True)
class Recipe:
    """How to build and train one backbone.

    Attributes:
        build: returns the untrained (or analytic) module, deterministically.
        train: trains it in place from a fixed seed on the CPU with one thread and returns a report
            {name: float}; None for an analytic backbone.
        summary: one line for `stepmark list backbones`.
        fp16: store floating weights as fp16 (they are loaded as fp32).
    """

    build: Callable[[], nn.Module]
    train: Callable[[nn.Module, Progress], dict[str, float]] | None
    summary: str
    fp16: bool = True


@lru_cache(maxsize=1)
def recipes() -> dict[str, Recipe]:
    """All recipes by backbone id."""
    found: dict[str, Recipe] = {}
    for family in FAMILIES:
        found.update(importlib.import_module(f"stepmark.backbones.{family}").RECIPES)
    return found


def manifest() -> dict[str, dict[str, Any]]:
    """id -> {sha256, params, seconds, report} of the committed weights; {} before the first training."""
    path = WEIGHTS / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add_source(prefix: str, load: Load, digest: Callable[[str], str]) -> None:
    """From now on ids that begin with `prefix` are loaded and digested by these, not by recipe."""
    _sources[prefix] = load, digest


def remove_source(prefix: str) -> None:
    """Undo `add_source`."""
    del _sources[prefix]


def recipe(backbone: str) -> Recipe:
    """The recipe of a backbone, or a one-line KeyError that lists the known ids."""
    if backbone not in recipes():
        raise KeyError(f"no backbone {backbone!r}; known: {', '.join(sorted(recipes()))}")
    return recipes()[backbone]


def digest(backbone: str) -> str:
    """Digest of what `load` returns: the weights' sha256; of an analytic backbone that of what it is made by."""
    for prefix, (_, theirs) in _sources.items():
        if backbone.startswith(prefix):
            return theirs(backbone)
    if recipe(backbone).train is not None:
        return manifest()[backbone]["sha256"]
    return _analytic(backbone)


def _analytic(backbone: str) -> str:
    """Of the code that its recipe reaches, of what it is given, and of the backbones that this names; nothing is built. The
    numbers of a dataset have the digest of that dataset."""
    build = recipe(backbone).build
    function, given = (build.func, (*build.args, build.keywords)) if isinstance(build, partial) else (build, ())
    file = Path(str(importlib.import_module(function.__module__).__file__))
    others = [digest(each) for each in given if isinstance(each, str) and each in recipes()]
    code = reach_digest([(file, [function.__name__])], leave_out=[Path(__file__)])  # how they are loaded does not count
    return hashlib.sha256(f"{code}{given}{others}".encode()).hexdigest()


def load(backbone: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """A backbone in eval mode without gradients.

    Raises:
        KeyError: unknown id. FileNotFoundError / ValueError: weights absent, or not those of the manifest.
    """
    from safetensors.torch import load_file

    for prefix, (theirs, _) in _sources.items():
        if backbone.startswith(prefix):
            return theirs(backbone, device)
    spec = recipe(backbone)
    module = spec.build()
    if spec.train is not None:
        path = WEIGHTS / f"{backbone}.safetensors"
        if not path.exists() or backbone not in manifest():
            raise FileNotFoundError(f"no weights for {backbone}; run: stepmark backbones train {backbone}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != manifest()[backbone]["sha256"]:
            raise ValueError(f"{path.name} is not the file in the manifest; run: stepmark backbones train {backbone}")
        weights = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        missing, unexpected = module.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - _tied(module):
            raise ValueError(f"{path.name} does not fit its recipe; run: stepmark backbones train {backbone}")
    else:  # its buffers may be the constants of a dataset's module, which nobody may write into
        for part in module.modules():
            part._buffers.update({name: None if b is None else b.clone() for name, b in part._buffers.items()})
    module = module.to(device=device, dtype=dtype).eval()
    return module.requires_grad_(False)


def _tied(module: nn.Module) -> set[str]:
    """Names of parameters that share storage with another one (safetensors stores such a pair once)."""
    first: dict[int, str] = {}
    tied: set[str] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if value.data_ptr() in first:
            tied |= {name, first[value.data_ptr()]}
        first.setdefault(value.data_ptr(), name)
    return tied


def save(backbone: str, module: nn.Module, seconds: float, report: dict[str, float]) -> Path:
    """Write weights and manifest entry, each whole or not at all."""
    import torch
    from safetensors.torch import save as to_bytes

    WEIGHTS.mkdir(exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if value.data_ptr() in seen and value.numel():
            continue
        seen.add(value.data_ptr())
        value = value.detach().cpu().contiguous()
        half = recipe(backbone).fp16 and value.is_floating_point()
        tensors[name] = value.half() if half else value
    data = to_bytes(tensors)
    path = WEIGHTS / f"{backbone}.safetensors"
    _write(path, data)
    entries = manifest()
    entries[backbone] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "params": sum(p.numel() for p in module.parameters()),
        "seconds": round(seconds, 1),
        "report": report,
        "torch": torch.__version__.split("+")[0],
    }
    _write(WEIGHTS / "manifest.json", (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode())
    return path


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(path.suffix + f".{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def train(backbone: str, progress: Progress | None = None) -> dict[str, float]:
    """Run a recipe from its fixed seed and store the weights. Minutes on one core; returns the recipe's report."""
    import torch
    from tqdm import tqdm

    spec = recipe(backbone)
    if spec.train is None:
        raise ValueError(f"{backbone} is analytic: it has no weights to train")
    torch.set_num_threads(1)
    module = spec.build()
    start = time.perf_counter()
    report = spec.train(module, progress or (lambda it, desc: tqdm(it, desc=desc, mininterval=1.0)))
    save(backbone, module, time.perf_counter() - start, report)
    return report
