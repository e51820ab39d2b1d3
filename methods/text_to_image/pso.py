"""PSO: a few-step student is tuned with pairs of pictures, one to be likelier than the other, at its own times."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.adapters import adapt, merge, tensors
from stepmark.tracks.text_to_image.consistency import descend, grid_times, sample, sample_times
from stepmark.tracks.text_to_image.policies import likelihood_ratio, played, student_move
from stepmark.tracks.text_to_image.sampling import noise_like
from stepmark.tracks.text_to_image.search import judged
from stepmark.tracks.text_to_image.students import UPDATES, UPDATES_OF_BASE, lcm_student, student_of_base

STEPS, RANK = 4, 16  # of the student; of the adapters
CLIP = 0.1  # a ratio of likelihoods counts between 1 - CLIP and 1 + CLIP
BETA_ONLINE, BETA_OFFLINE = 50.0, 200.0
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # where the adapters are


class PSO(Method):
    """Pairwise sample optimization: tune a student that was distilled to few steps, without distilling it again.

    The student's sampler, with a frozen copy of it as reference, is a chain of normal moves at its own four times,

        z_s ~ N(alpha_s f(z_t, c, t), sigma_s^2).

    Of a pair of pictures of one caption the target is to become likelier than the other by more than it was,

        loss = -log sigmoid(beta (r_target - r_other)),   r = log p(z_s | z_t) - log p_reference(z_s | z_t)

    so that only their difference moves the network, and what both have in common, the look of few steps, stays.

    Online pairs (`pso` on `text_to_image/scenes_eps`): the present student draws two pictures of a caption, and the reward
    says which is the target. r is exact for every move but the last, which is certain and teaches nothing; it is the mean
    over the latent's values, the ratio exp(r) is cut off outside of 0.9 and 1.1, and beta = 50. Offline pairs
    (`pso_offline`, and `pso` on `text_to_image/scenes_pastel`): they are drawn once, before. Both pictures of a pair are
    noised by the same noise to one of the four times, and r becomes the decrease of the error,

        r = |eps_reference(z_t) - eps|^2 - |eps_theta(z_t) - eps|^2      mean over the latent's values

    with beta = 200. For a preference both are drawn by the frozen student and ranked by the reward. For a style the target
    is a picture of that style, the other is what the frozen student, of the network `base`, draws for its caption.

    Controls: `pso_diffusion` learns the targets of the offline pairs with the loss of diffusion, at all times, from as many
    rows; `pso_random` ranks its online pairs by lot; `lcm_strong` is the student, told more guidance. On the task of the
    style `lcm` is distilled again, from a teacher of that style, and `lcm_of_base` is the student before.

    As in the authors' code: beta, the cut, the same noise for both, the moves that are trained, adapters of rank 16 in the
    layers of attention, gradients no longer than 1. There thousands of updates at 1e-5; here 44 of 16 online pairs, or 132
    of 16 out of 768 offline pairs (as many rows), at 1e-3, which warms up and falls. The reward is the reader's
    log-probability of the caption, theirs PickScore; the eye, which judges, is another one. Their offline preferences are
    people's, of pictures by other networks. Their scripts for pictures of one object take a hinge and no reference, count the
    other picture's error a tenth, and hold it; here a style is given the logistic loss, the other choice of the same code, and
    both count alike. Customization of one object is left out.

    What limits it here: one style, and pictures in which a preference is a matter of right and wrong.
    """

    paper = Paper(
        id="pso",
        title="Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
        authors="Miao, Yang, Lin, Wang, Liu, Wang, Qiu",
        year=2024,
        arxiv="2410.03190",
        code="ZichenMiao/Pairwise_Sample_Optimization",
    )
    tasks = ("text_to_image/scenes_eps", "text_to_image/scenes_pastel")
    baselines = ("lcm", "pso_diffusion", "pso_random", "lcm_strong", "lcm_of_base")
    claims = (
        Claim(
            "caption[pso,2..4] > max(caption[lcm,2..4], caption[lcm_strong,2..4], caption[pso_diffusion,2..4], "
            "caption[pso_random,2..4]) and fd[pso,2..4] <= 1.2 * min(fd[lcm,2..4], fd[pso_diffusion,2..4])",
            says="with pairs that it draws itself the student shows more captions in as few steps than before, than with more "
            "guidance, than by the loss of diffusion and by pairs ranked by lot; pictures stay as near to the data",
            headline=True,
        ),
        Claim(
            "caption[pso_offline,2..4] > max(caption[lcm,2..4], caption[lcm_strong,2..4], caption[pso_diffusion,2..4]) "
            "and fd[pso_offline,2..4] <= 1.2 * min(fd[lcm,2..4], fd[pso_diffusion,2..4])",
            says="and so it does with pairs that were drawn before",
            headline=True,
            setting="pairs are the student's own, ranked by a network; the paper's are people's, of pictures by others",
        ),
        Claim(
            "fd[pso,2..4] < min(fd[lcm_of_base,2..4], fd[pso_diffusion,2..4]) and fd[pso,2..4] <= 1.2 * fd[lcm,2..4] "
            "and caption[pso,2..4] > max(caption[lcm_of_base,2..4], caption[pso_diffusion,2..4]) "
            "and caption[pso,2..4] >= 0.8 * caption[lcm,2..4]",
            says="pictures of another style lead it there, nearer than the loss of diffusion does, and not far from a student "
            "that is distilled again from a teacher of that style",
            task="text_to_image/scenes_pastel",
            headline=True,
        ),
        Claim(
            "fd[pso_diffusion,2..4] > fd[lcm,2..4]",
            says="the loss of diffusion spoils the few-step student, even on pictures that were chosen among its own",
        ),
    )

    pairs = "online"  # or "offline"; of a style they are offline
    loss = "pairs"  # or "diffusion"
    judge = "reward"  # or "lots"
    updates = (44, 132)  # online, offline
    captions, kept, rate = 16, 768, 1e-3  # pairs of an update; offline pairs
    variants = (
        Variant(
            "pso_offline",
            says="pairs that the frozen student drew before",
            pairs="offline",
            tasks=("text_to_image/scenes_eps",),
            baselines=("lcm", "pso_diffusion", "lcm_strong"),
        ),
        Variant(
            "pso_diffusion",
            says="control: the loss of diffusion on the targets of the offline pairs",
            pairs="offline",
            loss="diffusion",
            baselines=("lcm", "lcm_of_base"),
        ),
        Variant(
            "pso_random",
            says="control: online pairs whose target is drawn by lot",
            judge="lots",
            tasks=("text_to_image/scenes_eps",),
            baselines=("lcm",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        style = "base" in session.networks
        role = "base" if style else "teacher"
        if style:
            weights = session.once(student_of_base, session.scale(UPDATES_OF_BASE, 2))
        else:
            weights = session.once(lcm_student, session.scale(UPDATES, 2))
        reference, tuned, student = session.clone(role), session.clone(role), session.networks["student"]
        for network in (reference, tuned, student):
            network.load_state_dict(weights)
        reference.requires_grad_(False)
        adapt(tuned, session.rng, RANK, RANK, targets=TARGETS)
        offline = style or self.pairs == "offline"
        target, other, states = self.gathered(session, reference, style) if offline else (torch.empty(0),) * 3
        learned = [p for p in tuned.parameters() if p.requires_grad]
        n = session.scale(self.captions, 2)
        for step in descend(session, learned, session.scale(self.updates[offline], 1), self.rate):
            if not offline:
                step(self.online(session, tuned, reference, n))
                continue
            size = 2 * n if self.loss == "diffusion" else n
            rows = torch.randint(len(target), (size,), generator=session.rng, device=target.device)
            if self.loss == "diffusion":
                times = grid_times(schedule_of(tuned), schedule_of(tuned).steps).tolist()
                t, noise = lots(session, times, target[rows])
                step(error(tuned, target[rows], noise, t, states[rows]).mean())
            else:
                t, noise = lots(session, sample_times(STEPS), target[rows])
                step(pair_loss(tuned, reference, target[rows], other[rows], states[rows], t, noise))
        merge(student, tensors(tuned), RANK)

    @torch.no_grad()
    def gathered(self, session: Session, reference: nn.Module, style: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Offline pairs: targets and others [N, 4, 8, 8], states of their captions [N, 32, 64]."""
        train, device = session.train, session.device
        n = session.scale(self.kept, 4)
        rows = torch.randperm(len(train["tokens"]), generator=session.rng, device=device)[:n].cpu()
        found = []
        for part in rows.split(128):
            asked = train["tokens"][part].to(device)
            states = reference.words(asked)
            other = path(session, reference, states)[-1]
            if style:
                target = session.networks["vae"].encode(train["x0"][part].to(device, session.dtype))
            else:
                target = path(session, reference, states)[-1]
                first = self.preferred(session, target, other, asked).view(-1, 1, 1, 1) >= 0
                target, other = torch.where(first, target, other), torch.where(first, other, target)
            found.append((target, other, states))
        target, other, states = (torch.cat(each) for each in zip(*found, strict=True))
        return target, other, states

    def preferred(self, session: Session, a: Tensor, b: Tensor, asked: Tensor) -> Tensor:
        """[n]: 1 where a is the target of a pair, -1 where b is, 0 where they are equal."""
        if self.judge == "lots":
            return torch.rand(len(a), generator=session.rng, device=a.device).sub(0.5).sign()
        first, second = judged(session, torch.cat([a, b]), asked)
        return (first - second).sign()

    def online(self, session: Session, tuned: nn.Module, reference: nn.Module, n: int) -> Tensor:
        """The loss of n fresh pairs of the student as it is."""
        tokens = session.train["tokens"]
        rows = torch.randint(len(tokens), (n,), generator=session.rng, device=session.device).cpu()
        asked = tokens[rows].to(session.device)
        with torch.no_grad():
            states = tuned.words(asked).repeat(2, 1, 1)  # of the firsts, then of the seconds
            points = path(session, tuned, states)
            first, second = points[-1].chunk(2)
            prefer = self.preferred(session, first, second, asked)
        return moves_loss(tuned, reference, points, states, prefer)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        return sample(student, batch, rung, session.rng, GUIDANCE, schedule_of(student))


