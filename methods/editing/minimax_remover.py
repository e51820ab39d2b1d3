"""MiniMax-Remover: a remover of objects from clips that is trained on the noise that leads it astray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.pairs import Pairs, blanked, denoised, encoded, on_grid
from stepmark.tracks.editing.transformer import TokenTransformer
from stepmark.tracks.image.schedules import Schedule, add_noise
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image.sampling import noise_like, noised

KEEP, REMOVE = 0, 1  # the two learnt tokens: the object shows again in the hole, or it does not
FLOW = Schedule("flow")


def remover() -> TokenTransformer:
    """A transformer over the tokens of all frames: noise, latents of the clip with its hole, and the mask on channels."""
    return TokenTransformer(channels=9, depth=4, tokens=2)


def asked(network: nn.Module, x: Tensor, t: Tensor, told: Tensor, token: int | None = None) -> Tensor:
    """The velocity of clips x [B, F, 4, 8, 8] at times t [B], shown told [B, F, 5, 8, 8]. One evaluation a row."""
    frames = torch.arange(x.shape[1], device=x.device)
    places = torch.stack([frames, torch.zeros_like(frames), torch.zeros_like(frames)], 1)
    which = None if token is None else torch.full((len(x),), token, device=x.device)
    return network(torch.cat([x, told], 2), t[:, None].expand(-1, x.shape[1]), places, which)


def shown(latents: Tensor, mask: Tensor) -> Tensor:
    """Latents of clips with their holes, and masks bool [B, F, 32, 32], as channels [B, F, 5, 8, 8]."""
    return torch.cat([latents, on_grid(mask).to(latents)], 2)


def propagated(source: Tensor, mask: Tensor) -> Tensor:
    """Clips [B, F, 3, h, w] whose holes [B, F, h, w] hold the mean of what the same pixel shows in frames where it is free, or of
    all pixels that are free where there is none."""
    free = (~mask).unsqueeze(2).to(source.dtype)
    everywhere = (source * free).mean((1, 3, 4), keepdim=True) / free.mean((1, 3, 4), keepdim=True)
    count = free.sum(1, keepdim=True)
    through = (source * free).sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(mask.unsqueeze(2), torch.where(count > 0, through, everywhere), source)


def unit(x: Tensor) -> Tensor:
    """x [B, ...], every item over its root mean square."""
    return x / x.flatten(1).square().mean(1).sqrt().clamp(min=1e-12).view(-1, *[1] * (x.dim() - 1))


def bad_noise(loss: Any, eps: Tensor, fresh: Tensor, step: float, share: float) -> Tensor:
    """A noise of unit variance that makes a loss larger: a step along the normed gradient of loss(eps), then a share (of the
    variance) of fresh noise instead.

        e = unit(eps + step unit(grad)),   sqrt(1 - share) e + sqrt(share) fresh
    """
    with torch.enable_grad():
        point = eps.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(point), point)
    return (1 - share) ** 0.5 * unit(eps + step * unit(gradient)) + share**0.5 * fresh


class Clips:
    """Clips of the train split for `prepare`: latents of what is shown, with and without the object."""

    def __init__(self, session: Session, n: int) -> None:
        data = session.train
        self.rows = torch.arange(min(n, len(data["mask"])))
        pairs = Pairs(session, ("x0", "without"), self.rows)
        self.draw, rows = pairs.draw, pairs.rows
        mask = data["mask"][rows].to(session.device)
        hole = encoded(session, blanked(data["x0"][rows].to(session.device), mask))
        self.told, self.mask = shown(hole, mask), mask
        self.whole, self.without = pairs.latents["x0"], pairs.latents["without"]


# --- the two stages --------------------------------------------------------------------------------------------------


def first(session: Session, n: int, updates: int, size: int, rate: float) -> dict[str, Tensor]:
    """Stage 1: flow matching to the clip without the object under one token, and to the clip with it under the other."""
    network, clips = remover().to(session.device, session.dtype), Clips(session, n)

    def loss() -> Tensor:
        rows = clips.draw(size)
        total = torch.zeros((), device=session.device)
        for token, part in zip((REMOVE, KEEP), rows.chunk(2), strict=True):
            x0 = clips.without[part] if token == REMOVE else clips.whole[part]
            x, t, eps = noised(session, FLOW, x0)
            total = total + (asked(network, x, t, clips.told[part], token) - (eps - x0)).square().mean() / 2
        return total

    fit(session, network, loss, updates, rate, ema=0.995, clip=1.0)
    return network.state_dict()


@torch.no_grad()
def guided(network: nn.Module, x: Tensor, told: Tensor, steps: int, guidance: float) -> Tensor:
    """Clips out of noise x in so many steps of Euler's, guided away from the object: v_keep + w (v_remove - v_keep). Two
    evaluations a step."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with_it, without = (asked(network, x, t, told, token) for token in (KEEP, REMOVE))
        return torch.lerp(with_it, without, guidance)

    return denoised(velocity, FLOW, x, steps)


