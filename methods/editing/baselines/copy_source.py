"""A copy of the source: what changes nothing keeps everything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method
from stepmark.session import Session


class CopySource(Method):
    """The picture that is to be changed, unchanged: encoded, decoded and encoded again. The control of every table: it keeps
    all that the autoencoder can keep, and edits nothing.

    The round through the decoder is one evaluation, so that a record without any, which would look like a network that was
    never asked, is not taken for one. Of clips it is that of the first frame.
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
        vae, noise = session.networks["vae"], batch["noise"]
        pictures = next(batch[name] for name in self.shown if name in batch).to(noise.dtype)
        latents = vae.encode(pictures.flatten(0, -4)).unflatten(0, noise.shape[:-3])
        first = latents[:, 0] if latents.dim() == 5 else latents
        first.copy_(vae.encode(vae(first)))
        return latents
