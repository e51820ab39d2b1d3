"""Finding plugins without importing them, and mounting their folders.

`methods`, `datasets`, `kernels` and `leaderboard` lie at the root of the checkout, outside the package, and hold no
`__init__.py`: a top-level package called `datasets` would shadow Hugging Face's. They are mounted as namespace packages
`stepmark.methods`, `stepmark.datasets` ...: from the checkout, else from inside the wheel, plus
every folder in `$STEPMARK_METHODS` and every entry point of group `stepmark.methods`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from stepmark import index, literals, names
from stepmark.digests import code_digest, reach_digest
from stepmark.literals import MethodInfo
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.places import PACKAGE, checkout
from stepmark.syntax import PluginError
from stepmark.task import Dataset, Task

MOUNTS = ("methods", "datasets", "kernels", "leaderboard")
MOST_TRAININGS = 10
NAMED = (
    "tasks",
    "baselines",
    "claims",
    "trainings",
)  # what a variant may name anew, beside the attributes of its class
ID = r"[a-z0-9][a-z0-9_]{0,63}"
DIGITS = 16  # of a digest, as records keep it
TRACK_CALLS = ("handles", "layers", "inputs", "check", "reference_call", "score")  # what the harness asks of a track


def method_folders() -> list[Path]:
    """Every folder that holds `<track>/<id>.py`: in-tree first, then `$STEPMARK_METHODS`, then entry points.

    Raises:
        PluginError: `$STEPMARK_METHODS` names what is no folder, or one whose plugins lie in no folder of a track.
    """
    folders = [(checkout() or PACKAGE) / "methods"]
    for item in filter(None, os.environ.get("STEPMARK_METHODS", "").split(os.pathsep)):
        path, layout = Path(item).expanduser(), f"lay methods out as <track>/<id>.py; tracks: {', '.join(tracks())}"
        if not path.is_dir():
            raise PluginError(f"STEPMARK_METHODS names {item!r}, which is no folder; {layout}")
        placed = any((path / track).is_dir() for track in tracks())
        if not placed and next(itertools.chain(path.glob("*.py"), path.glob("*/*.py")), None):
            raise PluginError(f"STEPMARK_METHODS names {item!r}, which has no folder of a track; {layout}")
        folders.append(path.resolve())
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
        folders = [root / name]
        if name == "methods":
            with contextlib.suppress(PluginError):  # an import says nothing of it; whoever asks for methods is told
                folders = method_folders()
        module.__path__ = [str(folder) for folder in folders]
        sys.modules[module.__name__] = module
        setattr(sys.modules["stepmark"], name, module)


def read_methods(path: Path) -> tuple[MethodInfo, ...]:
    """Metadata of the one `Method` subclass in a file, and of its variants.

    Raises:
        PluginError: no such class, two of them, an attribute that is no plain literal, a name that is no id.
    """
    source = path / "__init__.py" if path.is_dir() else path
    if not re.fullmatch(ID, path.stem):
        proper = re.sub("[^a-z0-9_]", "_", path.stem.lower()).lstrip("_")
        raise PluginError(
            f"{path}: the name of the file is the method's id, of small letters, digits and _: rename it"
            + (f" {proper}{path.suffix}" if re.fullmatch(ID, proper) else "")
        )
    classes = [
        node
        for node in literals.outline(source).body
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Method" for b in node.bases)
    ]
    if len(classes) != 1:
        raise PluginError(f"{source}: has {len(classes)} subclasses of Method, must have exactly one")
    node = classes[0]
    values = literals.assigned(node.body, source, ("paper", *NAMED, "variants", "unclaimed"))
    main = MethodInfo(
        id=path.stem,
        track=track_above(path),
        path=source,
        class_name=node.name,
        doc=ast.get_docstring(node) or "",
        paper=values.get("paper"),
        tasks=values.get("tasks", ()),
        baselines=values.get("baselines", ()),
        claims=values.get("claims", ()),
        unclaimed=values.get("unclaimed", ""),
        trainings=values.get("trainings", 1),
    )
    _check_named(main, f"{source}")
    variants = values.get("variants", ())
    if not isinstance(variants, tuple) or not all(isinstance(v, Variant) for v in variants):
        raise PluginError(f"{source}: variants must be a tuple of Variant(...)")
    return (main, *(_variant(main, each, literals.names(node.body)) for each in variants))


def _variant(main: MethodInfo, variant: Variant, attributes: set[str]) -> MethodInfo:
    where = f"{main.path}: variant {str(variant.id)[:80]!r}"
    if not isinstance(variant.id, str) or not re.fullmatch(ID, variant.id):
        raise PluginError(f"{where}: an id is made of small letters, digits and _")
    if not isinstance(variant.says, str) or not variant.says.strip():
        raise PluginError(f'{where}: says="..." must say what is different')
    overrides = dict(variant.overrides)
    unknown = sorted(set(overrides) - attributes - {*NAMED, "ranks"} | set(overrides) & {"paper", "variants"})
    if unknown:
        raise PluginError(
            f"{where} sets {', '.join(unknown)}, which the class {main.class_name} does not define; "
            "give the class an attribute of that name"
        )
    made = replace(
        main,
        id=variant.id,
        tasks=overrides.pop("tasks", main.tasks),
        baselines=overrides.pop("baselines", tuple(b for b in main.baselines if b != variant.id)),
        claims=overrides.pop("claims", ()),
        trainings=overrides.pop("trainings", main.trainings),
        base=main.id,
        says=variant.says,
        overrides=overrides,
    )
    _check_named(made, where)
    return made


def _check_named(info: MethodInfo, where: str) -> None:
    """Raise `PluginError` where tasks, baselines or claims are not what they must be."""
    for name, value in (("tasks", info.tasks), ("baselines", info.baselines)):
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            raise PluginError(f"{where}: {name} must be a tuple of strings, such as ('a', 'b') or ('a',)")
    if info.paper is not None and not isinstance(info.paper, Paper):
        raise PluginError(f"{where}: paper must be Paper(...) or None")
    if not isinstance(info.claims, tuple) or not all(isinstance(c, Claim) for c in info.claims):
        raise PluginError(f"{where}: claims must be a tuple of Claim(...)")
    if not isinstance(info.unclaimed, str):
        raise PluginError(f'{where}: unclaimed="..." says in words why there is no headline claim')
    if type(info.trainings) is not int or not 1 <= info.trainings <= MOST_TRAININGS:
        raise PluginError(f"{where}: trainings says with how many seeds it is prepared, 1 to {MOST_TRAININGS}")
    if not info.tasks:
        raise PluginError(f"{where}: tasks is empty; name at least one task (stepmark list tasks)")


def track_above(path: Path) -> str:
    """The track of a plugin: the folder below a folder of methods, or the nearest one that is called like a track."""
    for folder in method_folders():
        if path.is_relative_to(folder) and path.parent != folder:
            return path.relative_to(folder).parts[0]
    known = set(tracks())
    return next((parent.name for parent in path.parents if parent.name in known), path.parent.name)


def _method_files(skipped: dict[Path, str]) -> Iterator[Path]:
    """Every plugin, at any depth below `<folder>/<track>/`; a folder with an __init__.py is one plugin.

    skipped: gains the folders that cannot be read, or hold plugins and are called like no track.
    """
    known = tracks()
    for folder in method_folders():
        waiting = []
        for entry in _entries(folder, skipped):
            if entry.name in known:
                waiting.append(Path(entry))
            elif _is(entry.is_dir) and next(Path(entry).glob("*.py"), None):
                skipped[Path(entry)] = f"{entry.path}: {names.unknown('track', entry.name, known)}"
        while waiting:
            for entry in _entries(waiting.pop(0), skipped):
                if (_is(entry.is_file) and entry.name.endswith(".py")) or (
                    _is(entry.is_dir) and os.path.exists(os.path.join(entry, "__init__.py"))
                ):
                    yield Path(entry)
                elif _is(entry.is_dir):
                    waiting.append(Path(entry))


def _entries(folder: Path, skipped: dict[Path, str] | None = None) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith((".", "_"))), key=lambda e: e.name)
    except OSError as error:
        if skipped is None:
            raise
        skipped[folder] = f"{folder}: cannot be read: {error.strerror}"
        return []


def _is(asked: Callable[[], bool]) -> bool:
    """False also of what cannot be followed, such as a link to itself."""
    with contextlib.suppress(OSError):
        return asked()
    return False


_left_out: dict[Path, str] = {}


def left_out() -> list[str]:
    """What `methods` left out when it was last asked, and why: a line for each file or folder."""
    return list(_left_out.values())


def methods() -> dict[str, MethodInfo]:
    """Every method and variant by id. A file that cannot be read, or whose ids another has taken, is `left_out`: what is
    wrong with one plugin stops no other.

    Raises:
        PluginError: `$STEPMARK_METHODS` leads nowhere.
    """
    found: dict[str, MethodInfo] = {}
    skipped: dict[Path, str] = {}
    for path, infos in _read(_method_files(skipped), skipped):
        ids = [info.id for info in infos]
        taken = next((each for each in ids if each in found or ids.count(each) > 1), None)
        if taken is not None:
            other = found[taken].path if taken in found else path
            skipped[path] = f"{path}: method id {taken!r} stands in {other} too; rename one"
        else:
            found |= {info.id: info for info in infos}
    _left_out.clear()
    _left_out.update(skipped)
    return _with_brought(found)


_known: dict[
    Path, tuple[tuple[int, int, int], tuple[MethodInfo, ...]]
] = {}  # path -> (state of the file, what it says)


def _read(paths: Iterable[Path], skipped: dict[Path, str]) -> Iterator[tuple[Path, tuple[MethodInfo, ...]]]:
    """What the files say, each read again only after it has changed: a suite asks several times a cell, and a thousand
    files take seconds to parse, so that an index of them is kept on disk. `skipped` gains those that cannot be read.
    """
    if not _known:
        _known.update(index.load())
    changed = False
    for path in paths:
        try:
            state = index.state_of(path / "__init__.py" if path.suffix != ".py" else path)
            if path not in _known or _known[path][0] != state:
                _known[path] = (state, read_methods(path))
                changed = True
        except (PluginError, OSError) as error:
            skipped[path] = str(error)
            continue
        yield path, _known[path][1]
    if changed:
        index.save(_known)


def tracks() -> list[str]:
    """Names of the tracks: packages in `tracks/` that have tasks. One without any is what a track will stand on."""
    files = sorted(Path(entry) / "__init__.py" for entry in _entries(PACKAGE / "tracks") if entry.is_dir())
    return [f.parent.name for f in files if f.is_file() and "\nTASKS" in f.read_text(encoding="utf-8")]


@lru_cache(maxsize=1)
def _placed_tasks() -> dict[str, tuple[str, Task, Path]]:
    """Task id -> (track, Task, module): of every module of a track that has TASKS.

    A module beside the track's own holds tasks whose inputs or metrics are its own.
    """
    found: dict[str, tuple[str, Task, Path]] = {}
    for track in tracks():
        for path in sorted((PACKAGE / "tracks" / track).rglob("[!.]*.py"), key=lambda p: (p.name != "__init__.py", p)):
            if "\nTASKS" not in path.read_text(encoding="utf-8"):
                continue
            for task in literals.assigned(literals.outline(path).body, path, ("TASKS",)).get("TASKS", ()):
                if task.id in found:
                    raise PluginError(f"{path}: task {task.id!r} also stands in {found[task.id][2]}; rename one")
                found[task.id] = (track, task, path)
    return found


@lru_cache(maxsize=1)
def fixed_tasks() -> dict[str, tuple[str, Task]]:
    """Task id -> (track, Task), read without importing the tracks."""
    return {name: (track, task) for name, (track, task, _) in _placed_tasks().items()}


class Source(Protocol):
    """Where tasks come from that are no literals of a track: somebody brings them while the program runs.

    `restorer`: the module whose `restore()` adds the same source in a process that this one starts.
    """

    restorer: str

    def tasks(self) -> dict[str, tuple[str, Task]]:
        """Task id -> (track, Task). Their `module` is set."""

    def suits(self, info: MethodInfo) -> list[str]:
        """Those of its tasks that a method can be run on, though it does not name them."""

    def inputs_digest(self, task: Task) -> str:
        """sha256 over what the items of a task are made from, in the place of a dataset's."""


