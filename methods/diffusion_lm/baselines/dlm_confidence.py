"""Confident unmasking: in every step the words that a masked diffusion model is surest of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepmark.backbones.mdlm import MASK
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.blocks import unmask_confident
from stepmark.tracks.diffusion_lm.sampling import continuations, denoiser, masked_texts


class DLMConfidence(Method):
    """The usual greedy decoding of LLaDA and Dream: each step fills the masks with the greatest probability of a word.

    The masks are spread evenly over the steps, so that with as many steps as masks one word is written at a time, and
    with fewer steps k words are written at once by k independent most likely words.
    """

    tasks = ("completion/stories64",)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x, denoise = masked_texts(batch, session.device), denoiser(session.networks["model"])
        for left in range(rung, 0, -1):
            masks = int((x[0] == MASK).sum())
            if masks == 0:
                break
            x = unmask_confident(denoise(x), x, math.ceil(masks / left))
        return continuations(batch, x)
