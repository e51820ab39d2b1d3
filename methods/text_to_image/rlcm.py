"""RLCM: policy gradients for a consistency model, whose few steps are a short game with a reward at its end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import sample
from stepmark.tracks.text_to_image.policies import clipped_loss, likelihood_ratio, played, student_move
from stepmark.tracks.text_to_image.sampling import noisy_move, noisy_step
from stepmark.tracks.text_to_image.search import judged
from stepmark.tracks.text_to_image.students import UPDATES, lcm_student


class RLCM(Method):
    """RLCM: fine-tune a latent consistency model with the reward of what it draws.

    Its sampler predicts the end and noises it to the next time. That is a game of as many moves as steps (section 4,
    algorithm 1): the state is (z_t, t, caption), the move is normal,

        z_s ~ N(alpha_s f(z_t, w, c, t), sigma_s^2),

    and the reward of the decoded picture comes at the end. Pictures are drawn with the model as it is; the advantage is the
    reward less its mean over the pictures of the caption, over their standard deviation, at most 10 either way; every move of
    every picture pulls by max(-A r, -A clip(r, 1 - e, 1 + e)) with the ratio r of its likelihoods now and then (of the mean
    log-likelihood over the latent's values, as in the authors' code). The last move adds no noise, has no likelihood, and does
    not pull (there it is noised once more after it was decoded, which pulls by chance alone). Sampling is that of a consistency
    model.

    As in the authors' code: clip 1e-4, advantages of up to 10, gradients no longer than 5, Adam whose rate falls linearly by a
    third, one update a round with all that was drawn in it, so that every ratio is one and nothing is clipped. There 8 steps (16
    for alignment), 4 to 40 pictures a device and round with statistics by caption kept over rounds, adapters of rank 8 to 16 at
    1e-4 or 4e-4; here 4 steps, 4 captions of 8 pictures a round and statistics of these, all weights at 5e-5, 48 rounds. The
    reward is the reader's log-probability of the caption, theirs LLaVA's agreement with it; the eye, which judges here, is not
    asked.

    `rlcm_ddpo` plays the same game with the diffusion teacher (DDPO, Black et al. 2024): 16 guided steps of DDIM with eta = 1,
    each of which has a likelihood. About as many evaluations go into its rounds as into this student's distillation and rounds
    together. A budget buys it guided steps of the same sampler. Controls: `lcm` is the student before, `lcm_strong` the same
    told more guidance, and `rg_lcd_best_of` lets the reward choose among its pictures of two steps.
    """

    paper = Paper(
        id="rlcm",
        title="RL for Consistency Models: Faster Reward Guided Text-to-Image Generation",
        authors="Oertell, Chang, Zhang, Brantley, Sun",
        year=2024,
        arxiv="2404.03673",
        code="Owen-Oertell/rlcm",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("lcm", "rlcm_ddpo", "ddim_guided", "lcm_strong", "rg_lcd_best_of")
    trainings = 3
    claims = (
        Claim(
            "caption[rlcm,2..8] > max(caption[lcm,2..8], caption[lcm_strong,2..8], caption[rg_lcd_best_of,2..8]) and"
            " fd[rlcm,2..8] <= 1.2 * fd[lcm,2..8] and caption[rlcm,4] > caption[rlcm_ddpo,32]",
            says="from two steps on more captions are drawn right than before, than with more guidance and than by the reward's"
            " choice, pictures stay as near to the data, and four steps draw more than sixteen guided ones of a diffusion model"
            " trained as long with the same reward",
            headline=True,
        ),
    )

    game = "consistency"  # or "diffusion"
    steps, rounds, rate = 4, 48, 5e-5
    captions, group, clip, most = 4, 8, 1e-4, 10.0
    variants = (
        Variant(
            "rlcm_ddpo",
            says="the same game played by the diffusion teacher: DDPO",
            game="diffusion",
            steps=16,
            rounds=20,
            claims=(),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        student, teacher = session.networks["student"], session.networks["teacher"]
        if self.game == "consistency":
            student.load_state_dict(session.once(lcm_student, session.scale(UPDATES, 2)))
        student.words.requires_grad_(False)
        parameters = [p for p in student.parameters() if p.requires_grad]
        rounds = session.scale(self.rounds, 1)
        optimiser = torch.optim.Adam(parameters, lr=self.rate)
        tokens = session.train["tokens"].to(session.device)
        captions, group = session.scale((self.captions, self.group), (2, 2))
        for number in session.progress(range(rounds), "rounds"):
            optimiser.param_groups[0]["lr"] = self.rate * (1 - number / (3 * rounds))
            rows = torch.randint(len(tokens), (captions,), generator=session.rng, device=session.device)
            asked = tokens[rows].repeat_interleave(group, 0)
            with torch.no_grad():
                states = teacher.words(asked)
                path, means = self.draw(session, student, states)
                reward = judged(session, path[-1], asked).view(captions, group)
            advantage = standardised(reward).clamp(-self.most, self.most).flatten()
            optimiser.zero_grad(set_to_none=True)
            self.policy(student, path, means, states, advantage).backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimiser.step()

    def draw(self, session: Session, student: nn.Module, states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The points of games [n, 4, 8, 8] from the noise on, and the mean of every move."""
        return played(session, states, self.steps, lambda x, number: self.move(student, x, number, states))

    def policy(
        self, student: nn.Module, path: list[Tensor], before: list[Tensor], states: Tensor, advantage: Tensor
    ) -> Tensor:
        """The clipped loss of all moves but the last. before: their means when they were drawn."""
        losses = []
        for number in range(self.steps - 1):
            mean, spread = self.move(student, path[number], number, states)
            ratio = likelihood_ratio(path[number + 1], mean, before[number], spread)
            losses.append(clipped_loss(advantage, ratio, self.clip))
        return torch.stack(losses).mean()

    def move(self, student: nn.Module, x: Tensor, number: int, states: Tensor) -> tuple[Tensor, float]:
        """Mean [n, 4, 8, 8] and standard deviation of the move of that number from x, one of `steps`."""
        if self.game == "diffusion":
            t, s = uniform_times(self.steps)[number : number + 2]
            return ancestral_move(student, x, t, s, states)
        return student_move(student, x, number, self.steps, states)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        if self.game == "consistency":
            return sample(student, batch, rung, session.rng, GUIDANCE, schedule_of(student))
        if rung < 2:
            skip("a guided step takes two evaluations")
        x, denoise = batch["noise"], Denoiser(student, student.words(batch["condition"]), GUIDANCE)
        for t, s in pairwise(uniform_times(rung // 2)):
            x = noisy_step(denoise.schedule, *denoise(x, t), t, s, 1.0, session.rng)
        return x


def ancestral_move(network: nn.Module, x: Tensor, t: float, s: float, states: Tensor) -> tuple[Tensor, float]:
    """Mean [n, 4, 8, 8] and standard deviation of a guided ancestral step from time t to s < t, two evaluations a row."""
    denoise = Denoiser(network, states, GUIDANCE)
    return noisy_move(denoise.schedule, *denoise(x, t), t, s, 1.0)


def standardised(reward: Tensor) -> Tensor:
    """Rewards [captions, group] less the mean of their group, over its standard deviation."""
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, unbiased=False, keepdim=True) + 1e-4)
