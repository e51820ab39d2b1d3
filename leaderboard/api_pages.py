"""The API for authors, from the docstrings of the source: the plugin contract, and for each track what a method gets, what
it gives back, its tasks, its networks, and the algorithms that its methods share. Read with `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepmark.leaderboard import markup
from stepmark.leaderboard.markup import Cell, Line, esc, link, number, table
from stepmark.leaderboard.pages import Board, crumbs, element, slug, words

from stepmark.backbones import manifest
from stepmark.places import PACKAGE
from stepmark.plugins import TRACK_CALLS
from stepmark.syntax import parse

CONTRACT = {
    "method": ("Method", "Variant", "Paper", "Claim"),
    "session": ("Session",),
    "task": ("Task", "Dataset", "skip"),
}
CALLS = ("inputs", "check", "score", "handles")  # of a module with tasks: what they say of batches, outputs and metrics
OF_LM = ("encode", "decode", "batches", "fit", "Muon", "hidden_states", "rotate_by")  # what authors may use of it
LM = """\
Words, ids and training of the small language models, `stepmark.backbones.lm`. What stands here is for methods; the recipes
beside it are not. What your file names of it counts into the digests of its records.

- `VOCABULARY`: the words, a tuple of strings; the id of a word is its place in it. `len(VOCABULARY)` is the V of logits. Its
  last words, `<mask>` and `<pause>` among them, stand in no training text: they are for networks that a method trains.
- `PAD`, `EOS`, `UNKNOWN`: the ids 0, 1 and 2 of `<pad>`, `<eos>` and `<unk>`, as ints. Outputs end with `EOS`, or at their
  greatest length.
- `encode` gives the ids of the words between blanks and nothing more: it adds no `EOS`, and makes a word that it does not
  know `UNKNOWN`. `session.train["target"]` holds completions alone, without their prompts and without an end: what the
  models were trained on is `[*encode(prompt), *encode(target), EOS]`.
- Drafts may go on after `EOS`: `speculate` cuts the text there.
- On a checkpoint of a user's own, `encode` reads by the tokenizer of the folder, and `VOCABULARY` and `EOS` are not the
  checkpoint's: take the `eos` of its `Decoder`, and V from the logits.
"""
CHAINS = """\
Texts of the language models of this track, `stepmark.backbones.chains`: read, forked, cut, scored and written side by side on
one cache, each at a length of its own. All that a method asks of a model goes through them, a row of a call at a time.

- `stepmark.backbones.reasoners` has `encode` and `decode`, words to ids and back, `WORDS` and `EOS`. Ids are of words between
  blanks; a text ends with `EOS`, or where its tokens are used up.
- A prompt is a question and the word that chooses a format; each dataset of this track says at its top which there are.
"""
OFFERED = {  # track -> what its methods may use of a module of backbones/: the module, what is said of it, names
    "decoding": ("lm", LM, OF_LM),
    "diffusion_lm": ("lm", LM, OF_LM),
    "reasoning": ("chains", CHAINS, ("Chains",)),
}
WIDE = 100  # characters of a signature from which on each argument has a line
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):(?: (.*))?$")
OWN = "Harness only"  # what the docstring of a function says that no plugin calls

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# pages --------------------------------------------------------------------------------------------


def index(found: Board) -> list[str]:
    """The contract: what an author writes, and what the harness hands over."""
    tracks = ", ".join(link(f"{track}.html", words(track)) for track in found.tracks())
    parts = [
        element("p", "What a method is made of, from the docstrings of the source. What each track gives to a method, wants "
                f"back, and has for its methods to share: {tracks}.", "sm-lead"),
    ]  # fmt: skip
    for name, wanted in CONTRACT.items():
        defined = {node.name: node for node in parse(PACKAGE / f"{name}.py").body if isinstance(node, Node)}
        for each in wanted:
            parts += _documented(defined[each], "##", f"stepmark.{name}")
    return parts


def track_page(found: Board, track: str) -> list[str]:
    """A track for an author: its tasks and networks, inputs and outputs, and every shared function with its signature."""
    folder = PACKAGE / "tracks" / track
    modules = {_module(path): parse(path) for path in sorted(folder.rglob("*.py"))}
    asking = {name: tree for name, tree in modules.items() if _has_tasks(tree)}
    own = f"stepmark.tracks.{track}"
    parts = [
        crumbs(("index.html", "API"), (f"{track}.html", words(track))),
        said(ast.get_docstring(modules[own]) or ""),
        "## Tasks",
        _tasks(found, track),
        "## Networks",
        _networks(found, track),
        *_reports(found, track),
        "## Inputs, outputs, metrics",
    ]
    for name in sorted(asking, key=lambda name: (name != own, name)):
        tree = asking[name]
        ids = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in found.tasks]
        parts += [f"### {markup.heading(name)}", element("p", _among(found, dict.fromkeys(ids)), "sm-note")]
        parts += [said(ast.get_docstring(tree) or "")] if name != own else []
        for node in _functions(tree):
            if node.name in CALLS:
                parts += _documented(node, "####", name)
    if track in OFFERED:
        parts += _texts(*OFFERED[track])
    parts.append("## Shared algorithms")
    for name in sorted(modules, key=lambda name: (name in asking, name)):
        taken = TRACK_CALLS if name in asking else ()
        nodes = [node for node in _functions(modules[name]) if node.name not in taken]
        if nodes:
            parts.append(f"### {markup.heading(name)} {{ #{name.rpartition('.')[2]} }}")
            parts += [said(ast.get_docstring(modules[name]) or "")] if name not in asking else []
            parts += [markup.code("\n".join(aliases))] if (aliases := _aliases(modules[name])) else []
            for node in nodes:
                parts += _documented(node, "####", name)
    return parts


def _texts(module: str, words_on_it: str, names: Sequence[str]) -> list[str]:
    """What an author of a language method may use of the models' own module."""
    name = f"stepmark.backbones.{module}"
    defined = {node.name: node for node in parse(PACKAGE / "backbones" / f"{module}.py").body if isinstance(node, Node)}
    parts = [f"## The models' own: {markup.heading(name)} {{ #{module} }}", said(words_on_it)]
    for each in names:
        parts += _documented(defined[each], "####", name)
    return parts


