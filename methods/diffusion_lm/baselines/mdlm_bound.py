"""The likelihood bound of a masked diffusion language model, by Monte Carlo over what is masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.mdlm import LENGTH, mask_some, word_losses
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session


class MDLMBound(Method):
    """-log p(text) <= L E[mean over masked words of -log p(word | visible ones)], the number of masks uniform in 1..L.

    MDLM's negative ELBO in the form that counts masks instead of drawing each by itself, whose
    Monte Carlo estimate varies less (Nie et al. 2025, equation 6). One evaluation per draw; the numbers of masks of a
    text's draws are stratified. More draws narrow the estimate, the bound stays.

    What limits it here: the two networks are of one size, but the masked one was trained for more than twice as many
    updates, on as many texts each, for it learns more slowly.
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
    tasks = ("likelihood/stories64",)
    baselines = ("ar_lm",)
    claims = (
        Claim(
            "nll[mdlm_bound,*] <= 1.1 * nll[ar_lm,*]",
            says="in nats a word within a tenth of an autoregressive model of the same size, as on the paper's web text",
            headline=True,
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
        """Estimates of the bound in nats, [B]."""
        tokens, network = batch["tokens"], session.networks["model"]
        total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        for i in range(rung):
            u = torch.rand(len(tokens), generator=session.rng, device=tokens.device)
            count = 1 + (LENGTH * (i + u) / rung).long().clamp(max=LENGTH - 1)
            total += word_losses(network, tokens, mask_some(tokens, count, session.rng)).double()
        return LENGTH * total / rung
