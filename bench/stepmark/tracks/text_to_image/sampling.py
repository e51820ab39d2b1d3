"""What samplers of the track share: a network asked by captions that are encoded once, with guidance and negative prompts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark.tracks.image.solvers import Denoiser


class GuidedByCaption(Denoiser):
    """A `Denoiser` of a batch's captions: `denoise(x, t)` -> (x0, eps), `denoise.output(x, t)` -> eps or v.

    The captions are encoded here, once. Where the batch has a negative prompt, guidance leads away from that, and not from the
    empty caption.

    Args:
        network: the teacher or a network like it, with `words`.
        batch: "condition" int64 [B, 32], and "negative" where there are negative prompts.
        guidance: w of null + w (conditional - null); 1 is the plain prediction and costs one row a picture, else two.
    """

    def __init__(self, network: nn.Module, batch: Mapping[str, Tensor], guidance: float) -> None:
        states = network.words(batch["condition"])
        super().__init__(network, states, guidance)
        if guidance != 1.0 and "negative" in batch:
            self.condition = torch.cat([network.words(batch["negative"]), states])
