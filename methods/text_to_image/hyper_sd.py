"""Hyper-SD: consistency in segments of the path that grow, a reward's feedback, score distillation; one adapter for all steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, schedule_of, uniform_times
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.adapters import ALPHA, PREFIX, RANK, adapt, inner, merge, tensors
from stepmark.tracks.text_to_image.consistency import Batches, Pair, descend, draw, first_time, grid_times
from stepmark.tracks.text_to_image.distribution import Prompts, Scores, dmd_weight, from_noise, predictions, towards
from stepmark.tracks.text_to_image.inside import encoded
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.sampling import column, noise_like
from stepmark.tracks.text_to_image.search import judged

GRID = 40  # times of pairs, 25 timesteps apart: every segment of an eighth has five
MOST = 8  # steps
ETA = 0.3  # how much of a step is noise made anew


# --- the trajectory function -----------------------------------------------------------------------------------------


def jump(network: nn.Module, x: Tensor, t: Tensor, s: Tensor, states: Tensor, schedule: Schedule) -> Tensor:
    """f(x, t, s) = alpha_s x0 + sigma_s eps of what a network sees in x [B, 4, 8, 8] at times t [B]: x itself where s = t."""
    x0, eps = predictions(network, x, t, states, schedule)
    return column(schedule.alpha(s)) * x0 + column(schedule.sigma(s)) * eps


def ends(t: Tensor, segments: int, schedule: Schedule) -> Tensor:
    """Where the segments begin, seen from the data, in which times t [B] lie: the greatest m / segments below t. The last
    one begins at `first_time`."""
    return (((t * segments - 1e-4).ceil() - 1) / segments).clamp(min=first_time(schedule))


def noisier(schedule: Schedule, x: Tensor, s: Any, u: Any, noise: Tensor) -> Tensor:
    """x [B, ...] at times s with so much noise that it is at times u >= s, floats or [B]."""
    ratio, spare = schedule.alpha(u) / schedule.alpha(s), schedule.sigma(u) ** 2
    spare = spare - (ratio * schedule.sigma(s)) ** 2
    if isinstance(spare, Tensor):
        return column(ratio) * x + column(spare.clamp(min=0).sqrt()) * noise
    return ratio * x + max(spare, 0.0) ** 0.5 * noise


def steps(
    network: nn.Module, x: Tensor, states: Tensor, times: list[float], eta: float, rng: torch.Generator
) -> Tensor:
    """x [B, 4, 8, 8] taken from the first of some times to the last, one evaluation each: to (1 - eta) s, and with fresh noise
    to s. At s = 0 it is the x0 that the network sees."""
    schedule = schedule_of(network)
    for t, s in pairwise(times):
        x0, eps = predictions(network, x, torch.full_like(x[:, 0, 0, 0], t), states, schedule)
        u = (1 - eta) * s
        x = schedule.alpha(u) * x0 + schedule.sigma(u) * eps
        if u < s:
            x = noisier(schedule, x, u, s, noise_like(x, rng))
    return x


# --- training --------------------------------------------------------------------------------------------------------


def put(network: nn.Module, adapter: Mapping[str, Tensor]) -> nn.Module:
    """An adapted network with the numbers of an adapter, in place."""
    with torch.no_grad():
        for name, value in adapter.items():
            inner(network).get_parameter(name.removeprefix(PREFIX)).copy_(value)
    return network


class Segments:
    """Pairs of a guided teacher, and what a student makes of them in so many segments.

    Both points of a pair lie on one path; the student is to reach the beginning of their segment from either.
    """

    def __init__(self, session: Session, data: Batches, size: int) -> None:
        self.session, self.data, self.size = session, data, size
        self.teacher = session.networks["teacher"]
        self.schedule = schedule_of(self.teacher)
        self.times = grid_times(self.schedule, GRID)

    def draw(self) -> Pair:
        """Neighbours among 40 times, with one step of the teacher at w = 3 between them."""
        scales = (GUIDANCE, GUIDANCE)
        return draw(self.session, self.data, self.teacher, self.schedule, self.times, self.size, scales)

    def reached(self, student: nn.Module, pair: Pair, segments: int) -> tuple[Tensor, Pair, Tensor]:
        """Where the student gets to, the pair with its `target`, where it gets to from the point ahead, and at which times."""
        s = ends(pair.t, segments, self.schedule)
        with torch.no_grad():
            target = jump(student, pair.ahead, pair.s, s, pair.states, self.schedule)
        return jump(student, pair.x, pair.t, s, pair.states, self.schedule), replace(pair, target=target), s

    def consistent(self, student: nn.Module) -> Tensor:
        """The loss of one segment on a fresh pair, without an adversary."""
        found, pair, _ = self.reached(student, self.draw(), 1)
        assert pair.target is not None
        return (found - pair.target).square().mean()


class Adversary:
    """A head on the middle of the frozen teacher, which tells what a student reached from its targets. For `prepare`.

    Both are noised to the same times first, so that it does not win by what is too fine to see.
    """

    def __init__(self, session: Session, rate: float) -> None:
        self.teacher, self.rng = session.networks["teacher"], session.rng
        self.schedule = schedule_of(self.teacher)
        unet: Any = inner(self.teacher)
        width = unet.config.block_out_channels[-1]
        layers = [nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1)]
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), *layers).to(session.device, session.dtype)
        self.optimiser = torch.optim.AdamW(self.head.parameters(), lr=rate, betas=(0.0, 0.99), weight_decay=0.0)

    def shaken(self, s: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        """Times between s and those of the pair, and noise, at which points at times s are looked at."""
        u = s + (pair.t - s) * torch.rand(len(s), generator=self.rng, device=s.device, dtype=s.dtype)
        return u, noise_like(pair.x, self.rng)

    def verdict(self, x: Tensor, s: Tensor, u: Tensor, noise: Tensor, states: Tensor) -> Tensor:
        """Logits [B, 1, 4, 4]: large where points x at times s, noised to u, seem to be targets."""
        x = noisier(self.schedule, x, s, u, noise)
        return self.head(encoded(self.teacher, x, self.schedule.network_time(u), states)[0])

    def loss(self, found: Tensor, pair: Pair, s: Tensor) -> Tensor:
        """The student's, for what it reached."""
        return softplus(-self.verdict(found, s, *self.shaken(s, pair), pair.states)).mean()

    def learn(self, found: Tensor, pair: Pair, s: Tensor) -> None:
        """One update of the head, on both with the same noise."""
        assert pair.target is not None
        asked = (s, *self.shaken(s, pair), pair.states)
        real, made = self.verdict(pair.target, *asked), self.verdict(found.detach(), *asked)
        self.optimiser.zero_grad(set_to_none=True)
        (softplus(-real).mean() + softplus(made).mean()).backward()
        self.optimiser.step()


