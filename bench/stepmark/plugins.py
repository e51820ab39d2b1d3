"""Finding plugins without importing them, and mounting their folders.

`methods`, `datasets`, `kernels` and `leaderboard` lie at the root of the checkout, outside the package, and hold no
`__init__.py`: a top-level package called `datasets` would shadow Hugging Face's. They are mounted as namespace packages
`stepmark.methods`, `stepmark.datasets` ...: from the checkout, else from inside the wheel, plus
every folder in `$STEPMARK_METHODS` and every entry point of group `stepmark.methods`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepmark.method import Claim, Method, Paper
from stepmark.places import PACKAGE, checkout
from stepmark.task import CHECKPOINT, Dataset, Task

if TYPE_CHECKING:
    from stepmark.backbones.checkpoint import Made

MOUNTS = ("methods", "datasets", "kernels", "leaderboard")
DIGITS = 16  # of a digest, as records keep it
METADATA = ("paper", "claims", "tasks")  # of a method: what is said about it, not what runs
TRACK_CALLS = ("handles", "layers", "inputs", "check", "reference_call", "score")  # what the harness asks of a track


class PluginError(Exception):
    """A plugin cannot be read. One line that names the file, the line and the mend."""


@dataclass(frozen=True)
class MethodInfo:
    """What a method's file says of it, read without importing it."""

    id: str
    track: str
    path: Path
    class_name: str
    doc: str
    paper: Paper | None
    tasks: tuple[str, ...]
    baselines: tuple[str, ...]
    claims: tuple[Claim, ...]
    base: str | None = None  # of a variant: the id of the method in whose file it stands
    says: str = ""  # of a variant: what is different
    overrides: dict[str, Any] = field(default_factory=dict)  # of a variant: attributes that replace the method's

    @property
    def title(self) -> str:
        """First line of the docstring; of a variant what it says."""
        if self.says:
            return self.says
        return self.doc.strip().splitlines()[0] if self.doc else self.id


def method_folders() -> list[Path]:
    """Every folder that holds `<track>/<id>.py`: in-tree first, then `$STEPMARK_METHODS`, then entry points."""
    folders = [(checkout() or PACKAGE) / "methods"]
    for item in filter(None, os.environ.get("STEPMARK_METHODS", "").split(os.pathsep)):
        if not Path(item).is_dir():
            raise PluginError(
                f"STEPMARK_METHODS names {item!r}, which is no folder; give folders that hold <track>/<id>.py"
            )
        folders.append(Path(item).resolve())
    return [*folders, *_installed_folders()]


@lru_cache(maxsize=1)
def _installed_folders() -> list[Path]:
    """Folders that installed distributions offer; looked up once, for it reads the metadata of all of them."""
    folders: list[Path] = []
    for point in entry_points(group="stepmark.methods"):
        spec = importlib.util.find_spec(point.value)
        if spec is None or not spec.submodule_search_locations:
            raise PluginError(f"entry point {point.name} = {point.value!r} is no importable package of methods")
        folders.extend(Path(p) for p in spec.submodule_search_locations)
    return folders


def mount() -> None:
    """Make `stepmark.methods`, `.datasets`, `.kernels` and `.leaderboard` importable. Called once, by `import stepmark`."""
    root = checkout() or PACKAGE
    for name in MOUNTS:
        module = types.ModuleType(f"stepmark.{name}", f"Mounted from {name}/ (see stepmark.plugins).")
        folders = method_folders() if name == "methods" else [root / name]
        module.__path__ = [str(folder) for folder in folders]
        sys.modules[module.__name__] = module
        setattr(sys.modules["stepmark"], name, module)


CONSTRUCTORS: dict[str, type] = {"Paper": Paper, "Claim": Claim, "Task": Task, "Dataset": Dataset}


