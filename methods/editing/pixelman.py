"""PixelMan: the object is copied in the picture, and a few steps without inversion make the copy fit and fill the hole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, interpolate

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.attention import Control, Layer, controlled
from stepmark.tracks.editing.inversion import inverted, leap
from stepmark.tracks.editing.pairs import plastered
from stepmark.tracks.image.schedules import leading_times, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image.inside import outputs
from stepmark.tracks.text_to_image.sampling import noise_like

FINE = 16  # side of the maps that features are compared in: twice that of the latents
# Of the energies: the object, the rest, what is no more in the hole, what is to be there.
WEIGHTS = (4.0, 6.0, 0.2, 0.8)
STRENGTH = 40 / 64  # of the gradient. The authors' is 40, of means over 64 times as many latents
SIMILAR = 0.1  # of attention scaled to 0 .. 1: from there on a pixel is like the object
SEALED = -1e4  # added to a score that is to get no attention: a row that may look at nothing looks at all


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """x [B, c, h, w] moved by whole shifts int64 [B, 2], rows and columns; zero where nothing came from."""
    h, w = x.shape[-2:]
    row = torch.arange(h, device=x.device) - shift[:, :1]
    column = torch.arange(w, device=x.device) - shift[:, 1:]
    each = torch.arange(len(x), device=x.device)[:, None, None]
    found = x[each, :, row.clamp(0, h - 1)[:, :, None], column.clamp(0, w - 1)[:, None]].permute(0, 3, 1, 2)
    there = ((row >= 0) & (row < h))[:, :, None] & ((column >= 0) & (column < w))[:, None]
    return found * there[:, None]


def covered(mask: Tensor, side: int) -> Tensor:
    """Which of side x side cells a mask bool [B, h, w] touches, bool [B, side, side]."""
    return adaptive_avg_pool2d(mask[:, None].float(), side)[:, 0] > 0


def guided_steps(steps: int) -> list[int]:
    """How often the latents are pulled in each of so many steps: in the first fifth, then in every second step up to three
    fifths of them, and three times in those behind two fifths."""
    found = []
    for i in range(steps):
        often = 3 if int(0.4 * steps) < i < int(0.6 * steps) and i % 2 == 0 else 1
        found.append(often if i < int(0.6 * steps) and (i % 2 == 0 or i < int(0.2 * steps)) else 0)
    return found


def price(steps: int, guided: bool) -> int:
    """Evaluations that so many steps take: three branches, and for every pull an evaluation and the way back through it. What is
    copied has to be encoded before, which is one more."""
    return 3 * steps + 2 * sum(guided_steps(steps)) * guided


@dataclass(frozen=True)
class Move:
    """Where an object was and will be: masks bool [B, 32, 32], and the shift between them in whole pixels int64 [B, 2]."""

    old: Tensor
    new: Tensor
    shift: Tensor


class Branches(Control):
    """Attention of a target to the picture itself: in the half of the UNet behind the middle with the keys and values of the
    source, and everywhere so that nothing of the object leaks into the hole (leak-proof self-attention).

    Rows are those of `roles`, one group each. Keys and values are kept where a source is among them and handed to a target,
    in the same call or in a later one.

    In a row of the hole the scores of all pixels that the object goes to, or that are like it, are sealed. What is like it
    is found in the target's maps of the step before, averaged over heads, layers of most pixels and the rows of the new place;
    at first it is the old place.
    """

    def __init__(self, move: Move, leakproof: bool, side: int) -> None:
        self.leakproof, self.side = leakproof, side
        self.roles: tuple[str, ...] = ()
        self.old, self.new = (covered(mask, side) for mask in (move.old, move.new))
        self.hole, self.similar = self.old & ~self.new, self.old
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.seen: list[Tensor] = []

    def inputs(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layer.cross or not layer.up:
            return query, key, value
        keys, values = (list(each.chunk(len(self.roles))) for each in (key, value))
        for i, role in enumerate(self.roles):
            if role == "source":
                self.kept[layer.name] = keys[i], values[i]
        for i, role in enumerate(self.roles):
            if role == "target":
                keys[i], values[i] = self.kept[layer.name]
        return query, torch.cat(keys), torch.cat(values)

    def scores(self, layer: Layer, scores: Tensor) -> Tensor:
        if layer.cross or not self.leakproof or "target" not in self.roles:
            return scores
        side = round(scores.shape[2] ** 0.5)
        hole, new, similar = (covered(mask, side).flatten(1) for mask in (self.hole, self.new, self.similar))
        sealed = (hole & ~new)[:, None, :, None] & (new | similar)[:, None, None]
        groups = list(scores.chunk(len(self.roles)))
        at = self.roles.index("target")
        groups[at] = groups[at] + SEALED * sealed
        return torch.cat(groups)

    def maps(self, layer: Layer, maps: Tensor) -> Tensor:
        if not layer.cross and layer.up and "target" in self.roles and maps.shape[2] == self.side**2:
            self.seen.append(maps.chunk(len(self.roles))[self.roles.index("target")].mean(1))
        return maps

    def look(self) -> None:
        """Find anew what is like the object, in the maps of the step that is over."""
        maps, new = torch.stack(self.seen).mean(0), self.new.flatten(1)
        mean = (maps * new[..., None]).sum(1) / new.sum(1, keepdim=True).clamp(min=1)
        low, high = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
        self.similar = ((mean - low) / (high - low).clamp(min=1e-8) >= SIMILAR).view_as(self.new)
        self.seen.clear()


def asked(network: Any, *given: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a network says, and the outputs [B, 64, 16, 16] of both blocks behind the middle, made twice as large."""
    with outputs(*network.unet.up_blocks) as seen:
        found = network(*given)
    return found, [interpolate(each, size=(FINE, FINE)) for each in seen]


