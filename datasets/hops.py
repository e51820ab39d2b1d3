"""Multi-hop questions over a fixed random knowledge base of 60 people and 6 functional relations.

Prompt ``alma boss friend ? <cot>`` (the friend of the boss of alma); completion
``alma boss carlo ; carlo friend dora ; ans dora``: one recited fact per hop.  The facts themselves (1 hop) are
all in the training split; of the (person, path) pairs with 2 to 4 hops one in ten is held out for the test.
"""

from __future__ import annotations

import random
import zlib
from itertools import islice
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="hops",
    version=1,
    summary="Multi-hop questions over a fixed knowledge base of 60 people and 6 relations",
    licence="CC0-1.0",
    digests={
        "train": "6a97ba28534deb28564c6d7aa1054881370bb890d0c2b8f452de992908df550f",
        "test": "60c66629352b33c98c0957c4589d39a066d9007341ded766564f30c4035eede1",
    },
)
SIZES = {"train": 40_000, "test": 500}
RELATIONS = ("boss", "friend", "teacher", "doctor", "rival", "cousin")
PEOPLE = tuple(
    "alma boris carlo dora edgar fiona gus hanna ivan jana kurt lena milo nora oscar petra quinn rita stefan tilda "
    "ugo vera walter xenia yuri zoe adam bella cyrus delia enzo flora gino helga igor julia karim lotte marco nadia "
    "otto paula remy sonja theo ursula viktor wanda yvonne zeno arno bianca cesar diana emil freya georg heidi ines "
    "jonas".split()
)


def facts() -> dict[tuple[str, str], str]:
    """The knowledge base: (person, relation) -> person, the same on every call."""
    rng = random.Random("hops facts")
    return {(person, relation): rng.choice(PEOPLE) for relation in RELATIONS for person in PEOPLE}


def recite(person: str, path: tuple[str, ...], known: dict[tuple[str, str], str]) -> tuple[str, str]:
    """Completion and answer of the question `person`, `path`."""
    clauses = []
    for relation in path:
        clauses.append(f"{person} {relation} {known[person, relation]} ;")
        person = known[person, relation]
    return " ".join(clauses) + f" ans {person}", person


def split(name: str) -> dict[str, Any]:
    """Examples of the split ``train`` (1 to 4 hops) or ``test`` (2 to 4 hops, held-out person and path).

    Returns a dict of equally long lists: ``prompt`` (ends with ``<cot>``), ``target``, ``answer`` (one name) and
    ``level`` (hops).  Raises KeyError for any other name.
    """
    size, rng, known = SIZES[name], random.Random(f"hops {name}"), facts()
    levels = (2, 3, 4) if name == "test" else (1, 2, 3, 4)

    def questions() -> Any:
        count = 0
        while True:
            hops = levels[count % len(levels)]
            person, path = rng.choice(PEOPLE), tuple(rng.choice(RELATIONS) for _ in range(hops))
            held_out = hops > 1 and zlib.crc32(" ".join((person, *path)).encode()) % 10 == 0
            if held_out == (name == "test"):
                count += 1
                yield person, path

    rows: dict[str, list[Any]] = {"prompt": [], "target": [], "answer": [], "level": []}
    for person, path in islice(questions(), size):
        target, answer = recite(person, path, known)
        rows["prompt"].append(f"{person} {' '.join(path)} ? <cot>")
        rows["target"].append(target)
        rows["answer"].append(answer)
        rows["level"].append(len(path))
    return rows