_sources: list[Source] = []


def add_source(source: Source) -> None:
    """From now on its tasks stand among the others, in this process."""
    _sources.append(source)


def remove_source(source: Source) -> None:
    """Undo `add_source`."""
    _sources.remove(source)


def restorers() -> list[str]:
    """Modules whose `restore()` a started process calls, to know the tasks that this one knows."""
    return [source.restorer for source in _sources]


def _brought() -> dict[str, tuple[str, Task]]:
    return {name: placed for source in _sources for name, placed in source.tasks().items()}


def _with_brought(found: dict[str, MethodInfo]) -> dict[str, MethodInfo]:
    """The methods with the tasks that they gain."""
    gained = {i: [task for source in _sources for task in source.suits(m)] for i, m in found.items() if _sources}
    return found | {i: replace(found[i], tasks=(*found[i].tasks, *more)) for i, more in gained.items() if more}


def tasks() -> dict[str, tuple[str, Task]]:
    """As `fixed_tasks`, with those that somebody brings."""
    return fixed_tasks() | _brought()


def track_file(task: str) -> Path:
    """The module of a task's inputs, check and score."""
    if task in (brought := _brought()):
        spec = importlib.util.find_spec(brought[task][1].module)
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin)
    return _placed_tasks()[task][2]


def track_module(task: str) -> str:
    """The name of that module, to import."""
    path = track_file(task).relative_to(PACKAGE.parent).with_suffix("")
    return ".".join(path.parts if path.name != "__init__" else path.parent.parts)


