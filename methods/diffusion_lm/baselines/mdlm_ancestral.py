"""Ancestral sampling of a masked diffusion language model (Sahoo et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import ancestral, continuations, denoiser, masked_texts


class MDLMAncestral(Method):
    """MDLM: masks are replaced at random times by draws from the model, and a word once written stays.

    From t to s < t, alpha = 1 - t, each mask is replaced with probability (t - s) / t by a word drawn from the model's
    distribution at its position (equation 7); the mask itself has probability 0 there and visible words are carried over
    (section 3.2.3, the SUBS parameterisation). The model does not see t, so that a step in which no mask of a text moves needs
    no evaluation: the paper's cache. Which masks move is drawn first here, so that the evaluation is not only kept for
    later but never made; a text costs at most as many evaluations as it has words.

    `mdlm_nucleus` draws each word from the smallest set of words with 90 % of the probability: what remasking samplers are
    compared with, which do so as well (Wang et al. 2025, section 5.1). `mdlm_sharp` takes half of the probability, a control.
    The likelihood that the paper boasts of is `mdlm_bound`'s.

    Differs from the paper: words are drawn in double precision, for rounding in single precision lowers the temperature
    (Zheng et al. 2025).
    """

    paper = Paper(
        id="mdlm",
        title="Simple and Effective Masked Diffusion Language Models",
        authors="Subham Sekhar Sahoo, Marianne Arriola, Yair Schiff, Aaron Gokaslan, Edgar Marroquin, "
        "Justin T. Chiu, Alexander Rush, Volodymyr Kuleshov",
        year=2024,
        arxiv="2406.07524",
        code="kuleshov-group/mdlm",
    )
    tasks = ("generation/stories64", "completion/stories64")
    claims = (
        Claim(
            "valid[mdlm_ancestral,256] > valid[mdlm_ancestral,64] and valid[mdlm_ancestral,64] > valid[mdlm_ancestral,32] "
            "and valid[mdlm_ancestral,32] > valid[mdlm_ancestral,16] and valid[mdlm_ancestral,16] > valid[mdlm_ancestral,8]",
            says="each doubling of the steps gives more right texts",
            headline=True,
        ),
        Claim(
            "latency_ms[mdlm_ancestral,256] <= 2 * latency_ms[mdlm_ancestral,64]",
            says="steps in which nothing changes cost next to nothing: four times the steps take at most twice as long",
        ),
    )

    nucleus = 1.0
    variants = (
        Variant(
            "mdlm_nucleus",
            says="MDLM's ancestral sampler, each word drawn from the nucleus of 90 % of the probability",
            nucleus=0.9,
            baselines=("mdlm_ancestral",),
        ),
        Variant(
            "mdlm_sharp",
            says="The control that buys right texts with variety: words drawn from a nucleus of half of the probability",
            nucleus=0.5,
            baselines=("mdlm_ancestral",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x = masked_texts(batch, session.device)
        return continuations(batch, ancestral(denoiser(session.networks["model"]), x, rung, session.rng, self.nucleus))