def _literal(node: ast.expr, path: Path) -> Any:
    """Value of a plain literal, in which Paper(...), Claim(...), Task(...) and Dataset(...) may stand."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CONSTRUCTORS:
        kind = CONSTRUCTORS[node.func.id]
        names = [f.name for f in fields(kind)]
        if len(node.args) > len(names) or any(k.arg not in names for k in node.keywords):
            raise PluginError(f"{path}:{node.lineno}: {kind.__name__} takes {', '.join(names)}")
        arguments = dict(zip(names, (_literal(a, path) for a in node.args), strict=False))
        arguments |= {str(k.arg): _literal(k.value, path) for k in node.keywords}
        try:
            return kind(**arguments)
        except TypeError as error:
            raise PluginError(f"{path}:{node.lineno}: {error}") from None
    if isinstance(node, (ast.Tuple, ast.List)):
        items = [_literal(item, path) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_literal(k, path): _literal(v, path) for k, v in zip(node.keys, node.values, strict=True) if k}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise PluginError(
            f"{path}:{node.lineno}: write a plain literal here; it is read without running the file"
        ) from None


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise PluginError(f"{path}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise PluginError(f"{path}: not UTF-8 text") from None


_FUNCTION = re.compile(r"( *)(?:async )?def \w+\(")
_BEYOND = re.compile(r" *[^ \n]")


def _outline(path: Path) -> ast.Module:
    """As `_parse`, without functions: literals are a tenth of the text, and parsing all of it is what listing would wait
    for. What the lines do not show clearly is parsed whole.
    """
    kept: list[str] = []
    depth: int | None = None  # of the function that is being left out
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            found = _BEYOND.match(line)
            indent = found.end() - 1 if found else None
            inside = depth is not None and (indent is None or indent > depth or line[indent] == ")")
            if not inside:
                function = _FUNCTION.match(line)
                depth = len(function[1]) if function else None
                line = f"{function[1]}pass" if function else "" if found and line[found.end() - 1] == "@" else line
            kept.append("" if inside else line)
        return ast.parse("\n".join(kept))
    except (SyntaxError, UnicodeDecodeError):
        return _parse(path)


def _assigned(body: list[ast.stmt], path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for statement in body:
        target: ast.expr | None = None
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
        if isinstance(target, ast.Name) and target.id in wanted:
            assert isinstance(statement, (ast.Assign, ast.AnnAssign))
            assert statement.value is not None
            found[target.id] = _literal(statement.value, path)
    return found


def read_method(path: Path) -> MethodInfo:
    """Metadata of the one `Method` subclass in a file.

    Raises:
        PluginError: no such class, two of them, or an attribute that is no plain literal.
    """
    source = path / "__init__.py" if path.is_dir() else path
    state = source.stat()
    return _read_method(path, source, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=4096)
def _read_method(path: Path, source: Path, state: tuple[int, ...]) -> MethodInfo:
    """`state` stands for the bytes of the file: a suite asks for all methods several times a cell."""
    classes = [
        node
        for node in _outline(source).body
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Method" for b in node.bases)
    ]
    if len(classes) != 1:
        raise PluginError(f"{source}: has {len(classes)} subclasses of Method, must have exactly one")
    node = classes[0]
    values = _assigned(node.body, source, ("paper", "tasks", "baselines", "claims"))
    for name in ("tasks", "baselines"):
        if not isinstance(values.get(name, ()), tuple) or not all(isinstance(v, str) for v in values.get(name, ())):
            raise PluginError(f"{source}: {name} must be a tuple of strings, such as ('a', 'b') or ('a',)")
    if not all(isinstance(c, Claim) for c in values.get("claims", ())):
        raise PluginError(f"{source}: claims must be a tuple of Claim(...)")
    if not values.get("tasks"):
        raise PluginError(f"{source}: tasks is empty; name at least one task (stepmark list tasks)")
    return MethodInfo(
        id=path.stem,
        track=path.parent.name,
        path=source,
        class_name=node.name,
        doc=ast.get_docstring(node) or "",
        paper=values.get("paper"),
        tasks=values["tasks"],
        baselines=values.get("baselines", ()),
        claims=values.get("claims", ()),
    )


def _method_files() -> Iterator[Path]:
    for folder in method_folders():
        for track in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))):
            for path in sorted(track.iterdir()):
                if path.name.startswith((".", "_")):
                    continue
                if path.suffix == ".py" or (path / "__init__.py").exists():
                    yield path


def methods() -> dict[str, MethodInfo]:
    """Every method by id.

    Raises:
        PluginError: a file that cannot be read, or one id in two places.
    """
    found: dict[str, MethodInfo] = {}
    for path in _method_files():
        info = read_method(path)
        if info.id in found:
            raise PluginError(f"method id {info.id!r} stands in {found[info.id].path} and {info.path}; rename one")
        found[info.id] = info
    made = _checkpoint()
    if made is not None:
        found |= {i: replace(m, tasks=(*m.tasks, made.task.id)) for i, m in found.items() if made.suits(m)}
    return found


def tracks() -> list[str]:
    """Names of the tracks."""
    return sorted({track for track, _ in _track_files()})


def _track_files() -> list[tuple[str, Path]]:
    """(track, module): `tracks/<track>.py` and further parts of it, `tracks/<track>_<part>.py`.

    A part holds tasks whose inputs or metrics are its own, so that records of the other tasks do not hang on it.
    """
    paths = [p for p in sorted((PACKAGE / "tracks").glob("*.py")) if p.stem != "__init__"]
    stems = {p.stem for p in paths}
    return [(stem if (stem := p.stem.split("_")[0]) in stems else p.stem, p) for p in paths]


@lru_cache(maxsize=1)
def _placed_tasks() -> dict[str, tuple[str, Task, Path]]:
    found: dict[str, tuple[str, Task, Path]] = {}
    for track, path in _track_files():
        for task in _assigned(_outline(path).body, path, ("TASKS",)).get("TASKS", ()):
            if task.id in found:
                raise PluginError(f"{path}: task {task.id!r} also stands in track {found[task.id][0]}; rename one")
            found[task.id] = (track, task, path)
    return found


@lru_cache(maxsize=1)
def fixed_tasks() -> dict[str, tuple[str, Task]]:
    """Task id -> (track, Task), read without importing the tracks."""
    return {name: (track, task) for name, (track, task, _) in _placed_tasks().items()}


def tasks() -> dict[str, tuple[str, Task]]:
    """As `fixed_tasks`, with the task of the checkpoint folder that the environment names, where it names one."""
    made = _checkpoint()
    return fixed_tasks() if made is None else fixed_tasks() | {made.task.id: (made.track, made.task)}


def _checkpoint() -> Made | None:
    """What is made of a checkpoint folder (`stepmark run --backbone FOLDER`)."""
    if not os.environ.get("STEPMARK_BACKBONE"):
        return None
    from stepmark.backbones import checkpoint

    return checkpoint.current()


def track_file(task: str) -> Path:
    """The module of the track that holds a task."""
    if task.startswith(CHECKPOINT):
        return PACKAGE / "tracks" / f"{tasks()[task][0]}_checkpoint.py"
    return _placed_tasks()[task][2]


def datasets() -> dict[str, Dataset]:
    """Every dataset by id, read without importing it."""
    folder = (checkout() or PACKAGE) / "datasets"
    found: dict[str, Dataset] = {}
    for path in sorted(folder.glob("*.py")):
        values = _assigned(_outline(path).body, path, ("DATASET",))
        if "DATASET" in values:
            found[path.stem] = values["DATASET"]
    return found


def code_digest(path: Path, roots: Iterable[str] | None = None) -> str:
    """sha256 of what a source file makes happen: its syntax tree without comments, layout, docstrings, and a method's
    paper, claims and list of tasks. Correcting the text of a method leaves its records current.

    `roots`: only the top-level definitions of these names and what they use, directly or not, count: a track may gain
    functions without touching the methods that do not use them. Of a plugin folder all Python files count.
    """
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    sha = hashlib.sha256()
    for file in files:
        state = file.stat()
        definitions = _definitions(file, (state.st_mtime_ns, state.st_size, state.st_ino))
        wanted = set(range(len(definitions)))
        if roots is not None:
            open_names, seen, wanted = set(roots), set(), set()
            while open_names:
                name = open_names.pop()
                seen.add(name)
                for index, (defined, used, _) in enumerate(definitions):
                    if name in defined and index not in wanted:
                        wanted.add(index)
                        open_names |= used - seen
        for index in sorted(wanted):
            sha.update(definitions[index][2].encode())
    return sha.hexdigest()


@lru_cache(maxsize=4096)
def _definitions(path: Path, state: tuple[int, ...]) -> list[tuple[frozenset[str], frozenset[str], str]]:
    """(names defined, identifiers used, dump) of each top-level statement of a file."""
    found = []
    tree = _parse(path)
    asked = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    # Words that the code itself reads are no longer mere words.
    for node in (tree if asked & {*METADATA, "__doc__"} else _Bare().visit(tree)).body:
        inside = list(ast.walk(node))
        used = {n.id for n in inside if isinstance(n, ast.Name)} | {
            n.attr for n in inside if isinstance(n, ast.Attribute)
        }
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined = {node.name}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            used |= {alias.name for alias in node.names}
        else:
            defined = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        found.append((frozenset(defined), frozenset(used), _dump(node)))
    return found


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


def source_digests(info: MethodInfo, task: Task) -> dict[str, str]:
    """Digests of a method, of what it and the harness use of its track, of the task and of the dataset.

    Of a task all counts but its summary and how many cells there are.
    """
    path = track_file(task.id)
    track = code_digest(path, {*TRACK_CALLS, *identifiers(info.path)} - {"TASKS"})
    whole = path.with_name(f"{tasks()[task.id][0]}.py")
    if path != whole:  # a part of a track uses what the track defines
        used = (identifiers(info.path) | identifiers(path)) - {"TASKS"}
        track = hashlib.sha256(f"{track} {code_digest(whole, used)}".encode()).hexdigest()
    more = {"summary", "rungs", "smoke_rungs", "seeds", "module", "words", "checkpoint", "origin", "shown"}
    more |= {"price", "absent", "untrained", "follows"}  # which the digests of the networks and inputs hold
    asked = {name: value for name, value in asdict(task).items() if name not in more}
    found = {
        "method": code_digest(info.path),
        "track": track,
        "task": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        "dataset": _dataset_digest(task),
    }
    return {name: digest[:DIGITS] for name, digest in found.items()}


def _dataset_digest(task: Task) -> str:
    if task.from_folder:
        from stepmark.backbones import checkpoint

        return checkpoint.digest_of_inputs()
    return code_digest((checkout() or PACKAGE) / "datasets" / f"{task.dataset}.py")


def identifiers(path: Path) -> frozenset[str]:
    """Every name that a source file mentions."""
    state = path.stat()
    parts = _definitions(path, (state.st_mtime_ns, state.st_size, state.st_ino))
    return frozenset().union(*(defined | used for defined, used, _ in parts))


def load_class(info: MethodInfo) -> type[Method]:
    """Execute a method's file as a new module and return its class.

    A new module each time: globals that a plugin left behind in one cell are not there in the next.
    """
    name = f"stepmark.methods.{info.track}.{info.id}"
    spec = importlib.util.spec_from_file_location(name, info.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PluginError(f"{info.path}: {type(error).__name__} on import: {error}") from error
    finally:
        if previous is not None:
            sys.modules[name] = previous
        else:
            sys.modules.pop(name, None)
    return getattr(module, info.class_name)
