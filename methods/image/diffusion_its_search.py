"""Search at inference: more than one image is drawn, and a verifier says which is kept, or goes on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, euler_step
from stepmark.tracks.image.training import fit


class Verifier(nn.Module):
    """A small classifier of images [B, channels, size, size] into `kinds` classes."""

    def __init__(self, channels: int, size: int, kinds: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, kinds),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, kinds]."""
        return self.body(x)


def new_verifier(session: Session) -> Verifier:
    """Untrained, for the images and classes of the train split."""
    shape = session.train["x0"].shape
    return Verifier(shape[1], shape[2], 1 + int(session.train["condition"].max()))


def approval(verifier: nn.Module, images: Tensor, wish: Tensor) -> Tensor:
    """log p(wish | image) [B] of a verifier: one evaluation of it for every image."""
    return verifier(images).log_softmax(1).gather(1, wish[:, None])[:, 0]


def euler_sample(denoise: Denoiser, x: Tensor, steps: int) -> Tensor:
    """Images [B, ...] from noise in equal Euler steps, one evaluation each."""
    for t, s in pairwise(uniform_times(steps)):
        x = euler_step(x, denoise.output(x, t), t, s)
    return x


def noise_again(schedule: Schedule, x: Tensor, noise: Tensor, t: float, s: float) -> Tensor:
    """From x [B, ...] at time t forward to the noisier time s: the marginal of x_s, given that x is one of x_t."""
    ratio = schedule.alpha(s) / schedule.alpha(t)
    return ratio * x + (schedule.sigma(s) ** 2 - (ratio * schedule.sigma(t)) ** 2) ** 0.5 * noise


