"""Students that are to have their teacher's distribution, not its samples: the score of what a student makes is learnt while it
is trained, and the difference of the two scores pulls it (variational score distillation, Wang et al. 2023, Nguyen and Tran
2023; Diff-Instruct, Luo et al. 2023; distribution matching distillation, Yin et al. 2024). What those papers of the track share.

No picture is needed, captions are enough (`Prompts`), or noises and what a sampler makes of them (`coupled`). An update of a
student and one of the learnt score:

    scores = Scores(session)
    x = from_noise(student, noise, states)
    loss = towards(x, scores.pull(x, states, scores.times(len(x))))
    scores.learn(x, states)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stepmark.session import Session
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import Schedule, add_noise, from_x0_eps, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.sampling import column, ddim, noise_like

Weight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Prompts:
    """The captions of the train split without their pictures, for `prepare`.

    Attributes:
        tokens: captions int64 [N, 32].
    """

    def __init__(self, session: Session) -> None:
        most = session.scale(len(session.train["tokens"]), 64)
        self.tokens, self._rng = session.train["tokens"][:most].to(session.device), session.rng
        self._words = session.networks["teacher"].words

    @torch.no_grad()
    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Captions of n random rows, and their states [n, 32, 64]."""
        rows = torch.randint(len(self.tokens), (n,), generator=self._rng, device=self.tokens.device)
        return self.tokens[rows], self._words(self.tokens[rows])


@torch.no_grad()
def coupled(
    session: Session,
    network: nn.Module,
    n: int,
    steps: int,
    guidance: float,
    solve: Callable[[Denoiser, Tensor, Sequence[float]], Tensor] = ddim,
) -> dict[str, Tensor]:
    """n noises "eps", what so many guided steps of a network make of them, "x0", and the captions of each, "tokens"."""
    tokens, states = Prompts(session).batch(n)
    eps = torch.randn(n, *LATENT, generator=session.rng, device=session.device, dtype=session.dtype)
    parts = zip(session.progress(eps.split(64), "pairs"), states.split(64), strict=True)
    found = [solve(Denoiser(network, part, guidance), x, uniform_times(steps)) for x, part in parts]
    return {"eps": eps, "x0": torch.cat(found), "tokens": tokens}


def drawing(session: Session, have: Mapping[str, Tensor], size: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Gives random ones of such pairs: eps, x0 and the states of the captions."""
    with torch.no_grad():
        words = session.networks["teacher"].words
        states = torch.cat([words(part) for part in have["tokens"].split(256)])

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(states), (size,), generator=session.rng, device=session.device)
        return have["eps"][rows], have["x0"][rows], states[rows]

    return draw


def predictions(
    network: nn.Module, x: Tensor, t: Tensor, states: Tensor, schedule: Schedule, guidance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x0 and eps that a network predicts at x [B, 4, 8, 8], times t [B]. One evaluation a row, guided two."""
    time, scale = schedule.network_time(t), torch.full_like(t, guidance)
    output = network(x, time, states) if guidance == 1.0 else guided_rows(network, x, time, states, scale)
    return to_x0_eps(schedule.prediction, output, x, column(schedule.alpha(t)), column(schedule.sigma(t)))


def from_noise(network: nn.Module, noise: Tensor, states: Tensor) -> Tensor:
    """What a network makes of noise [B, 4, 8, 8] in one evaluation: the x0 that it predicts at t = 1."""
    one = torch.ones(len(noise), dtype=noise.dtype, device=noise.device)
    return predictions(network, noise, one, states, schedule_of(network))[0]


# the two scores ---------------------------------------------------------------------------------


def vsd_weight(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha sigma, which makes the pull sigma^2 (eps_teacher - eps_fake), as in the code of Nguyen and Tran (2023)."""
    return alpha * sigma


def dmd_weight(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """One over the mean of |x - x0_teacher|, item by item: the pull is about as long at all times (Yin et al. 2024, equation 8,
    as their code has it)."""
    return 1 / (x - x0).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)


class Scores:
    """The teacher's score and that of a student's samples, which begins as a copy of the teacher and learns while the student
    changes. For `prepare`.

    Args:
        own: whether the student's score is learnt. Without it (score distillation sampling, Poole et al. 2023) the noise that was
            added takes its place, and students end where the teacher's density is highest.
        guidance: of the teacher. own_guidance: of the learnt score, the same unless it is given.
        rate: of the learnt score, with AdamW.
        weight: of the pull: of the samples x, the teacher's x0, alpha and sigma.
        share: of the captions that the learnt score gets empty, so that it can be guided.

    Attributes:
        fake: the network of the learnt score, or None.
    """

    def __init__(
        self,
        session: Session,
        own: bool = True,
        guidance: float = GUIDANCE,
        own_guidance: float | None = None,
        rate: float = 5e-4,
        weight: Weight = vsd_weight,
        share: float = 0.1,
    ) -> None:
        self.teacher, self._rng = session.networks["teacher"], session.rng
        self.schedule = schedule_of(self.teacher)
        self.guidance, self.own_guidance = guidance, guidance if own_guidance is None else own_guidance
        self.weight, self.share = weight, share
        self.fake: nn.Module | None = None
        if own:
            self.fake = session.clone("teacher")
            self._parameters = [p for p in self.fake.parameters() if p.requires_grad]
            self._optimiser = torch.optim.AdamW(self._parameters, lr=rate, weight_decay=0.0)

    def times(self, n: int, low: float = 0.02, high: float = 0.98) -> Tensor:
        """n times, evenly from low to high: at either end the scores say little."""
        u = torch.rand(n, generator=self._rng, device=self._rng.device)
        return low + (high - low) * u

    @torch.no_grad()
    def pull(self, x: Tensor, states: Tensor, t: Tensor) -> Tensor:
        """w (x0_fake(x_t) - x0_teacher(x_t)) at x [B, 4, 8, 8] noised to times t [B]: against it the student is to go. Two
        evaluations a row of each score that is guided."""
        x_t = add_noise(self.schedule, x, noise_like(x, self._rng), t)
        x0 = predictions(self.teacher, x_t, t, states, self.schedule, self.guidance)[0]
        own = x
        if self.fake is not None:
            own = predictions(self.fake, x_t, t, states, self.schedule, self.own_guidance)[0]
        return self.weight(x, x0, column(self.schedule.alpha(t)), column(self.schedule.sigma(t))) * (own - x0)

    def learn(self, x: Tensor, states: Tensor) -> None:
        """One update of the learnt score on samples x [B, 4, 8, 8]: its own loss at times of all kinds, that of noise prediction
        weighted by alpha^2. One evaluation a row."""
        if self.fake is None:
            return
        x, schedule = x.detach(), self.schedule
        t, noise = self.times(len(x), 1 / schedule.steps, 1.0), noise_like(x, self._rng)
        dropped = torch.rand(len(x), generator=self._rng, device=x.device) < self.share
        with torch.no_grad():
            empty = self.fake.null_condition(states)
        states = torch.where(dropped.view(-1, *[1] * (states.dim() - 1)), empty, states)
        output = self.fake(add_noise(schedule, x, noise, t), schedule.network_time(t), states)
        alpha, sigma = column(schedule.alpha(t)), column(schedule.sigma(t))
        error = output - from_x0_eps(schedule.prediction, x, noise, alpha, sigma)
        loss = (error if schedule.flow else alpha * error).square().mean()
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()


def towards(x: Tensor, pull: Tensor) -> Tensor:
    """A loss whose gradient in x is `pull` over the number of elements: half the mean square of the way to x - pull."""
    return 0.5 * (x - (x - pull).detach()).square().mean()
