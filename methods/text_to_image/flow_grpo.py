"""Flow-GRPO: policy gradients for a flow, whose sampler is made stochastic so that its steps have likelihoods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.policies import clipped_loss, likelihood_ratio, played
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, column, ddim, noise_like
from stepmark.tracks.text_to_image.search import judged


class FlowGRPO(Method):
    """Flow-GRPO: train a flow with the reward of what it draws.

    A flow's sampler is an ODE: its steps have no likelihood and explore nothing. It has the same marginals as the SDE
    (equation 9), whose Euler-Maruyama step from time t over dt < 0 is normal with

        mean  x + [v + s^2 / (2 t) (x + (1 - t) v)] dt,    variance  s^2 |dt|,    s = a sqrt(t / (1 - t)),  a = 0.7

    (at t = 1, s is that of the next time). For every caption a group of pictures is drawn by it; the advantage of one is its
    reward less the group's mean, over the standard deviation of all rewards, at most 5 either way. Every step of every picture
    then pulls: the loss is the mean of max(-A r, -A clip(r, 1 - e, 1 + e)) + beta KL, where r is the ratio of the step's
    likelihood to that when it was drawn (of the mean log-likelihood over the latent's values, as in the authors' code), and
    KL = |mean - mean of the frozen flow|^2 / (2 s^2), the mean over the latent's values. *Denoising reduction*: pictures to
    train on take a quarter of the steps of pictures to look at. Sampling is Euler's, guided, as before.

    As in the authors' code: a, groups with one standard deviation for all, beta = 0.04, the last step left out of training
    (timestep fraction 0.99), guidance also in training, two updates a round of drawing (which
    the ratio is for), gradients no longer than 1.
    Both halves of guidance are trained, as in their later code; the first release held the one without a caption.
    Here all weights are trained, where the release trains adapters of rank 32, at a rate of 5e-5 with Adam, for 16 rounds, and
    no average of the weights is kept; groups are of 12 and not 24, with 8 captions a round; the clip is 1e-3 (theirs 1e-4 is
    for latents of 65 536 values, whose means scatter less); 4 steps to train on for 16 to look at, theirs 10 for 40. The reward
    is the reader's log-probability of the caption, where theirs is GenEval's score: the eye, which judges here, is not asked.

    `flow_grpo_full` draws what it trains on with as many steps as it is looked at with; `flow_grpo_best` draws as much and
    trains on the best picture of every group with the flow's own loss, where the claim asks whether likelihoods are needed.
    """

    paper = Paper(
        id="flow_grpo",
        title="Flow-GRPO: Training Flow Matching Models via Online RL",
        authors="Liu, Liu, Liang, Li, Liu, Wang, Wan, Zhang, Ouyang",
        year=2025,
        arxiv="2505.05470",
        code="yifan123/flow_grpo",
    )
    tasks = ("text_to_image/scenes_flow",)
    baselines = ("ddim_guided", "flow_grpo_best", "flow_grpo_full")
    trainings = 3
    claims = (
        Claim(
            "caption[flow_grpo,16..64] >= caption[ddim_guided,16..64] + 0.1 and"
            " caption[flow_grpo,16..64] > caption[flow_grpo_best,16..64] and"
            " fd[flow_grpo,16..64] <= 1.2 * fd[ddim_guided,16..64]",
            says="a tenth more captions are drawn right than by the flow that it starts from, and more than by training on the"
            " best of as many pictures, and pictures stay as near to the data",
            headline=True,
            setting="32 updates, not thousands, and a reader's log-probability, not the score that judges",
        ),
        Claim(
            "caption[flow_grpo,16..64] >= caption[flow_grpo_full,16..64] - 0.03",
            says="trained on pictures of a quarter of the steps, for a quarter of the evaluations, it ends as well",
        ),
    )

    steps = 4  # of the pictures that it is trained on
    loss = "grpo"  # or "best"
    variants = (
        Variant(
            "flow_grpo_full", says="trained on pictures of as many steps as it is looked at with", steps=16, claims=()
        ),
        Variant(
            "flow_grpo_best",
            says="trained on the best picture of every group, by the flow's own loss",
            loss="best",
            claims=(),
        ),
    )

    updates, captions, group = 32, 8, 12
    rate, beta, clip, most = 5e-5, 0.04, 1e-3, 5.0

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        student, teacher = session.networks["student"], session.networks["teacher"]
        student.words.requires_grad_(False)
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=1e-4)
        tokens = session.train["tokens"].to(session.device)
        captions, group = session.scale((self.captions, self.group), (2, 2))
        for _ in session.progress(range(session.scale(self.updates // 2, 1)), "rounds"):
            rows = torch.randint(len(tokens), (captions,), generator=session.rng, device=session.device)
            asked = tokens[rows].repeat_interleave(group, 0)
            with torch.no_grad():
                states = teacher.words(asked)
                path, means = self.draw(session, student, states)
                reward = judged(session, path[-1], asked).view(captions, group)
            advantage = advantages(reward).clamp(-self.most, self.most).flatten()
            best = torch.arange(captions, device=reward.device) * group + reward.argmax(1)
            for half in torch.arange(len(asked), device=session.device).view(captions, group).chunk(2, 1):
                part = half.flatten()  # of every group
                if self.loss == "best":
                    loss = likeness(session, student, path[-1][best], states[best])
                else:
                    points, before = ([x[part] for x in each] for each in (path, means))
                    loss = self.policy(student, teacher, points, before, states[part], advantage[part])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()

    def draw(self, session: Session, student: nn.Module, states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Stochastic paths to pictures of captions: their points [n, 4, 8, 8] from the noise on, and the mean of every step."""
        times = uniform_times(self.steps)

        def move(x: Tensor, number: int) -> tuple[Tensor, float]:
            t, s = times[number : number + 2]
            return stochastic_step(student, x, t, s, states, times[1])

        return played(session, states, self.steps, move)

    def policy(
        self,
        student: nn.Module,
        teacher: nn.Module,
        path: list[Tensor],
        before: list[Tensor],
        states: Tensor,
        advantage: Tensor,
    ) -> Tensor:
        """The clipped loss of all steps but the last, and the divergence from the frozen flow. before: means of the steps when
        they were drawn."""
        losses, times = [], uniform_times(self.steps)
        for i, (t, s) in enumerate(pairwise(times[:-1])):
            mean, spread = stochastic_step(student, path[i], t, s, states, times[1])
            with torch.no_grad():
                frozen, _ = stochastic_step(teacher, path[i], t, s, states, times[1])
            ratio = likelihood_ratio(path[i + 1], mean, before[i], spread)
            pull = clipped_loss(advantage, ratio, self.clip)
            level = spread / math.sqrt(t - s)  # the code divides by the rate of the noise, not by that of the step
            losses.append(pull + self.beta * (mean - frozen).square().mean() / (2 * level**2))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2:
            skip("a guided step takes two evaluations")
        denoise = GuidedByCaption(session.networks["student"], batch, GUIDANCE)
        return ddim(denoise, batch["noise"], uniform_times(rung // 2))  # of a flow Euler's steps


def stochastic_step(
    network: nn.Module, x: Tensor, t: float, s: float, states: Tensor, first: float, level: float = 0.7
) -> tuple[Tensor, float]:
    """Mean [n, 4, 8, 8] and standard deviation of the guided flow's stochastic step from time t to s < t.

    first: the time that stands for t = 1 in the noise, where its rate is infinite.
    """
    time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
    velocity = guided_rows(network, x, time, states, torch.full_like(time, GUIDANCE))
    rate, dt = level * math.sqrt(t / (1 - (first if t == 1 else t))), s - t
    half = rate**2 / (2 * t)
    return x * (1 + half * dt) + velocity * (1 + half * (1 - t)) * dt, rate * math.sqrt(-dt)


def advantages(reward: Tensor) -> Tensor:
    """Rewards [captions, group] less the mean of their group, over the standard deviation of all."""
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(unbiased=False) + 1e-4)


def likeness(session: Session, student: nn.Module, x0: Tensor, states: Tensor) -> Tensor:
    """The flow's own loss on pictures [n, 4, 8, 8] of captions."""
    eps = noise_like(x0, session.rng)
    t = torch.rand(len(x0), generator=session.rng, device=x0.device, dtype=x0.dtype)
    x = torch.lerp(x0, eps, column(t))
    return (student(x, t, states) - (eps - x0)).square().mean()
