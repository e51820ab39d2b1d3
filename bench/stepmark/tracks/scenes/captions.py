"""Captions of scenes: a closed grammar that is written, read back, and turned into ids of 32 tokens.

::

    caption    = objects ["on" BACKGROUND] ["in" "the" REGION] ["as" "pastel"] ["and" "no" thing]
    objects    = object [RELATION object] {"and" object}
    object     = ("a" | "an") thing ["with" COLOUR "top" "and" COLOUR "bottom"] ["at" PLACE]
    thing      = [SIZE] [COLOUR] [TEXTURE] (SHAPE | "object")

What a caption leaves out is free. A full caption names size, colour, texture, shape and place of every object, and the
background; it names every object there is, so that one more is a fault. "an object" has any shape. The clause "and no
red circle" says what must not be there; where a sampler takes a negative prompt, `negative_prompt` is that clause alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "purple")
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("black", "charcoal", "grey", "silver", "white", "navy", "forest", "wine")
RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind")
REVERSE = (1, 0, 3, 2, 5, 4)  # of the second object to the first, where the first has that relation to the second
REGIONS = ("north", "east", "south", "west")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
    "place": PLACES,
}
LENGTH = 32  # tokens of a caption, with those of its start and its end
PAD, START, END = range(3)
VOCABULARY: tuple[str, ...] = (
    *("<pad>", "<start>", "<end>"),
    *("a", "an", "and", "at", "in", "no", "of", "on", "the", "with"),
    *("above", "below", "behind", "front", "top", "bottom", "left", "right", "centre"),
    *SHAPES,
    "object",
    *COLOURS,
    *SIZES,
    *TEXTURES,
    *BACKGROUNDS,
    *REGIONS,
    *("as", "pastel"),
    *("make", "turn", "into", "add", "remove", "move", "to", "background"),  # of instructions to edit
)
_NUMBER = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Thing:
    """What is said of an object: indices in the tuples above, None where nothing is said.

    `lower`: the colour of the lower half of an object of two parts, whose upper half has `colour`.
    """

    shape: int | None = None
    colour: int | None = None
    size: int | None = None
    texture: int | None = None
    place: int | None = None
    lower: int | None = None

    def named(self) -> dict[str, int]:
        """The attributes that are said, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Caption:
    """What a caption says: of every object, of the first two together, of the background, of what must not be there."""

    objects: tuple[Thing, ...] = ()
    relation: int | None = None  # of the first object to the second, index in RELATIONS
    background: int | None = None
    region: int | None = None
    pastel: bool = False
    absent: Thing | None = None


def _words(thing: Thing, article: bool = True) -> str:
    whole = thing.lower is None
    parts = [
        "" if thing.size is None else SIZES[thing.size],
        COLOURS[thing.colour] if thing.colour is not None and whole else "",
        "" if thing.texture is None else TEXTURES[thing.texture],
        "object" if thing.shape is None else SHAPES[thing.shape],
    ]
    words = " ".join(filter(None, parts))
    if article:
        words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    if thing.lower is not None and thing.colour is not None:
        words += f" with {COLOURS[thing.colour]} top and {COLOURS[thing.lower]} bottom"
    return words if thing.place is None else f"{words} at {PLACES[thing.place]}"


def write(caption: Caption) -> str:
    """The words of a caption; of one that says nothing, none."""
    things = [_words(thing) for thing in caption.objects]
    text = things[0] if things else ""
    for i, thing in enumerate(things[1:]):
        link = RELATIONS[caption.relation] if i == 0 and caption.relation is not None else "and"
        text += f" {link} {thing}"
    if caption.background is not None:
        text += f" on {BACKGROUNDS[caption.background]}"
    if caption.region is not None:
        text += f" in the {REGIONS[caption.region]}"
    if caption.pastel:
        text += " as pastel"
    if caption.absent is not None:
        text += f" and no {_words(caption.absent, article=False)}"
    return text.strip()


