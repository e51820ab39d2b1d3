"""The training pictures as latents, with their captions: what every training of the track draws its batches from."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmark.session import Session

MOST = 10_000  # pictures of a split at most: to encode more would take time from the training itself


@torch.no_grad()
def encoded(session: Session, most: int) -> dict[str, Tensor]:
    """The first pictures of the train split as latents, {"x0": [N, 4, 8, 8]}: for `session.once`."""
    encode, pictures = session.networks["vae"].encode, session.train["x0"][:most]
    return {"x0": torch.cat([encode(part.to(session.device, session.dtype)) for part in pictures.split(500)])}


class Latents:
    """The train split in latents, its first 10 000 pictures, for `prepare`: encoded once for all who ask, which the offline
    cost shows.

    Attributes:
        x0: latents [N, 4, 8, 8] of unit variance. tokens: captions int64 [N, 32].
    """

    def __init__(self, session: Session) -> None:
        most = session.scale(min(len(session.train["x0"]), MOST), 64)
        self._words, self._rng = session.networks["teacher"].words, session.rng
        self.tokens = session.train["tokens"][:most].to(session.device)
        self.x0 = session.once(encoded, most)["x0"]

    def draw(self, n: int) -> Tensor:
        """Numbers of n random pictures."""
        return torch.randint(len(self.x0), (n,), generator=self._rng, device=self.x0.device)

    @torch.no_grad()
    def states(self, rows: Tensor) -> Tensor:
        """States [n, 32, 64] of the captions of the pictures of those numbers."""
        return self._words(self.tokens[rows])

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, captions and their states of n random pictures."""
        rows = self.draw(n)
        return self.x0[rows], self.tokens[rows], self.states(rows)
