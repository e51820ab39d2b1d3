"""Equations of docstrings as HTML: Greek letters, subscripts and powers from the plain text, without a script or a font.

A docstring writes `x_s = alpha_s x0 + sigma_s eps` so that it reads in a terminal; a page shows the same with letters
and raised or lowered parts. Nothing is parsed as mathematics: a name is set as a letter if it is the name of one, an
index is what follows an underscore after a letter, a power what follows `^`. Text in backquotes is left alone.
"""

from __future__ import annotations

import re

GREEK = dict(
    zip(
        "alpha beta gamma delta epsilon eps zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega "
        "Gamma Delta Theta Lambda Sigma Phi Psi Omega".split(),
        "αβγδεεζηθκλμνξπρστφχψωΓΔΘΛΣΦΨΩ",
        strict=True,
    )
)
NAMES = "|".join(sorted(GREEK, key=len, reverse=True))
# What may carry an index: a letter, the name of one, a few operators, an abbreviation in capitals.
BASE = rf"(?:{NAMES}|abar|sum|prod|max|min|mean|argmin|argmax|[A-Z]{{2,3}}|[A-Za-z])"
INDEX = r"(?:\{[^{}\n]{1,40}\}|[A-Za-z0-9]+)"
SYMBOL = re.compile(rf"(?<![A-Za-z0-9_&#;])({BASE})((?:&#x27;)|\*)?_({INDEX})(?![A-Za-z0-9]*_)(?![A-Za-z])")
LETTER = re.compile(rf"(?<![A-Za-z0-9_&#.])(?<![A-Za-z][-/])(d?)({NAMES}|abar)(?![A-Za-z0-9_]|-[a-z])")
POWER = re.compile(r"\^(?:\{([^{}\n]{1,40})\}|\(([^()\n]{1,40})\)|(-?[A-Za-z0-9]+))")
SIGNS = (
    ("&lt;=", "≤"),
    ("&gt;=", "≥"),
    ("!=", "≠"),
    ("&lt;-", "←"),
    ("-&gt;", "→"),
    ("+-", "±"),
    ("grad log", "∇ log"),
)


def typeset(escaped: str) -> str:
    """HTML of a text in which letters, indices and powers are set. The text is escaped already and stays so."""
    for plain, sign in SIGNS:
        escaped = escaped.replace(plain, sign)
    escaped = re.sub(r"(?<![A-Za-z])sqrt(?=\()", "√", escaped)
    escaped = SYMBOL.sub(_symbol, escaped)
    escaped = POWER.sub(lambda m: f"<sup>{_letters(m[1] or m[2] or m[3])}</sup>", escaped)
    return _letters(escaped)


def _symbol(match: re.Match[str]) -> str:
    base, mark, index = match[1], match[2] or "", match[3].strip("{}")
    if index == "bar":
        return f"{_letters(base)}\N{COMBINING MACRON}{mark}"
    # An index of an index, such as t_i inside braces, is set flat: it is rare, and small print gets no smaller.
    return f"{_sign(base)}{mark}<sub>{_letters(index)}</sub>"


def _sign(base: str) -> str:
    return {"sum": "Σ", "prod": "Π"}.get(base) or _letters(base)


def _letters(text: str) -> str:
    return LETTER.sub(lambda m: m[1] + ("α\N{COMBINING MACRON}" if m[2] == "abar" else GREEK[m[2]]), text)
