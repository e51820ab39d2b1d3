"""A copy of the source: what changes nothing keeps everything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method
from stepmark.session import Session


class CopySource(Method):
    """The picture that is to be changed, unchanged: its latents as they are. The control of every table: it keeps all that the
    autoencoder can keep, and edits nothing.

    One evaluation of the decoder, of clips on the first frame, is thrown away: a record without any would look like a network
    that was never asked.
    """

    paper = None
    tasks = (
        "editing/scenes",
        "instructions/scenes",
        "moving/scenes",
        "removing/scenes",
        "parts/scenes",
        "tryon/figures",
        "swapping/figures",
        "clips/scenes",
    )

    shown = ("source", "agnostic", "target")  # by kind of task, what is changed

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        latents = next(batch[f"{name}_latents"] for name in self.shown if name in batch)
        session.networks["vae"](latents[:, 0] if latents.dim() == 5 else latents)
        return latents.clone()
