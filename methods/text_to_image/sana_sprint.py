"""SANA-Sprint: a flow made into a continuous-time consistency model without training, then distilled with an adversary beside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.inside import outputs
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.sampling import column, noise_like

LAST = math.pi / 2  # the time of pure noise


class TrigFlow(nn.Module):
    """A flow network as one of TrigFlow, x_t = cos(t) x0 + sin(t) eps, t in [0, pi/2]: F, what d x_t / dt is expected to be.

    With s = sin t / (sin t + cos t), the flow's time, and x_s = x_t / (sin t + cos t) = x_t sqrt(s^2 + (1 - s)^2),

        F(x_t, t) = ((1 - 2s) x_s + (1 - 2s + 2s^2) v(x_s, s)) / sqrt(s^2 + (1 - s)^2)

    which is exact. dense: the network is told s itself and not 1000 s, so that what it is told changes smoothly in t.
    """

    def __init__(self, painter: nn.Module, dense: bool) -> None:
        super().__init__()
        self.painter, self.dense = painter, dense

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        time = t.sin() / (t.sin() + t.cos())
        s = column(time)
        norm = (s.square() + (1 - s).square()).sqrt()
        x = x * norm
        v = self.painter(x, time / 1000 if self.dense else time, states)
        return ((1 - 2 * s) * x + (1 - 2 * s + 2 * s.square()) * v) / norm


def guided(network: TrigFlow, x: Tensor, t: Tensor, states: Tensor, scale: float) -> Tensor:
    """F under guidance: null + scale (conditional - null)."""
    twice = torch.cat([network.painter.null_condition(states), states])
    null, conditional = network(torch.cat([x, x]), torch.cat([t, t]), twice).chunk(2)
    return torch.lerp(null, conditional, scale)


def noised(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] at times t [B]."""
    return column(t.cos()) * x0 + column(t.sin()) * eps


def ended(x: Tensor, t: Tensor, f: Tensor) -> Tensor:
    """The consistency function cos(t) x_t - sin(t) F: x0 as the network has it."""
    return column(t.cos()) * x - column(t.sin()) * f


def tangent(f: Tensor, change: Tensor, slope: Tensor, x: Tensor, t: Tensor, r: float) -> Tensor:
    """g = -cos^2(t) (F - dx/dt) - r (cos(t) sin(t) x + cos(t) sin(t) dF/dt): cos(t) times the derivative, along the path of the
    teacher, of the consistency function. `change`: cos(t) sin(t) dF/dt. It is 0 where the function is consistent and r = 1."""
    cos, sin = column(t.cos()), column(t.sin())
    return -cos.square() * (f - slope) - r * (cos * sin * x + change)


@torch.no_grad()
def changing(network: nn.Module, x: Tensor, t: Tensor, states: Tensor, slope: Tensor) -> Tensor:
    """cos(t) sin(t) dF/dt along a path with dx/dt = `slope`, by forward differentiation."""
    pace = t.cos() * t.sin()
    with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no forward derivative
        asked = lambda x, t: network(x, t, states)  # noqa: E731
        return torch.func.jvp(asked, (x, t), (column(pace) * slope, pace))[1]


