"""ReMDM: masked diffusion that may change its mind (Wang et al., 2025), as used for text: cap, and a loop for many steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.mdlm import MASK
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import (
    Denoiser,
    Sigma,
    continuations,
    denoiser,
    greatest_sigma,
    masked_texts,
    remask,
    remasking_step,
    times,
)

NUCLEUS = 0.9


class ReMDM(Method):
    """ReMDM: words that were written may be masked again, and every further step can repair the text.

    For alpha_t, the probability that a word is visible, a step from t to s masks a visible word again with probability
    sigma and fills a mask with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) by a draw from the model, so
    that after it a word is visible with probability alpha_s whatever sigma in [0, min(1, (1 - alpha_s) / alpha_t)]
    (equations 6 and 7). sigma = 0 is MDLM.

    With fewer steps than words sigma = min(eta, greatest), ReMDM-cap. From one step a word on ReMDM-loop: 45 % of the
    steps write 90 % of the text, half of them remask and refill at sigma = min(eta, greatest) with alpha held constant,
    the last 5 % finish. These are the paper's settings for unconditional text (section 5.1, table 1), with its nucleus
    of 90 %. Steps in which no mask is filled need no evaluation.

    eta is the paper's 0.04 (cap, fewer steps than words) and 0.02 (loop). It is a probability of one step, and the paper's
    texts have 1024 words where these have 64: at as many steps a word a run here takes a sixteenth of the steps, and masks
    a word again a sixteenth as often (2.6 times over the loop of 256 steps). `remdm_scaled` takes sixteen times as much,
    so that over a run each word is masked again as often as there; in the loop the greatest possible probability, a
    ninth, is less than that and bounds it, at which every step draws all masks at once, as no step of the paper does.

    `remdm_cap` caps at every number of steps (section 4.1), eta 0.008 from one step a word on (appendix table 6), both
    sixteen times for the same reason.
    `remdm_rescale` masks with a fixed share of the greatest possible probability, sigma = eta x greatest, most while
    little is written; the paper's eta are 0.045 with fewer steps than words and 0.015 from one step a word on.

    Differs from the official code: the time grid ends at 0 and its last step fills every mask by a draw, where the code
    stops just before and takes the most likely words. The nucleus holds the word that crosses 90 %, the code drops it.

    ReMDM-conf, ReMDM-switch and combinations of the strategies are left out.

    What limits it here: with the paper's eta a word is seldom masked again in so short a run. The forward-backward
    corrector, which has no constant to choose, has more right texts at every number of steps. At one step a word the loop
    has fewer of them than MDLM from the same nucleus, with four times the steps more; `remdm_scaled` then has fewer than
    MDLM. Words that are right together are a whole text here, and it takes one wrong word to spoil it.
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
    baselines = (
        "mdlm_nucleus",
        "mdlm_sharp",
        "forward_backward",
        "remdm_cap",
        "remdm_rescale",
        "remdm_scaled",
        "ar_lm",
    )
    claims = (
        Claim(
            "valid[remdm,256] > valid[remdm,64] and valid[remdm,256] > valid[mdlm_nucleus,256] "
            "and valid[remdm,256] >= valid[ar_lm,256] - 0.05 and entropy[remdm,256] >= 0.985 * entropy[ar_lm,256]",
            says="more steps give more right texts, more than MDLM's, nearly as many as an autoregressive model's, as varied",
            headline=True,
        ),
        Claim(
            "gen_ppl[remdm,4..32] < gen_ppl[mdlm_nucleus,4..32] "
            "and entropy[remdm,4..32] >= 0.985 * entropy[mdlm_nucleus,4..32]",
            says="with fewer steps than words its texts are better too, and as varied",
        ),
        Claim(
            "gen_ppl[remdm,4..32] < gen_ppl[mdlm_sharp,4..32]",
            says="and better than by drawing likelier words",
        ),
        Claim(
            "valid[remdm,8..256] > valid[forward_backward,8..256]",
            says="more right texts than the forward-backward corrector at every number of steps",
        ),
    )

    schedule = "loop"  # from one step a word on; "cap" and "rescale" at any number of steps
    few, many = 0.04, 0.02  # the paper's eta with fewer steps than words, and with as many or more
    shorter = 1  # eta grows with it; the paper's texts have 16 times as many words
    variants = (
        Variant(
            "remdm_scaled",
            says="ReMDM with eta as much greater as the paper's texts are longer",
            shorter=16,
            baselines=("mdlm_nucleus", "remdm", "remdm_cap", "remdm_rescale"),
            claims=(
                Claim(
                    "valid[remdm_scaled,64..256] > valid[remdm_cap,64..256] "
                    "and valid[remdm_scaled,64..256] > valid[remdm_rescale,64..256]",
                    says="from one step a word on the loop is the best of the strategies",
                    setting="eta, grown with the shorter texts, is cut at its bound: every step draws all masks at once",
                ),
            ),
        ),
        Variant(
            "remdm_cap",
            says="ReMDM-cap: each word is masked again with the same small probability at every step",
            schedule="cap",
            many=0.008,
            shorter=16,
            baselines=("mdlm_nucleus",),
            claims=(
                Claim(
                    "gen_ppl[remdm_cap,*] < gen_ppl[mdlm_nucleus,*] "
                    "and entropy[remdm_cap,*] >= 0.985 * entropy[mdlm_nucleus,*]",
                    says="at any number of steps its texts are better than MDLM's, and as varied",
                ),
            ),
        ),
        Variant(
            "remdm_rescale",
            says="ReMDM-rescale: each word is masked again with a fixed share of the greatest possible probability",
            schedule="rescale",
            few=0.045,
            many=0.015,
            shorter=16,
            baselines=("mdlm_nucleus", "remdm_cap"),
            claims=(
                Claim(
                    "gen_ppl[remdm_rescale,*] < gen_ppl[mdlm_nucleus,*] "
                    "and entropy[remdm_rescale,*] >= 0.985 * entropy[mdlm_nucleus,*]",
                    says="at any number of steps its texts are better than MDLM's, and as varied",
                ),
                Claim(
                    "gen_ppl[remdm_rescale,4..32] > gen_ppl[remdm_cap,4..32]",
                    says="with fewer steps than words its texts are worse than with a capped probability",
                ),
            ),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x, denoise = masked_texts(batch, session.device), denoiser(session.networks["model"])
        enough = rung >= batch["length"][0]
        eta = min(1.0, self.shorter * (self.many if enough else self.few))
        if self.schedule == "loop" and enough:
            x = remask_in_a_loop(denoise, x, rung, eta, session.rng, NUCLEUS)
        else:
            sigma = rescaled(eta) if self.schedule == "rescale" else capped(eta)
            x = remask(denoise, x, rung, sigma, session.rng, NUCLEUS)
        return continuations(batch, x)


def capped(eta: float) -> Sigma:
    """ReMDM-cap: sigma = min(eta, greatest)."""
    return lambda visible, then: min(eta, greatest_sigma(visible, then))


def rescaled(eta: float) -> Sigma:
    """ReMDM-rescale: sigma = eta x greatest."""
    return lambda visible, then: eta * greatest_sigma(visible, then)


def loop_schedule(steps: int, on: float, off: float, plateau: float) -> Iterator[tuple[float, float, bool]]:
    """(alpha_t, alpha_s, whether words are remasked) of ReMDM-loop: up to `plateau` while t > `on`, constant down to
    `off`, then up to 1."""

    def alpha(t: float) -> float:
        if t > on:
            return (1 - t) * plateau / (1 - on)
        return plateau if t > off else 1 - t * (1 - plateau) / off

    for t, s in pairwise(times(steps)):
        yield alpha(t), alpha(s), alpha(t) == alpha(s)


def remask_in_a_loop(
    denoise: Denoiser,
    x: Tensor,
    steps: int,
    eta: float,
    rng: torch.Generator,
    nucleus: float = 1.0,
    on: float = 0.55,
    off: float = 0.05,
    plateau: float = 0.9,
) -> Tensor:
    """ReMDM-loop: write most of the text, then remask and write again at a constant number of words, then finish."""
    fixed = x != MASK
    for visible, then, loop in loop_schedule(steps, on, off, plateau):
        sigma = min(eta, greatest_sigma(visible, then)) if loop else 0.0
        x = remasking_step(denoise, x, visible, then, sigma, fixed, rng, nucleus)
    return x
