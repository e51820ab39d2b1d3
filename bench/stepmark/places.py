"""Where Stepmark keeps things on this machine. Imports nothing heavy: every command asks."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent


def checkout() -> Path | None:
    """Root of the checkout this package runs from, or None when it runs from a wheel."""
    root = PACKAGE.parent.parent
    return root if (root / "pyproject.toml").exists() and (root / "methods").is_dir() else None


def cache_folder() -> Path:
    """Prepared states, solutions, the index of plugins: `$STEPMARK_CACHE`, else `~/.cache/stepmark`.

    Raises:
        FileNotFoundError: neither is known, as for a user without a name in a container.
    """
    if chosen := os.environ.get("STEPMARK_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "stepmark"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder: name a folder in STEPMARK_CACHE") from None


def writable(folder: Path, mend: str) -> None:
    """Make a folder, and a file in it that is gone at once: asked before anything is measured that is to lie there.

    Raises:
        ValueError: it cannot be done, in one line with the mend.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}); {mend}") from None


def may_change(path: Path) -> None:
    """Ask whether a file, or what there is yet of its folders, may be written; it is left as it is.

    Raises:
        ValueError: it may not, in one line.
    """
    there = next(each for each in (path, *path.parents) if each.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written; it is another user's, or name another folder with --results")


def writable_cache() -> None:
    """`writable` of the cache."""
    writable(cache_folder(), "name a folder in STEPMARK_CACHE")


def results_folder(tier: str) -> Path:
    """Where records go by default: the published folder for tier embedded, a private one for smoke and hub.

    Nobody else can run a record of a checkpoint folder again that lies here only: whoever publishes it says so.
    """
    root = checkout()
    if root is None:
        return Path("stepmark-results")
    return root / "leaderboard" / "results" if tier == "embedded" else root / ".stepmark" / "results"