def energies(now: list[Tensor], reference: list[Tensor], move: Move) -> tuple[Tensor, Tensor]:
    """Energy [B] of the object and of the rest, of features [B, c, 16, 16] of the target and of what is held against it."""
    of_object, of_rest, of_past, of_fill = WEIGHTS
    old, new = (covered(mask, FINE) for mask in (move.old, move.new))
    other, hole = ~(old | new), old & ~new
    shift = (move.shift * FINE / move.old.shape[-1]).round().long()

    def mean(x: Tensor, where: Tensor) -> Tensor:
        return (x * where).sum((-2, -1)) / where.sum((-2, -1)).clamp(min=1)

    first = second = torch.zeros(len(old), device=old.device)
    for found, wanted in zip(now, reference, strict=True):
        alike = cosine_similarity(found, wanted)
        there = cosine_similarity(found, shifted(wanted, shift))
        first = first + 0.5 * of_object / (1 + 4 * mean(there, new))
        second = second + 0.5 * of_rest / (1 + 4 * mean(alike, other)) + 0.5 * of_past * mean((alike + 1) / 2, hole)
        filled, around = mean(found, hole[:, None]), mean(wanted, other[:, None])
        second = second + of_fill / (1 + 2 * (cosine_similarity(filled, around) + 1))
    return first, second


class Guide(nn.Module):
    """The direction in which the energies of latents x_t rise. Has no weights of its own.

    A network for the sake of the count: its rows stand for the pass backwards, the evaluation inside is counted as the
    teacher's.
    """

    def forward(
        self, x: Tensor, t: float, teacher: nn.Module, states: Tensor, reference: list[Tensor], move: Move
    ) -> Tensor:
        """[B, 4, 8, 8]: at the object's new place of the energy of the object, elsewhere of that of the rest."""
        time = torch.full((len(x),), schedule_of(teacher).network_time(t), dtype=x.dtype, device=x.device)
        with torch.enable_grad():
            state = x.detach().requires_grad_(True)
            seen = asked(teacher, state.clone(), time, states)[1]  # counting FLOPs does not bear a leaf here
            first, second = (energy.sum() for energy in energies(seen, reference, move))
        (of_object,) = torch.autograd.grad(first, state, retain_graph=True)
        (of_rest,) = torch.autograd.grad(second, state)
        return torch.where(covered(move.new, x.shape[-1])[:, None], of_object, of_rest)


