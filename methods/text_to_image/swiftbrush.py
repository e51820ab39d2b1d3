"""SwiftBrush: a one-step student of a guided teacher, trained on captions alone by variational score distillation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image import LATENT
from stepmark.tracks.text_to_image.distribution import Prompts, Scores, from_noise, towards


class SwiftBrush(Method):
    """SwiftBrush: one evaluation instead of many, learnt from captions alone.

    The student is a copy of the teacher that is asked once, at the last time T, and whose x0 is the picture:

        f(z, c) = (z - sigma_T eps_student(z, T, c)) / alpha_T,    z ~ N(0, I)

    No sample of the teacher is shown to it. What it makes is noised to a time t between 0.02 and 0.98 of T, and there two
    networks are asked for the noise: the teacher, and a copy of it that is trained beside the student on what the student makes,
    so that it knows the student's own score. The difference is the gradient (algorithm 1):

        grad = E[ sigma_t^2 (eps_teacher(x_t, t, c) - eps_fake(x_t, t, c)) df/dtheta ],    x_t = alpha_t f(z, c) + sigma_t eps
        fake:  alpha_t^2 |eps_fake(x_t, t, c) - eps|^2

    Both noises are guided with w = 3, as in the authors' code, and a tenth of the captions that the second network learns from
    are empty. The two take turns, an update each, on the same samples. Whatever the budget, a picture costs one evaluation.

    `swiftbrush_sds` is what the paper starts from: score distillation sampling, where the noise that was added stands in for
    eps_fake. It pulls every sample to where the teacher's density is highest, so that all pictures of a caption become one.

    Differs from the paper: the fake score is a whole copy of the teacher instead of one with adapters of rank 64, which are
    as many as its channels here; 300 updates of 16 captions at a rate of 1e-4, instead of some epochs of more than a million
    captions at 1e-6, and the fake score at 5e-4 instead of 1e-3; w is that at which this teacher is best.

    What limits it here: x0 at T is 15 times the error of the noise, and the student begins as the blurred mean of all pictures
    of its caption. 300 updates may not bring it far from there.
    """

    paper = Paper(
        id="swiftbrush",
        title="SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
        authors="Nguyen, Tran",
        year=2023,
        arxiv="2312.05239",
        code="VinAIResearch/SwiftBrush",
    )
    tasks = ("text_to_image/scenes_eps", "free/scenes_eps")
    baselines = ("ddim_guided", "ddim_unguided", "swiftbrush_sds")
    trainings = 3
    claims = (
        Claim(
            "fd[swiftbrush,1] <= 1.25 * fd[ddim_guided,64] and caption[swiftbrush,1] >= 0.9 * caption[ddim_guided,64] "
            "and fd[swiftbrush,1] < fd[swiftbrush_sds,1] and caption[swiftbrush,1] > caption[ddim_unguided,1]",
            says="one evaluation is nearly as close to real pictures as thirty-two guided steps of the teacher, shows nearly as "
            "much of the captions, and is better than the student without a score of its own and than one step of the teacher",
            headline=True,
            setting="300 updates, where the paper's student sees millions of captions",
        ),
        Claim(
            "diversity[swiftbrush,1] > diversity[swiftbrush_sds,1] and fd[swiftbrush,1] < fd[swiftbrush_sds,1]",
            says="with a score of its own the student does not fall on one picture for a caption",
            task="free/scenes_eps",
        ),
    )

    own = True  # whether the student's own score is learnt
    updates, batch, rate, fake_rate = 300, 16, 1e-4, 5e-4
    variants = (
        Variant(
            "swiftbrush_sds",
            says="Score distillation sampling: the added noise in the place of the student's own score",
            own=False,
            baselines=("ddim_unguided",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        student, prompts = session.networks["student"], Prompts(session)
        scores, size = Scores(session, self.own, rate=self.fake_rate), session.scale(self.batch, 4)

        def loss() -> Tensor:
            states = prompts.batch(size)[1]
            noise = torch.randn(size, *LATENT, generator=session.rng, device=session.device, dtype=session.dtype)
            x = from_noise(student, noise, states)
            value = towards(x, scores.pull(x, states, scores.times(size)))
            scores.learn(x, states)
            return value

        fit(session, student, loss, session.scale(self.updates, 1), self.rate, clip=1.0)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        return from_noise(student, batch["noise"], student.words(batch["condition"]))
