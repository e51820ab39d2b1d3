"""Reading what a source file says of itself without running it: the literals of methods, tracks and datasets."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from stepmark.method import Claim, Paper, Variant
from stepmark.syntax import PluginError, parse
from stepmark.task import Dataset, Task

CONSTRUCTORS: dict[str, type] = {"Paper": Paper, "Claim": Claim, "Task": Task, "Dataset": Dataset}

TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "str | None": (str, type(None)), "int": (int,), "bool": (bool,)}


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
    unclaimed: str = ""  # of a paper without a headline claim: why there is none
    trainings: int = 1  # seeds that it is run with at least
    base: str | None = None  # of a variant: the id of the method in whose file it stands
    says: str = ""  # of a variant: what is different
    overrides: dict[str, Any] = field(default_factory=dict)  # of a variant: attributes that replace the method's

    @property
    def title(self) -> str:
        """First line of the docstring; of a variant what it says."""
        if self.says:
            return self.says
        return self.doc.strip().splitlines()[0] if self.doc else self.id

    def seeds(self, task: Task, tier: str = "embedded") -> int:
        """How many seeds it is run with on a task. Those beyond the task's own are further trainings: they get the items of
        the task's seeds again, in turn."""
        if tier == "smoke":
            return 1
        return task.seeds if task.untrained else max(task.seeds, self.trainings)


def literal(node: ast.expr, path: Path, owner: str) -> Any:
    """Value of a plain literal, in which Paper(...), Claim(...), Variant(...), Task(...) and Dataset(...) may stand.
    `owner`: the name that it is assigned to.

    Raises:
        PluginError: anything that would have to be run.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = Variant if node.func.id == "Variant" else CONSTRUCTORS.get(node.func.id)
        if kind is not None:
            return _made(kind, node, path, owner)
    if isinstance(node, (ast.Tuple, ast.List)):
        items = [literal(item, path, owner) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.Dict) and None not in node.keys:
        pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key]
        return {literal(key, path, owner): literal(value, path, owner) for key, value in pairs}
    try:
        return ast.literal_eval(node)
    except ValueError:
        piece = ast.unparse(node)
        raise PluginError(
            f"{path}:{node.lineno}: write a plain literal here, not {piece if len(piece) <= 60 else piece[:57] + '...'}: "
            f"{owner} is read without running the file, where names and calls have no value"
        ) from None


def _made(kind: type, node: ast.Call, path: Path, owner: str) -> Any:
    names = ["id", "says"] if kind is Variant else [f.name for f in fields(kind)]
    if len(node.args) > len(names) or any(
        k.arg is None or (kind is not Variant and k.arg not in names) for k in node.keywords
    ):
        raise PluginError(f"{path}:{node.lineno}: {kind.__name__} takes {', '.join(names)}")
    arguments = dict(zip(names, (literal(a, path, owner) for a in node.args), strict=False))
    arguments |= {str(k.arg): literal(k.value, path, owner) for k in node.keywords}
    for each in () if kind is Variant else fields(kind):
        wanted = TYPES.get(str(each.type))
        if wanted and each.name in arguments and not isinstance(arguments[each.name], wanted):
            said = f"{kind.__name__} takes {each.name} as {each.type}, not {arguments[each.name]!r}"
            raise PluginError(f"{path}:{node.lineno}: {said}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise PluginError(f"{path}:{node.lineno}: {error}") from None


_FUNCTION = re.compile(r"( *)(?:async )?def \w+\(")
_BEYOND = re.compile(r" *[^ \n]")


def outline(path: Path) -> ast.Module:
    """As `parse`, without functions: literals are a tenth of the text, and parsing all of it is what listing would wait
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
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # `parse` says what is wrong, if anything
        return parse(path)


def assigned(body: list[ast.stmt], path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Values of the wanted names among the assignments of a class or module."""
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
            found[target.id] = literal(statement.value, path, target.id)
    return found


def names(body: list[ast.stmt]) -> set[str]:
    """Every name that the assignments of a class or module set."""
    targets: list[ast.expr] = []
    for statement in body:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets.append(statement.target)
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
