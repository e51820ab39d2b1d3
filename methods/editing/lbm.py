"""LBM: a bridge from the latents of one picture to those of another, crossed in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.editing.pairs import Editor, Pairs, denoised, encoded, on_grid, plastered
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image.sampling import noise_like, noised

Velocity = Callable[[Tensor, Tensor], Tensor]
ADD, REMOVE = 4, 5  # kinds of edit in the train split


def bridged(start: Tensor, end: Tensor, t: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Points of Brownian bridges [B, ...] at times t [B]: t start + (1 - t) end + sigma sqrt(t (1 - t)) noise. At t = 1 it is the
    start, at 0 the end."""
    t = t.view(-1, *[1] * (start.dim() - 1))
    return t * start + (1 - t) * end + sigma * (t * (1 - t)).sqrt() * noise


def crossed(velocity: Velocity, start: Tensor, steps: int, sigma: float, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """The other end of a bridge from its start [B, ...] in so many even steps: x + (s - t) velocity(x, t), and between steps the
    noise that the bridge has there. velocity(x, t [B]) is start - end."""
    x = start
    for t, s in pairwise(uniform_times(steps)):
        x = x + (s - t) * velocity(x, torch.full_like(x.flatten(1)[:, 0], t))
        if s > 0 and sigma > 0:
            x = x + sigma * (s * (1 - s)) ** 0.5 * noise(x)
    return x


class LBM(Method):
    """Latent bridge matching: a picture becomes another one directly, not out of noise, in one step.

    Between the latents z_1 of a picture with an object and those z_0 of the same picture without it lies a Brownian bridge, on
    which a network learns the drift (section 3, as the authors' code has it, with t = 1 at the source),

        z_t = t z_1 + (1 - t) z_0 + sigma sqrt(t (1 - t)) eps,   sigma = 0.005
        loss = |v(z_t, t) - (z_1 - z_0)|^2 + 10 |D(z_t - t v) - x_0|^2

    at the four times 1/4, 1/2, 3/4 and 1, as often each; D decodes, cut off at -1 and 1, so that the step to the end is judged by
    the picture too. The network is the teacher, with the mask of the object as one channel more (the conditional form, section
    3.3) and the empty caption. A step from t to s goes from z_t to z_t + (s - t) v; between steps the noise of the bridge at s is
    added. As many steps as the rung allows are made, four at most.

    The rivals have the same network, data and updates. `lbm_diffusion` predicts the noise of what it makes out of noise, and is
    shown the source beside it: DDIM, any number of steps. `lbm_flow` starts in noise too, but is otherwise the same as LBM, its
    four times and its two losses: flow matching. `lbm_regression` is LBM at t = 1 alone, a network that is asked once for the
    answer. `lbm_straight` has sigma = 0. `lbm_plastered` is no network: the hole gets the median colour of all else.

    Differs from the paper: the second term is the squared error of pixels, which the authors' code has too, and not LPIPS, for
    no network here has learnt to see as people do; that the source is the picture with its object, and the mask a channel, is a
    reading. 400 updates of 16 pairs: 1000 of an object that is taken away, and 1000 of one that is added, backwards.

    What limits it here: the hole that an object leaves is filled with one colour, or with another object that shows on: there is
    little to be invented, and a regression is no bad answer.
    """

    paper = Paper(
        id="lbm",
        title="LBM: Latent Bridge Matching for Fast Image-to-Image Translation",
        authors="Chadebec, Tasar, Sreetharan, Aubin",
        year=2025,
        arxiv="2503.07535",
        code="gojasper/LBM",
    )
    tasks = ("removing/scenes",)
    baselines = ("lbm_diffusion", "lbm_flow", "lbm_regression", "lbm_straight", "lbm_plastered", "copy_source")
    trainings = 3
    claims = (
        Claim(
            "inside[lbm,1] >= inside[lbm_diffusion,64] and edit[lbm,1] >= edit[lbm_diffusion,64] "
            "and kept[lbm,1] <= kept[lbm_diffusion,64]",
            says="one step is as good as sixty-four of a conditional diffusion from noise",
            headline=True,
            setting="400 updates on 2000 pairs",
        ),
        Claim(
            "inside[lbm,1] > max(inside[lbm_flow,1], inside[lbm_regression,1], inside[copy_source,1]) "
            "and edit[lbm,1] > max(edit[lbm_flow,1], edit[lbm_regression,1])",
            says="one step is better than one of flow matching from noise, and than plain regression",
            headline=True,
            setting="holes with one likely filling, for which a regression is no bad answer",
        ),
        Claim(
            "inside[lbm,1] > inside[lbm_plastered,1] and edit[lbm,1] > edit[lbm_plastered,1]",
            says="one step is better than the median colour in the hole",
            headline=True,
            setting="backgrounds of one colour, which the median copies",
        ),
        Claim(
            "inside[lbm,2..4] >= inside[lbm,1] - 0.1 and edit[lbm,1..4] >= edit[lbm_straight,1..4] - 0.01",
            says="two and four steps take nothing away, nor does the noise of the bridge",
        ),
    )

    start = "source"  # "source" | "noise": where a picture begins; "plastered": no network
    loss = "bridge"  # "bridge" | "noise": what is predicted
    times, sigma = (0.25, 0.5, 0.75, 1.0), 0.005
    pixels = 10.0  # weight of the error of the decoded picture
    updates, batch, rate = 400, 16, 5e-4
    variants = (
        Variant(
            "lbm_diffusion",
            says="A picture out of noise, by noise prediction, shown the source; DDIM",
            start="noise",
            loss="noise",
            baselines=("copy_source",),
        ),
        Variant("lbm_flow", says="The same flow, out of noise", start="noise", sigma=0.0, baselines=("copy_source",)),
        Variant("lbm_regression", says="Asked once for the answer", times=(1.0,), baselines=("copy_source",)),
        Variant("lbm_straight", says="Without the noise of the bridge", sigma=0.0, baselines=("copy_source",)),
        Variant(
            "lbm_plastered",
            says="No network: the median colour of the picture in the hole",
            start="plastered",
            baselines=("copy_source",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        if self.start == "plastered":
            return {}
        return {"bridge": Editor(session.clone("teacher"), 1 if self.start == "source" else 5)}

    def prepare(self, session: Session) -> None:
        if self.start == "plastered":
            return
        network, data, vae = session.networks["bridge"], session.train, session.networks["vae"]
        kind = data["kind"]
        pairs = Pairs(session, ("source", "x0"), ((kind == REMOVE) | (kind == ADD)).nonzero()[:, 0])
        forth = (kind[pairs.rows] == REMOVE).view(-1, 1, 1, 1)
        after = torch.where(forth, data["x0"][pairs.rows], data["source"][pairs.rows]).to(session.device, session.dtype)
        mask = on_grid(data["mask"][pairs.rows]).to(session.device, session.dtype)
        forth, source, target = forth.to(session.device), pairs.latents["source"], pairs.latents["x0"]
        source, target = torch.where(forth, source, target), torch.where(forth, target, source)
        times, size = torch.tensor(self.times, device=session.device), session.scale(self.batch, 4)

        def loss() -> Tensor:
            rows = pairs.draw(size)
            told, end = self.told(source[rows], mask[rows]), target[rows]
            if self.loss == "noise":
                schedule = schedule_of(network)
                x, t, eps = noised(session, schedule, end)
                return (network(x, schedule.network_time(t), told) - eps).square().mean()
            start = source[rows] if self.start == "source" else noise_like(end, session.rng)
            t = times[torch.randint(len(times), (size,), generator=session.rng, device=session.device)]
            x = bridged(start, end, t, self.sigma, noise_like(end, session.rng))
            v = self.velocity(network, told)(x, t)
            picture = vae(x - t.view(-1, 1, 1, 1) * v).clamp(-1, 1)
            return (v - (start - end)).square().mean() + self.pixels * (picture - after[rows]).square().mean()

        fit(session, network, loss, session.scale(self.updates, 1), self.rate, clip=1.0)

    def told(self, source: Tensor, mask: Tensor) -> Tensor:
        """What the network is shown beside x: the mask, and the source where x does not begin with it."""
        return mask if self.start == "source" else torch.cat([mask, source], 1)

    def velocity(self, network: nn.Module, told: Tensor) -> Velocity:
        """The network, asked at times t [B] in (0, 1]: timesteps 249, 499, 749 and 999 of the teacher."""
        schedule = schedule_of(network)
        return lambda x, t: network(x, schedule.network_time(t), told)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if self.start == "plastered":
            return encoded(session, plastered(batch["source"], batch["mask"]))
        network, source = session.networks["bridge"], batch["source_latents"]
        told = self.told(source, on_grid(batch["mask"]).to(source.dtype))
        if self.loss == "noise":
            return denoised(lambda x, t: network(x, t, told), schedule_of(network), batch["noise"], rung)
        start = source if self.start == "source" else batch["noise"]
        steps = min(rung, len(self.times))
        return crossed(self.velocity(network, told), start, steps, self.sigma, lambda x: noise_like(x, session.rng))