# --- the student as a chain of moves ---------------------------------------------------------------------------------


def move(network: nn.Module, x: Tensor, number: int, states: Tensor) -> tuple[Tensor, float]:
    """Mean [n, 4, 8, 8] and standard deviation of the student's move of that number; of the last it is 0."""
    return student_move(network, x, number, STEPS, states)


@torch.no_grad()
def path(session: Session, network: nn.Module, states: Tensor) -> list[Tensor]:
    """The points [n, 4, 8, 8] that a student comes by, from noise to the picture."""
    return played(session, states, STEPS, lambda x, number: move(network, x, number, states))[0]


def moves_loss(
    network: nn.Module, reference: nn.Module, points: list[Tensor], states: Tensor, prefer: Tensor
) -> Tensor:
    """The loss of online pairs: the mean over all moves but the last. points: of the firsts of the pairs, then of the seconds
    [2n, 4, 8, 8]. prefer: [n], 1 where the first is the target, -1 where the second is, 0 where neither is."""
    losses = []
    for number in range(STEPS - 1):
        x, after = points[number : number + 2]
        with torch.no_grad():
            before, spread = move(reference, x, number, states)
        ratio = likelihood_ratio(after, move(network, x, number, states)[0], before, spread)
        first, second = ratio.clamp(1 - CLIP, 1 + CLIP).log().chunk(2)
        losses.append(-logsigmoid(BETA_ONLINE * prefer * (first - second)).mean())
    return torch.stack(losses).mean()


# --- pictures that are noised ----------------------------------------------------------------------------------------


def lots(session: Session, times: list[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """One of the times for each latent [n], and noise shaped like them."""
    rng, device = session.rng, like.device
    choice = torch.tensor(times, device=device, dtype=like.dtype)
    return choice[torch.randint(len(times), (len(like),), generator=rng, device=device)], noise_like(like, rng)


def error(network: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """Mean square error [n] of the noise that a student sees in noised latents."""
    schedule = schedule_of(network)
    x, time = add_noise(schedule, x0, noise, t), schedule.network_time(t)
    return (network(x, time, states, torch.full_like(t, GUIDANCE)) - noise).square().flatten(1).mean(1)


def pair_loss(
    network: nn.Module, reference: nn.Module, target: Tensor, other: Tensor, states: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """The loss of offline pairs, both noised alike to times t [n]."""
    both = (torch.cat([target, other]), noise.repeat(2, 1, 1, 1), t.repeat(2), states.repeat(2, 1, 1))
    with torch.no_grad():
        before = error(reference, *both)
    gained, lost = (before - error(network, *both)).chunk(2)
    return -logsigmoid(BETA_OFFLINE * (gained - lost)).mean()