def datasets() -> dict[str, Dataset]:
    """Every dataset by id, read without importing it."""
    folder = (checkout() or PACKAGE) / "datasets"
    found: dict[str, Dataset] = {}
    for path in sorted(folder.glob("[!.]*.py")):
        values = literals.assigned(literals.outline(path).body, path, ("DATASET",))
        if "DATASET" in values:
            found[path.stem] = values["DATASET"]
    return found


def source_digests(info: MethodInfo, task: Task) -> dict[str, str]:
    """Digests of a method, of what it and the harness use of its track, of the task and of the dataset.

    Of a task all counts but its summary and how many cells there are.
    """
    more = {"summary", "rungs", "smoke_n", "smoke_rungs", "seeds", "module", "words", "checkpoint", "origin", "shown"}
    more |= {"price", "absent", "untrained", "follows"}  # which the digests of the networks and inputs hold
    asked = {name: value for name, value in asdict(task).items() if name not in more}
    files = [*info.path.parent.rglob("[!.]*.py")] if info.path.name == "__init__.py" else [info.path]
    found = {
        "method": method_digest(info),
        "track": reach_digest([(track_file(task.id), TRACK_CALLS), *((f, None) for f in files)], leave_out=files),
        "task": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        "dataset": _dataset_digest(task),
    }
    return {name: digest[:DIGITS] for name, digest in found.items()}


def method_digest(info: MethodInfo) -> str:
    """Digest of a method's own file, and of what a variant sets: a new variant leaves the records of others current."""
    own = code_digest(info.path)
    return own if not info.overrides else hashlib.sha256(f"{own} {sorted(info.overrides.items())}".encode()).hexdigest()


def _dataset_digest(task: Task) -> str:
    for source in _sources:
        if task.id in source.tasks():
            return source.inputs_digest(task)
    return code_digest((checkout() or PACKAGE) / "datasets" / f"{task.dataset}.py")


def load_class(info: MethodInfo) -> type[Method]:
    """Execute a method's file as a new module and return its class, of a variant with its own settings.

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
    kind: type[Method] = getattr(module, info.class_name)
    if info.base is None:
        return kind
    named = {"tasks": info.tasks, "baselines": info.baselines, "claims": info.claims, "__doc__": info.says}
    return type(kind.__name__, (kind,), named | info.overrides | {"__module__": kind.__module__})
