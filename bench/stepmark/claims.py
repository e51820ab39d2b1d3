"""The claim language and its verdicts.

A claim is one sentence such as `fid[lcm,4] <= 1.1 * fid[ddim_cfg,50] and nfe[lcm,4] == 4`:

- `metric[method,rung]` is a measured figure: a metric of the task, a method by its bare name, a rung of its
  ladder; `*` in the place of a rung is every rung that the methods have in common, `4..16` every rung of the ladder
  from 4 to 16: the sentence then holds *at each* of them, one after the other in all places where a span stands;
- numbers, `+ - * /`, unary minus, parentheses, `abs(x)`, `min(x, y, ...)`, `max(x, y, ...)`;
- comparisons `< <= > >= == !=`, chained at will (`1 <= a[m,1] <= 2`), joined by `and`.

Nothing else parses, and nothing is ever evaluated by Python: the sentence is read with `ast` against this
list, and figures are float64 arrays. `==` and `!=` are exact, without tolerance: meant for counts, which
float64 holds exactly up to 2**53 through + - * (and / where it comes out even). For measured figures write an
inequality with its margin.
"""

from __future__ import annotations

import ast
import copy
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

State = Literal["reproduced", "not reproduced", "setting differs", "inconclusive", "not run"]

TIMES = ("latency_ms", "speedup")  # metrics that are seconds of the clock: judged where they were taken in turns

LONGEST = 500  # characters of a claim
LARGEST = 1e12  # a number in a claim; far below 2**53, so that integers stay exact
REPRODUCED, NOT_REPRODUCED = 0.95, 0.05
FEWEST_DRAWS = 2000

_ARITHMETIC: dict[type[ast.operator], Any] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal,
    ast.Eq: np.equal, ast.NotEq: np.not_equal,
}  # fmt: skip
_FUNCTIONS = {"abs": np.abs, "min": np.minimum, "max": np.maximum}


class ClaimError(ValueError):
    """A claim that is not in the language: one line that names the piece and the mend."""


class Span(NamedTuple):
    """Rungs of a ladder from `first` to `last`; of all that the methods have in common where both are None."""

    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        return "*" if self.first is None else f"{self.first}..{self.last}"

    def rungs(self, ladder: Sequence[int]) -> list[int]:
        """Those of a ladder that lie in it."""
        return [rung for rung in ladder if self.first is None or self.first <= rung <= (self.last or 0)]


class Reference(NamedTuple):
    """A measured figure that a claim speaks of; with a span a figure at each of its rungs."""

    metric: str
    method: str
    rung: int | Span

    def __str__(self) -> str:
        return f"{self.metric}[{self.method},{self.rung}]"


