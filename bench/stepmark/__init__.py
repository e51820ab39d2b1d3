"""Stepmark: how much quality does each inference step, millisecond, megabyte and joule buy?"""

from stepmark.method import Claim, Method, Paper, Variant, skip
from stepmark.task import Task

__version__ = "0.2.0"
__all__ = ["Claim", "Method", "Paper", "Session", "Task", "Variant", "frame", "skip"]


def __getattr__(name: str) -> object:
    # Session imports torch and frame numpy, which take seconds: only on first use, so that listing stays instant.
    if name == "Session":
        from stepmark.session import Session

        return Session
    if name == "frame":
        from stepmark.dataframe import frame

        return frame
    raise AttributeError(f"module 'stepmark' has no attribute {name!r}")


from stepmark.plugins import mount as _mount  # noqa: E402

_mount()
