"""Digests of sources: what makes a record old is a change of what runs, not of what is said about it.

A digest is taken over syntax trees without comments, layout and docstrings, of a method without its paper, claims, tasks
and variants. Of shared code only those top-level definitions count that are reached, by name, from where one starts:
a track may gain functions, and functions may move from one of its modules to another, and no record gets old.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from stepmark.places import PACKAGE
from stepmark.syntax import parse

# of a method: what is said about it, not what runs
METADATA = ("paper", "claims", "tasks", "variants", "unclaimed", "trainings")
SHARED = ("stepmark.tracks", "stepmark.backbones", "stepmark.hub")  # where what is imported is followed


class Definition(NamedTuple):
    """A top-level statement of a module."""

    defined: frozenset[str]
    used: frozenset[str]  # identifiers that stand in it
    dump: str  # its syntax tree as text; of an import nothing, for what it leads to counts
    imports: tuple[tuple[str, str, str], ...]  # (name here, module, name there or "" for the module itself)


def code_digest(path: Path) -> str:
    """sha256 of what a source file makes happen. Of a plugin folder (`path` is its __init__.py) all Python files count."""
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    sha = hashlib.sha256()
    for file in files:
        for definition in definitions(file):
            # Of shared code it matters what is imported, not from where: functions may move.
            names = [(here, there or module) for here, module, there in definition.imports]
            sha.update(f"{definition.dump}{sorted(names)}".encode())
    return sha.hexdigest()


def reach_digest(starts: Iterable[tuple[Path, Iterable[str] | None]], leave_out: Iterable[Path] = ()) -> str:
    """sha256 over every definition that is reached from the given (file, names); None: from all of the file.

    Imports from tracks and backbones are followed. `leave_out`: files whose own definitions do not count.
    """
    left_out = set(leave_out)
    read = functools.cache(definitions)
    reached: set[tuple[Path, int]] = set()
    libraries: set[str] = set()  # imports that lead out of what is followed
    asked: set[tuple[Path, str]] = set()
    waiting: list[tuple[Path, str]] = []
    for path, roots in starts:
        whole = [d.defined if d.defined else d.used for d in read(path)] if roots is None else []
        waiting += [(path, name) for names in ([roots] if roots is not None else whole) for name in names]
    while waiting:
        at = waiting.pop()
        if at in asked:
            continue
        asked.add(at)
        path, name = at
        for index, definition in enumerate(read(path)):
            if name not in definition.defined:
                continue
            if not definition.dump:  # an import at the top of the file: only what is asked of it
                for here, module, there in definition.imports:
                    if here == name and _file(module) is None and path not in left_out:
                        libraries.add(f"{here} is {module} {there}")
                    elif here == name:  # of a whole module its users say what they use
                        waiting += _led_to(module, there, frozenset())
            elif (path, index) not in reached:
                reached.add((path, index))
                waiting += [(path, used) for used in definition.used]
                for module, there in _modules(read(path), definition):
                    waiting += _led_to(module, there, definition.used)
    dumps = sorted(read(path)[index].dump for path, index in reached if path not in left_out)
    return hashlib.sha256("\n".join([*dumps, *sorted(libraries)]).encode()).hexdigest()


def _modules(file: Iterable[Definition], definition: Definition) -> Iterator[tuple[str, str]]:
    """(module, name) of the imports inside a definition, and of those at the top of its file that it uses."""
    yield from (each[1:] for each in definition.imports)
    for other in file:
        if not other.dump:
            yield from ((module, there) for here, module, there in other.imports if here in definition.used)


def _led_to(module: str, name: str, used: frozenset[str]) -> list[tuple[Path, str]]:
    """Where an import leads: to a name of a module, or, of a whole module, to every name that the user mentions."""
    whole = _file(_inside(module, name)) if name else _file(module)
    if whole is not None:
        return [(whole, each) for each in used]
    path = _file(module)
    return [] if path is None else [(path, name)]


def _inside(module: str, name: str) -> str:
    return f"{module}/{name}" if module.startswith("/") else f"{module}.{name}"


@lru_cache(maxsize=1024)
def _file(module: str) -> Path | None:
    """The file of a module whose code is followed; None where it is not, or where there is no such module."""
    if not module.startswith((*SHARED, "/")):
        return None
    stem = Path(module) if module.startswith("/") else PACKAGE.joinpath(*module.split(".")[1:])
    return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None)


def definitions(path: Path) -> tuple[Definition, ...]:
    """The top-level statements of a file, parsed again only after it has changed."""
    state = path.stat()
    return _definitions(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=4096)
def _definitions(path: Path, state: tuple[int, ...]) -> tuple[Definition, ...]:
    """`state` stands for the bytes of the file."""
    found = []
    tree = parse(path)
    asked = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    # Words that the code itself reads are no longer mere words.
    for node in (tree if asked & {*METADATA, "__doc__"} else _Bare().visit(tree)).body:
        inside = list(ast.walk(node))
        used = {n.id for n in inside if isinstance(n, ast.Name)} | {
            n.attr for n in inside if isinstance(n, ast.Attribute)
        }
        imports = tuple(each for n in inside for each in _imports(n, path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined = {node.name}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined = {here for here, _, _ in imports}
        else:
            defined = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        found.append(Definition(frozenset(defined), frozenset(used), "" if is_import else _dump(node), imports))
    return tuple(found)


def _imports(node: ast.AST, path: Path) -> list[tuple[str, str, str]]:
    if isinstance(node, ast.Import):
        return [(a.asname or a.name.partition(".")[0], a.name, "") for a in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            folder = [path.parent, *path.parent.parents][node.level - 1]
            if path.is_relative_to(PACKAGE):
                module = ".".join(filter(None, [*folder.relative_to(PACKAGE.parent).parts, module]))
            else:  # a plugin that is a folder: its modules have no name of their own, so a path stands for it
                module = str(folder.joinpath(*module.split(".")) if module else folder)
        return [(a.asname or a.name, module, a.name) for a in node.names]
    return []


def _dump(node: object) -> str:
    """A syntax tree as text that is the same on every version of Python, which `ast.dump` is not."""
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []
        ]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    return repr(node)


class _Bare(ast.NodeTransformer):
    """Drops docstrings, and of classes what is only metadata."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            ) and ast.get_docstring(node, clean=False):
                body = body[1:]
            if isinstance(node, ast.ClassDef):
                body = [line for line in body if not _is_metadata(line)]
            node.body = body or [ast.Pass()]  # type: ignore[attr-defined]
        return node


def _is_metadata(line: ast.stmt) -> bool:
    targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
    return any(isinstance(t, ast.Name) and t.id in METADATA for t in targets)
