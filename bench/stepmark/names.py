"""What is said of a name that is not known: the names that it was perhaps meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MANY = 20  # names from which on they are not all listed


def meant(name: str, known: Iterable[str]) -> str:
    """`did you mean 'ddim'?`; "" where nothing known is like the name."""
    plain = {each.lower().replace("-", "_"): each for each in known}
    asked = name.lower().replace("-", "_")
    # The last part of kind/name, or its beginning, then what is spelled alike.
    found = [each for each in plain if asked in {each.rpartition("/")[2], each.partition("/")[0]} and asked]
    found += difflib.get_close_matches(asked, plain, n=3, cutoff=0.7)
    if not found and len(asked) > 2:
        found = sorted(each for each in plain if each.startswith(asked))
    guesses = [repr(plain[each]) for each in dict.fromkeys(found)][:3]
    return f"did you mean {' or '.join(guesses)}?" if guesses else ""


def unknown(kind: str, name: str, known: Iterable[str], see: str = "") -> str:
    """One line for a name of some kind ("method", "task" ...) that is not among those known.

    see: the command that lists them, which is named instead of them where they are many.
    """
    have = sorted(known)
    if guess := meant(name, have):
        return f"no {kind} {name!r}; {guess}" + (f" (all: {see})" if see else "")
    return f"no {kind} {name!r}; " + (
        f"see: {see}" if see and len(have) > MANY else f"known: {', '.join(have) or 'none'}"
    )