def segmented(
    session: Session, segments: tuple[int, ...], updates: int, size: int, rate: float, adversarial: float
) -> dict[str, Tensor]:
    """The adapter after as many updates in each of the stages, every one with so many segments."""
    student = adapt(session.clone("teacher"), session.rng, RANK, ALPHA)
    pairs = Segments(session, Latents(session), size)
    adversary = Adversary(session, 1e-3) if adversarial else None
    learned = [p for p in student.parameters() if p.requires_grad]
    for k in segments:
        share = 1 / (2 * k) if adversary else 0.0
        for step in descend(session, learned, updates, rate):
            found, pair, s = pairs.reached(student, pairs.draw(), k)
            assert pair.target is not None
            loss = (1 - share) * (found - pair.target).square().mean()
            if adversary:
                loss = loss + share * adversarial * adversary.loss(found, pair, s)
            step(loss)
            if adversary:
                adversary.learn(found, pair, s)
    return tensors(student)


def unified(
    session: Session,
    segments: tuple[int, ...],
    updates: tuple[int, int, int],
    size: int,
    rate: float,
    adversarial: float,
    feedback: float,
    matching: float,
) -> dict[str, Tensor]:
    """The adapter after the stages of segments, of feedback and of score distillation; of a stage whose weight is 0 consistency
    alone is left."""
    first, second, third = updates
    student = adapt(session.clone("teacher"), session.rng, RANK, ALPHA)
    put(student, session.once(segmented, segments, first, size, rate, adversarial))
    pairs, prompts = Segments(session, Latents(session), size), Prompts(session)
    learned = [p for p in student.parameters() if p.requires_grad]

    def drawn() -> tuple[Tensor, Tensor, Tensor]:
        tokens, states = prompts.batch(size)
        noise = torch.randn(size, *LATENT, generator=session.rng, device=session.device, dtype=session.dtype)
        return noise, tokens, states

    for step in descend(session, learned, second, rate / 4):
        loss = pairs.consistent(student)
        if feedback:
            loss = loss - feedback * liked(session, student, *drawn()).mean()
        step(loss)
    scores = Scores(session, own_guidance=1.0, weight=dmd_weight) if matching and third else None
    for step in descend(session, learned, third, rate / 4):
        loss = pairs.consistent(student)
        if scores:
            noise, _, states = drawn()
            x = from_noise(student, noise, states)
            loss = loss + matching * towards(x, scores.pull(x, states, scores.times(len(x))))
            scores.learn(x, states)
        step(loss)
    return tensors(student)


