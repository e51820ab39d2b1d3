"""ReMDM: masked diffusion that may change its mind (Wang et al., 2025), as used for text: cap, and a loop for many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import capped, continuations, masked_texts, remask, remask_in_a_loop
from stepmark.tracks.diffusion_lm.training import denoiser

FEW, MANY, NUCLEUS = 0.04, 0.02, 0.9  # eta with fewer steps than words, and with as many or more


class ReMDM(Method):
    """ReMDM: words that were written may be masked again, and every further step can repair the text.

    For alpha_t, the probability that a word is visible, a step from t to s masks a visible word again with probability
    sigma and fills a mask with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) by a draw from the model, so
    that after it a word is visible with probability alpha_s whatever sigma in [0, min(1, (1 - alpha_s) / alpha_t)]
    (equations 6 and 7). sigma = 0 is MDLM.

    With fewer steps than words sigma = min(0.04, greatest), ReMDM-cap. From one step a word on ReMDM-loop: 45 % of the
    steps write 90 % of the text, half of them remask and refill at sigma = min(0.02, greatest) with alpha held constant,
    the last 5 % finish. These are the paper's settings for unconditional text (section 5.1, table 1), with its nucleus
    of 90 %. Steps in which no mask is filled need no evaluation.

    Differs from the official code: the time grid ends at 0 and its last step fills every mask by a draw, where the code
    stops just before and takes the most likely words. The nucleus holds the word that crosses 90 %, the code drops it.
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
    baselines = ("mdlm_nucleus", "forward_backward", "remdm_cap", "remdm_rescale")
    claims = (
        Claim(
            "valid[remdm,256] > valid[mdlm_nucleus,256] and valid[remdm,256] > valid[remdm,64]",
            says="with four steps a word more texts are right than MDLM's, and than with one step a word",
        ),
        Claim(
            "entropy[remdm,256] >= 0.9 * entropy[mdlm_ancestral,256]",
            says="the texts stay varied",
        ),
        Claim(
            "gen_ppl[remdm,16] < gen_ppl[mdlm_nucleus,16] and gen_ppl[remdm,32] < gen_ppl[mdlm_nucleus,32] "
            "and entropy[remdm,16] >= 0.9 * entropy[mdlm_nucleus,16]",
            says="with fewer steps than words its texts are better too, and as varied",
        ),
        Claim(
            "gen_ppl[remdm,256] < gen_ppl[forward_backward,256] "
            "and entropy[remdm,256] >= 0.9 * entropy[forward_backward,256]",
            says="better than the forward-backward corrector, and as varied",
        ),
        Claim(
            "valid[remdm,256] > valid[remdm_cap,256] and valid[remdm,256] > valid[remdm_rescale,256]",
            says="with four steps a word the loop is the best of the strategies",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x, denoise = masked_texts(batch, session.device), denoiser(session.networks["model"])
        if rung < batch["length"][0]:
            x = remask(denoise, x, rung, capped(FEW), session.rng, NUCLEUS)
        else:
            x = remask_in_a_loop(denoise, x, rung, MANY, session.rng, NUCLEUS)
        return continuations(batch, x)
