"""ALDM: a segmenter as the adversary of a diffusion model that is told a layout, asked along a stretch of the sampling path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import descend
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.layout import CLASSES, layouts_of
from stepmark.tracks.text_to_image.sampling import column, noise_like

FAKE = CLASSES  # what the segmenter is to see in pictures that were made: one class more than there are
STEPS, LAZY = 25, 8  # times that paths are made of; updates of which one asks the segmenter
START = (1 / 24, 1 / 12)  # of the updates: where its weight begins to grow, and where it is whole


class Controlled(nn.Module):
    """A painter and a ControlNet beside it: eps [B, 4, 8, 8] for x, t, the states of captions and layouts int64 [B, 32, 32].

    The ControlNet is a copy of the painter's first half. It adds to what the painter's second half gets, at first nothing.
    The painter does not learn. `strength` times what is added.
    """

    prediction = "epsilon"

    def __init__(self, painter: Any) -> None:
        super().__init__()
        from diffusers import ControlNetModel  # seconds to import: only when a network is built

        unet = painter.unet
        self.painter, self.alphas_cumprod = painter.requires_grad_(False), painter.alphas_cumprod
        self.control = ControlNetModel.from_unet(
            unet,
            conditioning_embedding_out_channels=(16, 32, 64),  # which halves the map twice: from 32 pixels to 8
            load_weights_from_unet=False,  # the library does not know the input for a guidance scale
            conditioning_channels=CLASSES,
        )
        self.control.conv_in.load_state_dict(unet.conv_in.state_dict())
        self.control.time_embedding.load_state_dict(unet.time_embedding.state_dict(), strict=False)
        self.control.down_blocks.load_state_dict(unet.down_blocks.state_dict())
        self.control.mid_block.load_state_dict(unet.mid_block.state_dict())

    def words(self, ids: Tensor) -> Tensor:
        """States [B, 32, 64] of captions."""
        return self.painter.words(ids)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The empty caption, in the form of the ones that are given."""
        return self.painter.null_condition(condition)

    def forward(self, x: Tensor, t: Tensor, states: Tensor, layout: Tensor, strength: float = 1.0) -> Tensor:
        hint = one_hot(layout, CLASSES).permute(0, 3, 1, 2).to(x.dtype)
        down, middle = self.control(x, t, states, hint, conditioning_scale=strength, return_dict=False)
        told = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.painter.unet(x, t, states, **told, return_dict=False)[0]


class Segmenter(nn.Module):
    """What every pixel of pictures [B, 3, 32, 32] shows, or that it was made: logits [B, 8, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.coarsest = self._layer(3, 32, 1), self._layer(32, 64, 2), self._layer(64, 64, 2)
        self.between, self.up = self._layer(64, 64, 1), nn.Upsample(scale_factor=2)
        self.join, self.last = self._layer(128, 32, 1), self._layer(64, 32, 1)
        self.head = nn.Conv2d(32, CLASSES + 1, 1)

    @staticmethod
    def _layer(before: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        found = self.join(torch.cat([self.up(self.between(self.coarsest(coarse))), coarse], 1))
        return self.head(self.last(torch.cat([self.up(found), fine], 1)))


# --- losses ----------------------------------------------------------------------------------------------------------


def balanced(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy pixel by pixel [B, H, W] of logits [B, C, H, W], weighted so that every class that occurs in the batch
    counts alike, however few its pixels: by (all pixels) / (those of the class, times the classes that occur, times C)."""
    kinds = logits.shape[1]
    count = torch.bincount(wanted.flatten(), minlength=kinds)
    weight = wanted.numel() / (count.clamp(min=1) * (count > 0).sum() * kinds)
    return cross_entropy(logits, wanted, reduction="none") * weight.to(logits.dtype)[wanted]


def along(losses: Sequence[Tensor]) -> Tensor:
    """The mean of pixelwise losses [B, H, W] along a path, with the slope of the first alone, which is made steeper or flatter
    at every pixel so that it stands for all of them."""
    first, mean = losses[0], torch.stack([loss.detach() for loss in losses]).mean(0)
    share = torch.where(first != 0, mean / first.detach(), 0.0)
    return (first * share).mean()


# --- training --------------------------------------------------------------------------------------------------------


def times(like: Tensor) -> Tensor:
    """The 26 times 0, 1/25, .., 1 of paths."""
    return torch.linspace(0, 1, STEPS + 1, dtype=torch.float64, device=like.device).to(like.dtype)


