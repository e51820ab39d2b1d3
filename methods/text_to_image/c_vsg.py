"""c-VSG: away from the pictures of a caption that there are already, but no further than real ones lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.scenes.captions import COLOURS, SHAPES, read, texts
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import noise_like
from stepmark.tracks.text_to_image.search import JUDGED, ROOM, candidates, taken


def vendi(features: Tensor) -> Tensor:
    """Vendi scores [G] of sets of unit vectors [G, n, d]: exp of the entropy of the eigenvalues of their cosines over n."""
    n = features.shape[1]
    share = torch.linalg.eigvalsh(features @ features.mT / n).clamp(min=1e-8)
    share = share / share.sum(1, keepdim=True)
    return (-(share * share.log()).sum(1)).exp()


def gain(features: Tensor, bank: Tensor, exemplars: Tensor, beta: float) -> Tensor:
    """VS(bank and x) - beta VS(exemplars and x) [G] for features of pictures x [G, d] and of the sets [G, n, d]."""
    among, real = (vendi(torch.cat([each, features[:, None]], 1)) for each in (bank, exemplars))
    return among - beta * real


class Features(nn.Module):
    """The body of a reader of pictures, in the place of CLIP: unit vectors [B, 64] of what latents decode to."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader = reader.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        return nn.functional.normalize(self.reader.features(pictures), dim=1)


class Guide(nn.Module):
    """The direction in which the criterion rises at x_t, as long as x_t itself in every item. Has no weights of its own.

    A network for the sake of the count: its rows stand for the pass backwards, the evaluations inside are counted as those
    of the networks that are asked.
    """

    def forward(
        self,
        x: Tensor,
        t: float,
        denoise: Denoiser,
        networks: Mapping[str, nn.Module],
        sets: tuple[Tensor, Tensor],
        beta: float,
    ) -> Tensor:
        """[G, 4, 8, 8], of the gradient of `gain` for the predicted x0, with which x_t is mixed the more the less noise is
        left. sets: the bank and the exemplars."""
        with torch.enable_grad():
            state = x.detach().requires_grad_(True)
            x0 = denoise(state.clone(), t)[0]  # counting FLOPs does not bear a leaf here
            share = denoise.schedule.sigma(t)
            pictures = networks["vae"](share * x0 + (1 - share) * state)
            value = gain(networks["features"](pictures), *sets, beta).sum()
        (gradient,) = torch.autograd.grad(value, state)
        return as_long(gradient, x)


def as_long(direction: Tensor, x: Tensor) -> Tensor:
    """A direction [G, ...] with the norm of x [G, ...] in every item."""
    length, norm = (each.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) for each in (direction, x))
    return direction / (length + 1e-8) * norm


def numbered(condition: Tensor) -> Tensor:
    """Items in the order of their numbers among those of the same caption int64 [B, 32]: int64 [captions, most], -1 where a
    caption has no more."""
    group = torch.unique(condition, dim=0, return_inverse=True)[1]
    number = (group[:, None] == group).tril(-1).sum(1)
    found = torch.full((int(group.max()) + 1, int(number.max()) + 1), -1, device=condition.device)
    found[group, number] = torch.arange(len(condition), device=condition.device)
    return found


