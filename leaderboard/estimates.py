"""A figure with its interval, what counts as one, and how figures are written."""

from __future__ import annotations

from typing import NamedTuple

WILDEST = 1e100  # no measurement is larger; beyond it sums and squares leave the floating-point numbers


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval, in the metric's own unit."""

    value: float
    low: float
    high: float


def sane(x: float | None) -> float | None:
    """The figure, or None where it is no measurement: records are untrusted, and 1e308 is a number too."""
    return x if x is not None and abs(x) <= WILDEST else None


def figure(x: float | None) -> str:
    """A number in three or four digits; a dash for null."""
    if x is None:
        return "-"
    size = abs(x)
    if x == 0:
        return "0"
    if size >= 1e7 or size < 1e-3:
        return f"{x:.2e}"
    if size >= 1000:
        return f"{x:,.0f}"
    text = f"{x:.4f}" if size < 1 else f"{x:.3f}" if size < 10 else f"{x:.2f}" if size < 100 else f"{x:.1f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def times(x: float) -> str:
    """A factor in two or three digits: 1.09×, 6.6×, 205×."""
    text = f"{x:.2f}".rstrip("0").rstrip(".") if x < 10 else f"{x:,.0f}" if x < 1e7 else f"{x:.1e}"
    return f"{text}×"


def factor(e: Estimate) -> tuple[str, str]:
    """A factor, and its interval or ""."""
    return times(e.value), f"[{times(e.low)}, {times(e.high)}]".replace("×", "") if e.low < e.high else ""


def with_interval(e: Estimate | None) -> str:
    """`value [low, high]`."""
    return "-" if e is None else f"{figure(e.value)} [{figure(e.low)}, {figure(e.high)}]"
