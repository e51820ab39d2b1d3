"""ReMDM-rescale: remasking with a share of the greatest possible probability (Wang et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import continuations, masked_texts, remask, rescaled
from stepmark.tracks.diffusion_lm.training import denoiser

FEW, MANY, NUCLEUS = 0.045, 0.015, 0.9  # eta with fewer steps than words, and with as many or more


class ReMDMRescale(Method):
    """ReMDM-rescale: each word is masked again with a fixed share of the greatest possible probability.

    For alpha_t, the probability that a word is visible, a step from t to s masks a visible word again with probability
    sigma and fills a mask with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) by a draw from the model, so
    that after it a word is visible with probability alpha_s whatever sigma in [0, min(1, (1 - alpha_s) / alpha_t)]
    (equations 6 and 7). sigma = 0 is MDLM.

    Here sigma = eta x greatest (section 4.1): most remasking while little is written. eta is the paper's, 0.045 with
    fewer steps than words and 0.015 from one step a word on (table 6, appendix E.2.4).
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
    baselines = ("mdlm_nucleus", "remdm_cap")
    claims = (
        Claim(
            "gen_ppl[remdm_rescale,256] < gen_ppl[mdlm_nucleus,256] "
            "and entropy[remdm_rescale,256] >= 0.9 * entropy[mdlm_nucleus,256]",
            says="with four steps a word its texts are better than MDLM's, and as varied",
        ),
        Claim(
            "gen_ppl[remdm_rescale,16] > gen_ppl[remdm_cap,16] and gen_ppl[remdm_rescale,32] > gen_ppl[remdm_cap,32]",
            says="with fewer steps than words its texts are worse than with a capped probability",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x, denoise = masked_texts(batch, session.device), denoiser(session.networks["model"])
        eta = FEW if rung < batch["length"][0] else MANY
        x = remask(denoise, x, rung, rescaled(eta), session.rng, NUCLEUS)
        return continuations(batch, x)
