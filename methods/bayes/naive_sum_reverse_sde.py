"""See the class."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, noising, problems, scores


class NaiveSumReverseSDE(Method):
    """Composed single-observation scores in a plain reverse SDE: the short cut that F-NPSE warns of.

    The same network, training data and composed score S(theta, t) as `compositional_score_sbi`, integrated as if S were
    the score of the forward-diffused posterior: Euler-Maruyama on

        d theta = (beta/2 theta + beta S) d tau + sqrt(beta) dw,    tau = 1 - t.

    It is not (diffusion does not commute with products), and the draws come out wrong however many steps are taken: where
    S is stiff the SDE equilibrates at about half the variance that S stands for.

    Source: the discussion in Geffner, Papamakarios and Mnih 2023, section 3.2. To give it its best chance, steps are
    spaced so that beta dt S cannot overshoot by more than the state itself (exponential damping of the linear stiff part),
    and draws are kept in the box of +-6 prior standard deviations.
    """

    tasks = ("posterior/gaussian_n30", "posterior/gaussian10_n30", "posterior/gaussian_n10", "posterior/mixture_n10")

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The score network and its embedding of an observation."""
        return scores.score_networks(session.task)

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """Denoising score matching on 10 000 pairs (theta, x), as for F-NPSE."""
        total = session.scale(2_000, 60)
        data = session.train
        loss = scores.fit_score(
            session.networks["score"],
            session.networks["encoder"],
            data["theta_1"].to(session.device),
            data["x_1"].to(session.device),
            session.rng,
            session.progress(range(total), "score matching"),
            total,
        )
        return {"held_out_loss": torch.tensor(loss)}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Posterior draws [B, DRAWS, d] for the sets x [B, n, d]."""
        x = batch["x"]
        b, n, _ = x.shape
        network = session.networks["score"]
        prior = problems.problem(session.task).prior.to(x.device)
        context = session.networks["encoder"](x.reshape(b * n, 1, -1)).reshape(b, n, -1)

        def composed(theta: Tensor, t: float) -> Tensor:
            return scores.compose_scores(scores.set_scores(network, theta, t, context), prior.score(theta), t)

        start = torch.randn(b, linear.DRAWS, x.shape[-1], generator=session.rng, device=x.device)
        covariance = prior.moments()[1]
        reach = 6 * float(covariance.diagonal().max()) ** 0.5
        steps = max(1, rung // (linear.DRAWS * n))
        return reverse_sde(composed, start, steps, float(network.variances.mean()), n, reach, session.rng)


def reverse_sde(
    score_of: object, theta: Tensor, steps: int, variance: float, factors: int, reach: float, generator: torch.Generator
) -> Tensor:
    """Integrate the reverse SDE from t = 1 to T_MIN in `steps` steps with a stiff-stable exponential Euler scheme.

    The drift beta (theta / 2 + S) is split into -r theta with r = beta (factors / (a v + 1 - a) - 1/2), its stiff part if
    the factors were Gaussian with undiffused variance v, and a rest that is frozen over a step; the linear SDE is then
    solved exactly. As steps go to infinity this is the plain reverse SDE.
    """
    for i in range(steps):
        t, s = (max(scores.T_MIN, (1 - k / steps) ** 2) for k in (i, i + 1))
        a = noising.alpha_bar(t)
        # beta integrated over the step, so that a coarse step still sees all of its noise.
        spent = math.log(noising.alpha_bar(s) / a)
        rate = factors / (a * variance + 1 - a) - 0.5
        drift = 0.5 * theta + score_of(theta, t)  # type: ignore[operator]
        shrink = -math.expm1(-rate * spent) / rate
        noise = torch.randn(theta.shape, generator=generator, device=theta.device, dtype=theta.dtype)
        spread = math.sqrt(-math.expm1(-2 * rate * spent) / (2 * rate))
        theta = (theta + shrink * drift + spread * noise).clamp(-reach, reach)
    return theta