def liked(session: Session, student: nn.Module, noise: Tensor, tokens: Tensor, states: Tensor) -> Tensor:
    """Log-probability [B] that the reward gives to captions in what the student paints of noise: in 1, 2, 4 or 8 steps, from one
    of which, by lot, x0 is taken. That one has a slope, those before it have none."""
    n, rng = 2 ** int(torch.randint(4, (), generator=session.rng, device=session.device)), session.rng
    times = uniform_times(n)
    last = int(torch.randint(n, (), generator=rng, device=session.device))
    with torch.no_grad():
        x = steps(student, noise, states, times[: last + 1], ETA, rng)
    x0 = steps(student, x, states, [times[last], 0.0], ETA, rng)
    return judged(session, x0, tokens)[0]


class HyperSD(Method):
    """Hyper-SD: a student of one to eight steps, which is one adapter, learned in three ways one after the other.

    Trajectory-segmented consistency (section 3.1, algorithm 1). The path is cut into k segments of equal length. With s(t) the
    beginning of the segment of t, and f the step of DDIM by what the student sees,

        f(x_t, t, s) = alpha_s x0 + sigma_s eps
        loss = (1 - g) |f(x_t, t, s) - sg f(x_t', t', s)|^2 + g L_adv,   g = 1 / (2k)

    x_t' is one guided step of the teacher from x_t, 25 timesteps long, s = s(t) for both. k is 8, then 4, 2 and 1, and each
    stage goes on where the last one ended: what a stage joins is consistent already. L_adv is an adversary, a head on the
    teacher's first half, to whom f is to look like its target: squares do for near targets, it does for far ones, so g grows.

    Feedback (section 3.2). The student paints from noise in 1, 2, 4 or 8 steps; x0 at one of them, by lot, is decoded, and the
    reward is climbed through it: here the log-probability that a reader gives to the caption, which also says what lies where.

    Score distillation (section 3.3). What the student makes of noise at once is pulled by the difference of two scores (DMD),
    the guided teacher's and that of a copy which learns on what the student makes. In both of these stages the consistency of
    one segment goes on beside, so that more steps stay good.

    The adapter is merged. Steps are even in time, which with 8, 4, 2 and 1 are the segments; each goes to (1 - eta) s and is
    noised to s, eta = 0.3. Larger budgets take eight.

    Controls: `hyper_sd_single` has one segment from the start, in as many updates: consistency without segments. In
    `hyper_sd_unrewarded` and `hyper_sd_unscored` the stage in question is consistency alone, as long. `lcm_lora` is the paper's
    rival for all steps.

    Differs from the paper, of which weights were released and no code of training: the weights of the losses are a reading of
    words, g and the adversary's 0.1, feedback's 0.02, distillation's 0.25; one reward in place of one for beauty and one for
    structure; x0 at the last time is taken from the noise that the network predicts, which does not change there to a network
    of x0; rank 8; 50 updates in each of four stages, 30 of feedback, 40 of distillation, batches of 16.

    What limits it here: at the last time the network's error is divided by an alpha of 0.07, and 270 updates of an adapter are
    few to make up for it.
    """

    paper = Paper(
        id="hyper_sd",
        title="Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        authors="Ren, Xia, Lu, Zhang, Wu, Xie, Wang, Xiao",
        year=2024,
        arxiv="2404.13686",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("lcm_lora", "ddim_guided", "dpm_guided", "hyper_sd_single", "ddim_unguided")
    trainings = 3
    claims = (
        Claim(
            "fd[hyper_sd,1..8] < min(fd[lcm_lora,1..8], fd[hyper_sd_single,1..8], fd[ddim_unguided,1..8]) "
            "and caption[hyper_sd,1..8] > max(caption[lcm_lora,1..8], caption[hyper_sd_single,1..8], "
            "caption[ddim_unguided,1..8])",
            says="in one to eight steps, with one adapter, pictures are nearer to the data and truer to the caption than those "
            "of LCM-LoRA, than those of consistency without segments, and than as many steps of the teacher",
            headline=True,
            setting="270 short updates",
        ),
        Claim(
            "fd[hyper_sd,2..8] < min(fd[ddim_guided,2..8], fd[dpm_guided,2..8]) "
            "and caption[hyper_sd,2..8] > max(caption[ddim_guided,2..8], caption[dpm_guided,2..8])",
            says="and better than guided solvers within the same budget",
            headline=True,
        ),
        Claim(
            "fd[hyper_sd,8] <= 1.1 * fd[ddim_guided,64] and caption[hyper_sd,8] >= 0.95 * caption[ddim_guided,64]",
            says="eight steps lose next to nothing against thirty-two guided ones",
            headline=True,
            setting="270 short updates",
        ),
        Claim(
            "caption[hyper_sd,1..8] > caption[hyper_sd_unrewarded,1..8] "
            "and fd[hyper_sd,1..8] <= 1.1 * fd[hyper_sd_unrewarded,1..8]",
            says="feedback makes captions truer and does not drive pictures from the data",
        ),
        Claim(
            "fd[hyper_sd,1] < fd[hyper_sd_unscored,1] and fd[hyper_sd,2..8] <= 1.1 * fd[hyper_sd_unscored,2..8]",
            says="score distillation makes the one step better, and the same adapter keeps the others",
        ),
    )

    segments = (8, 4, 2, 1)
    adversarial, feedback, matching = 0.1, 0.02, 0.25  # weights
    updates, batch, rate = (50, 30, 40), 16, 2e-3
    variants = (
        Variant(
            "hyper_sd_single",
            says="control: one segment in all stages, as many updates",
            segments=(1, 1, 1, 1),
            baselines=("lcm_lora",),
        ),
        Variant(
            "hyper_sd_unrewarded",
            says="ablation: consistency alone in the stage of feedback",
            feedback=0.0,
            baselines=("lcm_lora",),
        ),
        Variant(
            "hyper_sd_unscored",
            says="ablation: consistency alone in the stage of score distillation",
            matching=0.0,
            baselines=("lcm_lora",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        segments = tuple(self.segments)
        lengths = session.scale((segments, self.updates, self.batch), (segments[3:], (1, 1, 1), 2))
        weights = self.adversarial, self.feedback, self.matching
        adapter = dict(session.once(unified, *lengths, self.rate, *weights))
        merge(session.networks["student"], adapter, ALPHA)
        return adapter

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        states, times = student.words(batch["condition"]), uniform_times(min(rung, MOST))
        return steps(student, batch["noise"], states, times, ETA, session.rng)
