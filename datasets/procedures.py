"""Procedures whose every step is told, so that nothing is left to find: eight kinds, 2 to 25 steps, exact states.

A prompt names a procedure and what it works on, ``sort d a c b``; the completion goes through the states after each
step, ``a d c b ; a b c d ; end``. Nothing has to be planned or known, only carried out: what falls with the number of
steps is how long a model keeps to a rule.

Formats, chosen by the last word of the prompt: <states> (all of them) and <last> (the last one at once). A third way
asks for one step at a time: the state stands in the place of the start (`onward`), and only the first state of the
answer is kept. Where nothing is left to do, the answer is ``end``.

The kinds (letters are a to j, digits 0 to 9):

    sort      the smallest letter that is not in its place yet moves there (one state a move)
    rotate    the first letter goes to the end, as often as the number says
    delete    the first of the letters that are named is taken out, until none is left
    replace   the first letter of one kind becomes another, until none is left
    count     how many of a letter were seen, after each letter
    sum       the running sum of digits, its last digit
    gather    equal letters move behind their first one, kind by kind
    edits     a list of edits, one a step: drop the first, drop the last, turn round, or add a letter at the end
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="procedures",
    version=1,
    summary="Eight procedures of 2 to 25 told steps with exact states",
    licence="CC0-1.0",
    digests={
        "train": "d7ce50d363ebd918b53d95532e280187de6b8ea198cf29ab993fb87ef077ec39",
        "test": "fe4e184fd729ab8ef82511c6bacc4eded19c17a27603f8da91b43a39b886a5bf",
    },
)
ASKED = {"carry/procedures": "test"}  # task -> split
LONGEST = 1_200  # tokens of a text, where 25 states of up to 40 letters may be asked for
SIZES = {"train": 6_000, "test": 600}
KINDS = ("sort", "rotate", "delete", "replace", "count", "sum", "gather", "edits")
LETTERS = "abcdefghij"
EDITS = ("first", "last", "turn", *LETTERS)
SHORT, MEDIUM, LONG = range(2, 7), range(7, 17), range(17, 26)
TRAINED = range(1, 11)  # numbers of steps that a model is trained on


def states(prompt: str) -> list[str]:
    """The state after each step of a prompt without its format.

    Raises:
        ValueError: not a prompt of these procedures.
    """
    kind, *words = prompt.split()
    if kind == "sort":
        return _sorted(words)
    if kind == "rotate":
        count, word = int("".join(w for w in words if w.isdigit())), [w for w in words if not w.isdigit()]
        return [" ".join(word[i % len(word) :] + word[: i % len(word)]) for i in range(1, count + 1)]
    if kind in ("delete", "replace"):
        return _changed(kind, words)
    if kind == "count":
        return [" ".join(str(words[1 : i + 1].count(words[0]))) for i in range(1, len(words))]
    if kind == "sum":
        return [str(sum(map(int, words[: i + 1])) % 10) for i in range(1, len(words))]
    if kind == "gather":
        return _gathered(words)
    if kind == "edits":
        return _edited(words)
    raise ValueError(f"no procedure is called {kind!r}; there are {', '.join(KINDS)}")


def _sorted(word: list[str]) -> list[str]:
    found = []
    for place in range(len(word)):
        smallest = min(range(place, len(word)), key=lambda i: (word[i], i))
        if smallest != place:
            word = [*word[:place], word[smallest], *word[place:smallest], *word[smallest + 1 :]]
            found.append(" ".join(word))
    return found


def _changed(kind: str, words: list[str]) -> list[str]:
    given = 1 if kind == "delete" else 2
    wanted, word, found = words[0], words[given:], []
    while wanted in word:
        place = word.index(wanted)
        word = [*word[:place], *words[1:given], *word[place + 1 :]]
        found.append(" ".join(word) or "none")
    return found


def _gathered(word: list[str]) -> list[str]:
    found = []
    for letter in dict.fromkeys(word):
        while True:
            start = word.index(letter)
            run = start
            while run < len(word) and word[run] == letter:
                run += 1
            if letter not in word[run:]:
                break
            place = word.index(letter, run)
            word = [*word[:run], letter, *word[run:place], *word[place + 1 :]]
            found.append(" ".join(word))
    return found


def _edited(words: list[str]) -> list[str]:
    """``word : edit edit ...``"""
    place = words.index(":")
    word, found = words[:place], []
    for edit in words[place + 1 :]:
        if edit == "turn":
            word = word[::-1]
        elif edit == "first":
            word = word[1:]
        elif edit == "last":
            word = word[:-1]
        else:
            word = [*word, edit]
        found.append(" ".join(word) or "none")
    return found


def onward(asked: str, state: str) -> str | None:
    """The prompt that goes on from the state after the first step of another. None where a state does not tell what is
    left (count), or where there is none."""
    kind, *words = asked.split()
    if kind == "rotate":
        count = int("".join(w for w in words if w.isdigit()))
        return f"rotate {' '.join(str(count - 1))} {state}" if count else None
    if kind == "sum":
        return " ".join([kind, state, *words[2:]]) if len(words) > 1 else None
    if kind == "edits":
        left = words[words.index(":") + 1 :]
        return " ".join([kind, *_letters(state), ":", *left[1:]]) if left else None
    if kind in ("delete", "replace"):
        return " ".join([kind, *words[: 1 if kind == "delete" else 2], *_letters(state)])
    return None if kind == "count" else f"{kind} {state}"


def _letters(state: str) -> list[str]:
    return [] if state == "none" else state.split()


def prompt(rng: random.Random, kind: str, steps: int) -> str:
    """A prompt of a kind, without its format, that takes so many steps."""
    while True:
        found = _attempt(rng, kind, steps)
        if len(states(found)) == steps:
            return found


def _attempt(rng: random.Random, kind: str, steps: int) -> str:
    def word(length: int, letters: Sequence[str] = LETTERS) -> str:
        return " ".join(rng.choices(letters, k=max(1, length)))

    if kind == "sort":
        return f"sort {word(steps + rng.randint(1, 3 + steps // 4))}"
    if kind == "rotate":
        return f"rotate {' '.join(str(steps))} {word(rng.randint(4, 8))}"
    if kind in ("delete", "replace"):
        wanted, other = rng.sample(LETTERS, 2)
        rest = [letter for letter in LETTERS if letter not in (wanted, other)]
        letters = [wanted] * steps + rng.choices(rest, k=rng.randint(2, 6))
        rng.shuffle(letters)
        return " ".join([kind, wanted, *([other] if kind == "replace" else []), *letters])
    if kind == "count":
        letter = rng.choice(LETTERS)
        return f"count {letter} {word(steps, [letter, *rng.sample(LETTERS, 2)])}"
    if kind == "sum":
        return f"sum {word(steps + 1, '0123456789')}"
    if kind == "gather":
        # Of n letters of m kinds n / m stand together in the end whatever is done, and the first of each kind stays.
        kinds = rng.randint(3, 5) if steps < 11 else rng.randint(5, 8)
        length = round((steps + kinds + 0.5) / (1 - 1 / kinds)) + rng.randint(-1, 1)
        return f"gather {word(length, rng.sample(LETTERS, kinds))}"
    edits = [rng.choice(EDITS[:3]) if rng.random() < 0.6 else rng.choice(LETTERS) for _ in range(steps)]
    return f"edits {word(rng.randint(3, 7))} : {' '.join(edits)}"


def solution(asked: str, form: str) -> str:
    """The completion of a prompt in the format <states> or <last>."""
    found = states(asked)
    return " ; ".join([*(found if form == "<states>" else found[-1:]), "end"])


def said(text: str) -> list[str]:
    """The states of a text, up to its end."""
    found = [part.strip() for part in text.split(" ; ")]
    return found[: found.index("end")] if "end" in found else found


def prefix(asked: str, text: str) -> tuple[int, int, int]:
    """(leading states of a text that are right, states of the text, states that there are)."""
    gold = states(asked)
    own, right = said(text), 0
    for one, other in zip(own, gold, strict=False):
        if one != other:
            break
        right += 1
    return right, len(own), len(gold)


def judged(asked: str, text: str) -> dict[str, float]:
    """What a text is worth, by metric; NaN where a metric is of other numbers of steps only: accuracy of its last
    state, valid where it has all states and nothing else and has ended, prefix the share of states that lead and are
    right."""
    none = float("nan")
    right, own, gold = prefix(asked, text)
    end = float(said(text)[-1:] == states(asked)[-1:])
    share, ended = right / max(own, gold), text.split()[-1:] == ["end"]
    lengths = {"short": SHORT, "medium": MEDIUM, "long": LONG}
    return {
        "accuracy": end,
        "answered": float(ended),
        "valid": float(right == own == gold and ended),
        "prefix": share,
        **{f"accuracy_{name}": end if gold in steps else none for name, steps in lengths.items()},
        **{f"prefix_{name}": share if gold in steps else none for name, steps in lengths.items()},
    }


def split(name: str) -> dict[str, Any]:
    """Prompts of ``train`` (1 to 10 steps) or ``test`` (2 to 25, a third of each of short, medium and long), kinds in
    turn.

    Returns a dict of equally long lists: ``question``, ``prompt`` (with <states>), ``target``, ``answer`` (the last
    state), ``level`` (steps) and ``kind``. Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"procedures {name}")
    rows: dict[str, list[Any]] = {"question": [], "prompt": [], "target": [], "answer": [], "level": [], "kind": []}
    while len(rows["prompt"]) < size:
        number = len(rows["prompt"])
        kind = KINDS[number % len(KINDS)]
        steps = rng.choice(TRAINED if name == "train" else (SHORT, MEDIUM, LONG)[number // len(KINDS) % 3])
        asked = prompt(rng, kind, steps)
        if (zlib.crc32(asked.encode()) % 10 == 0) == (name == "train"):
            continue
        rows["question"].append(asked)
        rows["prompt"].append(f"{asked} <states>")
        rows["target"].append(solution(asked, "<states>"))
        rows["answer"].append(states(asked)[-1])
        rows["level"].append(steps)
        rows["kind"].append(kind)
    return rows
