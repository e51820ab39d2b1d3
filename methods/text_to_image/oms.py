"""One More Step: a small network takes the noise to where the schedule of a latent model really ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, ddim, noise_like

WIDTH, WORDS = 32, 64  # channels of psi, of the states of captions


class Step(nn.Module):
    """psi: v [B, 4, 8, 8] at a signal-to-noise ratio of zero, for noise [B, 4, 8, 8] and the states of captions [B, 32, 64].

    Convolutions and two layers of attention from every pixel to the words. It is told no time, as there is only one.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Conv2d(LATENT[0], width, 3, padding=1)
        self.place = nn.Parameter(0.3 * torch.randn(1, width, *LATENT[1:]))
        self.convolve = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(4)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.read = nn.ModuleList(
            nn.MultiheadAttention(width, 4, kdim=WORDS, vdim=WORDS, batch_first=True) for _ in range(2)
        )
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, LATENT[0], 3, padding=1))

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        h = self.first(x) + self.place
        for i, (norm, read) in enumerate(zip(self.norm, self.read, strict=True)):
            h = h + self.convolve[2 * i](h)
            pixels = norm(h.flatten(2).transpose(1, 2))
            h = h + read(pixels, states, states, need_weights=False)[0].transpose(1, 2).unflatten(2, x.shape[2:])
            h = h + self.convolve[2 * i + 1](h)
        return self.last(h)


def one_more_step(x0: Tensor, noise: Tensor, fresh: Tensor, alpha: float, share: float) -> Tensor:
    """x_T [B, ...] from the prediction x0 at pure noise: alpha_T x0 + sqrt(1 - alpha_T^2 - s^2) noise + s fresh, with
    s^2 = share (1 - alpha_T^2). Whatever the share, the noise in x_T has the variance 1 - alpha_T^2 of the schedule.
    """
    variance = 1 - alpha**2
    return alpha * x0 + (variance * (1 - share)) ** 0.5 * noise + (variance * share) ** 0.5 * fresh