def _module(path: Path) -> str:
    inside = path.relative_to(PACKAGE.parent).with_suffix("")
    return ".".join(inside.parts if path.name != "__init__.py" else inside.parent.parts)


def _has_tasks(tree: ast.Module) -> bool:
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == "TASKS" for target in targets)


def _functions(tree: ast.Module | ast.ClassDef) -> Iterator[Node]:
    """What others may call: public, with a docstring, and not the harness's."""
    for node in tree.body:
        if isinstance(node, Node) and not node.name.startswith("_"):
            doc = ast.get_docstring(node)
            if doc and OWN not in doc:
                yield node


def _aliases(tree: ast.Module) -> list[str]:
    """Names of types that signatures use: `Propose = Callable[...]`."""
    assigned = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return [
        f"{target.id} = {ast.unparse(value)}"
        for target, value in assigned
        if isinstance(target, ast.Name) and isinstance(value, ast.Subscript) and not target.id.isupper()
    ]


def _among(found: Board, ids: Sequence[str] | dict[str, None]) -> str:
    return "Tasks: " + (", ".join(link(f"../tasks/{slug(task)}.html", task) for task in ids) or "none") + "."


def _tasks(found: Board, track: str) -> str:
    lines = []
    for task_id, (of_track, task) in found.tasks.items():
        if of_track == track:
            networks = ", ".join(f"{role}: {name}" for role, name in task.backbones.items()) or "–"
            metrics = ", ".join(f"{name} ({better})" for name, better in task.metrics.items())
            cells = [
                Cell(link(f"../tasks/{slug(task_id)}.html", task_id), task_id),
                markup.text(task.summary),
                markup.text(networks),
                markup.text(f"{', '.join(map(str, task.rungs))} {task.unit}"),
                markup.text(metrics),
                number(task.seeds),
            ]
            lines.append(Line(cells))
    head = ("Task", "What is asked", "session.networks", "Rungs", "Metrics, the first ranks", "Seeds")
    return table(head, lines, f"Tasks of {words(track)}")


def _networks(found: Board, track: str) -> str:
    asked = {name for of_track, task in found.tasks.values() if of_track == track for name in task.backbones.values()}
    lines = [Line([Cell(esc(name), name), markup.text(what)]) for name, what in summaries().items() if name in asked]
    if not lines:
        return element("p", "No network is given: what is costly here is a simulator, or a network that a method adds.")
    return table(("Network", "What it is and predicts"), lines, f"Networks of {words(track)}")


def _reports(found: Board, track: str) -> list[str]:
    """What the networks of a track could do when their training ended, before any method acted on them."""
    asked = {name for of_track, task in found.tasks.values() if of_track == track for name in task.backbones.values()}
    entries = {name: entry["report"] for name, entry in manifest().items() if name in asked}
    lines = [
        Line([Cell(esc(name), name), Cell(esc(what), what), number(value)])
        for name, report in sorted(entries.items())
        for what, value in report.items()
    ]
    if not lines:
        return []
    parts = [
        table(("Network", "Figure", "Value"), lines, f"What was found of the networks of {words(track)} when trained")
    ]
    for path in sorted((PACKAGE / "backbones").glob("*.py")):
        tree = parse(path)
        own = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & entries.keys()
        for node in _functions(tree):
            if node.name == "measure" and own:
                parts.append(element("p", f"Of {', '.join(sorted(own))}:", "sm-note"))
                parts.append(said(ast.get_docstring(node) or ""))
    return parts


