"""TiUE: the encoder half of a UNet runs once, without the time, and its decoder half at four times at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, leading_times, schedule_of, to_x0_eps
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image import LATENT
from stepmark.tracks.text_to_image.distribution import Prompts, Scores, towards
from stepmark.tracks.text_to_image.inside import encoded


def decoded_from(unet: Any, x: Tensor, kept: Sequence[Tensor], time: Tensor, states: Tensor) -> Tensor:
    """The second half of a UNet: behind `encoded(painter, x, time, states)` it gives what the painter gives."""
    embedding = unet.time_embedding(unet.get_time_embed(sample=x, timestep=time))
    for block in unet.up_blocks:
        kept, maps = kept[: -len(block.resnets)], kept[-len(block.resnets) :]
        x = block(hidden_states=x, temb=embedding, res_hidden_states_tuple=tuple(maps), encoder_hidden_states=states)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


class OnePass(nn.Module):
    """A copy of the teacher of which one call gives the noises [K, B, 4, 8, 8] at K times, from one pass of its encoder half.

    times: those of the decoder half, the noisiest first; the encoder half is always told the first.
    """

    def __init__(self, painter: Any, times: list[float]) -> None:
        super().__init__()
        self.painter, self.schedule = painter, schedule_of(painter)
        self.times = times

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        unet, k = self.painter.unet, len(self.times)
        told = torch.tensor([self.schedule.network_time(t) for t in self.times], dtype=x.dtype, device=x.device)
        up, kept = encoded(self.painter, x, told[:1].expand(len(x)), states)
        up, maps = up.repeat(k, 1, 1, 1), [each.repeat(k, 1, 1, 1) for each in kept]
        noises = decoded_from(unet, up, maps, told.repeat_interleave(len(x)), states.repeat(k, 1, 1))
        return noises.unflatten(0, (k, len(x)))


def joined(schedule: Schedule, x: Tensor, noises: Tensor, times: list[float]) -> Tensor:
    """DDIM from the noise x [B, ...] at times[0] to the data along given noises [K, B, ...], one a step: no network is asked."""
    for noise, (t, s) in zip(noises, pairwise([*times, 0.0]), strict=True):
        x = ddim_step(schedule, *to_x0_eps("epsilon", noise, x, schedule.alpha(t), schedule.sigma(t)), s)
    return x


def divergence(noises: Tensor) -> Tensor:
    """KL from N(mean, variance) of each noise [N, ...] to N(0, 1), summed over the N: -1/2 (1 + log v - mean^2 - v)."""
    flat = noises.flatten(1)
    mean, variance = flat.mean(1), flat.var(1)
    return -0.5 * (1 + variance.log() - mean.square() - variance).sum()


class TiUE(Method):
    """TiUE: four steps of sampling in one pass, because the half of the network that need not know the time runs once.

    The encoder half of the UNet, with its middle, gets the noise z and always the same time. Its maps go to the decoder half,
    which is told K = 4 times and gives four noises, in one batch. None waits for another, and DDIM's steps are all that is left:

        f = E(z, t_1, c),   eps_i = D(f, t_i, c) for t_1 > ... > t_K at once
        x_(i+1) = a_i x_i + b_i eps_i,   x_1 = z,   x_(K+1) is the picture

    The student begins as the teacher and learns from captions alone, by variational score distillation, as SwiftBrush does:
    the picture is noised to a time t, and pulled along sigma_t^2 (eps_teacher - eps_fake), with a copy of the teacher that
    learns the student's own score beside it. The four noises are asked to be like noise:

        loss = VSD + 0.1 sum over noises of KL(N(mean, var) || N(0, 1)),   mean and var over the numbers of one noise

    A pass costs three evaluations, for the decoder half is twice the other, and is counted by the harness as one row:
    `nfe_equivalent` says what it is. It is offered from four evaluations on.

    `tiue_no_kl` leaves the noises to themselves. The one-step student of the same training, with as many updates on as many
    captions, is `swiftbrush`.

    Differs from the paper: as `swiftbrush` does, by its 300 updates, rates, and a fake score that is a whole copy. The
    divergence is a sum over a batch of 16, there of 8 on each device, so that it weighs twice as much here. The times are
    those of the authors' code, evenly from three quarters of the schedule down, and not from its end.

    What limits it here: the student must learn in 300 updates to get by without its own earlier steps.
    """

    paper = Paper(
        id="tiue",
        title="One-Way Ticket:Time-Independent Unified Encoder for Distilling Text-to-Image Diffusion Models",
        authors="Li, Wang, Wang, Liu, Xie, van de Weijer, Khan, Yang, Wang, Yang",
        year=2025,
        arxiv="2505.21960",
        code="sen-mao/Loopfree",
    )
    tasks = ("free/scenes_eps", "text_to_image/scenes_eps")
    baselines = ("swiftbrush", "lcm", "ddim_unguided", "ddim_guided", "tiue_no_kl")
    trainings = 3
    claims = (
        Claim(
            "diversity[tiue,4] > max(diversity[swiftbrush,4], diversity[lcm,4]) "
            "and fd[tiue,4] < min(fd[swiftbrush,4], fd[lcm,4]) "
            "and caption[tiue,4] >= 0.9 * caption[swiftbrush,4] and latency_ms[tiue,4] <= 0.8 * latency_ms[lcm,4]",
            says="pictures of a caption differ more than those of a one-step student and of LCM in four steps and are nearer to "
            "real ones, show about as much of it, and take less time than four steps",
            headline=True,
            setting="300 updates, where the paper's student sees millions of captions",
        ),
        Claim(
            "diversity[tiue,4] > diversity[tiue_no_kl,4] and fd[tiue,4] < fd[tiue_no_kl,4]",
            says="that noises are asked to be like noise makes pictures more diverse and more real",
            setting="300 updates, where the paper's student sees millions of captions",
        ),
        Claim(
            "fd[tiue,4] < min(fd[ddim_unguided,4], fd[ddim_guided,4]) "
            "and caption[tiue,4] > max(caption[ddim_unguided,4], caption[ddim_guided,4])",
            says="one pass is better than the teacher's own four evaluations",
            task="text_to_image/scenes_eps",
        ),
    )

    steps = 4  # K
    kl = 0.1  # weight of the divergence of every noise
    updates, batch, rate, fake_rate = 300, 16, 1e-4, 5e-4
    variants = (
        Variant("tiue_no_kl", says="The noises are not asked to be like noise", kl=0.0, baselines=("swiftbrush",)),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        teacher = session.clone("teacher")
        return {"student": OnePass(teacher, leading_times(self.steps, schedule_of(teacher).steps)[:-1])}

    def prepare(self, session: Session) -> None:
        student, prompts = session.networks["student"], Prompts(session)
        scores, size = Scores(session, rate=self.fake_rate), session.scale(self.batch, 4)

        def loss() -> Tensor:
            states = prompts.batch(size)[1]
            noise = torch.randn(size, *LATENT, generator=session.rng, device=session.device, dtype=session.dtype)
            noises = student(noise, states)
            x = joined(scores.schedule, noise, noises, student.times)
            value = towards(x, scores.pull(x, states, scores.times(size)))
            scores.learn(x, states)
            return value + self.kl * divergence(noises.flatten(0, 1))

        fit(session, student, loss, session.scale(self.updates, 1), self.rate, clip=1.0)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < self.steps:
            skip("a pass costs three evaluations")
        student, x = session.networks["student"], batch["noise"]
        return joined(student.schedule, x, student(x, student.painter.words(batch["condition"])), student.times)
