"""SDXS: the network is made smaller first, then a one-step student by feature matching and score distillation in segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.distribution import Scores, coupled, drawing, from_noise, towards
from stepmark.tracks.text_to_image.inside import blocks, encoded, outputs
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.sampling import dpm_solver_pp, noised


class Passed(nn.Module):
    """Stands where a transformer block stood, and does nothing."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (x,)


def shrink(painter: Any) -> Any:
    """Takes from a network, in place, the middle of its UNet and the transformer blocks of the finest maps."""
    unet = painter.unet
    unet.mid_block = None
    for block in (unet.down_blocks[0], unet.up_blocks[-1]):
        block.attentions = nn.ModuleList(Passed() for _ in block.attentions)
    return painter


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM [B] of maps a and b [B, C, H, W] over windows of 3x3, its constants in units of the power of b. Maps have signs, and
    two that are turned round would be alike in the product of its factors: it is their mean."""
    power = b.square().mean((1, 2, 3), keepdim=True).detach() + 1e-6
    c1, c2 = 0.01**2 * power, 0.03**2 * power

    def local(x: Tensor) -> Tensor:
        return avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a.square(), local(b * b) - mean_b.square()
    level = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    shape = (2 * (local(a * b) - mean_a * mean_b) + c2) / (var_a + var_b + c2)
    return 0.5 * (level + shape).mean((1, 2, 3))


def unlike(teacher: Any, x: Tensor, wanted: Tensor, states: Tensor, time: float = 0.0) -> Tensor:
    """The feature distance [B] of latents x and `wanted` [B, 4, 8, 8]: 1 - SSIM, the mean over the maps of the encoder half of
    the teacher, and over the latents themselves."""
    t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
    maps = [x, *encoded(teacher, x, t, states)[1]]
    with torch.no_grad():
        aims = [wanted, *encoded(teacher, wanted, t, states)[1]]
    return 1 - torch.stack([similarity(a, b) for a, b in zip(maps, aims, strict=True)]).mean(0)


# --- what the variants share -----------------------------------------------------------------------------------------


def pairs(session: Session, n: int, steps: int) -> dict[str, Tensor]:
    """Pairs of the guided teacher, in DPM-Solver++ steps."""
    return coupled(session, session.networks["teacher"], n, steps, GUIDANCE, dpm_solver_pp)


def small(session: Session, updates: int, size: int, rate: float) -> dict[str, Tensor]:
    """The shrunk network, taught to do as the teacher does: its noise and, map by map, what leaves its blocks."""
    teacher, student, data = session.networks["teacher"], shrink(session.clone("teacher")), Latents(session)
    schedule = schedule_of(teacher)

    def loss() -> Tensor:
        x0, _, states = data.batch(size)
        x, t, _ = noised(session, schedule, x0)
        asked = x, schedule.network_time(t), states
        with torch.no_grad(), outputs(*blocks(teacher.unet)) as aims:
            aim = teacher(*asked)
        with outputs(*blocks(student.unet)) as maps:
            found = student(*asked)
        apart = [(a - b).square().mean() / b.square().mean() for a, b in zip(maps, aims, strict=True)]
        return (found - aim).square().mean() + torch.stack(apart).mean()

    fit(session, student, loss, updates, rate, clip=1.0)
    return student.state_dict()


class SDXS(Method):
    """SDXS: a smaller network and one step of it, together.

    The network loses the middle of its UNet and the transformer blocks of the finest maps, and is taught to do as the teacher
    does, in its output and in what leaves its blocks (section 3.1):

        loss = |eps_small - eps_teacher|^2 + mean over blocks of |f_small - f_teacher|^2 / |f_teacher|^2

    Then it becomes a student of one step, f(z, c), its x0 at the last time (section 3.2). First it warms up by feature matching,
    on noises z and the pictures x that a sampler of the teacher makes of them under guidance, so that w need not be paid again:

        loss = mean over maps of 1 - SSIM(g(f(z, c)), g(x)),   g the maps of a network that has learnt to see

    In the end by segments of time: at noisy times t > alpha the student is pulled by the difference of two scores, the
    teacher's and that of a copy which learns on what the student makes; at the others by feature matching.

        grad = E[ [t > alpha] sigma_t^2 (eps_teacher - eps_fake) df/dtheta + lambda [t < alpha] grad of the feature distance ]

    alpha and lambda begin high, so that the student's pictures come to lie where the teacher's score has something to say, and
    fall while it learns. A picture costs one evaluation of a network of three fifths of the operations.

    `sdxs_features` is feature matching alone, for as many updates; `sdxs_scores` score distillation alone, at all times
    (Diff-Instruct). All begin with the same small network.

    Differs from the paper, of which no training code was released: alpha falls from 0.9 to 0.5 and lambda from 1 to 1/4, which
    are a reading of words; the maps are those of the teacher's own encoder half at its least time, and the latents, instead of
    those of a network that sees decoded pictures, for decoding would cost more than all the rest; SSIM is the mean of its two
    factors, for these maps have signs; trajectories are not straightened before; no adversarial tuning of details at the end;
    160, 120 and 160 updates of the three stages. The small decoder is left out, for the harness decodes, and so are conditions
    that are images.

    What limits it here: captions reach the small network on its coarse maps only, and the three stages are short.
    """

    paper = Paper(
        id="sdxs",
        title="SDXS: Real-Time One-Step Latent Diffusion Models with Image Conditions",
        authors="Song, Sun, Yin",
        year=2024,
        arxiv="2403.16627",
        code="IDKiro/sdxs",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("ddim_guided", "ddim_unguided", "sdxs_features", "sdxs_scores")
    trainings = 3
    claims = (
        Claim(
            "30 * latency_ms[sdxs,1] <= latency_ms[ddim_guided,32] and caption[sdxs,1] >= caption[ddim_guided,32] "
            "and fd[sdxs,1] <= 1.2 * fd[ddim_guided,32]",
            says="thirty times as fast as sixteen guided steps of the teacher, pictures show as much of their captions and are "
            "nearly as close to real ones",
            headline=True,
            setting="440 short updates, and time that goes into calls more than into the network",
        ),
        Claim(
            "fd[sdxs,1] < min(fd[sdxs_features,1], fd[sdxs_scores,1], fd[ddim_unguided,1]) "
            "and caption[sdxs,1] > max(caption[sdxs_features,1], caption[sdxs_scores,1], caption[ddim_unguided,1])",
            says="the two losses together, each at its times, are better than either alone, and than one step of the teacher",
            headline=True,
            setting="440 short updates",
        ),
    )

    small_updates, warm_updates, updates = 160, 120, 160
    small_rate, rate, fake_rate, batch = 1e-3, 2e-4, 5e-4, 16
    n, solver_steps = 640, 8  # of the pairs
    alpha, matching = (0.9, 0.5), (1.0, 0.25)  # alpha and lambda at the beginning and at the end
    variants = (
        Variant(
            "sdxs_features",
            says="Feature matching alone, for as many updates",
            alpha=(1.0, 1.0),
            matching=(1.0, 1.0),
            baselines=("ddim_unguided",),
        ),
        Variant(
            "sdxs_scores",
            says="Score distillation alone, at all times and from the first update",
            alpha=(0.0, 0.0),
            matching=(0.0, 0.0),
            baselines=("ddim_unguided",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": shrink(session.clone("teacher"))}

    def prepare(self, session: Session) -> None:
        student, teacher = session.networks["student"], session.networks["teacher"]
        student.load_state_dict(session.once(small, *session.scale((self.small_updates, 32), (1, 4)), self.small_rate))
        have = session.once(pairs, *session.scale((self.n, self.solver_steps), (8, 2)))
        size, steps = session.scale((self.batch, self.updates), (4, 1))
        warm = 0 if self.alpha[0] == 0 else session.scale(self.warm_updates, 1)
        steps += session.scale(self.warm_updates, 1) - warm
        scores = Scores(session, self.alpha[1] < 1, rate=self.fake_rate)
        times, draw = iter(torch.linspace(0, 1, max(steps, 2)).tolist()), drawing(session, have, size)

        def warming() -> Tensor:
            eps, aim, states = draw()
            return unlike(teacher, from_noise(student, eps, states), aim, states).mean()

        def segments() -> Tensor:
            eps, aim, states = draw()
            x = from_noise(student, eps, states)
            value = self.segmented(scores, x, aim, states, next(times))
            scores.learn(x, states)
            return value

        if warm:
            fit(session, student, warming, warm, self.rate, clip=1.0)
        if steps:
            fit(session, student, segments, steps, self.rate, clip=1.0)

    def segmented(self, scores: Scores, x: Tensor, aim: Tensor, states: Tensor, progress: float) -> Tensor:
        """The loss of samples x [B, 4, 8, 8], whose pairs are `aim`, at a time for each, after so much of the updates."""
        start, end = self.alpha
        high, low = self.matching
        t = scores.times(len(x))
        above = t > start + (end - start) * progress
        value = x.new_zeros(())
        if above.any():
            pulled, asked = x[above], states[above]
            value = value + above.float().mean() * towards(pulled, scores.pull(pulled, asked, t[above]))
        if not above.all():
            apart = unlike(scores.teacher, x[~above], aim[~above], states[~above])
            value = value + (high + (low - high) * progress) * apart.sum() / len(x)
        return value

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        return from_noise(student, batch["noise"], student.words(batch["condition"]))