def successes(
    session: Session, stage: tuple[int, int, int, float], n: int, steps: int, guidance: float, share: float
) -> dict[str, Tensor]:
    """What stage 1 makes of n training clips, of which a share is kept, where the hole is closest to the truth, in the place of
    those that people called successful: "x0" and what is shown, "told", of each, and the clip with the object, "whole"."""
    network, clips = remover().to(session.device, session.dtype), Clips(session, n)
    network.load_state_dict(session.once(first, *stage))
    network.eval()
    found = []
    for told in session.progress(clips.told.split(20), "removals"):
        noise = noise_like(told[:, :, :4], session.rng)
        found.append(guided(network, noise, told, steps, guidance))
    x0, inside = torch.cat(found), clips.told[:, :, 4:]
    error = ((x0 - clips.without).square() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    best = error.argsort()[: max(int(share * len(x0)), 1)]
    return {"x0": x0[best], "told": clips.told[best], "whole": clips.whole[best]}


class MiniMaxRemover(Method):
    """MiniMax-Remover: six steps without guidance, by training on its own successes and on the noise that it fails with.

    A flow transformer sees all frames of a clip at once: noise, the latents of the clip with its hole, and the mask on channels.
    There is no text and no cross-attention. In stage 1 one more token stands in self-attention, of two that are learnt: under one
    the target is the clip without the object, under the other the clip with it, so that guidance needs no text,

        v = v_keep + w (v_remove - v_keep),   w = 2,   two evaluations a step.

    Stage 2 has neither token nor guidance. It learns from removals that stage 1 made, of which the better ones are kept, on the
    worst noise near a random one (minimax),

        min over the network, max over eps of |v(x_t, t) - (eps - x0)|^2,   x_t = (1 - t) x0 + t eps

    The inner maximum is one step along the normed gradient in eps, brought back to unit variance, and mixed with fresh noise of
    half the variance; the outer minimum is an update on that noise.

    `minimax_random` is stage 2 on random noise, `minimax_object` on noise moved down the loss of the clip with the object, which
    is what a failure shows. `minimax_stage1` is stage 1 with guidance, `minimax_plain` without. `minimax_propagated` is no
    network: a hole takes the mean of what its pixel shows in the frames where it is free. Eight frames are encoded for it, which
    are eight evaluations.

    Differs from the paper: no model of videos is at hand, so that stage 1 is trained from nothing, 400 updates of 16 clips; the
    truth of a training clip judges in the place of people, and the better half of 200 removals is kept (10 000 in the paper);
    stage 2 has 120 updates. Only inference was released: which loss the bad noise climbs, by how much, and how much fresh noise
    is mixed in are choices made here. Steps are Euler's, the authors' UniPC.

    What limits it here: a clip has eight frames and a background that stands still, which propagation copies exactly.
    """

    paper = Paper(
        id="minimax_remover",
        title="MiniMax-Remover: Taming Bad Noise Helps Video Object Removal",
        authors="Zi, Peng, Qi, Wang, Zhao, Xiao, Wong",
        year=2025,
        arxiv="2505.24873",
        code="zibojia/MiniMax-Remover",
    )
    tasks = ("clips/scenes",)
    baselines = (
        "minimax_random",
        "minimax_object",
        "minimax_stage1",
        "minimax_plain",
        "minimax_propagated",
        "copy_source",
    )
    trainings = 3
    claims = (
        Claim(
            "inside[minimax_remover,6] >= inside[minimax_stage1,100] "
            "and kept[minimax_remover,6] <= 1.1 * kept[minimax_stage1,100] "
            "and inside[minimax_remover,6] > inside[copy_source,6]",
            says="six steps without guidance are as good as fifty guided ones of stage 1",
            headline=True,
            setting="a network trained from nothing in 400 updates, and 120 of the second stage",
        ),
        Claim(
            "inside[minimax_remover,6..12] > max(inside[minimax_random,6..12], inside[minimax_plain,6..12]) "
            "and worst[minimax_remover,6..12] > max(worst[minimax_random,6..12], worst[minimax_plain,6..12])",
            says="bad noise makes removals better than random noise does, also in their worst frame",
            headline=True,
            setting="a network trained from nothing in 400 updates, and 120 of the second stage",
        ),
        Claim(
            "inside[minimax_remover,12..50] > inside[minimax_propagated,12..50]",
            says="better than what propagation from other frames fills in",
            headline=True,
            setting="a background that stands still, which propagation copies exactly",
        ),
    )

    stage = "bad"  # "bad" | "random" | "object": the noise of stage 2; "guided" | "plain": stage 1; "propagated"
    clips, first_updates, batch, first_rate = 500, 400, 16, 1.5e-3
    removals, sampled_steps, share = 200, 12, 0.5
    updates, rate = 120, 5e-4
    guidance, step, fresh = 2.0, 1.0, 0.5
    variants = (
        Variant("minimax_random", says="Stage 2 on random noise", stage="random", baselines=("copy_source",)),
        Variant(
            "minimax_object",
            says="Stage 2 on noise that leads to the clip with its object",
            stage="object",
            baselines=("minimax_random",),
        ),
        Variant("minimax_stage1", says="Stage 1, guided", stage="guided", baselines=("copy_source",)),
        Variant("minimax_plain", says="Stage 1 without guidance", stage="plain", baselines=("copy_source",)),
        Variant(
            "minimax_propagated",
            says="No network: holes filled from the frames in which they are free",
            stage="propagated",
            baselines=("copy_source",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {} if self.stage == "propagated" else {"remover": remover().to(session.device, session.dtype)}

    def prepare(self, session: Session) -> None:
        if self.stage == "propagated":
            return
        network = session.networks["remover"]
        stage = (*session.scale((self.clips, self.first_updates, self.batch), (4, 1, 4)), self.first_rate)
        if self.stage in ("guided", "plain"):
            network.load_state_dict(session.once(first, *stage))
            return
        n, steps, updates, size = session.scale(
            (self.removals, self.sampled_steps, self.updates, self.batch), (4, 1, 1, 2)
        )
        have = session.once(successes, stage, n, steps, self.guidance, self.share)  # before the network is changed
        network.load_state_dict(session.once(first, *stage))
        network.tokens.requires_grad_(False)

        def loss() -> Tensor:
            rows = torch.randint(len(have["x0"]), (size,), generator=session.rng, device=session.device)
            x0, told, whole = (have[name][rows] for name in ("x0", "told", "whole"))
            _, t, eps = noised(session, FLOW, x0)
            if self.stage != "random":
                eps = self.astray(session, network, x0, whole, told, t, eps)
            return matching(network, x0, told, t, eps).mean()

        fit(session, network, loss, updates, self.rate, clip=1.0)

    def astray(
        self, session: Session, network: nn.Module, x0: Tensor, whole: Tensor, told: Tensor, t: Tensor, eps: Tensor
    ) -> Tensor:
        """Bad noise for clips x0 near eps: up the loss of x0, or down the loss of the clips with the object."""

        def worse(eps: Tensor) -> Tensor:
            if self.stage == "object":
                return -matching(network, whole, told, t, eps).sum()
            return matching(network, x0, told, t, eps).sum()

        return bad_noise(worse, eps, noise_like(eps, session.rng), self.step, self.fresh)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        source, mask, noise = batch["source"], batch["mask"], batch["noise"]
        if self.stage == "propagated":
            if rung < mask.shape[1]:
                skip("every frame of a clip is encoded")
            return encoded(session, propagated(source, mask))
        network, told = session.networks["remover"], shown(batch["blanked_latents"], mask)
        if self.stage == "guided" and rung > 1:
            return guided(network, noise, told, rung // 2, self.guidance)
        token = REMOVE if self.stage in ("guided", "plain") else None
        return denoised(lambda x, t: asked(network, x, t, told, token), FLOW, noise, rung)


def matching(network: nn.Module, x0: Tensor, told: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The loss of flow matching of every clip, [B]."""
    found = asked(network, add_noise(FLOW, x0, eps, t), t, told)
    return (found - (eps - x0)).square().flatten(1).mean(1)
