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
    """Prepared states, solutions, the index of plugins, locks: `$STEPMARK_CACHE`, else `~/.cache/stepmark`."""
    return Path(os.environ.get("STEPMARK_CACHE") or Path.home() / ".cache" / "stepmark")


def results_folder(tier: str) -> Path:
    """Where records go by default: the published folder for tier embedded, a private one for smoke and hub.

    Nobody else can run a record of a checkpoint folder again that lies here only: whoever publishes it says so.
    """
    root = checkout()
    if root is None:
        return Path("stepmark-results")
    return root / "leaderboard" / "results" if tier == "embedded" else root / ".stepmark" / "results"