class ContextualizedVendiScoreGuidance(Method):
    """Contextualized Vendi score guidance: every picture of a caption is led away from those that were made before it.

    The Vendi score of a set S of n pictures is exp(-sum_i l_i log l_i) with the eigenvalues l_i of K / n, K the cosines of
    their features: how many different pictures there are in it. The pictures of a caption are made one after the other, and
    the features of each go into a memory bank M. At every fifth step (algorithm 1)

        x_t <- x_t + 0.05 |x_t| g / |g|
        g = grad_{x_t} (VS(M and x0) - beta VS(E and x0)),   beta = 2

    where x0 is predicted by the conditional network from x_t and decoded, and E are four real pictures of what the caption
    says: diversity is wanted beyond what was made, and none beyond what is real (the context). The step then goes on with
    the noise that was predicted before. The first picture of a caption is not guided. All constants are the authors', of
    whose scales, 0.04 to 0.07, one in the middle is taken; so is their code's mixing of x0 with x_t, sigma_t x0 +
    (1 - sigma_t) x_t, before it is decoded.

    Features are those of the reward network, read before its last layer. A step takes two evaluations, a guided one four
    more: the conditional network again, the decoder, the reader and the way back through them. Each picture takes two to be
    decoded and read for the bank. 64 evaluations pay for 21 steps, of which five are guided, 32 for ten, of which two are.
    With 16 only the first step could be, from which nothing can be foreseen.

    Controls: `c_vsg_without_context` has beta = 0 (the authors' VSG); `c_vsg_at_random` pushes as far at the same steps in a
    random direction; `c_vsg_picked` draws as many pictures as `best_of_n` and keeps the one with the greatest gain of the
    criterion; and weaker guidance by the caption, which makes pictures differ too, is `ddim_unguided`.

    Differs from the paper: the pictures of a caption take the place of those of an object in a region; a bank ends with a
    batch, of which a dozen pictures are of one caption, where the authors have 180. Decoded pictures go to the reader as they
    are, where theirs are stretched to the range of CLIP.

    What limits it here: the reader tells apart what lies where, and that is what the criterion spreads.
    """

    paper = Paper(
        id="c_vsg",
        title="Improving Geo-diversity of Generated Images with Contextualized Vendi Score Guidance",
        authors="Askari Hemmat, Hall, Sun, Ross, Drozdzal, Romero-Soriano",
        year=2024,
        arxiv="2406.04551",
        code="facebookresearch/Contextualized-Vendi-Score-Guidance",
    )
    tasks = ("free/scenes_eps",)
    baselines = ("ddim_guided", "ddim_unguided")
    claims = (
        Claim(
            "diversity[c_vsg,32..64] > max(diversity[ddim_guided,32..64], diversity[c_vsg_at_random,32..64], "
            "diversity[c_vsg_picked,32..64]) and fd[c_vsg,32..64] <= fd[ddim_guided,32..64] and "
            "caption[c_vsg,32..64] >= 0.97 * caption[ddim_guided,32..64] and "
            "caption[c_vsg,32..64] > caption[ddim_unguided,32..64]",
            says="pictures of a caption differ more than those of the plain sampler, of random pushes or of choosing among as "
            "many for the same evaluations, and are as good and as true to it, and truer than without guidance by it",
            headline=True,
            setting="a dozen pictures in the bank, not 180; captions of one object, not regions of the world",
        ),
        Claim(
            "diversity[c_vsg,32..64] > diversity[ddim_guided,32..64] and caption[c_vsg,32..64] > caption[ddim_unguided,32..64]",
            says="it spreads them, and is truer to the caption than without guidance by it, which spreads them too",
        ),
        Claim(
            "fd[c_vsg,32..64] < fd[c_vsg_without_context,32..64] and "
            "diversity[c_vsg,32..64] > diversity[ddim_guided,32..64]",
            says="the context keeps among real pictures what the bank drives apart",
        ),
    )

    push = "gradient"  # "gradient" | "random"; "none": of several unguided pictures the criterion picks one
    scale, beta, every, real = 0.05, 2.0, 5, 4
    variants = (
        Variant(
            "c_vsg_without_context", says="VSG: away from what was made, with no regard to real pictures", beta=0.0
        ),
        Variant("c_vsg_at_random", says="control: pushes as long in random directions", push="random"),
        Variant("c_vsg_picked", says="control: the best of n pictures by the same criterion", push="none"),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"features": Features(session.clone("reward")), "guide": Guide()}

    @torch.no_grad()
    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Features [shapes, colours, 4, 64] of real pictures of one object."""
        objects = session.train["objects"]
        alone = objects[:, 1, 0] < 0
        found = []
        for shape in range(len(SHAPES)):
            for colour in range(len(COLOURS)):
                fit = alone & (objects[:, 0, 0] == shape) & (objects[:, 0, 1] == colour)
                found.append(session.train["x0"][fit.nonzero()[: self.real, 0]])
        pictures = torch.cat(found).to(session.device, session.dtype)
        features = torch.cat([session.networks["features"](part) for part in pictures.split(96)])
        return {"exemplars": features.view(len(SHAPES), len(COLOURS), self.real, -1)}

    def steps(self, rung: int) -> tuple[int, int]:
        """How many pictures are tried for one that is kept, and in how many steps each."""
        if self.push == "none":
            tries = rung // ROOM
            return tries, (rung // tries - JUDGED) // 2
        price = 4 if self.push == "gradient" else 0
        return 1, max(n for n in range(1, rung // 2) if 2 * n + price * -(-n // self.every) + JUDGED <= rung)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2 * ROOM:
            skip("a guided step takes six evaluations, and the first of them foresees nothing")
        noise, condition, networks = batch["noise"], batch["condition"], session.networks
        states = networks["teacher"].words(condition)
        said = [read(text).objects[0] for text in texts(condition)]
        exemplars = session.state["exemplars"][[each.shape for each in said], [each.colour for each in said]]
        memory, made = exemplars.new_zeros(len(noise), exemplars.shape[-1]), torch.zeros_like(noise)
        order = numbered(condition)
        for number in range(order.shape[1]):
            rows = order[:, number][order[:, number] >= 0]
            bank = memory[order[order[:, number] >= 0, :number]]
            sets = bank, exemplars[rows]
            made[rows], memory[rows] = self.picture(session, noise[rows], states[rows], sets, rung)
        return made

    def picture(
        self, session: Session, x: Tensor, states: Tensor, sets: tuple[Tensor, Tensor], rung: int
    ) -> tuple[Tensor, Tensor]:
        """The next picture [G, 4, 8, 8] of captions whose banks and exemplars are `sets`, and its features [G, 64]."""
        networks, first = session.networks, sets[0].shape[1] == 0
        tries, steps = self.steps(rung)
        tries = 1 if first else tries
        x = candidates(x, tries, session.rng)
        denoise = Denoiser(networks["teacher"], states.repeat(tries, 1, 1), GUIDANCE)
        plain = Denoiser(networks["teacher"], states)
        for step, (t, s) in enumerate(pairwise(uniform_times(steps))):
            eps = denoise(x, t)[1]
            if step % self.every == 0 and not first and self.push != "none":
                if self.push == "gradient":
                    push = networks["guide"](x, t, plain, networks, sets, self.beta)
                else:
                    push = as_long(noise_like(x, session.rng), x)
                x = x + self.scale * push
            schedule = denoise.schedule
            x = ddim_step(schedule, (x - schedule.sigma(t) * eps) / schedule.alpha(t), eps, s)
        features = networks["features"](networks["vae"](x))
        if tries > 1:
            bank, exemplars = (each.repeat(tries, 1, 1) for each in sets)
            value = gain(features, bank, exemplars, self.beta).view(tries, -1)
            best = value.argmax(0, keepdim=True)
            x, features = taken(x, best), taken(features, best)
        return x, features
