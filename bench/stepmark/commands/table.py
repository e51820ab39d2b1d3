"""Rows of text under each other."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence


def columns(rows: Sequence[tuple[str, ...]], indent: str = "  ", most: int | None = None) -> str:
    """Rows of equally many cells, each column as wide as its widest cell; lines end at `most` characters, if that is said."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(line if most is None or len(line) <= most else line[: most - 3].rstrip() + "..." for line in lines)


def screen() -> int | None:
    """Characters in a line of the terminal; None where a file or another program reads, which gets all there is."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
