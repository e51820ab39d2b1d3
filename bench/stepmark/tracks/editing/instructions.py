"""Instructions to edit: what they name, how they go wrong, and what an eye that looks at both pictures says was done."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from stepmark.datasets.edits32 import instruct
from stepmark.datasets.scenes32 import describe
from stepmark.tracks.scenes.captions import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Caption,
)
from stepmark.tracks.scenes.parser import parse


def facts(text: str) -> list[tuple[int, int, tuple[str, ...]]]:
    """What an instruction names: from which word to which, and what might stand there. A place is one fact of one or two
    words."""
    words = text.split()
    end = len(words)
    found: list[tuple[int, int, tuple[str, ...]]] = []
    for i, word in enumerate(words):
        if word in ("to", "at") and " ".join(words[i + 1 :]) in PLACES:
            found.append((i + 1, end, PLACES))
            end = i
    for i, word in enumerate(words[:end]):
        found += [(i, i + 1, kinds) for kinds in (COLOURS, SHAPES, SIZES, TEXTURES, BACKGROUNDS) if word in kinds]
    return found


def altered(text: str, rng: np.random.Generator) -> str:
    """An instruction with one of its facts, chosen by lot, replaced by another of its kind."""
    named, words = facts(text), text.split()
    start, end, kinds = named[int(rng.integers(len(named)))]
    others = [kind for kind in kinds if kind != " ".join(words[start:end])]
    return " ".join([*words[:start], others[int(rng.integers(len(others)))], *words[end:]])


def difference(before: Caption, after: Caption) -> str | None:
    """The instruction that leads from one scene to another, told by their full captions; None where not one thing has changed, or
    more than one."""
    gone = [thing for thing in before.objects if thing not in after.objects]
    new = [thing for thing in after.objects if thing not in before.objects]
    if before.background != after.background:
        return instruct("background", before, after, 0) if not gone and not new else None
    old, now = Caption(tuple(gone)), Caption(tuple(new))
    if (len(gone), len(new)) == (0, 1):
        return instruct("add", old, now, 0)
    if (len(gone), len(new)) == (1, 0):
        return instruct("remove", old, now, 0)
    if (len(gone), len(new)) == (1, 1):
        changed = [name for name in ATTRIBUTES if getattr(gone[0], name) != getattr(new[0], name)]
        return instruct({"place": "move"}.get(changed[0], changed[0]), old, now, 0) if len(changed) == 1 else None
    return None


def seen(before: Tensor, after: Tensor) -> list[str | None]:
    """What the eye says was done to pictures [N, 3, 32, 32], one with the other: `difference` of what it reads in both."""
    read = [describe(parse(pictures).scenes) for pictures in (before, after)]
    return [difference(*captions) for captions in zip(*read, strict=True)]
