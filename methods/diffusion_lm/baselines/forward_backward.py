"""Forward-backward correction of masked diffusion: each step is followed by its own noising and taken again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import continuations, denoiser, greatest_sigma, masked_texts, remask

NUCLEUS = 0.9


class ForwardBackward(Method):
    """The forward-backward corrector: words are masked at the rate of the forward process while masks are filled.

    In continuous time the corrector adds the forward rate to the reverse one twice over, which leaves the marginals as
    they are (Campbell et al. 2022, section 4.4). For masks, predictor and corrector together are one step that masks a
    word again with probability sigma = (alpha_s - alpha_t) / alpha_t and fills masks accordingly (Wang et al. 2025,
    proposition 4.2): one evaluation a step, as in their comparison.

    Differs from there: sigma is kept at its greatest possible value (1 - alpha_s) / alpha_t, which it exceeds in the
    last step on this grid; words are drawn from the nucleus of 90 %, as in their experiments.
    """

    paper = Paper(
        id="continuous_time_discrete_diffusion",
        title="A Continuous Time Framework for Discrete Denoising Models",
        authors="Andrew Campbell, Joe Benton, Valentin De Bortoli, Tom Rainforth, George Deligiannidis, Arnaud Doucet",
        year=2022,
        arxiv="2205.14987",
        code="andrew-cr/tauLDR",
    )
    tasks = ("generation/stories64",)
    baselines = ("mdlm_nucleus",)
    claims = (
        Claim(
            "gen_ppl[forward_backward,*] < gen_ppl[mdlm_nucleus,*] "
            "and entropy[forward_backward,*] >= 0.985 * entropy[mdlm_nucleus,*]",
            says="with the corrector texts are better than with as many steps of the predictor alone, and as varied",
            headline=True,
        ),
        Claim(
            "valid[forward_backward,16] > valid[mdlm_nucleus,32] and valid[forward_backward,32] > valid[mdlm_nucleus,64]",
            says="and than with twice as many of them",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x = masked_texts(batch, session.device)
        x = remask(denoiser(session.networks["model"]), x, rung, corrected, session.rng, NUCLEUS)
        return continuations(batch, x)


def corrected(visible: float, then: float) -> float:
    """sigma of forward-backward correction: each step is followed by its own noising and taken again.

    (alpha_s - alpha_t) / alpha_t (Wang et al. 2025, proposition 4.2), kept at the greatest possible near the end.
    """
    return min((then - visible) / visible, greatest_sigma(visible, then)) if visible > 0 else 0.0
