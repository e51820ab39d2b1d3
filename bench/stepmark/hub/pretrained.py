"""Models of diffusers and transformers from a folder: offline, from safetensors, without code of the folder's own."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def opened(kind: Any, folder: Path, **options: Any) -> Any:
    """from_pretrained of a folder, offline and without code of its own; failures in one line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with _quiet():
            return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # many libraries, many kinds: a folder that cannot be read is the user's to mend
        raise ValueError(
            f"{folder} cannot be loaded ({first_line(error)}); its files must be whole and of one model, and ask for no "
            "code of their own"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries have to say about a folder is said by us, or not at all."""
    names = ("diffusers.utils.logging", "transformers.utils.logging")
    loggings: list[Any] = [sys.modules[name] for name in names if name in sys.modules]
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggings]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for each in loggings:
                each.set_verbosity_error()
                each.disable_progress_bar()
            yield
    finally:
        for each, verbosity, bars in before:
            each.set_verbosity(verbosity)
            if bars:
                each.enable_progress_bar()


def first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line.split('. ')[0][:250]}"


def whole(folder: Path, info: dict[str, Any]) -> None:
    """Raise ValueError, in one line, where the weights of a folder are not those that its configuration asks for."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {name: sorted(map(str, info.get(name) or [])) for name in names}
    computed = ("inv_freq", "position_ids")  # old files hold tables that models now compute
    found["unexpected_keys"] = [key for key in found["unexpected_keys"] if not key.endswith(computed)]
    if found["mismatched_keys"]:
        raise ValueError(
            f"{folder}: {found['mismatched_keys'][0]}: other shapes than config.json asks for; they belong to different models"
        )
    if found["missing_keys"]:
        raise ValueError(
            f"{folder}: the weights lack {found['missing_keys'][0]} and {len(found['missing_keys']) - 1} more that "
            "config.json asks for; download them again"
        )
    if found["unexpected_keys"]:
        raise ValueError(
            f"{folder}: the weights hold {found['unexpected_keys'][0]}, of which config.json knows nothing"
        )
