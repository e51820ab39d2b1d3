"""Self-cascade diffusion: a small sample is where the large one starts, and tiny upsamplers carry its features over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.cascade import halved
from stepmark.tracks.image.schedules import Schedule, add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step
from stepmark.tracks.image.training import fit, sinusoids


def doubled(images: Tensor) -> Tensor:
    """Bilinear interpolation to twice the size."""
    return interpolate(images, scale_factor=2, mode="bilinear")


def euler_samples(denoise: Denoiser, x: Tensor, steps: int) -> Tensor:
    """Samples from noise x [B, ...] in equal Euler steps."""
    for t, s in pairwise(uniform_times(steps)):
        x = euler_step(x, denoise.output(x, t), t, s)
    return x


def base_samples(denoise: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Samples [B, C, H / 2, W / 2] at the size of training in equal Euler steps. Their noise is the mean of 2x2 values of
    `noise` [B, C, H, W], at unit variance again.
    """
    return euler_samples(denoise, 2 * halved(noise), steps)


def from_pivot(
    velocity: Callable[[Tensor, float], Tensor],
    schedule: Schedule,
    pivot: Tensor,
    eps: Tensor,
    steps: int,
    start: float,
) -> Tensor:
    """Samples [B, C, H, W] in equal Euler steps from time `start` < 1, where the sample of the smaller size, doubled and
    noised, stands for the steps that are left out (equation 5).
    """
    x = add_noise(schedule, doubled(pivot), eps, torch.full((len(eps),), start, device=eps.device))
    for t, s in pairwise(uniform_times(steps, start)):
        x = euler_step(x, velocity(x, t), t, s)
    return x


