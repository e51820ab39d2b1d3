"""Source files as syntax trees, and what is said when a file is none."""

from __future__ import annotations

import ast
from pathlib import Path


class PluginError(Exception):
    """A plugin cannot be read. One line that names the file, the line and the mend."""


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file.

    Raises:
        PluginError: it has none.
    """
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise PluginError(f"{path}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise PluginError(f"{path}: not UTF-8 text") from None
