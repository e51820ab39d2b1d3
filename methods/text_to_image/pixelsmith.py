"""Pixelsmith: large pictures patch by patch, held to an enlarged small one by their phases and a slider."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import ddim

PATCH = 8  # latents of the teacher's own pictures are as wide
Corner = tuple[int, int]


class Pixelsmith(Method):
    """Pixelsmith: draw at the teacher's own size, enlarge, and denoise again at the large size, one patch at a time.

    The small picture is decoded, stretched and encoded: the guide. It is noised to every time of the grid with one noise, and the
    large latent starts from the first of these. Every place of it has a time of its own. Until all have reached the data,

    1. a place is drawn among those that are noisiest, and the patch around it, pushed inside, is cut out of the latent;
    2. before the slider, the patch's Fourier phases become the mean direction of its own and the guide's at this time, its
       magnitudes stay: exp(i p) = (exp(i p_own) + exp(i p_guide)) / |...|;
    3. what of the patch is ahead already is taken as it was before (from the latent that all shared the last time), and the
       patch makes one guided step of DDIM;
    4. before the slider, but for the last step, every other value, as on a chess board that is shifted at random, is the
       guide's at the next time;
    5. the values that were noisiest are put back into the latent, mixed half and half in a border of one value to those that
       were ahead, and their time moves on.

    So no more than a patch is ever in the network, however large the picture. These are the steps of the authors' code, whose
    patches are of 128 with a border of 10, with random places; the slider there is at 20 to 30 of 50 steps, here at half of
    them. The phases are averaged and the chess board is mixed in the code and not in the paper's text. Here patches are of 8 with
    a border of 1, all pictures of a batch have the same places, and the picture is stretched once to the final size, bicubic,
    where theirs goes by doublings, with Lanczos. The small picture is drawn from what the large noise is in the mean. The
    encoder sees the large picture whole, and not in tiles.

    A budget of NFE goes to as many steps as it allows: the small picture takes two evaluations a step, the large one two for
    every patch, and the decoder and the encoder one each.

    Controls: `pixelsmith_stretched` is the guide itself. `pixelsmith_direct` gives the large latent to the network as it is.
    `pixelsmith_free` is MultiDiffusion (Bar-Tal et al. 2023): patches on a grid of half their width, averaged, without a guide.
    `pixelsmith_unslid` follows the guide to the end.
    """

    paper = Paper(
        id="pixelsmith",
        title="Is One GPU Enough? Pushing Image Generation at Higher-Resolutions with Foundation Models",
        authors="Tragakis, Aversa, Kaul, Murray-Smith, Faccio",
        year=2024,
        arxiv="2406.07251",
        code="Thanos-DB/Pixelsmith",
    )
    tasks = ("large/scenes_x2", "large/scenes_x4")
    baselines = ("pixelsmith_stretched", "pixelsmith_direct", "pixelsmith_free", "pixelsmith_unslid")
    claims = (
        Claim(
            "caption[pixelsmith,256..512] > caption[pixelsmith_free,256..512] and"
            " caption[pixelsmith,256..512] > caption[pixelsmith_direct,256..512] and"
            " crop_fd[pixelsmith,256..512] < crop_fd[pixelsmith_stretched,256..512]",
            says="twice as wide: the scene is there once, where patches alone or the network alone repeat it, and details are"
            " nearer to those of large pictures than when the small one is stretched",
            headline=True,
        ),
        Claim(
            "caption[pixelsmith,1024..2048] > caption[pixelsmith_free,1024..2048] and"
            " caption[pixelsmith,1024..2048] > caption[pixelsmith_direct,1024..2048] and"
            " crop_fd[pixelsmith,1024..2048] < crop_fd[pixelsmith_stretched,1024..2048]",
            says="the same four times as wide",
            task="large/scenes_x4",
            headline=True,
        ),
        Claim(
            "memory_mib[pixelsmith,1024..2048] < memory_mib[pixelsmith_direct,1024..2048]",
            says="patches take less memory than the large latent as it is",
            task="large/scenes_x4",
            headline=True,
            setting="the encoder sees the large picture whole, where theirs takes it in tiles",
        ),
    )

    way, slider = "guided", 0.5
    variants = (
        Variant("pixelsmith_stretched", says="the small picture, stretched", way="stretched", claims=()),
        Variant("pixelsmith_direct", says="the teacher on the large latent as it is", way="direct", claims=()),
        Variant(
            "pixelsmith_free",
            says="patches side by side, averaged, without a guide: MultiDiffusion",
            way="free",
            claims=(),
        ),
        Variant("pixelsmith_unslid", says="held to the enlarged picture to the end", slider=1.0, claims=()),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, noise, rng = session.networks["teacher"], batch["noise"], session.rng
        denoise = Denoiser(network, network.words(batch["condition"]), GUIDANCE)
        size = noise.shape[-1]
        if self.way == "direct":
            return ddim(denoise, noise, uniform_times(rung // 2))
        if self.way == "free":
            return side_by_side(
                denoise, noise, rung // (2 * len(grid(size))) or skip("less than a step of all patches")
            )
        steps, price = 0, 2  # to be decoded and encoded
        plan: list[list[Corner]] = []
        while True:  # one step more, as long as it can be paid
            more = rounds(size, 1, rng) if self.way == "guided" else []
            price += 2 + 2 * sum(map(len, more))
            if price > rung:
                break
            steps, plan = steps + 1, plan + more
        if steps == 0:
            skip("less than a step of all patches")
        k = size // PATCH
        first = avg_pool2d(noise, k) * k  # means of k x k values, of unit variance again
        small = ddim(denoise, first, uniform_times(steps))
        picture = session.networks["vae"](small).clamp(-1, 1)
        guide = session.networks["vae"].encode(interpolate(picture, scale_factor=k, mode="bicubic").clamp(-1, 1))
        return guide if self.way == "stretched" else self.refine(denoise, guide, noise, plan, rng)

    def refine(
        self, denoise: Denoiser, guide: Tensor, noise: Tensor, plan: list[list[Corner]], rng: torch.Generator
    ) -> Tensor:
        """The large latent [B, 4, h, h], from a guide like it, patch by patch as `rounds` planned them."""
        schedule, times = denoise.schedule, uniform_times(len(plan))
        guides = [schedule.alpha(t) * guide + schedule.sigma(t) * noise for t in times]
        x, held = guides[0], round(self.slider * len(plan))
        for number, ((t, s), corners) in enumerate(zip(pairwise(times), plan, strict=True)):
            before, x = x, x.clone()
            waiting = torch.ones_like(x[:1, :1])
            for row, column in corners:
                place = (..., slice(row, row + PATCH), slice(column, column + PATCH))
                patch, mine = before[place], waiting[place].clone()
                if number < held:
                    patch = torch.where(mine > 0, shared_phase(x[place], guides[number][place]), patch)
                patch = ddim_step(schedule, *denoise(patch, t), s)
                if number < held - 1:
                    patch = torch.where(chess(rng).to(x.device), guides[number + 1][place], patch)
                x[place] = torch.lerp(x[place], patch, softened(mine))
                waiting[place] = 0
        return x


def grid(size: int) -> list[Corner]:
    """Upper left corners of patches that overlap by half, over a latent of that width."""
    starts = range(0, size - PATCH + 1, PATCH // 2)
    return [(row, column) for row in starts for column in starts]


def side_by_side(denoise: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """MultiDiffusion: at every step the mean of what all patches that hold a value make of it."""
    x, count = noise, torch.zeros_like(noise[:1, :1])
    places = [(..., slice(r, r + PATCH), slice(c, c + PATCH)) for r, c in grid(noise.shape[-1])]
    for place in places:
        count[place] += 1
    for t, s in pairwise(uniform_times(steps)):
        total = torch.zeros_like(x)
        for place in places:
            total[place] += ddim_step(denoise.schedule, *denoise(x[place], t), s)
        x = total / count
    return x


def rounds(size: int, steps: int, rng: torch.Generator) -> list[list[Corner]]:
    """Upper left corners of the patches of every step over a latent of that width: around places drawn among those that have
    not been reached, until all have."""
    plan = []
    for _ in range(steps):
        waiting, corners = torch.ones(size, size, dtype=torch.bool), []
        while waiting.any():
            places = waiting.nonzero()
            pick = int(torch.randint(len(places), (), generator=rng, device=rng.device))
            row, column = (min(max(int(at) - PATCH // 2, 0), size - PATCH) for at in places[pick])
            corners.append((row, column))
            waiting[row : row + PATCH, column : column + PATCH] = False
        plan.append(corners)
    return plan


def shared_phase(patch: Tensor, guide: Tensor) -> Tensor:
    """A patch [B, 4, 8, 8] with its own Fourier magnitudes and the mean direction of its phases and those of a guide."""
    own, theirs = torch.fft.rfft2(patch), torch.fft.rfft2(guide)
    direction = own / own.abs().clamp(min=1e-12) + theirs / theirs.abs().clamp(min=1e-12)
    return torch.fft.irfft2(torch.polar(own.abs(), direction.angle()), s=patch.shape[-2:])


def chess(rng: torch.Generator) -> Tensor:
    """Every other value of a patch, bool [8, 8], shifted by one or not."""
    index = torch.arange(PATCH)
    shift = int(torch.randint(2, (), generator=rng, device=rng.device))
    return (index[:, None] + index[None] + shift) % 2 == 0


def softened(mine: Tensor) -> Tensor:
    """How much of a patch is put back [1, 1, 8, 8]: all of what waited, half of its neighbours of width one, nothing else."""
    near = torch.nn.functional.max_pool2d(mine, 3, 1, 1)
    return torch.where(mine > 0, mine, 0.5 * near)