@dataclass(frozen=True)
class Check:
    """A parsed claim. Made by `parse` only, which has vetted every node of the tree."""

    text: str
    tree: ast.expr = field(repr=False, compare=False)

    def references(self) -> tuple[Reference, ...]:
        """The figures that the claim speaks of, each once, in the order of the text."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.Subscript)]
        nodes.sort(key=lambda node: (node.lineno, node.col_offset))
        return tuple(dict.fromkeys(_reference(node) for node in nodes))

    def comparisons(self) -> tuple[Check, ...]:
        """The comparisons that `and` joins, each a claim of its own."""
        return tuple(Check(self.text, part) for part in _conjuncts(self.tree))

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans in the place of rungs, each once; a comparison has one at most."""
        return tuple(dict.fromkeys(r.rung for r in self.references() if isinstance(r.rung, Span)))

    def at(self, rungs: Mapping[Span, Sequence[int]]) -> Check:
        """Every comparison at each of the rungs of its span, joined by `and`: without spans.

        Raises:
            ValueError: a span has no rung.
        """
        parts: list[ast.expr] = []
        for part in _conjuncts(self.tree):
            span = next(iter(Check(self.text, part).spans), None)
            if span is None:
                parts.append(part)
            elif not rungs[span]:
                raise ValueError(f"a claim over no rung at all ({span}) says nothing")
            else:
                parts += [_Placed(rung).visit(copy.deepcopy(part)) for rung in rungs[span]]
        return Check(self.text, ast.BoolOp(ast.And(), parts))

    def evaluate(
        self, values: Mapping[Reference, NDArray[np.float64] | float]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Where the claim holds, and where it has no finite value (there it does not hold), for arrays of one
        length.

        A figure or an intermediate result that is not finite spoils its position even where the rest of the
        sentence would hide it, as in `min(1, a / 0)`.
        """
        arrays = {key: np.atleast_1d(np.asarray(value, dtype=np.float64)) for key, value in values.items()}
        length = max((array.size for array in arrays.values()), default=1)
        spoilt = np.zeros(length, dtype=bool)

        def number(node: ast.expr) -> NDArray[np.float64]:
            if isinstance(node, ast.Constant):
                result = np.asarray(node.value, dtype=np.float64)
            elif isinstance(node, ast.Subscript):
                result = arrays[_reference(node)]
            elif isinstance(node, ast.UnaryOp):
                result = -number(node.operand)
            elif isinstance(node, ast.BinOp):
                result = _ARITHMETIC[type(node.op)](number(node.left), number(node.right))
            else:
                assert isinstance(node, ast.Call)
                assert isinstance(node.func, ast.Name)
                function, arguments = _FUNCTIONS[node.func.id], [number(argument) for argument in node.args]
                result = function(*arguments) if len(arguments) == 1 else _fold(function, arguments)
            result = np.broadcast_to(result, (length,))
            np.logical_or(spoilt, ~np.isfinite(result), out=spoilt)
            return result

        def truth(node: ast.expr) -> NDArray[np.bool_]:
            if isinstance(node, ast.BoolOp):
                return np.logical_and.reduce([truth(part) for part in node.values])
            assert isinstance(node, ast.Compare)
            sides = [number(side) for side in (node.left, *node.comparators)]
            parts = [_COMPARISONS[type(op)](sides[i], sides[i + 1]) for i, op in enumerate(node.ops)]
            return np.logical_and.reduce(parts)

        with np.errstate(all="ignore"):
            holds = truth(self.tree)
        return holds & ~spoilt, spoilt


def _fold(function: Any, arguments: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    result = arguments[0]
    for argument in arguments[1:]:
        result = function(result, argument)
    return result


def _reference(node: ast.Subscript) -> Reference:
    assert isinstance(node.value, ast.Name)
    assert isinstance(node.slice, ast.Tuple)
    method, rung = node.slice.elts
    assert isinstance(method, ast.Name)
    if isinstance(rung, ast.Slice):
        ends = [end.value if isinstance(end, ast.Constant) else None for end in (rung.lower, rung.upper)]
        return Reference(node.value.id, method.id, Span(*ends))  # type: ignore[arg-type]
    assert isinstance(rung, ast.Constant)
    assert isinstance(rung.value, int)
    return Reference(node.value.id, method.id, rung.value)


def _conjuncts(tree: ast.expr) -> list[ast.expr]:
    """The comparisons that `and` joins."""
    if isinstance(tree, ast.BoolOp):
        return [each for value in tree.values for each in _conjuncts(value)]
    return [tree]


class _Placed(ast.NodeTransformer):
    """Puts a rung where a span stands."""

    def __init__(self, rung: int) -> None:
        self.rung = rung

    def visit_Slice(self, node: ast.Slice) -> ast.expr:
        return ast.Constant(self.rung)


# Python has no such rungs: they are read as its slices, which nothing else in the language can be.
_SLICE = re.compile(r",[^\]]*:[^\]]*\]")
_STAR = re.compile(r",\s*\*\s*\]")
_FROM_TO = re.compile(r",\s*(\d{1,12})\s*\.\.\s*(\d{1,12})\s*\]")


def _as_python(text: str) -> str:
    return _FROM_TO.sub(r",\1:\2]", _STAR.sub(",:]", text))


# parsing ------------------------------------------------------------------------------------------------


def parse(check: str) -> Check:
    """Read a claim.

    Raises:
        ClaimError: anything outside the language, in one line.
    """
    if not isinstance(check, str):
        raise ClaimError(f"a claim is a string, not {type(check).__name__}; write it in quotes")
    text = " ".join(check.split())
    if not text:
        raise ClaimError("the claim is empty; write a comparison such as fid[lcm,4] <= 1.1 * fid[ddim,50]")
    if len(text) > LONGEST:
        raise ClaimError(f"the claim has {len(text)} characters; split it into claims of at most {LONGEST}")
    if not text.isascii() or not text.isprintable():
        raise ClaimError("the claim holds a character outside plain ASCII; write names and signs in ASCII (<=, *)")
    if _SLICE.search(text):
        raise ClaimError("':' is not in the claim language; write a span of rungs as fid[lcm,4..16]")
    if "#" in text:
        raise ClaimError("'#' is not in the claim language; put remarks into the claim's `says`")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "invalid decimal literal": the tree decides, not a warning
            tree = ast.parse(_as_python(text), mode="eval").body
    except SyntaxError as error:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise ClaimError(f"{shown!r} does not parse ({error.msg}); a claim is a comparison of figures") from None
    except (ValueError, RecursionError, MemoryError):
        raise ClaimError("the claim is nested too deeply or holds too long a number; simplify it") from None
    found = Check(text, tree)
    _vet_truth(tree, _as_python(text))
    if not found.references():
        raise ClaimError("the claim names no measured figure; write one as metric[method,rung]")
    for part in _conjuncts(tree):
        spans = sorted(map(str, Check(text, part).spans))
        if len(spans) > 1:
            raise ClaimError(f"one comparison has the spans {' and '.join(spans)}; make them one")
    return found


def _piece(node: ast.AST, text: str) -> str:
    piece = ast.get_source_segment(text, node) or text
    return repr(piece if len(piece) <= 60 else piece[:57] + "...")


def _vet_truth(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BoolOp):
        if isinstance(node.op, ast.Or):
            raise ClaimError(f"`or` in {_piece(node, text)} is not in the claim language; make each side its own claim")
        for part in node.values:
            _vet_truth(part, text)
        return
    if isinstance(node, ast.Compare):
        for op in node.ops:
            if type(op) not in _COMPARISONS:
                raise ClaimError(f"the comparison in {_piece(node, text)} is not known; use < <= > >= == or !=")
        for side in (node.left, *node.comparators):
            _vet_number(side, text)
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        raise ClaimError(f"`not` in {_piece(node, text)} is not in the claim language; turn the comparison round")
    _vet_number(node, text)  # a more telling error, if the piece is no number either
    raise ClaimError(f"{_piece(node, text)} is a figure, not a claim; compare it with something, as in x <= y")


def _vet_number(node: ast.expr, text: str) -> None:
    piece = _piece(node, text)
    if isinstance(node, ast.Constant):
        if type(node.value) not in (int, float):
            raise ClaimError(f"{piece} is not a number; write a plain number such as 1.1")
        # Compared as it stands: float(10**400) would overflow.
        if not (abs(node.value) <= LARGEST):  # type: ignore[arg-type]
            raise ClaimError(f"the number {piece} is too large; numbers go up to {LARGEST:g}")
    elif isinstance(node, ast.Subscript):
        _vet_reference(node, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _vet_number(node.operand, text)
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Pow):
            raise ClaimError(f"the power in {piece} is not in the claim language; write the product out")
        if type(node.op) not in _ARITHMETIC:
            raise ClaimError(f"the operator in {piece} is not in the claim language; use + - * /")
        _vet_number(node.left, text)
        _vet_number(node.right, text)
    elif isinstance(node, ast.Call):
        _vet_call(node, text)
    elif isinstance(node, ast.Name):
        raise ClaimError(f"{piece} stands alone; say which method and rung, as in {node.id}[method,4]")
    elif isinstance(node, ast.Attribute):
        raise ClaimError(f"the dot in {piece} is not in the claim language; use bare names, as in fid[lcm,4]")
    elif isinstance(node, (ast.Compare, ast.BoolOp)):
        raise ClaimError(f"{piece} is a comparison where a number belongs; join comparisons by `and` only")
    else:
        raise ClaimError(
            f"{piece} ({type(node).__name__.lower()}) is not in the claim language; "
            "use metric[method,rung], numbers, + - * /, comparisons, and, abs, min, max"
        )


def _vet_call(node: ast.Call, text: str) -> None:
    piece = _piece(node, text)
    if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
        raise ClaimError(f"the call {piece} is not in the claim language; the functions are abs, min, max")
    if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
        raise ClaimError(f"the call {piece} must list its arguments plainly; write {node.func.id}(x, y)")
    if node.func.id == "abs" and len(node.args) != 1:
        raise ClaimError(f"{piece} has {len(node.args)} arguments; abs takes one")
    if node.func.id != "abs" and len(node.args) < 2:
        raise ClaimError(f"{piece} has {len(node.args)} arguments; {node.func.id} takes two or more figures")
    for argument in node.args:
        _vet_number(argument, text)


def _vet_reference(node: ast.Subscript, text: str) -> None:
    piece = _piece(node, text)
    if not isinstance(node.value, ast.Name):
        raise ClaimError(f"{piece} does not begin with a metric's name; write metric[method,rung]")
    metric = node.value.id
    if isinstance(node.slice, ast.Name):
        raise ClaimError(
            f"{piece} names no rung; write {metric}[{node.slice.id},4], or {metric}[{node.slice.id},*] for each of all"
        )
    if not isinstance(node.slice, ast.Tuple) or len(node.slice.elts) != 2:
        raise ClaimError(f"{piece} is not a figure; write {metric}[method,rung]")
    method, rung = node.slice.elts
    if not isinstance(method, ast.Name):
        raise ClaimError(f"{_piece(method, text)} in {piece} is not a method; use its bare name, as in {metric}[lcm,4]")
    if isinstance(rung, ast.Slice):
        span = _reference(node).rung
        if isinstance(span, Span) and span.first is not None and span.last is not None and span.first >= span.last:
            raise ClaimError(f"the span {span} of {metric}[{method.id}] is empty; write the lower rung first")
        return
    if not isinstance(rung, ast.Constant) or type(rung.value) is not int:
        raise ClaimError(
            f"the rung {_piece(rung, text)} in {piece} is not a plain integer; write {metric}[{method.id},4]"
        )
    if rung.value > LARGEST:
        raise ClaimError(f"the rung in {piece} is too large; rungs go up to {LARGEST:g}")


# verdicts -----------------------------------------------------------------------------------------------

Resamples = Sequence[Sequence[float] | NDArray[np.float64]]


@dataclass(frozen=True)
class Verdict:
    """What the measurements say of a claim.

    `fraction` of the draws in which it holds (None: not run), `holds` at the point estimates, `values` those
    estimates by reference, `spoilt` the number of draws without a finite value, `text` all of it in one line, `notes`
    what has to be read beside it.
    """

    state: State
    fraction: float | None
    holds: bool | None
    values: dict[str, float]
    spoilt: int
    text: str
    notes: tuple[str, ...] = ()


def verdict(
    check: Check | str,
    lookup: Callable[[str, str, int], Resamples | str],
    B: int = FEWEST_DRAWS,
    seed: int = 0,
    points: Callable[[str, str, int], float | None] | None = None,
) -> Verdict:
    """Judge a claim by `max(B, FEWEST_DRAWS)` draws over seeds and item resamples.

    `lookup(metric, method, rung)` returns the paired resamples, one array per seed, or in a string the reason
    why there are none. Index b of seed s must mean the same resample in every array, and the seeds the same
    seeds in the same order: each draw takes one seed and one index for all references together. Arrays of
    length one are deterministic figures and stand for every index. `points` gives the estimate over all items
    (default: the mean of the resamples). A metric that reads differently on resamples (`stats.centred`)
    should be centred by the caller.

    Reproduced if the claim holds in at least 95 % of the draws, not reproduced if in at most 5 %, else
    inconclusive. A draw without a finite value (a division by zero) counts as one in which it does not hold.
    """
    check = parse(check) if isinstance(check, str) else check
    if check.spans:
        raise ValueError(f"{check.text!r} speaks of the rungs {check.spans[0]}; say which they are with `Check.at`")
    tables: dict[Reference, list[NDArray[np.float64]]] = {}
    reasons: list[str] = []
    for reference in check.references():
        assert isinstance(reference.rung, int)
        found = lookup(reference.metric, reference.method, reference.rung)
        if isinstance(found, str):
            reasons.append(f"{reference}: {' '.join(found.split())}")
            continue
        tables[reference] = [np.asarray(row, dtype=np.float64).ravel() for row in found]
        if not tables[reference] or not all(row.size for row in tables[reference]):
            reasons.append(f"{reference}: no values")
    if not reasons:
        reasons = _unpaired(tables)
    if reasons:
        return Verdict("not run", None, None, {}, 0, "not run: " + "; ".join(dict.fromkeys(reasons)))

    seeds = len(next(iter(tables.values())))
    lengths = [max(rows[s].size for rows in tables.values()) for s in range(seeds)]
    draws = max(B, FEWEST_DRAWS)
    rng = np.random.default_rng(seed)
    which = rng.integers(seeds, size=draws)
    index = (rng.random(draws) * np.asarray(lengths)[which]).astype(np.int64)
    sample = {reference: np.empty(draws) for reference in tables}
    for s in range(seeds):
        here = which == s
        for reference, rows in tables.items():
            sample[reference][here] = rows[s][index[here] if rows[s].size > 1 else 0]
    holds, spoilt = check.evaluate(sample)
    fraction = float(holds.mean())

    estimates: dict[Reference, float] = {}
    for reference, rows in tables.items():
        assert isinstance(reference.rung, int)
        given = points(reference.metric, reference.method, reference.rung) if points is not None else None
        estimates[reference] = float(np.mean([row.mean() for row in rows])) if given is None else float(given)
    at_points, _ = check.evaluate(estimates)

    state: State = "inconclusive"
    if fraction >= REPRODUCED:
        state = "reproduced"
    elif fraction <= NOT_REPRODUCED:
        state = "not reproduced"
    text = f"{state}: holds in {_percent(fraction)} of {draws} resamples; "
    text += ", ".join(f"{reference} = {value:.4g}" for reference, value in estimates.items())
    if spoilt.any():
        text += f"; {_percent(float(spoilt.mean()))} of the resamples have no finite value and count as false"
    values = {str(reference): value for reference, value in estimates.items() if math.isfinite(value)}
    return Verdict(state, fraction, bool(at_points[0]), values, int(spoilt.sum()), text)


def _unpaired(tables: Mapping[Reference, list[NDArray[np.float64]]]) -> list[str]:
    first, rows = next(iter(tables.items()))
    for reference, others in tables.items():
        if len(others) != len(rows):
            return [f"{first} has {len(rows)} seeds, {reference} has {len(others)}; they are not paired"]
    for s in range(len(rows)):
        sizes = {reference: table[s].size for reference, table in tables.items() if table[s].size > 1}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{reference} has {size}" for reference, size in sizes.items())
            return [f"different numbers of resamples in seed {s}: {said}; they are not paired"]
    return []


def _percent(fraction: float) -> str:
    # Never "100 %" or "0 %" for what is merely close to it.
    shown = f"{100 * fraction:.1f}"
    if shown == "100.0" and fraction < 1:
        shown = "99.9"
    if shown == "0.0" and fraction > 0:
        shown = "0.1"
    return f"{shown} %"