class FeatureUpsampler(nn.Module):
    """Features [B, C, h, w] of the smaller image as a correction [B, C, 2 h, 2 w] to those of the larger; at first none.

    Normalised, doubled, narrowed to `width` channels, told the time, widened again (section 3.4).
    """

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU())
        self.narrow = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(32, width)
        self.widen = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.widen.weight)
        nn.init.zeros_(self.widen.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Correction for features at times t [B]."""
        hidden = self.narrow(doubled(self.enter(features))) + self.time(sinusoids(t))[:, :, None, None]
        return self.widen(nn.functional.silu(hidden))


class Cascade(nn.Module):
    """A frozen network with feature upsamplers: it sees the smaller image too, and only the upsamplers learn.

    The smaller image, without noise, passes through the same network at the same time; what leaves each level of the
    encoder and the middle block is upsampled and added to what leaves it in the pass of the larger image.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prediction = base.prediction
        blocks = self._blocks()
        self.upsamplers = nn.ModuleList(FeatureUpsampler(int(block.resnets[-1].out_channels)) for block in blocks)

    def _blocks(self) -> list[Any]:
        unet: Any = self.base.named.unet  # type: ignore[union-attr]
        return [*unet.down_blocks, unet.mid_block]

    def forward(self, x: Tensor, pivot: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction [B, C, H, W] at x [B, C, H, W], pivot [B, C, H / 2, W / 2], t float [B]."""
        features: list[Tensor] = []

        def keep(block: nn.Module, given: Any, found: Any) -> None:
            features.append(found[0] if isinstance(found, tuple) else found)

        def add(upsampler: nn.Module, place: int, found: Any) -> Any:
            more = upsampler(features[place], t)
            return (found[0] + more, *found[1:]) if isinstance(found, tuple) else found + more

        hooks = [block.register_forward_hook(keep) for block in self._blocks()]
        with torch.no_grad():
            self.base(pivot, t, condition)
        for hook in hooks:
            hook.remove()
        hooks = [
            block.register_forward_hook(lambda _, given, found, one=one, place=place: add(one, place, found))
            for place, (block, one) in enumerate(zip(self._blocks(), self.upsamplers, strict=True))
        ]
        out = self.base(x, t, condition)
        for hook in hooks:
            hook.remove()
        return out


class SelfCascadeDiffusion(Method):
    """Self-cascade diffusion: a network adapts to twice its size by tiny feature upsamplers, everything else frozen.

    A network composes well at the size it was trained on only. So (section 3.3)

        z_0   sample at the size of training
        z_K = alpha_K up(z_0) + sigma_K eps,   K < T        (equation 5, up: bilinear)
        then denoise from K to 0 at the larger size, with the same network

    Composition comes from the pivot z_0, and the steps from T to K are left out: large images start at t = 0.5. Half of
    the rung are steps at the small size, half at the large one. So far nothing is trained, and this is what
    `self_cascade_free` does.

    Here the network also sees z_0 itself while it denoises: at every time t the clean z_0 passes through the frozen
    network, and its features at each level of the encoder correct those of the large image (section 3.4, equation 6)

        f_n <- f_n + phi_n(up(h_n), t)

    with h_n and f_n what leaves level n (and the middle block) for the small and the large image. Only the phi_n learn,
    some thousand parameters in all, by the network's own loss on a thousand large images, whose halves are their pivots.
    A large step is one row of a larger network; what it costs is in the FLOPs, with the decoder's pass over z_0, whose
    outcome is thrown away.

    `fully_finetuned` is the paper's other end: all weights of the network learn at the larger size, for as many updates of
    as many images, and it samples from noise at that size with all of its rung. `upsampled_samples` is the control of all
    of it: composition of the best, no detail. All of its rung are steps at the small size, whose rows cost a quarter of
    those of the large one.

    Differs from the paper: one doubling instead of several, pixels instead of latents, Euler steps of a flow instead of a
    diffusion. K is the time at which signal and noise are equal; the released code starts at timestep 700 of 1 000, with a
    twelfth of the signal's variance, which is t = 0.77 on a flow. Pivots are halves of the training images,
    clean and perfect; there they are fresh samples for the same prompt, with the faults of those that are used later. The
    rung is halved between the sizes; there the small sample gets all 50 steps and the large one 35 more. phi_n is one
    narrow block instead of two, starts at zero and learns only the times that are sampled. It is used at all of them; the
    released code goes without it in the last tenth of the timesteps. Updates are hundreds, not thousands, for both
    trainings, and as many for both, where the paper boasts of a fifth.

    What limits it here: an image of one shape has hardly any detail that an upsampled one lacks. With the upsamplers shapes
    are sharper than by interpolation; but composition is at best that of the small sample, which at the lower rungs has few
    steps, and the steps at the larger size cost some of it: `fd` and alignment of the small sample, enlarged, are much the
    better ones. `fully_finetuned` has the smaller `fd` with few steps, and worse shapes and alignment throughout. `fd`
    compares images at half their size, where detail that was added is averaged away.
    """

    paper = Paper(
        id="self_cascade_diffusion",
        title="Make a Cheap Scaling: A Self-Cascade Diffusion Model for Higher-Resolution Adaptation",
        authors="Guo, He, Chen, Xia, Cun, Wang, Huang, Zhang, Wang, Chen, Shan, Wen",
        year=2024,
        arxiv="2402.10491",
        code="GuoLanqing/Self-Cascade",
    )
    tasks = ("attributes_to_image/shapes32",)
    baselines = ("euler", "fully_finetuned", "self_cascade_free", "upsampled_samples")
    trainings = 3
    claims = (
        Claim(
            "misfit[self_cascade_diffusion,*] <= misfit[fully_finetuned,*] and fd[self_cascade_diffusion,*] <= "
            "fd[fully_finetuned,*]",
            says="some thousand weights adapt the network at least as well as all of them do in as many updates",
            headline=True,
            setting="the small sample has 2 to 8 steps, the paper's 50; fd is taken at half size, where added detail is averaged "
            "away; and 200 updates, not 10 000",
        ),
        Claim(
            "fd[self_cascade_diffusion,*] < fd[euler,*] and misfit[self_cascade_diffusion,*] < misfit[euler,*]",
            says="composition and shapes are better than those of direct sampling at the larger size",
        ),
        Claim(
            "misfit[self_cascade_diffusion,8..16] < misfit[self_cascade_free,8..16] "
            "and fd[self_cascade_diffusion,8..16] < fd[self_cascade_free,8..16]",
            says="with tuned upsamplers shapes and composition are better than without",
        ),
        Claim(
            "misfit[self_cascade_diffusion,8..16] < misfit[upsampled_samples,8..16] "
            "and fd[self_cascade_diffusion,8..16] <= 1.1 * fd[upsampled_samples,8..16]",
            says="shapes are sharper than those of an upsampled small sample, and composition is kept",
        ),
    )

    start = 0.5  # K
    large = "tuned"  # how the large image is made: "tuned" | "finetuned" | "free" | "interpolated"
    variants = (
        Variant(
            "self_cascade_free",
            says="without upsamplers: the same network denoises the large image, and nothing is trained",
            large="free",
            trainings=1,
            baselines=("euler", "upsampled_samples"),
            claims=(
                Claim(
                    "fd[self_cascade_free,*] < fd[euler,*] and single[self_cascade_free,*] >= single[euler,*]",
                    says="composition is better than that of direct sampling at the larger size",
                ),
                Claim(
                    "misfit[self_cascade_free,8..16] < misfit[upsampled_samples,8..16] "
                    "and fd[self_cascade_free,8..16] <= 1.1 * fd[upsampled_samples,8..16]",
                    says="and shapes are sharper than those of an upsampled small sample, at the same composition",
                ),
            ),
        ),
        Variant(
            "fully_finetuned",
            says="all weights trained at the larger size, for as many updates, and direct sampling",
            large="finetuned",
            baselines=("euler",),
        ),
        Variant(
            "upsampled_samples",
            says="samples at the size of training, enlarged by bicubic interpolation",
            trainings=1,
            large="interpolated",
            baselines=("euler",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        if self.large == "tuned":
            return {"cascade": Cascade(session.clone("teacher"))}
        return {"student": session.clone("teacher")} if self.large == "finetuned" else {}

    def prepare(self, session: Session) -> None:
        if self.large == "tuned":
            train_large(session, session.networks["cascade"], self.start, tuned=True)
        elif self.large == "finetuned":
            train_large(session, session.networks["student"], 1.0, tuned=False)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        noise, condition = batch["noise"], batch["condition"]
        denoise = Denoiser(session.networks["teacher"], condition)
        if self.large == "finetuned":
            return euler_samples(Denoiser(session.networks["student"], condition), noise, rung)
        if self.large == "interpolated":
            return interpolate(base_samples(denoise, noise, rung), scale_factor=2, mode="bicubic")
        pivot = base_samples(denoise, noise, rung // 2)
        eps = torch.randn(noise.shape, generator=session.rng, device=noise.device, dtype=noise.dtype)

        def velocity(x: Tensor, t: float) -> Tensor:
            if self.large == "free":
                return denoise.output(x, t)
            times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
            return session.networks["cascade"](x, pivot, times, condition)

        return from_pivot(velocity, denoise.schedule, pivot, eps, rung - rung // 2, self.start)


# --- training --------------------------------------------------------------------------------------------------------


def train_large(
    session: Session, network: nn.Module, start: float, tuned: bool, steps: int = 200, batch: int = 16
) -> None:
    """Flow matching on the images of the larger size at times below `start`: of a cascade (`tuned`), whose pivots are their
    halves, or of a network as it is, all of its weights.
    """
    data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))

    def loss() -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=session.rng, device=session.device)
        x0, eps = data[rows], torch.randn(data[rows].shape, generator=session.rng, device=session.device)
        t = start * torch.rand(batch, generator=session.rng, device=session.device)
        x = add_noise(schedule_of(network), x0, eps, t)
        v = network(x, halved(x0), t, label[rows]) if tuned else network(x, t, label[rows])
        return (v - (eps - x0)).square().mean()

    fit(session, network, loss, session.scale(steps, 2), rate=2e-3 if tuned else 5e-4, ema=0.98, clip=1.0)