def advanced(
    student: nn.Module, x: Tensor, number: Tensor, states: Tensor, layout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x [B, 4, 8, 8] at the times of numbers int64 [B]: eps, x0, and the point at the time before, by DDIM."""
    schedule, t, s = schedule_of(student), times(x)[number], times(x)[number - 1]
    eps = student(x, schedule.network_time(t), states, layout)
    x0 = to_x0_eps("epsilon", eps, x, column(schedule.alpha(t)), column(schedule.sigma(t)))[0]
    return eps, x0, column(schedule.alpha(s)) * x0 + column(schedule.sigma(s)) * eps


class Lessons:
    """The segmenter as an adversary, on latents that are decoded. For `prepare`.

    Args:
        fake: weight of what was made in its loss. first, size: updates and batch of its lessons before.
    """

    def __init__(self, session: Session, fake: float, first: int, size: int) -> None:
        self.vae, self.fake = session.networks["vae"], fake
        self.network = Segmenter().to(session.device, session.dtype)
        self.network.load_state_dict(session.once(segmenter, first, size, 2e-3))
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=2e-4, weight_decay=0.005)

    def seen(self, z: Tensor) -> Tensor:
        """Logits of what latents decode to."""
        return self.network(self.vae(z).clamp(-1, 1))

    def judge(self, z: Tensor, layout: Tensor) -> Tensor:
        """How little of their layouts latents show, pixel by pixel."""
        return balanced(self.seen(z), layout)

    def learn(self, made: Tensor, real: Tensor, layout: Tensor) -> None:
        """One update: real latents show their layouts, those that were made are of the class more."""
        invented = cross_entropy(self.seen(made.detach()), torch.full_like(layout, FAKE))
        self.optimiser.zero_grad(set_to_none=True)
        (self.judge(real, layout).mean() + self.fake * invented).backward()
        self.optimiser.step()


def segmenter(session: Session, updates: int, size: int, rate: float) -> dict[str, Tensor]:
    """A segmenter of the train split, before it knows of any picture that was made."""
    network, data = Segmenter().to(session.device, session.dtype), session.train["x0"]
    for step in descend(session, list(network.parameters()), updates, rate):
        rows = torch.randint(len(data), (size,), generator=session.rng, device=session.device).cpu()
        pictures = data[rows].to(session.device, session.dtype)
        step(balanced(network(pictures), layouts_of(session.train, rows).to(session.device)).mean())
    return network.state_dict()


def controlnet(
    session: Session, updates: int, size: int, rate: float, weight: float, path: int, fake: float, first: int
) -> dict[str, Tensor]:
    """A ControlNet, trained on the noise at all times but the least `path`, and, unless the weight is 0, by a segmenter along a
    path of so many steps."""
    student, data, rng = session.networks["student"], Latents(session), session.rng
    schedule, control = schedule_of(student), student.control
    layout_of = layouts_of(session.train, slice(len(data.x0))).to(session.device)
    lessons = Lessons(session, fake, first, size) if weight else None

    def estimated(least: int) -> tuple[Tensor, ...]:
        """Latents noised to times of a number above `least`: the loss of the noise, x0, the next point, and the numbers."""
        number = torch.randint(least + 1, STEPS + 1, (size,), generator=rng, device=x0.device)
        noise = noise_like(x0, rng)
        x = add_noise(schedule, x0, noise, times(x0)[number])
        eps, made, x = advanced(student, x, number, states, layout)
        return (eps - noise).square().mean(), made, x, number

    for done, step in enumerate(descend(session, list(control.parameters()), updates, rate)):
        rows = data.draw(size)
        x0, states, layout = data.x0[rows], data.states(rows), layout_of[rows]
        asked = lessons if done % LAZY == 0 else None
        if asked is not None:
            with torch.no_grad():
                made = estimated(0)[1]
            asked.learn(made, x0, layout)
        loss, made, x, number = estimated(path)
        share = min(max((done / updates - START[0]) / (START[1] - START[0]), 0.0), 1.0)
        if asked is not None and share > 0:
            losses = [asked.judge(made, layout)]
            with torch.no_grad():
                for k in range(1, path + 1):
                    _, made, x = advanced(student, x, number - k, states, layout)
                    losses.append(asked.judge(made, layout))
            loss = loss + weight * share * along(losses)
        step(loss)
    return control.state_dict()


class ALDM(Method):
    """ALDM: a ControlNet for layouts whose estimates of the clean picture a segmenter is to read as the layout says.

    The ControlNet learns to predict the noise, and its estimates x0 at random times are decoded and given to a segmenter D of
    N + 1 classes (section 3.1, equations 2 and 3). D learns that real pictures show their layouts y, pixel by pixel, and
    that what was made is of the class N + 1; the generator wants that to be read as its layout:

        loss_D = CE_b(D(x), y) + 0.01 CE(D(x0), N + 1)
        loss_G = |eps - eps(x_t, t, c, y)|^2 + lambda CE_b(D(x0), y),   lambda = 0.1

    CE_b weighs a pixel by (all pixels) / (pixels of its class, times the classes that occur, times N + 1), so that small
    objects count as much as the background. To be faithful all along the path, the estimate is unrolled (section 3.2,
    equation 4): from x_t, with t among 25 times but for the least K, K = 9 steps of DDIM by the model itself follow, and CE_b
    is the mean over the K + 1 estimates. Only the first has a slope; its loss is scaled at every pixel to the value of that
    mean. As in the authors' code the noise is learnt at those times only, and D is asked and taught in every 8th update, with a
    weight that begins to grow at 1/24 of the updates and is whole at 1/12. D is a segmenter of real pictures to begin with.

    Sampling is that of the teacher with a layout: DDIM guided by the caption, the layout in both halves, two evaluations a step.
    A row of the ControlNet and the row of the teacher that it is for count as one; NFE-equivalents show what it costs.

    Controls: `aldm_controlnet` is trained as long on the noise alone, at all 25 times; `aldm_noisy` too, but at those that ALDM
    learns at, where layouts are decided. `aldm_pushed` is the first with its residuals times 1.5, the blunt way to make a map
    count for more. `aldm_single` asks the segmenter at the first estimate only (K = 0). `aldm_blind` is the guided teacher,
    which is not told the layout.

    Differs from the paper: ControlNet reads classes, not embeddings of their names; D is a small network with skips which was
    taught for 200 updates, not UPerNet; the 25 times are 39, 79, ..., 999; rates of 1e-3, which warms up and falls, and 2e-4,
    constant (there 1e-5, constant, and 1e-6, in one cycle) with a batch of 16 for 240 updates, of which 30 ask D. The authors'
    code lets a further 1 / (K + 1) of the first estimate's slope through, which is left out, so that K = 0 is the plain loss.
    That data made for other weather train better segmenters is not asked here.

    What limits it here: 240 updates, where the authors' ControlNet has 120 000 to learn to follow its map.
    """

    paper = Paper(
        id="aldm",
        title="Adversarial Supervision Makes Layout-to-Image Diffusion Models Thrive",
        authors="Li, Keuper, Zhang, Khoreva",
        year=2024,
        arxiv="2401.08815",
        code="boschresearch/ALDM",
    )
    tasks = ("layout/scenes_eps",)
    baselines = ("aldm_controlnet", "aldm_noisy", "aldm_pushed", "aldm_single", "aldm_blind")
    trainings = 3
    claims = (
        Claim(
            "miou[aldm,8..64] > max(miou[aldm_controlnet,8..64], miou[aldm_noisy,8..64], miou[aldm_pushed,8..64], "
            "miou[aldm_blind,8..64]) "
            "and caption[aldm,8..64] >= 0.95 * caption[aldm_controlnet,8..64] "
            "and fd[aldm,8..64] <= 1.1 * fd[aldm_controlnet,8..64]",
            says="pictures follow the layout better than those of a ControlNet trained on the noise alone, at all times or at "
            "the noisy ones, than with its residuals turned up and than without one, and show as much of the caption",
            headline=True,
            setting="240 updates, of which 30 ask the segmenter",
        ),
        Claim(
            "miou[aldm,8..64] > miou[aldm_single,8..64]",
            says="asked along the path, the segmenter makes layouts hold better than asked at one estimate",
            headline=True,
            setting="240 updates, of which 30 ask the segmenter",
        ),
    )

    layout, strength = True, 1.0
    weight, path, fake = 0.1, 9, 0.01  # lambda, K, and the weight of what was made in the segmenter's loss
    updates, batch, rate, first = 240, 16, 1e-3, 200
    variants = (
        Variant(
            "aldm_controlnet",
            says="control: the ControlNet trained as long, on the noise alone",
            weight=0.0,
            path=0,
            baselines=("aldm_blind",),
        ),
        Variant(
            "aldm_noisy",
            says="control: the same, at the times that ALDM learns at",
            weight=0.0,
            baselines=("aldm_controlnet",),
        ),
        Variant(
            "aldm_pushed",
            says="control: that ControlNet with its residuals times 1.5",
            weight=0.0,
            path=0,
            strength=1.5,
            baselines=("aldm_controlnet",),
        ),
        Variant(
            "aldm_single",
            says="ablation: the segmenter is asked at one estimate, nothing is unrolled",
            path=0,
            baselines=("aldm_controlnet",),
        ),
        Variant("aldm_blind", says="control: the guided teacher, without the layout", layout=False, baselines=()),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        if not self.layout:
            return {}
        return {"student": Controlled(session.clone("teacher")).to(session.device, session.dtype)}

    def prepare(self, session: Session) -> None:
        if not self.layout:
            return
        updates, size, first = session.scale((self.updates, self.batch, self.first), (2, 4, 1))
        asked = (updates, size, self.rate, self.weight, self.path, self.fake, first)
        session.networks["student"].control.load_state_dict(session.once(controlnet, *asked))

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, x = session.networks["student" if self.layout else "teacher"], batch["noise"]
        schedule, states = schedule_of(network), network.words(batch["condition"])
        told = (batch["layout"].repeat(2, 1, 1), self.strength) if self.layout else ()
        twice = torch.cat([network.null_condition(states), states])
        for t, s in pairwise(uniform_times(rung // 2)):
            time = torch.full((2 * len(x),), schedule.network_time(t), dtype=x.dtype, device=x.device)
            null, conditional = network(torch.cat([x, x]), time, twice, *told).chunk(2)
            eps = torch.lerp(null, conditional, GUIDANCE)
            x0 = to_x0_eps(schedule.prediction, eps, x, schedule.alpha(t), schedule.sigma(t))[0]
            x = ddim_step(schedule, x0, eps, s)
        return x
