"""The training pictures as latents, with their captions: what every training of the track draws its batches from."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmark.session import Session


class Latents:
    """The train split in latents, for `prepare`: encoded once here, which the offline cost shows.

    Attributes:
        x0: latents [N, 4, 8, 8] of unit variance. tokens: captions int64 [N, 32]. states: of the captions [N, 32, 64].
    """

    @torch.no_grad()
    def __init__(self, session: Session) -> None:
        most = session.scale(len(session.train["x0"]), 64)
        vae, words, self._rng = session.networks["vae"], session.networks["teacher"].words, session.rng
        pictures = session.train["x0"][:most].to(session.device, session.dtype)
        self.tokens = session.train["tokens"][:most].to(session.device)
        self.x0 = torch.cat([vae.encode(part) for part in pictures.split(500)])
        self.states = torch.cat([words(part) for part in self.tokens.split(500)])

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, captions and their states of n random pictures."""
        rows = torch.randint(len(self.x0), (n,), generator=self._rng, device=self.x0.device)
        return self.x0[rows], self.tokens[rows], self.states[rows]