class Head(nn.Module):
    """Looks at the tokens [B, L, C] of one block: logits [B, L]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv1d(width, width, 1))
        self.second = spectral_norm(nn.Conv1d(width, width, 9, padding=4, padding_mode="circular"))
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.norms[0](self.first(tokens.transpose(1, 2))), 0.2)
        x = x + nn.functional.leaky_relu(self.norms[1](self.second(x)), 0.2)
        return self.last(x)[:, 0]


def judged(eyes: TrigFlow, heads: nn.ModuleDict, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """What the heads, by the number of the block that they look at, make of noised latents: logits [B, heads L]."""
    blocks: Any = eyes.painter.transformer.transformer_blocks
    with outputs(*(blocks[int(name)] for name in heads)) as seen:
        eyes(x, t, states)
    return torch.cat([head(tokens) for head, tokens in zip(heads.values(), seen, strict=True)], 1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What the adversary minimises: real above 1, fake below -1."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


# --- training --------------------------------------------------------------------------------------------------------


def densified(session: Session, updates: int, size: int, rate: float) -> dict[str, Tensor]:
    """The teacher told s instead of 1000 s: a copy of it that learns to say the same."""
    teacher, data = session.networks["teacher"], Latents(session)
    network, schedule = session.clone("teacher"), schedule_of(teacher)

    def loss() -> Tensor:
        x0, _, states = data.batch(size)
        t, dropped = torch.rand(2, size, generator=session.rng, device=x0.device, dtype=x0.dtype)
        states = torch.where((dropped < 0.1).view(-1, 1, 1), teacher.null_condition(states), states)
        x = add_noise(schedule, x0, noise_like(x0, session.rng), t)
        with torch.no_grad():
            aim = teacher(x, t, states)
        return (network(x, t / 1000, states) - aim).square().mean()

    fit(session, network, loss, updates, rate, clip=1.0)
    return network.state_dict()


class SanaSprint(Method):
    """SANA-Sprint: consistency distillation in continuous time, with an adversary for what it leaves blurred.

    A flow is a model of TrigFlow (`TrigFlow` has the formula), and need not be trained to be one. In
    it the consistency function is f(x_t, t) = cos(t) x_t - sin(t) F(x_t, t), and F is pushed along the derivative of f on the
    teacher's guided path, which forward differentiation gives (sCM):

        g = -cos^2(t) (F - dx/dt) - r cos(t) sin(t) (x_t + dF/dt),   r from 0 to 1 over the first part of the updates
        loss = exp(u) / (D tan t) |F - sg(F) - g / (|g| + 0.1)|^2 - u,   u = u(t) learnt, sg: no gradient

    The derivative in t is steady only if the network is told its time densely: a copy of the teacher that is told s instead
    of 1000 s learns first to say what the teacher says, and takes its place. Where f is still blurred an adversary
    helps (LADD): heads on three blocks of that teacher judge noised latents, real ones above 1, the student's below
    -1, and real ones with the caption of another below -1 too. Student and adversary take turns; the student adds

        0.5 * -mean of the heads at f(x_t, t),   t = pi/2 for half of the items

    One network serves one, two and four steps: f, noise to the next time, f again. With two steps the time between is 1.3, else
    times are even. Larger budgets take four.

    `sana_sprint_scm` is without the adversary, `sana_sprint_ladd` has nothing but the adversary; updates, dense teacher and
    sampling are the same.

    Differs from the paper: guidance has the one scale 3 instead of a scale that the student is told; no normalisation
    of queries and keys, which large networks need against gradients that explode; sigma_data is 1, as that of the latents, so
    that training times, tan t = 2 exp(N(0.2, 1.6)), are the same; AdamW; 300 updates to make the teacher dense and 180 of student
    and adversary each; no image conditions.

    What limits it here: 300 updates must teach the network a new sense of time, and what is lost there the student never has.
    """

    paper = Paper(
        id="sana_sprint",
        title="SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
        authors="Chen, Xue, Zhao, Yu, Paul, Chen, Cai, Han, Xie",
        year=2025,
        arxiv="2503.09641",
        code="NVlabs/Sana",
    )
    tasks = ("text_to_image/scenes_flow",)
    baselines = ("ddim_guided", "ddim_unguided", "sana_sprint_scm", "sana_sprint_ladd")
    trainings = 3
    claims = (
        Claim(
            "fd[sana_sprint,1..4] < min(fd[sana_sprint_scm,1..4], fd[sana_sprint_ladd,1..4], fd[ddim_unguided,1..4]) "
            "and fd[sana_sprint,1..4] <= 1.2 * fd[ddim_guided,32] "
            "and caption[sana_sprint,1..4] >= 0.95 * caption[ddim_guided,32]",
            says="in one to four steps it is better than either of its two parts and than as many steps of the teacher, and "
            "nearly as good as sixteen guided steps",
            headline=True,
            setting="180 updates, and a teacher whose sense of time was changed in 300",
        ),
        Claim(
            "fd[sana_sprint,1] < fd[sana_sprint_ladd,4] and latency_ms[sana_sprint,1] < 0.4 * latency_ms[sana_sprint_ladd,4]",
            says="one step is better than four of adversarial distillation alone, for a fraction of the time",
            headline=True,
            setting="180 updates, and a teacher whose sense of time was changed in 300",
        ),
        Claim(
            "fd[sana_sprint,2] < fd[ddim_guided,8] and caption[sana_sprint,2] > caption[ddim_guided,8]",
            says="two steps are better than four guided ones of the teacher",
        ),
    )

    consistent, adversarial = 1.0, 0.5  # weights of the two losses
    mean, deviation = 0.2, 1.6  # of log(tan(t) / 2) in training
    judged_mean, judged_deviation = -0.6, 1.0  # the same, of what the adversary is shown
    warm, top = 0.25, 0.5  # part of the updates in which r grows; share of t = pi/2
    blocks = (1, 3, 5)  # of the teacher, that heads look at
    dense_updates, dense_rate, updates, rate, batch = 300, 1e-3, 180, 2e-4, 32
    variants = (
        Variant(
            "sana_sprint_scm",
            says="Consistency alone, without the adversary",
            adversarial=0.0,
            baselines=("ddim_unguided",),
        ),
        Variant(
            "sana_sprint_ladd",
            says="The adversary alone, without consistency",
            consistent=0.0,
            baselines=("ddim_unguided",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": TrigFlow(session.clone("teacher"), True)}

    def times(self, session: Session, n: int, mean: float, deviation: float) -> Tensor:
        """n times with log(tan(t) / 2) normal."""
        z = torch.randn(n, generator=session.rng, device=session.device, dtype=session.dtype)
        return (2 * (mean + deviation * z).exp()).atan()

    def prepare(self, session: Session) -> None:
        student, data = session.networks["student"], Latents(session)
        size, updates = session.scale((self.batch, self.updates), (4, 1))
        dense = session.once(densified, session.scale(self.dense_updates, 1), size, self.dense_rate)
        student.painter.load_state_dict(dense)
        teacher = TrigFlow(session.clone("teacher"), True).eval()
        teacher.painter.load_state_dict(dense)
        teacher.requires_grad_(False)
        width = teacher.painter.transformer.inner_dim
        heads = nn.ModuleDict({str(n): Head(width) for n in self.blocks}).to(session.device, session.dtype)
        u = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1)).to(session.device, session.dtype)
        nn.init.zeros_(u[-1].weight)
        optimiser = torch.optim.AdamW(heads.parameters(), lr=self.rate, betas=(0.0, 0.99), weight_decay=0.0)
        numbers = iter(range(updates))
        both = nn.ModuleList([student, u])

        def generated(x0: Tensor, states: Tensor) -> Tensor:
            """What the student makes of latents that are noised anew, half of them to noise."""
            t = self.times(session, size, self.mean, self.deviation)
            top = torch.rand(size, generator=session.rng, device=session.device) < self.top
            t = torch.where(top, torch.full_like(t, LAST), t)
            x = noised(x0, noise_like(x0, session.rng), t)
            return ended(x, t, student(x, t, states))

        def shown(x0: Tensor, states: Tensor) -> Tensor:
            t = self.times(session, size, self.judged_mean, self.judged_deviation)
            return judged(teacher, heads, noised(x0, noise_like(x0, session.rng), t), t, states)

        def learn_to_judge(x0: Tensor, states: Tensor) -> None:
            with torch.no_grad():
                made = generated(x0, states)
            fake = torch.cat([shown(made, states), shown(x0.roll(1, 0), states)])
            optimiser.zero_grad(set_to_none=True)
            hinge(shown(x0, states), fake).backward()
            optimiser.step()

        def loss() -> Tensor:
            x0, _, states = data.batch(size)
            value = x0.new_zeros(())
            if self.consistent:
                r = min(1.0, next(numbers) / max(self.warm * updates, 1))
                value = value + self.consistent * self.consistency(session, student, teacher, u, x0, states, r)
            if self.adversarial:
                learn_to_judge(x0, states)
                value = value - self.adversarial * shown(generated(x0, states), states).mean()
            return value

        fit(session, both, loss, updates, self.rate, clip=1.0)

    def consistency(
        self, session: Session, student: Any, teacher: Any, u: nn.Module, x0: Tensor, states: Tensor, r: float
    ) -> Tensor:
        """The loss of sCM on latents x0 [B, 4, 8, 8] noised to random times."""
        t = self.times(session, len(x0), self.mean, self.deviation)
        x = noised(x0, noise_like(x0, session.rng), t)
        with torch.no_grad():
            slope = guided(teacher, x, t, states, GUIDANCE)
        change = changing(student, x, t, states, slope)
        f = student(x, t, states)
        g = tangent(f.detach(), change, slope, x, t, r)
        g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
        error = (f - f.detach() - g).square().mean((1, 2, 3)) / t.tan()
        said = u(torch.stack([t.cos(), t.sin()], 1))[:, 0]
        return (said.exp() * error - said).mean()

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student, x = session.networks["student"], batch["noise"]
        states = student.painter.words(batch["condition"])
        for number, t in enumerate(steps(min(rung, 4))):
            now = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
            if number:
                x = noised(x, noise_like(x, session.rng), now)
            x = ended(x, now, student(x, now, states))
        return x


def steps(n: int) -> list[float]:
    """The n times from pi/2 down at which the network is asked: evenly towards 0, but for two, of which the second is 1.3."""
    return [LAST, 1.3] if n == 2 else [LAST * (1 - i / n) for i in range(n)]