class PixelMan(Method):
    """PixelMan: an object is moved by copying its pixels, and the copy is the anchor of a sampler that inverts nothing.

    The manipulated picture has the object twice. With z_man and z_src, its latents and the source's, z_out = z_man at first
    and the same fresh noise in all three branches, a step at time t is

        x_b = alpha z_b + sigma eps,   b of out, src, man
        x_out <- x_out - lambda grad E(x_out),   in some of the steps
        z_out = z_man + m (x0(x_out) - x0(x_man))

    so that whatever the network cannot keep of a picture is the same in both predictions and cancels. m is 1 less the object's
    new place, which stays as it was copied, and 1 everywhere in the last two steps. The prompt is empty, without guidance.

    The evaluation of x_out takes keys and values of x_src in self-attention behind the middle. Its self-attention is
    leak-proof: pixels of the hole cannot see where the object goes, nor what is like the object, which is what the attention
    of the new place was on in the step before, at 0.1 of the most or more. E compares features behind the middle with those of
    x_man by cosines: the object's at its new place with those at its old, the rest with itself, the hole with the object that was
    there, which it is to differ from, and with all around, whose mean it is to have. All constants, orders and intervals are
    the authors' code.

    A step takes three evaluations and a pull two, an evaluation and the way back. 16 steps have eight pulls: 64
    evaluations, as the authors' code counts them, and one more, as the manipulated picture is encoded. The rung pays for 2, 4,
    8, 16 and 31 steps.

    Differs from the paper: features of x_man for E are those of its branch, which the code evaluates once more, while it
    counts no way back; gradients are scaled for means over 64 latents and not 4096; regions are cells that the mask touches; the
    edge of m is as soft as cells that the mask covers in part, without a blur.

    Controls: `pixelman_pasted` returns z_man; `pixelman_plastered` has the median colour in its hole before it is encoded;
    `pixelman_inpainted` fills the hole of z_man by sampling with the empty caption, from noise, while all else is z_man noised,
    one evaluation a step; `pixelman_inverted` is what the paper replaces: source latents on the path of DDIM inversion, the
    target from their last with the object pasted, the same attention and energies, no anchor, as many evaluations a step and
    nothing to encode. `pixelman_leaking` and `pixelman_unguided` leave out leak-proof attention and E.

    What limits it here: an object covers two or three cells a side of 8x8 latents, so that a hole has a handful of rows of
    attention; backgrounds have one colour, so that there is little to make the copy fit.
    """

    paper = Paper(
        id="pixelman",
        title="PixelMan: Consistent Object Editing with Diffusion Models via Pixel Manipulation and Generation",
        authors="Jiang, Hassanpour, Salameh, Samadi, He, Sun, Niu",
        year=2024,
        arxiv="2412.14283",
        code="LiyaoJiang1998/PixelMan",
    )
    tasks = ("moving/scenes",)
    baselines = ("copy_source", "pixelman_pasted", "pixelman_plastered", "pixelman_inpainted", "pixelman_inverted")
    claims = (
        Claim(
            "psnr[pixelman,65] > max(psnr[pixelman_inverted,65], psnr[pixelman_inverted,128], psnr[copy_source,65], "
            "psnr[pixelman_pasted,65], psnr[pixelman_inpainted,65]) and inside[pixelman,65] > max(inside[pixelman_inverted,65], "
            "inside[pixelman_inverted,128], inside[pixelman_pasted,65], inside[pixelman_inpainted,65]) "
            "and kept[pixelman,65] < min(kept[pixelman_inverted,65], kept[pixelman_inverted,128])",
            says="16 steps, 65 evaluations, are nearer to the moved scene, where it changes and elsewhere, than inversion with "
            "as many evaluations or twice as many, than pasting and than plain inpainting of the hole",
            headline=True,
        ),
        Claim(
            "psnr[pixelman,65] > psnr[pixelman_plastered,65] and inside[pixelman,65] > inside[pixelman_plastered,65]",
            says="nearer to it than the copied object and the median colour in the hole",
            headline=True,
            setting="backgrounds of one colour, which the median copies",
        ),
        Claim(
            "psnr[pixelman,*] > max(psnr[pixelman_inverted,*], psnr[pixelman_inpainted,*]) "
            "and kept[pixelman,*] < kept[pixelman_inverted,*]",
            says="so it is with any number of evaluations",
        ),
        Claim(
            "inside[pixelman,*] > inside[pixelman_leaking,*] and psnr[pixelman,*] >= psnr[pixelman_leaking,*]",
            says="the hole is filled better where its pixels cannot look at the object",
        ),
        Claim(
            "inside[pixelman,*] > inside[pixelman_unguided,*] and psnr[pixelman,*] >= psnr[pixelman_unguided,*]",
            says="pulling the latents is worth more than as many evaluations in further steps",
        ),
    )

    how = "anchored"
    leakproof, guided = True, True
    variants = (
        Variant(
            "pixelman_inverted",
            says="from DDIM inversion, without an anchor",
            how="inverted",
            baselines=("copy_source",),
        ),
        Variant("pixelman_leaking", says="the hole may look at the object", leakproof=False, baselines=("pixelman",)),
        Variant("pixelman_unguided", says="nothing pulls the latents", guided=False, baselines=("pixelman",)),
        Variant(
            "pixelman_pasted",
            says="control: the copied object, and no hole filled",
            how="pasted",
            baselines=("copy_source",),
        ),
        Variant(
            "pixelman_plastered",
            says="control: the copied object, and the median colour of the picture in the hole",
            how="plastered",
            baselines=("pixelman_pasted",),
        ),
        Variant(
            "pixelman_inpainted",
            says="control: the hole is sampled, all else is as pasted",
            how="inpainted",
            baselines=("pixelman_pasted",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"guide": Guide()}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        source, mask, shift = batch["source"], batch["mask"], batch["shift"].round().long()
        new = shifted(mask[:, None].float(), shift)[:, 0] > 0
        move = Move(mask, new, shift)
        teacher, z_src = session.networks["teacher"], batch["source_latents"]
        if self.how != "inverted":
            pasted = torch.where(new[:, None], shifted(source, shift), source)
            if self.how == "plastered":
                pasted = plastered(pasted, mask & ~new)
            z_man = session.networks["vae"].encode(pasted)
            if self.how in ("pasted", "plastered"):
                return z_man
            rung -= 1
        nothing = torch.zeros(len(mask), 32, dtype=torch.int64, device=mask.device)
        states = teacher.words(teacher.null_condition(nothing))
        if self.how == "inpainted":
            return inpainted(teacher, states, z_man, mask & ~new, rung, batch["noise"], session.rng)
        steps = max((n for n in range(1, rung) if price(n, self.guided) <= rung), default=0)
        if not steps:
            skip("a step takes three evaluations and its pull two")
        times = leading_times(steps)[:-1]
        control = Branches(move, self.leakproof, z_src.shape[-1])
        schedule, guide = schedule_of(teacher), session.networks["guide"]
        pulls = guided_steps(steps) if self.guided else [0] * steps

        def ask(x: Tensor, t: float, *roles: str) -> tuple[list[Tensor], list[Tensor]]:
            """Noise of the branches in x, and the first one's features."""
            control.roles = roles
            time = torch.full((len(x),), schedule.network_time(t), dtype=x.dtype, device=x.device)
            with controlled(teacher, control):
                found, seen = asked(teacher, x, time, states.repeat(len(roles), 1, 1))
            return list(found.chunk(len(roles))), [each[: len(states)] for each in seen]

        if self.how == "inverted":
            path = inverted(Denoiser(teacher, states), z_src, [*times, 0.0])
            there = covered(new, z_src.shape[-1])[:, None]
            x = torch.where(there, shifted(path[0], (shift * z_src.shape[-1] / mask.shape[-1]).round().long()), path[0])
            for number, (t, s) in enumerate(pairwise([*times, 0.0])):
                _, reference = ask(path[number], t, "source")
                for _ in range(pulls[number]):
                    x = x - STRENGTH * guide(x, t, teacher, states, reference, move)
                (eps,), _ = ask(x, t, "target")
                control.look()
                x = leap(schedule, x, eps, t, s)
            return x

        z_out, rest = z_man, 1 - adaptive_avg_pool2d(new[:, None].float(), z_man.shape[-1])
        for number, t in enumerate(times):
            eps = noise_like(z_man, session.rng)
            x, x_src, x_man = (schedule.alpha(t) * z + schedule.sigma(t) * eps for z in (z_out, z_src, z_man))
            (eps_man, _), reference = ask(torch.cat([x_man, x_src]), t, "manipulated", "source")
            for _ in range(pulls[number]):
                x = x - STRENGTH * guide(x, t, teacher, states, reference, move)
            (eps_out,), _ = ask(x, t, "target")
            control.look()
            change = leap(schedule, x, eps_out, t, 0.0) - leap(schedule, x_man, eps_man, t, 0.0)
            z_out = z_man + (rest if number < steps - 2 else 1) * change
        return z_out


def inpainted(
    teacher: nn.Module, states: Tensor, z: Tensor, hole: Tensor, steps: int, noise: Tensor, rng: torch.Generator
) -> Tensor:
    """Latents whose hole is sampled by DDIM from noise, all else being z [B, 4, 8, 8] as noised as the time says."""
    denoise, where = Denoiser(teacher, states), covered(hole, z.shape[-1])[:, None]
    schedule, x = denoise.schedule, noise
    for t, s in pairwise(uniform_times(steps)):
        x = torch.where(where, x, schedule.alpha(t) * z + schedule.sigma(t) * noise_like(z, rng))
        x = leap(schedule, x, denoise.output(x, t), t, s)
    return torch.where(where, x, z)