class InferenceTimeSearch(Method):
    """Inference-time scaling by search: evaluations beyond a few steps are spent on noises, and a verifier chooses.

    More steps refine the sample that a noise leads to; they cannot change which one it is. So evaluations beyond a few
    steps are better spent on noises. There are three searches (section 3.1). Random search draws several and keeps what a
    verifier likes best:

        n_1, ..., n_N ~ N(0, I),   x_i = ODE solver from n_i,   return the x_i with the highest V(x_i, wish)

    It uses nothing of what it has seen, and with a verifier that can be fooled it finds what fools it. Zero-order search
    (`diffusion_its_search_zero_order`) stays near: from the pivot n, the noise that was given,

        n_i = (n + lambda z_i) / sqrt(1 + lambda^2),   z_i ~ N(0, I),   i = 1..N
        x_i = ODE solver from n_i;   the n_i with the highest V(x_i, wish) is the next pivot

    so long as it is better than the pivot itself. Noises keep unit variance. In both, every image takes 8 Euler steps and
    one evaluation of V, so that a ninth of the rung are noises; a rung that leaves no choice goes into steps. Search over
    paths (`diffusion_its_search_paths`) branches while it samples. N noises are brought to an intermediate time. Then,
    round after round,

        each path at t gets M copies with new noise, forward from t to t + df
        each copy takes a step of the ODE back to t + df - db < t, and V judges the x0 that was predicted for it
        the N copies with the highest V(x0, wish) go on

    until the time is 0, where the best of the N is returned. Time goes down by eighths; df is a sixteenth. A round costs
    two evaluations for each of N M copies, the network's and the verifier's; at the last the prediction is the image.
    N is 2 and M what the rung allows; where it does not pay for two paths there is one, and below 15 evaluations none.

    The verifier V is a supervised one, a small classifier trained here on the train split, log p(wish | x). Two judges
    that count are others: a classifier that no search sees, and the Frechet distance of all images, which rises where a
    search finds what pleases V and nothing else (verifier hacking). `best_of_random` is the control of the whole idea: as
    many noises, and one of them taken by lot.

    Differs from the paper: verifier and judge are small classifiers instead of Inception, CLIP or DINO heads; there is
    one verifier, and nothing is drawn from text. The model is conditional, as there, but made to heed its class in part,
    because a small one of ten digits is otherwise right always (see the task). In zero-order search a round has two
    neighbours at lambda 0.7, a cosine of 0.82 with the pivot, for want of evaluations; an implementation by the first
    author has four at 0.95, with the norm of the pivot. A pivot that is better than all of its neighbours stays. In
    search over paths the verifier reads the prediction of the step itself, so that judging needs no further evaluation of
    the network; paths compete within one item, as there. Two paths, eight levels and a sixteenth are choices for budgets
    of a hundred.

    At 32 evaluations each of two paths has one copy, so that nothing is chosen before the end: claims of search over
    paths begin at 64. It has no control that draws lots, so that what it gains from new noise alone is not told apart.

    What limits it here: the verifier is soon fooled. Accuracy rises with every search to nearly all images; the Frechet
    distance falls at first and rises again with more noises, least so in zero-order search, most in search over paths.
    """

    paper = Paper(
        id="diffusion_its_search",
        title="Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps",
        authors="Ma, Tong, Jia, Hu, Su, Zhang, Yang, Li, Jaakkola, Jia, Xie",
        year=2025,
        arxiv="2501.09732",
    )
    tasks = ("search/digits",)
    baselines = ("euler", "best_of_random")
    claims = (
        Claim(
            "accuracy[diffusion_its_search,32..128] > max(accuracy[euler,32..128], accuracy[euler,8]) "
            "and fd[diffusion_its_search,32..128] < min(fd[euler,32..128], fd[euler,8])",
            says="where more denoising steps gain nothing search does: a judge that it never saw reads the wish in more of "
            "the images, and together they are nearer to the data",
            headline=True,
        ),
        Claim(
            "accuracy[diffusion_its_search,16] < accuracy[diffusion_its_search,32] < accuracy[diffusion_its_search,64]",
            says="and the more noises are searched, the better, from none on (16) and until all images are right (64)",
        ),
        Claim(
            "accuracy[diffusion_its_search,32..128] > accuracy[best_of_random,32..128] "
            "and fd[diffusion_its_search,32..128] < fd[best_of_random,32..128]",
            says="it is the verifier that does it: of as many noises, one taken by lot is worse in both",
        ),
        Claim(
            "fd[diffusion_its_search,128] > min(fd[diffusion_its_search,32], fd[diffusion_its_search,64])",
            says="random search hacks its verifier: with the most noises, images are farther from the data again",
        ),
    )

    search = "random"  # "random" | "zero_order" | "paths"
    blind = False  # whether lots are drawn instead of asking the verifier
    steps = 8  # of one image, in the first two
    neighbours, reach = 2, 0.7  # of zero-order search: N, lambda
    paths, levels, forward = 2, 8, 0.0625  # of search over paths: N, the parts into which time falls, df
    variants = (
        Variant(
            "diffusion_its_search_zero_order",
            says="zero-order search: climb from a noise to the best of its neighbours, again and again",
            search="zero_order",
            baselines=("euler", "diffusion_its_search"),
            claims=(
                Claim(
                    "accuracy[diffusion_its_search_zero_order,32..128] > max(accuracy[euler,32..128], accuracy[euler,8]) "
                    "and fd[diffusion_its_search_zero_order,32..128] < min(fd[euler,32..128], fd[euler,8])",
                    says="search near the first noise is better than more denoising steps, to both judges",
                    headline=True,
                ),
                Claim(
                    "fd[diffusion_its_search_zero_order,128] <= fd[diffusion_its_search,128]",
                    says="it stays near its noise, and hacks the verifier less than random search does",
                ),
            ),
        ),
        Variant(
            "diffusion_its_search_paths",
            says="search over paths: branch while sampling, judge what each branch is heading for, keep the best",
            search="paths",
            baselines=("euler", "diffusion_its_search"),
            claims=(
                Claim(
                    "accuracy[diffusion_its_search_paths,64..128] > max(accuracy[euler,64..128], accuracy[euler,8]) "
                    "and fd[diffusion_its_search_paths,64..128] < min(fd[euler,64..128], fd[euler,8])",
                    says="search over paths is better than more denoising steps, to both judges",
                    headline=True,
                ),
            ),
        ),
        Variant(
            "best_of_random",
            says="control: as many noises as random search, and one of their images taken by lot",
            blind=True,
            baselines=("euler",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"verifier": new_verifier(session)}

    def judged(self, session: Session, images: Tensor, wish: Tensor) -> Tensor:
        """What the verifier thinks of images [B, ...], or lots: [B]."""
        if self.blind:
            return torch.rand(len(images), generator=session.rng, device=images.device)
        return approval(session.networks["verifier"], images, wish)

    def prepare(self, session: Session) -> None:
        session.networks["verifier"].load_state_dict(session.once(train_verifier))

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        least = 1 + 2 * (self.levels - 1) if self.search == "paths" else 2 * (self.steps + 1)
        if rung < least:  # there is nothing to choose from
            return euler_sample(Denoiser(session.networks["teacher"], batch["condition"]), batch["noise"], rung)
        search = {"random": self.random, "zero_order": self.zero_order, "paths": self.over_paths}[self.search]
        return search(session, batch["noise"], batch["condition"], rung)

    def random(self, session: Session, noise: Tensor, wish: Tensor, rung: int) -> Tensor:
        """The best of the images [B, ...] of so many noises as the rung pays for, the first of them the given ones."""
        denoise = Denoiser(session.networks["teacher"], wish)
        best, liked = noise, torch.full((len(noise),), -torch.inf, device=noise.device)
        for _ in range(rung // (self.steps + 1)):
            found = euler_sample(denoise, noise, self.steps)
            value = self.judged(session, found, wish)
            better = value > liked
            best = torch.where(better[:, None, None, None], found, best)
            liked = torch.where(better, value, liked)
            noise = torch.randn(noise.shape, generator=session.rng, device=noise.device, dtype=noise.dtype)
        return best

    def zero_order(self, session: Session, pivot: Tensor, wish: Tensor, rung: int) -> Tensor:
        """The image [B, ...] of the last pivot, after as many rounds of neighbours as the rung pays for."""
        denoise = Denoiser(session.networks["teacher"], wish)
        tries = rung // (self.steps + 1)
        best = euler_sample(denoise, pivot, self.steps)
        liked = self.judged(session, best, wish)
        for first in range(1, tries, self.neighbours):
            centre = pivot
            for _ in range(first, min(first + self.neighbours, tries)):
                step = torch.randn(pivot.shape, generator=session.rng, device=pivot.device, dtype=pivot.dtype)
                noise = (centre + self.reach * step) / (1 + self.reach**2) ** 0.5
                found = euler_sample(denoise, noise, self.steps)
                value = self.judged(session, found, wish)
                better = value > liked
                chosen = better[:, None, None, None]
                best, pivot = torch.where(chosen, found, best), torch.where(chosen, noise, pivot)
                liked = torch.where(better, value, liked)
        return best

    def over_paths(self, session: Session, first: Tensor, wish: Tensor, rung: int) -> Tensor:
        """The best image [B, ...] of those to which the paths lead that survive every round."""
        network, rounds = session.networks["teacher"], 2 * (self.levels - 1)
        width = min(self.paths, rung // (1 + rounds))
        copies = (rung - width) // (rounds * width)

        def draw(n: int) -> Tensor:
            shape = (n * len(first), *first.shape[1:])
            return torch.randn(shape, generator=session.rng, device=first.device, dtype=first.dtype)

        times = uniform_times(self.levels)
        x = torch.cat([first, draw(width - 1)])  # paths of an item stand len(first) rows apart, as do their copies
        x = euler_step(x, Denoiser(network, wish.repeat(width)).output(x, 1.0), 1.0, times[1])
        wishes = wish.repeat(width * copies)
        denoise = Denoiser(network, wishes)
        for t, s in pairwise(times[1:]):
            up = t + self.forward
            x = noise_again(denoise.schedule, x.repeat(copies, *[1] * (x.dim() - 1)), draw(width * copies), t, up)
            x0, eps = denoise(x, up)
            value = self.judged(session, x0, wishes).view(-1, len(first))
            x = ddim_step(denoise.schedule, x0, eps, s)
            best = value.topk(width if s > 0 else 1, dim=0).indices  # [width, B]
            x = x[(best * len(first) + torch.arange(len(first), device=best.device)).flatten()]
        return x


# --- training --------------------------------------------------------------------------------------------------------


def train_verifier(session: Session) -> dict[str, Tensor]:
    """Cross entropy on the train split; the verifier's weights. A little noise on the images: early predictions are to be
    judged too.
    """
    verifier = session.networks["verifier"]
    data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))

    def loss() -> Tensor:
        rows = torch.randint(len(data), (64,), generator=session.rng, device=session.device)
        noise = torch.randn(data[rows].shape, generator=session.rng, device=session.device)
        level = 0.4 * torch.rand(64, 1, 1, 1, generator=session.rng, device=session.device)
        return nn.functional.cross_entropy(verifier(data[rows] + level * noise), label[rows])

    fit(session, verifier, loss, session.scale(1000, 4), rate=3e-3)
    return verifier.state_dict()
