from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from stepmark import Claim, Method, Paper
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import bridge_step
from stepmark.tracks.image.training import PointField

Pairs = Callable[[], tuple[Tensor, Tensor, Tensor]]


def transport(
    generator: nn.Module, x: Tensor, condition: Tensor, steps: int, epsilon: float, rng: torch.Generator
) -> Tensor:
    """Carry x from time 1 to 0 in so many transitions: guess the end, then draw from the bridge towards it."""
    for t, s in pairwise(uniform_times(steps)):
        now, then = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, s))
        end = guess(generator, x, now, condition, rng)
        x = bridge_step(end, x, now, then, epsilon, rng)
    return x


def guess(generator: nn.Module, x: Tensor, t: Tensor, condition: Tensor, rng: torch.Generator) -> Tensor:
    """A random end [B, 2] at time 0 of the path through x at t: G(x, t, z) with a fresh latent z."""
    z = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return generator(torch.cat([x, z], 1), t, condition)


class Projection:
    """A generator with its critic, optimisers and averaged weights, trained on the pairs of one coupling at a time."""

    def __init__(self, generator: nn.Module, critic: nn.Module, rate: float) -> None:
        self.generator, self.critic = generator, critic
        self.average = deepcopy(generator).requires_grad_(False)
        self.optimisers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.9)) for network in (generator, critic)
        ]

    def fit(self, pairs: Pairs, count: int, steps: int, epsilon: float, rng: torch.Generator) -> None:
        """`count` updates towards q(x_s | x_t) of the bridges between pairs (x at 0, x at 1, condition)."""
        for _ in range(count):
            loss, penalty = self.critic_loss(pairs(), steps, epsilon, rng)
            self._update(1, loss + penalty)
            self._update(0, self.generator_loss(pairs(), steps, epsilon, rng))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 0.005)

    def critic_loss(
        self, pairs: tuple[Tensor, Tensor, Tensor], steps: int, epsilon: float, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Non-saturating loss of the critic, and gamma / 2 |grad_x_s D|^2 at the real transitions (R1, gamma 0.01)."""
        x_s, x_t, t, s, condition = bridge_transition(pairs, steps, epsilon, rng)
        x_s.requires_grad_(True)
        real = self.critic(torch.cat([x_s, x_t], 1), t, condition)
        with torch.no_grad():
            fake = bridge_step(guess(self.generator, x_t, t, condition, rng), x_t, t, s, epsilon, rng)
        slope = torch.autograd.grad(real.sum(), x_s, create_graph=True)[0]
        made = self.critic(torch.cat([fake, x_t], 1), t, condition)
        return softplus(-real).mean() + softplus(made).mean(), 0.005 * slope.square().sum(1).mean()

    def generator_loss(
        self, pairs: tuple[Tensor, Tensor, Tensor], steps: int, epsilon: float, rng: torch.Generator
    ) -> Tensor:
        """Non-saturating loss of the generator on its transitions from the same x_t."""
        _, x_t, t, s, condition = bridge_transition(pairs, steps, epsilon, rng)
        made = bridge_step(guess(self.generator, x_t, t, condition, rng), x_t, t, s, epsilon, rng)
        return softplus(-self.critic(torch.cat([made, x_t], 1), t, condition)).mean()

    def _update(self, which: int, loss: Tensor) -> None:
        self.optimisers[which].zero_grad(set_to_none=True)
        loss.backward()
        self.optimisers[which].step()


def bridge_transition(
    pairs: tuple[Tensor, Tensor, Tensor], steps: int, epsilon: float, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x_s, x_t, t, s, condition): neighbouring points, t - s = 1 / steps, of Brownian bridges between the pairs."""
    x0, x1, condition = pairs
    index = torch.randint(1, steps + 1, (len(x0),), generator=rng, device=x0.device)
    t, s = ((index - k).to(x0.dtype) / steps for k in (0, 1))
    x_t = bridge_step(x0, x1, torch.ones_like(t), t, epsilon, rng)
    return bridge_step(x0, x_t, t, s, epsilon, rng), x_t, t, s, condition


class ASBM(Method):
    """Adversarial Schroedinger bridge matching: a bridge from noise to data in four random transitions.

    Discrete-time iterative Markovian fitting alternates between two projections. Reciprocal: keep the coupling of the
    ends and fill in Brownian bridges of variance e,

        x_t | x_0, x_1 ~ N((1 - t) x_0 + t x_1, e t (1 - t))                     (equation 5)

    on the times t = 0, 1/4, ..., 1 (1 is noise). Markovian: keep only the transitions q(x_s | x_t) between neighbouring
    times. These are learnt by a generator and a critic that sees (x_s, x_t, t),

        x_s ~ bridge between G(x_t, t, z) and x_t,   non-saturating loss, R1 penalty

    so that a transition may have any shape, where a Gaussian one would need many small steps. A forward pair (noise to
    data) and a backward pair (data to noise) are trained in turn; the coupling made by one is what the next learns from
    (algorithm 1), starting from independent ends. The fixed point is the Schroedinger bridge, so transport is short: that is
    half of what the paper shows and is not measured here, where claims compare the law of the ends alone.
    Four evaluations make a sample; larger budgets use four.

    Differs from the paper: small perceptrons that are told which mixture; three rounds of a few thousand updates of one side
    each, where the release trains each side for 200 000 before twenty rounds of both; a coupling is sampled once a round. For
    training this short the learning rate is five times that of the authors' runs on Gaussian mixtures (1e-4), the average
    forgets five times as fast (decay 0.999 there), and the batch is half of theirs (512); a critic is updated once for each
    update of its generator, as in their runs in the plane, where those on Gaussian mixtures update it three times. The latent
    z has two dimensions, there one.

    The variance e is 1, one of the authors' values. Bridges of a tenth of it between a Gaussian and a mixture of the
    plane have transitions that are nearly Gaussian, and DSBM then loses nothing with four of them; at 1 its four steps
    end about twice as far from the data as its sixty-four, which leaves room for transitions of any shape.

    What limits it here: adversarial training of minutes; every round of a critic and a generator passes the errors of its
    coupling on to the next. Four transitions end between four and sixty-four steps of DSBM; how near differs from training
    to training.
    """

    paper = Paper(
        id="asbm",
        title="Adversarial Schrödinger Bridge Matching",
        authors="Gushchin, Selikhanovych, Kholkin, Burnaev, Korotin",
        year=2024,
        arxiv="2405.14449",
        code="Daniil-Selikhanovych/ASBM",
    )
    tasks = ("sampling/mixtures_flow",)
    baselines = ("dsbm",)
    claims = (
        Claim(
            "sliced_w2[asbm,4] <= 1.1 * sliced_w2[dsbm,64]",
            says="four adversarial transitions end as near to the law of the data as 64 steps of diffusion bridge matching "
            "(how far points are carried is not compared)",
            headline=True,
            setting="9000 updates of two adversarial pairs; the release makes 200 000 a side before its 20 rounds",
        ),
        Claim(
            "sliced_w2[asbm,4] < min(sliced_w2[dsbm,4], sliced_w2[flow_matching_points,4])",
            says="and nearer than four of its steps, and than four of flow matching from independent pairs",
            setting="9000 updates of two adversarial pairs; the release makes 200 000 a side before its 20 rounds",
        ),
    )

    transitions, epsilon = 4, 1.0
    rounds = (4000, 3000, 2000)  # updates: forward, backward, forward, ...
    batch, rate = 256, 5e-4

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"generator": PointField(1 + int(session.train["condition"].max()), extra=2)}

    def prepare(self, session: Session) -> None:
        rng, device = session.rng, session.device
        data, label = (session.train[key].to(device) for key in ("x0", "condition"))
        kinds, forward = 1 + int(label.max()), session.networks["generator"]
        generators = (forward, PointField(kinds, extra=2).to(device))
        sides = [Projection(one, PointField(kinds, extra=2, outputs=1).to(device), self.rate) for one in generators]
        starts, size = data, session.scale(self.batch, 32)
        ends = torch.randn(data.shape, generator=rng, device=device)

        def pairs() -> tuple[Tensor, Tensor, Tensor]:
            pick = torch.randint(len(starts), (size,), generator=rng, device=device)
            return starts[pick], ends[pick], label[pick]

        rounds = session.scale(self.rounds, (2, 2, 2))
        for k, count in enumerate(session.progress(rounds, "rounds")):
            sides[k % 2].fit(pairs, count, self.transitions, self.epsilon, rng)
            # what the other side learns from: ends of the true law at its time 0, and where this one takes them from
            source = torch.randn(data.shape, generator=rng, device=device) if k % 2 == 0 else data
            with torch.no_grad():
                made = transport(sides[k % 2].average, source, label, self.transitions, self.epsilon, rng)
            starts, ends = source, made
        forward.load_state_dict(sides[0].average.state_dict())

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < self.transitions:
            skip("it is trained for four transitions")
        generator, rng = session.networks["generator"], session.rng
        return transport(generator, batch["noise"], batch["condition"], self.transitions, self.epsilon, rng)
