"""Distillation++: the teacher looks once at what its few-step student predicts first, while a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import GRID, predict, sample_times
from stepmark.tracks.text_to_image.sampling import noise_like
from stepmark.tracks.text_to_image.students import UPDATES, lcm_student


class DistillationPP(Method):
    """Distillation++: the first step of a consistency student is led by its teacher, at inference and without training.

    The student predicts the end of its path from x_t. That estimate is noised again to the time s where the student is
    asked next, and the guided teacher says what it sees there. One step of gradient descent on the loss of score
    distillation,

        |x - x0_teacher(s)|^2 abar_s / (1 - abar_s)   at x = x0_student(t),

    with the teacher's estimate held fixed, leads from the student's estimate towards the teacher's (equation 9, algorithm
    1):

        x_s = alpha_s x0_student + sigma_s eps,   x0_teacher = (x_s - sigma_s eps_w(x_s, s)) / alpha_s
        x0 = (1 - lambda) x0_student + lambda x0_teacher

    The sampler of the consistency model goes on from there: it noises x0 to s, with fresh noise, and asks the student. Only
    the first step is led. The guided teacher costs two evaluations, so that the student has two steps less than the rung.

    Controls, all of as many evaluations: `lcm` has the student's steps in the teacher's place; `distillation_pp_self` has
    the student itself look again, which costs one and leaves it a step more. `distillation_pp_fewer` has the same steps of
    the student and no teacher, and two evaluations less: the paper's first comparison. Ablations: `distillation_pp_random`
    draws s by lot, `distillation_pp_same` takes s = t, `distillation_pp_late` leads the last step that has a next one.

    Differs from the paper: the authors' repository holds no code; lambda, a constant there too, is 0.3 here and was not
    searched for. The student is the plain consistency student of the track, told a scale of 3; the teacher is guided by the
    same.

    What limits it here: a network of noise says little of the data at timestep 999, so that the first estimate, which is
    led, is the student's worst; and with four evaluations the student has but two steps.
    """

    paper = Paper(
        id="distillation_pp",
        title="Inference-Time Diffusion Model Distillation",
        authors="Park, Lee, Ye",
        year=2024,
        arxiv="2412.08871",
        code="geonyeong-park/inference_distillation",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("lcm", "distillation_pp_self", "distillation_pp_fewer", "ddim_guided")
    claims = (
        Claim(
            "fd[distillation_pp,4..8] < min(fd[lcm,4..8], fd[distillation_pp_self,4..8], fd[distillation_pp_fewer,4..8], "
            "fd[ddim_guided,4..8]) and caption[distillation_pp,4..8] > max(caption[lcm,4..8], "
            "caption[distillation_pp_self,4..8], caption[distillation_pp_fewer,4..8], caption[ddim_guided,4..8])",
            says="a look of the teacher makes the student's pictures better and truer to the caption than its own steps for the "
            "same evaluations, than a look of the student itself, and than the teacher's steps",
            headline=True,
            setting="two and six steps of the student beside the look, not four",
        ),
        Claim(
            "fd[distillation_pp,4..8] < min(fd[distillation_pp_random,4..8], fd[distillation_pp_same,4..8])",
            says="the teacher is best asked at the student's next time, not at any or at the present one",
        ),
        Claim(
            "fd[distillation_pp,8..16] < fd[distillation_pp_late,8..16] "
            "and caption[distillation_pp,8..16] > caption[distillation_pp_late,8..16]",
            says="and early rather than late",
        ),
    )

    by = "teacher"  # who looks again: or "student", or "nobody"
    when = "next"  # or "same", "random"
    late = False
    weight = 0.3  # lambda
    variants = (
        Variant(
            "distillation_pp_self",
            says="control: the student itself looks again, for one evaluation, and has a step more",
            by="student",
            baselines=("lcm",),
        ),
        Variant(
            "distillation_pp_fewer",
            says="control: the same steps of the student, nobody looks again; two evaluations less",
            by="nobody",
            baselines=("lcm",),
        ),
        Variant(
            "distillation_pp_random",
            says="ablation: the teacher looks at a time drawn by lot",
            when="random",
            baselines=("distillation_pp",),
        ),
        Variant(
            "distillation_pp_same",
            says="ablation: the teacher looks at the time that the student was asked at",
            when="same",
            baselines=("distillation_pp",),
        ),
        Variant(
            "distillation_pp_late",
            says="ablation: the last step that has a next one is led, not the first",
            late=True,
            baselines=("distillation_pp",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        session.networks["student"].load_state_dict(session.once(lcm_student, session.scale(UPDATES, 2)))

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        steps = min(rung - (1 if self.by == "student" else 2), GRID)
        if steps < 2:
            skip("two steps of the student and a look of the guided teacher take four evaluations")
        student, teacher = session.networks["student"], session.networks["teacher"]
        schedule, x0 = schedule_of(student), batch["noise"]
        states = student.words(batch["condition"])
        guided = Denoiser(teacher, teacher.words(batch["condition"]), GUIDANCE)

        def estimate(x: Tensor, t: float) -> Tensor:
            level = torch.full_like(x[:, 0, 0, 0], t)
            return predict(student, x, level, states, torch.full_like(level, GUIDANCE), schedule)

        def noised(x0: Tensor, t: float) -> Tensor:
            return schedule.alpha(t) * x0 + schedule.sigma(t) * noise_like(x0, session.rng)

        times = sample_times(steps)
        led = steps - 2 if self.late else 0
        for number, t in enumerate(times):
            x0 = estimate(noised(x0, t) if number else batch["noise"], t)
            if number == led and self.by != "nobody":
                s = self.asked_at(times, number, session.rng)
                x_s = noised(x0, s)
                x0 = torch.lerp(x0, guided(x_s, s)[0] if self.by == "teacher" else estimate(x_s, s), self.weight)
        return x0

    def asked_at(self, times: list[float], number: int, rng: torch.Generator) -> float:
        """The time s at which the teacher looks at the estimate of a step."""
        if self.when == "random":
            return int(torch.randint(1, GRID + 1, (), generator=rng, device=rng.device)) / GRID
        return times[number + 1] if self.when == "next" else times[number]
