"""Deduction from rules and facts that stand in the prompt, with made-up words, distractors and exact checks of every step.

A statement has three words, a fact ``boris is zepa`` or a rule ``zepa isnt tumo`` (whatever is zepa is not tumo), in any
order. A question asks for one fact: ``... ? boris is tumo``. Two beings each begin a chain of rules; both chains end in the
word that is asked for, one of them in ``is``, the other in ``isnt``, so that the last rule alone tells nothing. Rules that
lead nowhere hang on the chains, and facts of what a being is not: they are what makes a question hard. Words are drawn anew
for each question, so that nothing can be known beforehand.

Formats, chosen by a word at the end of the prompt, or before its last statement, so that what is to be looked up stands last:

    <dir>      the answer at once: ``ans false``
    <proof>    the fact it starts from, then rule and new fact: ``boris is zepa . zepa isnt tumo boris isnt tumo . ans false``
    <select>   the fact and the rule that come next: ``boris is zepa zepa isnt tumo``
    <infer>    after a fact and a rule alone: the new fact, ``boris isnt tumo``
    <holds>    before a question: the fact that settles it and what it says, ``boris isnt tumo false``, or ``unknown``
    <rules>    before a question: every rule that ends in the word asked for, in any order: ``zepa isnt tumo mabi is tumo done``
    <goal>     after a rule and a question alone: what is to be shown instead, ``boris is zepa``
    <agree>    after a rule and a question alone: whether rule and question say the same of the word, ``no``
    <follows>  after a fact and a rule, before a new fact: whether it follows, ``yes`` or ``no``
    <whole>    after a question and a whole proof: whether all of it is right, ``yes`` or ``no``
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="deduction",
    version=1,
    summary="Deduction over 1 to 6 rules in the prompt, with distractors and exact checks of every step",
    licence="CC0-1.0",
    digests={
        "train": "823149ebbf18c3554b415b419324fa65e1c938a6bb029a9e4b72bfbec00b034f",
        "test": "d81a93f663e877830d8ee2f8201a9696bc7d78fac5526cc2586b654f19e245e0",
        "dense": "b84ec3655663684f3bd1ca0e8f6a45667f847e3ceedf465df37a01fc4dcd8e0b",
        "deep": "8e871a62582b1e5a86207ab59e8ead4cda1d6f64ac8f0fca04894c41c8d735bd",
    },
)
ASKED = {"deduce/chains": "test", "deduce/dense": "dense", "deduce/deep": "deep"}  # task -> split
SIZES = {"train": 8_000, "test": 600, "deep": 300, "dense": 300}
DEPTHS = {"train": (1, 2, 3, 4, 5), "test": (1, 2, 3, 4, 5), "deep": (6,), "dense": (3,)}
DEAD = {"train": (0, 1, 2, 3, 4), "test": (2, 4), "deep": (2, 4), "dense": (6, 8)}
# Two syllables each; none of them is a word.
CONCEPTS = tuple(
    f"{a}{v}{b}{w}" for a, b in zip("bdfgklmnprstvz", "zlmtbrkpdnvsgf", strict=True) for v in "aeiou" for w in "aeiou"
)[::2]
NAMES = tuple(
    "alma boris carlo dora edgar fiona gus hanna ivan jana kurt lena milo nora oscar petra quinn rita stefan tilda "
    "ugo vera walter xenia yuri zoe adam bella cyrus delia enzo flora gino helga igor julia karim lotte marco nadia".split()
)
Statement = tuple[str, bool, str]  # subject, is / isnt, word


@dataclass(frozen=True)
class Question:
    """Statements in the order of the text, and the fact that is asked for (always an ``is``)."""

    statements: tuple[Statement, ...]
    goal: Statement

    @property
    def facts(self) -> list[Statement]:
        """Those about beings."""
        return [s for s in self.statements if s[0] in NAMES]

    @property
    def rules(self) -> list[Statement]:
        """Those about words."""
        return [s for s in self.statements if s[0] not in NAMES]


def said(statement: Statement) -> str:
    """A statement in words."""
    return f"{statement[0]} {'is' if statement[1] else 'isnt'} {statement[2]}"


def told(question: Question) -> str:
    """The text of a question, without a format."""
    return f"{' '.join(map(said, question.statements))} ? {said(question.goal)}"


def read(text: str) -> Question:
    """A question from its text.

    Raises:
        ValueError: not a question of this language.
    """
    context, there, goal = text.partition(" ? ")
    statements = read_statements(context)
    asked = read_statements(goal)
    if not there or statements is None or asked is None or len(asked) != 1:
        raise ValueError(f"not a question of statements: {text[:80]!r}")
    return Question(tuple(statements), asked[0])


def read_statements(text: str) -> list[Statement] | None:
    """The statements of a text of nothing else; None where it holds something else."""
    words = text.split()
    if not words or len(words) % 3:
        return None
    found = [(words[i], words[i + 1] == "is", words[i + 2]) for i in range(0, len(words), 3)]
    fine = all(v in ("is", "isnt") for v in words[1::3]) and not {"is", "isnt"} & {*words[::3], *words[2::3]}
    return found if fine else None


# -- solving and checking ------------------------------------------------------------------------------------------


def follows(fact: Statement, rule: Statement) -> Statement | None:
    """What a fact and a rule give; None where the rule is not about what the fact says."""
    return (fact[0], rule[1], rule[2]) if fact[1] and rule[0] == fact[2] else None


def proof(question: Question) -> list[tuple[Statement, Statement]]:
    """(rule, new fact) by new fact from the being's fact to the answer. Its first entry holds that fact twice.

    Raises:
        ValueError: there is none.
    """
    who, _, word = question.goal
    starts = [fact for fact in question.facts if fact[0] == who]
    if not starts:
        raise ValueError(f"nothing is said of {who}")
    paths = [[(start, start)] for start in starts]
    while paths:
        path = paths.pop(0)
        last = path[-1][1]
        if last[2] == word:
            return path
        for rule in question.rules:
            new = follows(last, rule)
            if new is not None and all(new != fact for _, fact in path):
                paths.append([*path, (rule, new)])
    raise ValueError(f"{said(question.goal)} cannot be settled")


def answer(question: Question) -> str:
    """true or false."""
    return "true" if proof(question)[-1][1][1] else "false"


@dataclass(frozen=True)
class Checked:
    """Of each step whether it is valid (its fact or rule is in the prompt, its new fact follows from what was shown) and
    whether it lies on the proof; `right`: the answer is; `valid`: every step is valid and the last one settles it."""

    steps: tuple[bool, ...]
    straight: tuple[bool, ...]
    right: bool
    valid: bool


def answer_of(text: str) -> str | None:
    """What stands behind the last ``ans`` of a text, true or false; None where it is anything else."""
    _, there, ending = text.rpartition("ans ")
    return ending.strip() if there and ending.strip() in ("true", "false") else None


def check(question: str | Question, text: str) -> Checked:
    """Hold a text of the format <proof> against its question. A valid step off the proof is a detour, not a fault."""
    asked = read(question) if isinstance(question, str) else question
    body, ending = text.rpartition("ans ")[0], answer_of(text)
    known: list[Statement] = []
    way = [fact for _, fact in proof(asked)]
    steps, straight = [], []
    for clause in body.split(" .") if body else text.split(" ."):
        if not clause.strip():
            continue
        found = read_statements(clause)
        new = None
        if found is not None and len(found) == 1 and found[0] in asked.facts:
            new = found[0]
        elif found is not None and len(found) == 2 and found[0] in asked.rules:
            new = found[1] if any(follows(fact, found[0]) == found[1] for fact in known) else None
        steps.append(new is not None)
        straight.append(new in way)
        if new is not None:
            known.append(new)
    right = ending == answer(asked)
    settled = bool(known) and known[-1][0] == asked.goal[0] and known[-1][2] == asked.goal[2]
    agrees = settled and ("true" if known[-1][1] else "false") == ending
    return Checked(tuple(steps), tuple(straight), right, right and all(steps) and agrees)


def judged(asked: str, text: str) -> dict[str, float]:
    """What a text is worth as an answer to a question, by metric; NaN where a metric is of other questions only. It is misled
    where its first step off the proof is a valid one."""
    question = read(asked)
    seen = check(question, text)
    count, depth = max(1, len(seen.steps)), len(proof(question)) - 1
    valid, dead = float(seen.valid), len(question.statements) - 2 * (depth + 1)
    misled = next((fine for fine, straight in zip(seen.steps, seen.straight, strict=True) if not straight), False)
    return {
        "accuracy": float(seen.right),
        "answered": float(answer_of(text) is not None),
        "valid": valid,
        "steps": sum(seen.steps) / count,
        "straight": sum(seen.straight) / count,
        "misled": float(misled),
        "detoured": valid * misled,
        **{f"valid_depth{rules}": valid if depth == rules else float("nan") for rules in (1, 5)},
        **{f"valid_dead{statements}": valid if dead == statements else float("nan") for statements in (2, 4)},
    }


# -- writing -------------------------------------------------------------------------------------------------------


def question(rng: random.Random, depth: int, dead: int, chains: int = 2) -> Question:
    """A question over `chains` chains of `depth` rules each with `dead` statements that lead nowhere, rules or facts. The
    first chain ends in what the question asks for; the second ends in the same word and the opposite."""
    words = rng.sample(CONCEPTS, chains * depth + 1 + dead)
    ends = words.pop()
    beings = rng.sample(NAMES, chains)
    truth = rng.random() < 0.5
    statements: list[Statement] = []
    inner = []
    for number, being in enumerate(beings):
        own = [words.pop() for _ in range(depth)]
        sign = truth if number == 0 else (not truth if number == 1 else rng.random() < 0.5)
        statements.append((being, True, own[0]))
        statements += [(a, True, b) for a, b in pairwise(own)]
        statements.append((own[-1], sign, ends))
        inner += own
    for _ in range(dead):  # one in six is a fact, of what a being is not
        subject, sign = (
            (rng.choice(beings), False) if rng.random() < 1 / 6 else (rng.choice(inner), rng.random() < 0.75)
        )
        statements.append((subject, sign, words.pop()))
    rng.shuffle(statements)
    return Question(tuple(statements), (beings[0], True, ends))


def solution(asked: Question, form: str) -> str:
    """The completion of a question in the format <dir> or <proof>."""
    ending = f"ans {answer(asked)}"
    if form == "<dir>":
        return ending
    first, *rest = proof(asked)
    return " ".join([f"{said(first[1])} .", *(f"{said(rule)} {said(new)} ." for rule, new in rest), ending])


def module(rng: random.Random, asked: Question, form: str) -> tuple[str, str]:
    """A prompt and its completion in one of the formats that take a question apart."""
    way = proof(asked)
    done = rng.randrange(len(way) - 1)  # facts shown beside the first one
    fact, (rule, new) = way[done][1], way[done + 1]
    if form == "<select>":
        shown = [said(known) for _, known in way[1 : done + 1]]
        after = [follows(known, each) for _, known in way[: done + 1] for each in asked.rules]
        if rng.random() < 0.3:  # a detour was made before, unless what is drawn lies on the way
            aside = rng.choice([given for given in after if given is not None])
            shown += [said(aside)] if aside not in [known for _, known in way] else []
        return (
            f"{' '.join([*map(said, asked.statements), *shown])} ? {said(asked.goal)} {form}",
            f"{said(fact)} {said(rule)}",
        )
    if form == "<infer>":
        return f"{said(fact)} {said(rule)} {form}", said(new)
    if form == "<follows>":
        wrong = rng.random() < 0.5
        if wrong:
            new = rng.choice([(new[0], not new[1], new[2]), (new[0], new[1], rng.choice(CONCEPTS)), fact])
        holds = follows(fact, rule) == new
        return f"{said(fact)} {said(rule)} {form} {said(new)}", "yes" if holds else "no"
    if form == "<whole>":
        return whole(rng, asked)
    if form in ("<holds>", "<rules>"):
        # A goal on the way, or one that a fact settles, in either sign.
        goal = rng.choice([asked.goal, *(f for _, f in way), rng.choice(asked.facts)])
        goal = (goal[0], True, goal[2])
        given = list(asked.statements)
        if form == "<holds>" and rng.random() < 0.3:  # after what was shown alone
            given = [known for _, known in way[rng.randrange(len(way)) :]]
        prompt = f"{' '.join(map(said, given))} ? {form} {said(goal)}"
        if form == "<holds>":
            found = next((f for f in given if (f[0], f[2]) == (goal[0], goal[2])), None)
            return prompt, "unknown" if found is None else f"{said(found)} {'true' if found[1] else 'false'}"
        rules = [said(r) for r in asked.rules if r[2] == goal[2]]
        return prompt, " ".join([*rng.sample(rules, len(rules)), "done"])
    rule = rng.choice(asked.rules)
    goal = (rng.choice(NAMES), rng.random() < 0.5, rule[2])
    prompt = f"{said(rule)} ? {said(goal)} {form}"
    return prompt, f"{goal[0]} is {rule[0]}" if form == "<goal>" else ("yes" if rule[1] == goal[1] else "no")


def whole(rng: random.Random, asked: Question) -> tuple[str, str]:
    """A question with its proof, right or spoilt at one place, and whether it is right."""
    first, *rest = proof(asked)
    parts = [[first[1]], *([rule, new] for rule, new in rest)]
    spoilt = rng.random() < 0.5
    if spoilt:
        k = rng.randrange(1, len(parts))
        rule, new = parts[k]
        parts[k] = rng.choice(
            [
                [rule, (new[0], not new[1], new[2])],
                [(rule[0], not rule[1], rule[2]), (new[0], not new[1], new[2])],
                [(rule[0], rule[1], other := rng.choice(CONCEPTS)), (new[0], new[1], other)],
            ]
        )
    last = parts[-1][-1]
    text = " ".join([*(f"{' '.join(map(said, part))} ." for part in parts), "ans", "true" if last[1] else "false"])
    return f"{told(asked)} <proof> {text} <whole>", "yes" if check(asked, text).valid else "no"


def split(name: str) -> dict[str, Any]:
    """Questions of ``train`` and ``test`` (1 to 5 rules), ``deep`` (6) or ``dense`` (3 rules, 6 or 8 that lead nowhere).

    Returns a dict of equally long lists: ``question``, ``prompt`` (the question and ``<proof>``), ``target``, ``answer``,
    ``level`` (rules) and ``dead``. Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"deduction {name}")
    rows: dict[str, list[Any]] = {"question": [], "prompt": [], "target": [], "answer": [], "level": [], "dead": []}
    while len(rows["prompt"]) < size:
        number = len(rows["prompt"])
        depth = DEPTHS[name][number % len(DEPTHS[name])]
        dead = DEAD[name][number // len(DEPTHS[name]) % len(DEAD[name])]
        asked = question(rng, depth, dead)
        text = told(asked)
        if (zlib.crc32(text.encode()) % 10 == 0) == (name == "train"):
            continue
        rows["question"].append(text)
        rows["prompt"].append(f"{text} <proof>")
        rows["target"].append(solution(asked, "<proof>"))
        rows["answer"].append(answer(asked))
        rows["level"].append(depth)
        rows["dead"].append(dead)
    return rows
