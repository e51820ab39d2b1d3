"""What token ids say that are none of the embedded vocabulary: those of a checkpoint that somebody brings.

Ids below `reasoners.SIZE` are the words of the reasoning track, whoever writes them; what is above them is a vocabulary of
somebody's own, which may lend its voice while it is open. So methods read and compare words, whichever model wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Say = Callable[[Sequence[int]], str]

_say: Say | None = None


def lend(say: Say | None) -> None:
    """From now on texts that hold other ids than words are said so; None: by nobody."""
    global _say
    _say = say


def said(ids: Sequence[int]) -> str:
    """A text of words and other ids, in words.

    Raises:
        KeyError: nobody lends a voice.
    """
    if _say is None:
        raise KeyError("these token ids are a checkpoint's: name it by --backbone FOLDER")
    return _say(ids)