class _Reader:
    """Reads words from the left; every `take` moves on only past what it was asked for."""

    def __init__(self, text: str) -> None:
        self.text, self.words, self.at = text, text.split(), 0

    def take(self, phrase: str) -> bool:
        wanted = phrase.split()
        if self.words[self.at : self.at + len(wanted)] != wanted:
            return False
        self.at += len(wanted)
        return True

    def one_of(self, phrases: Sequence[str]) -> int | None:
        """Which of the phrases comes next, the longest that does."""
        longest = sorted(range(len(phrases)), key=lambda i: -len(phrases[i].split()))
        return next((i for i in longest if self.take(phrases[i])), None)

    def needed(self, phrases: Sequence[str]) -> int:
        found = self.one_of(phrases)
        if found is None:
            raise ValueError(
                f"no caption: {self.text!r}: after word {self.at}, one of {', '.join(phrases)} should follow"
            )
        return found

    def place(self) -> int:
        """A place; in "at top left of a star" it is the top, for "left of" is what relates the two."""
        related = [p for p in PLACES if self.words[self.at : self.at + len(p.split()) + 1] == [*p.split(), "of"]]
        return PLACES.index((fitting := [p for p in PLACES if p not in related])[self.needed(fitting)])

    def thing(self, article: bool = True) -> Thing:
        if article:
            self.needed(("a", "an"))
        size, colour, texture = (self.one_of(words) for words in (SIZES, COLOURS, TEXTURES))
        shape = self.needed((*SHAPES, "object"))
        lower = None
        if self.take("with"):
            colour = self.needed(COLOURS)
            self.needed(("top and",))
            lower = self.needed(COLOURS)
            self.needed(("bottom",))
        place = self.place() if self.take("at") else None
        return Thing(shape if shape < len(SHAPES) else None, colour, size, texture, place, lower)


def read(text: str) -> Caption:
    """The caption that `write` wrote.

    Raises:
        ValueError: the text is no sentence of the grammar.
    """
    reader = _Reader(text)
    objects: list[Thing] = []
    relation = None
    if reader.words[:1] in (["a"], ["an"]):
        objects.append(reader.thing())
        relation = reader.one_of(RELATIONS)
        if relation is not None:
            objects.append(reader.thing())
        while reader.words[reader.at : reader.at + 2] != ["and", "no"] and reader.take("and"):
            objects.append(reader.thing())
    background = reader.needed(BACKGROUNDS) if reader.take("on") else None
    region = reader.needed(REGIONS) if reader.take("in the") else None
    pastel = reader.take("as pastel")
    absent = reader.thing(article=False) if reader.take("and no") else None
    if reader.at < len(reader.words):
        raise ValueError(f"no caption: {text!r}: nothing can follow word {reader.at}")
    return Caption(tuple(objects), relation, background, region, pastel, absent)


def swapped(caption: Caption) -> Caption:
    """The same said the other way round: the first two objects in the other order, and so their relation."""
    relation = None if caption.relation is None else REVERSE[caption.relation]
    return replace(caption, objects=(*caption.objects[:2][::-1], *caption.objects[2:]), relation=relation)


def positive(caption: Caption) -> Caption:
    """The caption without its clause of what must not be there: the prompt beside a negative prompt."""
    return replace(caption, absent=None)


def negative_prompt(caption: Caption) -> str:
    """What must not be there, as a prompt of its own ("a red circle"); "" where nothing is excluded."""
    return "" if caption.absent is None else _words(caption.absent)


def unwanted(text: str) -> Thing | None:
    """What a negative prompt says must not be there: the inverse of `negative_prompt`."""
    return _Reader(text).thing() if text else None


def tokens(texts: Iterable[str]) -> Tensor:
    """Ids int64 [N, 32] of texts: start, words, end, padding. KeyError for a word that is not in VOCABULARY.

    Raises:
        ValueError: a text has more than 30 words.
    """
    rows = []
    for text in texts:
        ids = [START, *(_NUMBER[word] for word in text.split()), END]
        if len(ids) > LENGTH:
            raise ValueError(f"{text!r} has {len(ids) - 2} words, more than {LENGTH - 2}")
        rows.append(ids + [PAD] * (LENGTH - len(ids)))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, LENGTH)


def texts(ids: Tensor) -> list[str]:
    """The texts of ids [N, 32]."""
    return [" ".join(VOCABULARY[i] for i in row if i > END) for row in ids.tolist()]
