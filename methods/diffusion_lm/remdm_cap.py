"""ReMDM-cap: remasking with a small constant probability (Wang et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import capped, continuations, masked_texts, remask
from stepmark.tracks.diffusion_lm.training import denoiser

ETA, NUCLEUS = 0.04, 0.9


class ReMDMCap(Method):
    """ReMDM-cap: each word is masked again with the same small probability at every step.

    For alpha_t, the probability that a word is visible, a step from t to s masks a visible word again with probability
    sigma and fills a mask with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) by a draw from the model, so
    that after it a word is visible with probability alpha_s whatever sigma in [0, min(1, (1 - alpha_s) / alpha_t)]
    (equations 6 and 7). sigma = 0 is MDLM.

    Here sigma = min(0.04, greatest) (section 4.1), the paper's eta for fewer steps than words (table 6).

    Differs from the paper: from one step a word on it lowers eta to 0.008, for 1024 words; over the sixteenth of the
    steps that 64 words take, hardly a word would be masked again, so that eta stays.
    """

    paper = Paper(
        id="remdm",
        title="Remasking Discrete Diffusion Models with Inference-Time Scaling",
        authors="Guanghan Wang, Yair Schiff, Subham Sekhar Sahoo, Volodymyr Kuleshov",
        year=2025,
        arxiv="2503.00307",
        code="kuleshov-group/remdm",
    )
    tasks = ("generation/stories64",)
    baselines = ("mdlm_nucleus",)
    claims = (
        Claim(
            "gen_ppl[remdm_cap,256] < gen_ppl[mdlm_nucleus,256] "
            "and entropy[remdm_cap,256] >= 0.9 * entropy[mdlm_nucleus,256]",
            says="with four steps a word its texts are better than MDLM's, and as varied",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x, denoise = masked_texts(batch, session.device), denoiser(session.networks["model"])
        x = remask(denoise, x, rung, capped(ETA), session.rng, NUCLEUS)
        return continuations(batch, x)