def summaries() -> dict[str, str]:
    """Backbone id -> its line in `stepmark list backbones`, from the source of the recipes."""
    made: dict[str, str] = {}
    for path in sorted((PACKAGE / "backbones").glob("*.py")):
        for node in parse(path).body:
            if (
                isinstance(node, ast.AnnAssign)
                and ast.unparse(node.target) == "RECIPES"
                and isinstance(node.value, ast.Dict)
            ):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    texts = [n for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                    last = max(texts, key=lambda n: (n.lineno, n.col_offset))
                    made[ast.literal_eval(key) if key else ""] = last.value
    return made


# one function or class ----------------------------------------------------------------------------


def _documented(node: Node, level: str, module: str) -> list[str]:
    """Heading, signature and docstring; of a class those of its public methods too."""
    parts = [f"{level} {markup.heading(node.name)}", markup.code(signature(node, f"from {module} import {node.name}"))]
    parts.append(said(ast.get_docstring(node) or ""))
    if isinstance(node, ast.ClassDef):
        for method in _functions(node):
            if not isinstance(method, ast.ClassDef):
                parts += [markup.code(signature(method)), said(ast.get_docstring(method) or "")]
    return parts


def signature(node: Node, first: str = "") -> str:
    """How it is called, with types, below the line that imports it. Of a class its `__init__` or its fields."""
    lines = [first] if first else []
    if isinstance(node, ast.ClassDef):
        made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
        is_data = any("dataclass" in ast.unparse(each) for each in node.decorator_list)
        if made is not None:
            lines.append(_call(node.name, _arguments(made)[1:], ""))
        elif is_data:
            lines.append(_call(node.name, fields, ""))
        else:
            lines += [f"class {node.name}({', '.join(ast.unparse(base) for base in node.bases)}):"]
            lines += [f"    {field}" for field in fields]
        call = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__call__"), None)
        if call is not None:
            lines.append(_call(f"{node.name}(...)", _arguments(call)[1:], _gives(call)))
        return "\n".join(lines)
    given = _arguments(node)
    is_property = any(ast.unparse(each) in {"property", "cached_property"} for each in node.decorator_list)
    if is_property:
        return "\n".join([*lines, f".{node.name}{_gives(node).replace(' -> ', ': ')}"])
    method = given[:1] == ["self"]
    return "\n".join([*lines, _call(f".{node.name}" if method else node.name, given[method:], _gives(node))])


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    found = [_argument(arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if a.vararg:
        found.append(f"*{_argument(a.vararg, None)}")
    elif a.kwonlyargs:
        found.append("*")
    found += [_argument(arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return found + ([f"**{_argument(a.kwarg, None)}"] if a.kwarg else [])


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    typed = f"{arg.arg}: {ast.unparse(arg.annotation)}" if arg.annotation else arg.arg
    return typed if default is None else f"{typed}{' = ' if arg.annotation else '='}{ast.unparse(default)}"


def _gives(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""


def _call(name: str, arguments: Sequence[str], gives: str) -> str:
    short = f"{name}({', '.join(arguments)}){gives}"
    return short if len(short) <= WIDE else f"{name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){gives}"


# docstrings ---------------------------------------------------------------------------------------


def said(doc: str) -> str:
    """A docstring as HTML, as plainly as it stands there: names and shapes are not set as letters and indices."""
    blocks: list[str] = []
    for part in re.split(r"\n[ \t]*\n", doc.strip("\n")):
        lines = part.split("\n")
        while lines:
            section = SECTION.match(lines[0])
            if section:
                inside = [SECTION.match(line) is None and (line[:1] == " " or bool(section[2])) for line in lines[1:]]
                size = inside.index(False) + 1 if False in inside else len(lines)
                blocks.append(_section(section[1], section[2] or "", lines[1:size]))
            else:
                kind = _kind(lines[0])
                size = 1
                while size < len(lines) and (_kind(lines[size]) == kind or (kind == "item" and lines[size][:1] == " ")):
                    size += 1
                blocks.append(_block(kind, lines[:size]))
            lines = lines[size:]
    return '<div class="sm-doc">' + "\n".join(blocks) + "</div>"


def _kind(line: str) -> str:
    return "item" if line.startswith(("- ", "* ")) else "shown" if line.startswith("  ") else "text"


def _block(kind: str, lines: Sequence[str]) -> str:
    if kind == "shown":
        least = min(len(line) - len(line.lstrip()) for line in lines)
        return markup.code("\n".join(line[least:] for line in lines))
    if kind == "item":
        items = re.split(r"(?:^|\n)[-*] ", "\n".join(lines))[1:]
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _section(title: str, rest: str, lines: Sequence[str]) -> str:
    """Args, Attributes and so on: names and what they are; where no name stands, a sentence."""
    pairs: list[list[str]] = []
    for line in [rest, *lines] if rest else lines:
        named = re.match(r" {1,4}([\w, *()]+?): (.*)", line) or (None if pairs else re.match(r"()(.*)", line))
        if named:
            pairs.append([named[1], named[2]])
        elif pairs:
            pairs[-1][1] += f" {line.strip()}"
    if len(pairs) == 1 and not pairs[0][0]:
        return f"<p><b>{title}</b>: {_inline(pairs[0][1])}</p>"
    return f"<p><b>{title}</b></p>" + markup.definitions([(name, _inline(text)) for name, text in pairs])


def _inline(content: str) -> str:
    parts = re.split(r"(`{1,2})([^`]+)\1", " ".join(content.split()))
    codes = [f"<code>{esc(part)}</code>" for part in parts[2::3]]
    return "".join(text + code for text, code in zip(map(esc, parts[::3]), [*codes, ""], strict=True))
