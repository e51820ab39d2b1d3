"""SwD: a few-step student whose latents grow from step to step, and a loss that matches what patches are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image import LATENT
from stepmark.tracks.text_to_image.distribution import Scores, dmd_weight, predictions, towards
from stepmark.tracks.text_to_image.inside import outputs
from stepmark.tracks.text_to_image.sampling import column, noise_like

SIDE = LATENT[-1]  # of latents in full size
HUBER = 0.001  # of the patch loss, as in the authors' code


def grid() -> Tensor:
    """The 28 times of the authors' code, from 1 down to 0.009: even ones from 1 to 0.003, each taken to 3 t / (1 + 2 t)."""
    even = torch.linspace(1.0, 3 * 0.001 / 1.002, 28)
    return 3 * even / (1 + 2 * even)


def enlarged(z: Tensor, side: int) -> Tensor:
    """Latents [B, 4, h, h] as larger ones [B, 4, side, side]."""
    return z if z.shape[-1] == side else interpolate(z, size=side, mode="bicubic")


def denoised(network: nn.Module, x: Tensor, time: float, states: Tensor) -> Tensor:
    """The x0 that a network of velocities sees in x [B, 4, h, h] at a time. One evaluation, cheaper the smaller h is."""
    t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
    return predictions(network, x, t, states, schedule_of(network))[0]


