"""Sentences of one grammar in four languages, each with a script and words of its own, and with a label behind them.

In English words: ``Anna sold 12+7 horses in Rome: animals``. A line ends with the answer to one of three questions: which
kind of thing it was, on which side of the country the place lies, or what the calculation gives. Lines of a document have
one language and one question; only the labels of the lines before tell a reader which.

The languages are bijective ciphers of each other: every word has one counterpart, drawn from the letters of the script.
Names, places and the first word of a line are capitalised; in the second language all nouns are; the fourth has no
capitals. Any of three word orders may stand in any language. All choices are uniform and independent, so that every
line is equally probable: `surprise` is the entropy, which no model of these texts can go below.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="dialects",
    version=1,
    summary="One grammar in four languages and scripts, with capitals, calculations and three questions to answer",
    licence="CC0-1.0",
    digests={
        "train": "85e2016493a3b47038f3b20d15e7046d231e8037dcd22791ef9e1d08fb4e2262",
        "test": "eb163c8fac85f57f8439a94b5a5aa37506eda804cfb853343d92e360edbf81ee",
    },
)
SIZES = {"train": 5_000, "test": 400}  # documents
LINES = 5  # of a document; of a test document the last is the question
SCRIPTS = (  # consonants and vowels
    ("bdfgklmnprstvz", "aeiou"),
    ("βγδζθκλμνπρτφχ", "αεηιουω"),
    ("бвгджзклмнпрстф", "аеиоуы"),
    ("ბგდვზთკლმნპრსტფქ", "აეიოუ"),
)
CAPITAL_NOUNS = 1  # the language, by number
ROLES = {"name": 16, "verb": 8, "animal": 8, "tool": 8, "north": 6, "south": 6, "in": 1, "label": 4}  # words of each
FIRST, SECOND = range(11, 21), range(2, 7)  # numbers of a calculation
ORDERS, SIGNS, QUESTIONS = 3, "+-", ("thing", "place", "sum")
LABELS = ("animal", "tool", "north", "south")  # the order of the words of role "label"


@lru_cache(maxsize=len(SCRIPTS))
def dictionary(language: int) -> dict[str, list[str]]:
    """Role -> its words in a language, all distinct: two to four syllables, one for the word of role "in"."""
    rng, (consonants, vowels) = random.Random(f"dialects {language}"), SCRIPTS[language]
    seen: set[str] = set()
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    for role, count in ROLES.items():
        while len(found[role]) < count:
            syllables = 1 if role == "in" else rng.choice((2, 2, 3, 3, 4))
            word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(syllables))
            if word not in seen:
                seen.add(word)
                found[role].append(word)
    return found


def surprise(told: bool) -> float:
    """-log p in nats of any line, its label and end included; `told`: language and question are known from others."""
    words = ROLES["name"] * ROLES["verb"] * (ROLES["animal"] + ROLES["tool"]) * (ROLES["north"] + ROLES["south"])
    lines = ORDERS * words * len(FIRST) * len(SECOND) * len(SIGNS)
    return math.log(lines if told else lines * len(SCRIPTS) * len(QUESTIONS))


def capitalised(word: str) -> str:
    """With a capital first letter, where the script has any."""
    return word[0].title() + word[1:]


def example(rng: random.Random, language: int, question: str) -> tuple[str, str, list[str]]:
    """One (text up to its colon, label, the four labels to choose from in random order)."""
    words = dictionary(language)
    thing, place = rng.randrange(ROLES["animal"] + ROLES["tool"]), rng.randrange(ROLES["north"] + ROLES["south"])
    first, second, sign = rng.choice(FIRST), rng.choice(SECOND), rng.choice(SIGNS)
    name, verb, within = capitalised(rng.choice(words["name"])), rng.choice(words["verb"]), words["in"][0]
    things, where = (words["animal"] + words["tool"])[thing], capitalised((words["north"] + words["south"])[place])
    calculation = f"{first}{sign}{second}"
    if language == CAPITAL_NOUNS:
        things = capitalised(things)
    text = (
        f"{name} {verb} {calculation} {things} {within} {where}:",
        f"{within} {where} {name} {verb} {calculation} {things}:",
        f"{verb} {name} {calculation} {things} {within} {where}:",
    )[rng.randrange(ORDERS)]
    if question == "sum":
        answer = first + second if sign == "+" else first - second
        label, others = str(answer), [str(answer + more) for more in (-10, -1, 1, 10) if answer + more >= 0]
        labels = [label, *rng.sample(others, 3)]
    else:
        right = LABELS[thing >= ROLES["animal"]] if question == "thing" else LABELS[2 + (place >= ROLES["north"])]
        labels = list(words["label"])
        label = labels[LABELS.index(right)]
    rng.shuffle(labels)
    return capitalised(text), label, labels


def split(name: str) -> dict[str, Any]:
    """The split ``train``: a list ``document`` of texts, each of whole lines. ``test``: lists ``demonstrations`` (lists of
    lines), ``text``, ``labels`` (four), ``answer`` (the number of the right one) and ``question``. KeyError for any other.
    """
    size, rng = SIZES[name], random.Random(f"dialects {name}")
    documents, rows = [], []
    for _ in range(size):
        language, question = rng.randrange(len(SCRIPTS)), rng.choice(QUESTIONS)
        found = [example(rng, language, question) for _ in range(LINES)]
        lines = [f"{text} {label}\n" for text, label, _ in found]
        text, label, labels = found[-1]
        documents.append("".join(lines))
        rows.append((lines[:-1], text, labels, labels.index(label), question))
    if name == "train":
        return {"document": documents}
    keys = ("demonstrations", "text", "labels", "answer", "question")
    return {key: [row[i] for row in rows] for i, key in enumerate(keys)}
