"""Source files as syntax trees, and what is said when a file is none."""

from __future__ import annotations

import ast
from importlib.util import decode_source
from pathlib import Path


class PluginError(Exception):
    """A plugin cannot be read. One line that names the file, the line and the mend."""


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, in the encoding that Python itself would read it in (a byte-order mark is no fault).

    Raises:
        PluginError: it has none, or cannot be read.
    """
    try:
        return ast.parse(decode_source(path.read_bytes()))
    except SyntaxError as error:
        if str(error.msg).startswith("invalid or missing encoding"):
            raise PluginError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
        raise PluginError(f"{path}{f':{error.lineno}' if error.lineno else ''}: {error.msg}") from None
    except UnicodeDecodeError:
        raise PluginError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; brackets in brackets without end
        raise PluginError(f"{path}: no Python source: {error}") from None
    except OSError as error:
        raise PluginError(f"{path}: cannot be read: {error.strerror or error}") from None