def seen(network: Any, x: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity at times t [B], and the tokens [B, L, C] that leave the middle block."""
    blocks = network.transformer.transformer_blocks
    with outputs(blocks[len(blocks) // 2 - 1]) as kept:
        return network(x, t, states), kept[0]


def patch_loss(made: Tensor, real: Tensor) -> Tensor:
    """Mean over pictures and channels of sqrt(d^2 + c^2) - c, d the difference between the means of tokens [B, L, C].

    That is the maximum mean discrepancy, with a linear kernel, between the patches of one picture and those of another.
    """
    gap = made.mean(1) - real.mean(1)
    return ((gap.square() + HUBER**2).sqrt() - HUBER).mean()


@torch.no_grad()
def shrunk(session: Session, side: int, most: int) -> dict[str, Tensor]:
    """The first pictures of the train split as latents of a side, encoded in that size, {"x0": [N, 4, side, side]}: for
    `session.once`."""
    encode, pictures = session.networks["vae"].encode, session.train["x0"][:most]
    size = pictures.shape[-1] // SIDE * side
    parts = (part.to(session.device, session.dtype) for part in pictures.split(250))
    return {"x0": torch.cat([encode(interpolate(part, size=size, mode="area")) for part in parts])}


class Pyramid:
    """Pictures of the train split as latents of several sizes. For `prepare`.

    Attributes:
        x0: by side, [N, 4, side, side]. tokens: captions int64 [N, 32].
    """

    def __init__(self, session: Session, sides: Sequence[int], most: int) -> None:
        self._words, self._rng = session.networks["teacher"].words, session.rng
        self.x0 = {side: session.once(shrunk, side, most)["x0"] for side in sorted(set(sides))}
        self.tokens = session.train["tokens"][:most].to(session.device)

    @torch.no_grad()
    def batch(self, n: int, side: int, before: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of n pictures in one size, the same enlarged from a smaller one, and the states of their captions."""
        rows = torch.randint(len(self.tokens), (n,), generator=self._rng, device=self.tokens.device)
        return self.x0[side][rows], enlarged(self.x0[before][rows], side), self._words(self.tokens[rows])


def resized_teacher(session: Session, sides: tuple[int, ...], most: int, updates: int, size: int) -> dict[str, Tensor]:
    """The teacher, tuned to pictures that are smaller than its own."""
    network, data, rng = session.clone("teacher"), Pyramid(session, sides, most), session.rng
    network.words.requires_grad_(False)
    which = cycle(sides)

    def loss() -> Tensor:
        side = next(which)
        x0, _, states = data.batch(size, side, side)
        t, dropped = torch.rand(2, size, generator=rng, device=x0.device, dtype=x0.dtype)
        states = torch.where((dropped < 1 / 8).view(-1, 1, 1), network.null_condition(states), states)
        eps = noise_like(x0, rng)
        return (network(add_noise(schedule_of(network), x0, eps, t), t, states) - (eps - x0)).square().mean()

    fit(session, network, loss, updates, 5e-4, clip=1.0)
    return network.state_dict()


class Rivals:
    """What a student learns from: the teacher, a copy of it that learns the score of what the student makes, and a head on that
    copy which tells made from real. For `prepare`."""

    def __init__(self, session: Session, teacher: nn.Module, rate: float) -> None:
        self.rng, self.grid = session.rng, grid().to(session.device, session.dtype)
        self.scores = Scores(session, own_guidance=1.0, weight=dmd_weight)
        assert self.scores.fake is not None
        self.teacher, self.fake, self.schedule = teacher, self.scores.fake, self.scores.schedule
        self.scores.teacher = teacher
        self.fake.load_state_dict(teacher.state_dict())
        self.fake.words.requires_grad_(False)
        widths = torch.linspace(int(teacher.transformer.inner_dim), 1, 5).int().tolist()
        layers = [part for a, b in pairwise(widths) for part in (nn.LayerNorm(a), nn.GELU(), nn.Linear(a, b))]
        self.head = nn.Sequential(*layers).to(session.device, session.dtype)
        self._learned = [p for p in (*self.fake.parameters(), *self.head.parameters()) if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._learned, lr=rate, weight_decay=0.01)

    def times(self, n: int, start: int) -> Tensor:
        """n times of the grid from its number `start` on."""
        return self.grid[torch.randint(start, len(self.grid), (n,), generator=self.rng, device=self.grid.device)]

    def noise(self, x: Tensor) -> Tensor:
        return noise_like(x, self.rng)

    def learn(self, made: Tensor, real: Tensor, states: Tensor) -> None:
        """One update of the copy and its head, on what was made and on real latents, with the same noise."""
        for p in self._learned:
            p.requires_grad_(True)
        t, noise = self.times(len(made), 0), self.noise(made)
        x = add_noise(self.schedule, made, noise, t)
        velocity, tokens = seen(self.fake, x, t, states)
        other = seen(self.fake, add_noise(self.schedule, real, noise, t), t, states)[1]
        told = softplus(self.head(tokens.mean(1))).mean() + softplus(-self.head(other.mean(1))).mean()
        self._optimiser.zero_grad(set_to_none=True)
        ((x - column(t) * velocity - made).square().mean() + 1e-2 * told).backward()
        nn.utils.clip_grad_norm_(self._learned, 10.0)
        self._optimiser.step()
        for p in self._learned:  # while the student asks them they need no slopes
            p.requires_grad_(False)

    def loss(self, made: Tensor, real: Tensor, states: Tensor, weights: tuple[float, float, float]) -> Tensor:
        """The student's: distribution matching, the head's verdict, and patches like those of real latents."""
        matching, adversarial, patches = weights
        loss = made.new_zeros(())
        if matching:
            pull = self.scores.pull(made, states, self.times(len(made), 12))
            loss = loss + matching * towards(made, pull)
        if adversarial:
            t = self.times(len(made), 12)
            tokens = seen(self.fake, add_noise(self.schedule, made, self.noise(made), t), t, states)[1]
            loss = loss + adversarial * softplus(-self.head(tokens.mean(1))).mean()
        if patches:
            t, noise = self.times(len(made), 18), self.noise(made)
            two = (seen(self.teacher, add_noise(self.schedule, z, noise, t), t, states)[1] for z in (made, real))
            loss = loss + patches * patch_loss(*two)
        return loss


class SwD(Method):
    """SwD: noise hides what is fine, so early steps need few tokens; latents are enlarged between steps.

    Step i works at time t_i on latents of s_i x s_i (algorithm 1). It predicts the clean latents, which are enlarged by bicubic
    interpolation to s_{i+1} and noised to t_{i+1},

        x = (1 - t_{i+1}) up(x0) + t_{i+1} eps,      t = 1, 0.896, 0.737, 0.602,      s = 4, 4, 6, 8

    so that four steps take 33 tokens where four in full size take 64. A student is trained for each step in turn: real pictures
    are encoded at s_{i-1}, enlarged to s_i and noised to t_i, which it is to mend, and what it makes is compared with pictures
    encoded at s_i. The loss has three parts,

        matching   0.5 |x - sg(x - g)|^2,   g = (x0_fake - x0_teacher) / mean |x - x0_teacher|   (DMD2)
        adversary  0.005 softplus(-h(mean token)),   h a head on the fake score's middle block
        patches    mean over channels of sqrt(d^2 + c^2) - c,   d = mean token made - mean token real,   c = 0.001

    The last is new: the MMD of the tokens of one picture, as the teacher's middle block has them at low noise, in a linear
    kernel. The fake score and its head learn twice in every update. The teacher, guided with w = 3, was tuned to small latents;
    students of full size have it as it is.

    Controls, trained as long: `swd_full` makes four steps in full size, `swd_two` two, which cost about as much as SwD's four.
    `swd_forced` is the student of full size with its first steps at the small ones: fewer tokens without training for them.
    Ablations: `swd_no_patch` is without the patch loss, `swd_patch_only` has nothing else. `swd_one_token` begins with sides of
    2, 4, 6, 8, the first of which is a single patch.

    Differs from the paper: the train split in place of pictures that the teacher drew; all weights learn, there an adapter of
    rank 64; two lessons of the fake score, not five, rates of 2e-4 and 5e-4; 150 updates of 32, 300 to tune the teacher, on
    4000 pictures; features of the patch loss are the teacher's, while the authors' code takes the fake score's; the head looks
    at what is made under a noise of its own, there under that of the scores. The student has four steps only: less than that is
    skipped, more is not spent.

    What limits it here: 16 tokens in full size, beside which the 32 of the caption weigh much: those do not get fewer, so that
    costs fall by less than tokens. A call costs more than its tokens where networks are so small, so that time says little.
    """

    paper = Paper(
        id="swd",
        title="Scale-wise Distillation of Diffusion Models",
        authors="Starodubcev, Kuznedelev, Babenko, Baranchuk",
        year=2025,
        arxiv="2503.16397",
        code="yandex-research/swd",
    )
    tasks = ("text_to_image/scenes_flow",)
    baselines = ("swd_full", "swd_two", "swd_forced", "ddim_guided")
    trainings = 3
    claims = (
        Claim(
            "nfe_equivalent[swd,4] <= 0.7 * nfe_equivalent[swd_full,4] and fd[swd,4] <= 1.1 * fd[swd_full,4] "
            "and caption[swd,4] >= 0.95 * caption[swd_full,4] and fd[swd,4] < min(fd[swd_two,2], fd[swd_forced,4]) "
            "and caption[swd,4] > max(caption[swd_two,2], caption[swd_forced,4])",
            says="four growing steps cost seven tenths of four in full size and are as good, and are better than two in full "
            "size and than small steps that nobody trained",
            headline=True,
            setting="16 tokens, of which the cost of the caption leaves less to save",
        ),
        Claim(
            "latency_ms[swd,4] <= 1.25 * latency_ms[swd_two,2]",
            says="they take about the time of two steps in full size",
            headline=True,
            setting="a network so small that a call takes longer than its tokens",
        ),
        Claim(
            "fd[swd,4] <= fd[ddim_guided,32] and caption[swd,4] >= 0.95 * caption[ddim_guided,32]",
            says="they are as good as sixteen guided steps of the teacher",
        ),
        Claim(
            "fd[swd,4] < fd[swd_no_patch,4] and caption[swd,4] > caption[swd_no_patch,4]",
            says="the patch loss makes pictures better",
        ),
    )

    times = (1.0, 0.8959, 0.7371, 0.6022)
    sides, trained = (4, 4, 6, 8), ()  # of the steps: in sampling, and in training where that is another
    weights = (1.0, 5e-3, 1.0)  # of matching, adversary, patches
    updates, lessons, batch, most = 150, 2, 32, 4000
    tuning, rate, fake_rate = 300, 2e-4, 5e-4
    variants = (
        Variant(
            "swd_full",
            says="control: four steps in full size, trained alike",
            sides=(8, 8, 8, 8),
            baselines=("ddim_guided",),
        ),
        Variant(
            "swd_two",
            says="control: two steps in full size, trained alike, which cost about as much",
            times=(1.0, 0.7371),
            sides=(8, 8),
            baselines=("ddim_guided",),
        ),
        Variant(
            "swd_forced",
            says="control: the student of full size, whose steps are taken at the small sizes all the same",
            trained=(8, 8, 8, 8),
            baselines=("swd_full",),
        ),
        Variant("swd_no_patch", says="ablation: no patch loss", weights=(1.0, 5e-3, 0.0), baselines=("swd_full",)),
        Variant(
            "swd_patch_only", says="ablation: only the patch loss", weights=(0.0, 0.0, 1.0), baselines=("swd_full",)
        ),
        Variant("swd_one_token", says="steps at sides of 2, 4, 6 and 8", sides=(2, 4, 6, 8), baselines=("swd_full",)),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        sides = tuple(self.trained or self.sides)
        found = session.once(
            student_of,
            sides,
            tuple(self.times),
            tuple(self.weights),
            *session.scale((self.updates, self.lessons, self.batch, self.most, self.tuning), (1, 1, 4, 8, 1)),
            self.rate,
            self.fake_rate,
        )
        session.networks["student"].load_state_dict(found)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < len(self.sides):
            skip(f"the student takes {len(self.sides)} steps")
        student, side = session.networks["student"], self.sides[0]
        states, x = student.words(batch["condition"]), batch["noise"][..., :side, :side]
        for number, (time, side) in enumerate(zip(self.times, self.sides, strict=True)):
            if number:
                x = enlarged(x, side)
                x = (1 - time) * x + time * noise_like(x, session.rng)
            x = denoised(student, x, time, states)
        return x


def student_of(
    session: Session,
    sides: tuple[int, ...],
    times: tuple[float, ...],
    weights: tuple[float, float, float],
    updates: int,
    lessons: int,
    size: int,
    most: int,
    tuning: int,
    rate: float,
    fake_rate: float,
) -> dict[str, Tensor]:
    """A student of steps at those times and sides; what small sides are tuned from is the teacher."""
    student, teacher = session.networks["student"], session.clone("teacher").requires_grad_(False)
    data = Pyramid(session, sides, most)  # before a network is changed, so that all variants ask for the same
    if min(sides) < SIDE:
        kinds = tuple(sorted(set(sides)))
        teacher.load_state_dict(session.once(resized_teacher, kinds, most, tuning, size))
    student.load_state_dict(teacher.state_dict())
    student.words.requires_grad_(False)
    rivals = Rivals(session, teacher, fake_rate)

    def asked(number: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the student makes at the step of that number, the real latents in its size, and the states."""
        real, x, states = data.batch(size, sides[number], sides[max(number - 1, 0)])
        x = (1 - times[number]) * x + times[number] * rivals.noise(x)
        return denoised(student, x, times[number], states), real, states

    numbers: Iterator[int] = cycle(range(len(sides)))

    def loss() -> Tensor:
        number = next(numbers)
        for _ in range(lessons if weights[0] or weights[1] else 0):
            with torch.no_grad():
                made, real, states = asked(number)
            rivals.learn(made, real, states)
        return rivals.loss(*asked(number), weights)

    fit(session, student, loss, updates, rate, clip=1.0)
    return student.state_dict()
