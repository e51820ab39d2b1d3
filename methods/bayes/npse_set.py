"""See the class."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, noising, problems, scores


class NPSESet(Method):
    """NPSE with a set encoder: learn the posterior score of all n observations at once, sample by reverse diffusion.

    The score s(theta, t, X) of the diffused posterior given the whole set is learnt by denoising score matching; a deep
    set embeds X. One row of the network for each step and draw, whatever n, and a plain reverse diffusion is right, since
    s IS the score of the forward-diffused posterior. But a training example costs n simulations: 10 000 / n examples.

    Sampler: deterministic DDIM steps theta_s = sqrt(a_s) x0 + sqrt(1 - a_s) e with e = -sqrt(1 - a_t) s and
    x0 = (theta_t - sqrt(1 - a_t) e) / sqrt(a_t), on times u^2, at most 200 of them.

    Source: the set-encoder baseline ("NPSE", m = n) of Geffner, Papamakarios and Mnih 2023, section 4; DDIM is Song, Meng
    and Ermon 2021, eq. 12. Same network, optimiser and early stopping as the compositional methods.
    """

    tasks = (
        "posterior/gaussian_n30",
        "posterior/gaussian10_n30",
        "posterior/gaussian_n10",
        "posterior/gaussian_n1",
        "posterior/mixture_n10",
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The score network and the embedding of a set."""
        return scores.score_networks(session.task)

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """Denoising score matching on 10 000 / n sets of n."""
        total = session.scale(2_000, 60)
        data = session.train
        n = problems.observations(session.task)
        loss = scores.fit_score(
            session.networks["score"],
            session.networks["encoder"],
            data[f"theta_{n}"].to(session.device),
            data[f"x_{n}"].to(session.device),
            session.rng,
            session.progress(range(total), "score matching"),
            total,
        )
        return {"held_out_loss": torch.tensor(loss)}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Posterior draws [B, DRAWS, d] for the sets x [B, n, d]."""
        x = batch["x"]
        context = session.networks["encoder"](x)[:, None]
        steps = min(200, max(1, rung // linear.DRAWS))
        times = [max(scores.T_MIN, (1 - i / steps) ** 2) for i in range(steps + 1)]
        theta = torch.randn(len(x), linear.DRAWS, x.shape[-1], generator=session.rng, device=x.device)
        for t, s in pairwise(times):
            a_t, a_s = noising.alpha_bar(t), noising.alpha_bar(s)
            score = scores.set_scores(session.networks["score"], theta, t, context)[:, :, 0]
            noise = -((1 - a_t) ** 0.5) * score
            clean = (theta - (1 - a_t) ** 0.5 * noise) / a_t**0.5
            # The last step lands on the data; before it clean is a posterior mean, noise brings the spread back.
            theta = a_s**0.5 * clean + (1 - a_s) ** 0.5 * noise
        return theta