class OneMoreStep(Method):
    """One More Step (OMS): before the first step of an untouched sampler, one step of a small network, from pure noise to the
    last time that the model was trained at.

    The usual schedule of latent models ends at abar_T = 0.0047 and not at 0: the noisiest latents of training still show the
    mean of the picture, its brightness above all. Sampling starts from noise that shows nothing, which the model takes for
    medium brightness. A network psi stands in for the step that lacks, from a time S of which abar_S = 0. There v is
    -x0, so that psi learns, on noise and captions alone (section 4),

        loss = |psi(x_S, c) - v|^2,   v = -x0,   x_S ~ N(0, I)

    and in sampling

        x0' = -(psi(x_S, ()) + w (psi(x_S, c) - psi(x_S, ())))
        x_T = sqrt(abar_T) x0' + sqrt(1 - abar_T - s^2) x_S + s noise

    after which the sampler, here DDIM with guidance, goes on from T as it always does. psi has a guidance weight w of its own;
    at w = 1 it takes one row, and so it is here. As in the authors' code s^2 = 1 - abar_T: the posterior of the forward
    process given x0' and x_S, in which x_S has no weight. Their code multiplies the noise by the variance and not by its root,
    which for this schedule is nearly the same; here it is the root, as the equation has it. psi has 54 000 parameters, 3 % of the
    teacher, is trained for 800 updates of 64 pictures, and reads captions through the teacher's encoder.

    The step counts as an evaluation, so that of a rung of 2 n evaluations n - 1 guided steps are left.

    Two controls need no training. `oms_mean` puts the mean latent of the training pictures in the place of x0'.
    `oms_random` puts the latent of a random training picture there: x_T is then distributed just as in training, but does
    not know the caption. Whatever moves the brightness of all pictures as a crowd would pass with one of them.

    Differs from the paper: psi is a network of one resolution and not a UNet of several; its captions are read by the encoder
    of the base model and not by one of its own; one base model, so that sharing psi among several is not asked.

    What limits it here: a latent has 256 values, 64 times fewer than those of the paper's models, so that what the
    schedule keeps of the mean at its end is fainter against the noise by a factor of 8. Where a caption names the
    background, guidance finds it from noise too.
    """

    paper = Paper(
        id="oms",
        title="One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws and Enhancing "
        "Low-Frequency Controls",
        authors="Hu, Zheng, Zheng, Wang, Tao, Cham",
        year=2023,
        arxiv="2311.15744",
        code="mhh0318/OneMoreStep",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("ddim_guided", "oms_mean", "oms_random")
    trainings = 3
    claims = (
        Claim(
            "w1_brightness[oms,8..64] <= 0.7 * w1_brightness[ddim_guided,8..64] and fd[oms,8..64] <= fd[ddim_guided,8..64] "
            "and caption[oms,8..64] >= caption[ddim_guided,8..64] - 0.01 "
            "and nfe_equivalent[oms,8..64] <= nfe_equivalent[ddim_guided,8..64] "
            "and w1_brightness[oms,8..64] < w1_brightness[oms_mean,8..64] and fd[oms,8..64] < fd[oms_random,8..64]",
            says="at no more cost, for a guided step is left out, brightness is nearer to that of the data by a third and "
            "pictures are no worse; neither a constant nor a picture drawn at random in the place of the prediction does as well",
            headline=True,
            setting="latents of 256 values, in which the end of the schedule shows less of the mean than in those of 16 384",
        ),
    )

    start = "predicted"  # what stands for x0': "predicted" by psi, the "mean" latent, or a "random" one
    scale, share = 1.0, 1.0  # w; s^2 as a share of 1 - abar_T
    updates, batch, rate = 800, 64, 2e-3
    variants = (
        Variant(
            "oms_mean",
            says="the mean latent of the training pictures in the place of the prediction",
            start="mean",
            baselines=("ddim_guided",),
        ),
        Variant(
            "oms_random",
            says="the latent of a random training picture in the place of the prediction",
            start="random",
            baselines=("ddim_guided",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"step": Step()} if self.start == "predicted" else {}

    def prepare(self, session: Session) -> dict[str, Tensor] | None:
        """Train psi; the controls keep the mean latent, or 256 of them."""
        data = Latents(session)
        if self.start == "mean":
            return {"x0": data.x0.mean(0, keepdim=True)}
        if self.start == "random":
            return {"x0": data.batch(256)[0]}
        step: Any = session.networks["step"]
        teacher: Any = session.networks["teacher"]
        size = session.scale(self.batch, 8)
        with torch.no_grad():
            nothing = teacher.words(teacher.null_condition(data.tokens[:1]))

        def loss() -> Tensor:
            x0, _, states = data.batch(size)
            noise = noise_like(x0, session.rng)
            dropped = torch.rand(size, generator=session.rng, device=x0.device) < 0.1
            states = torch.where(dropped[:, None, None], nothing, states)
            return (step(noise, states) + x0).square().mean()

        fit(session, step, loss, session.scale(self.updates, 2), self.rate, clip=1.0)
        return None

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        steps = (rung - 1) // 2
        if steps < 1:
            skip("the further step and a guided one take three evaluations")
        denoise, x = GuidedByCaption(session.networks["teacher"], batch, GUIDANCE), batch["noise"]
        fresh, x0 = noise_like(x, session.rng), self.predicted(session, x, denoise.condition)
        x = one_more_step(x0, x, fresh, denoise.schedule.alpha(1.0), self.share)
        return ddim(denoise, x, uniform_times(steps))

    def predicted(self, session: Session, x: Tensor, states: Tensor) -> Tensor:
        """x0' [B, 4, 8, 8] for noise [B, 4, 8, 8] and the states of the empty captions and of the captions [2 B, 32, 64]."""
        if self.start != "predicted":
            kept = session.state["x0"]
            return kept[torch.randint(len(kept), (len(x),), generator=session.rng, device=x.device)]
        step = session.networks["step"]
        if self.scale == 1.0:
            return -step(x, states[len(x) :])
        null, told = step(torch.cat([x, x]), states).chunk(2)
        return -torch.lerp(null, told, self.scale)
