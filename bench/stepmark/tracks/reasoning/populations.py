"""Draws among the texts, steps or statements that a search has before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepmark.session import Session


def drawn(session: Session, weights: Tensor | Sequence[float], count: int, replacement: bool = False) -> list[int]:
    """`count` numbers drawn by weights that need not sum to 1, one after the other; none twice without replacement."""
    table = torch.as_tensor(weights, dtype=torch.float64, device=session.device).clamp_min(1e-12)
    return torch.multinomial(table, count, replacement, generator=session.rng).tolist()  # type: ignore[no-any-return]
