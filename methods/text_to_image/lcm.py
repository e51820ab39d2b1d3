"""LCM: a guided latent teacher distilled into a network that says where its ODE ends, and is asked a few times."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import distil, fold, follow, sample
from stepmark.tracks.text_to_image.students import UPDATES, UPDATES_OF_BASE, lcm_student, student_of_base


class LCM(Method):
    """Latent consistency model: guidance and the whole ODE are distilled into one network at once.

    The student starts from the teacher's weights and gets one more input, the guidance scale w. It predicts the end of the
    guided path through z_t (section 4.1), and the end itself where the path ends, by c_skip = 1 and c_out = 0 there:

        f(z, w, c, t) = c_skip(t) z + c_out(t) (z - sigma_t eps(z, w, c, t)) / alpha_t
        c_skip = 0.5^2 / (s^2 + 0.5^2),      c_out = s / sqrt(s^2 + 0.5^2),      s = 10 t

    with t in timesteps, 0 to 999. Training noises a latent to one of 50 timesteps, 19, 39, ..., 999; the teacher makes one DDIM
    step to the timestep k = 20 before, guided by a scale drawn for every row (sections 4.2 and 4.3, algorithm 1),

        z' = DDIM(z_t, t, t - k; null + w (conditional - null))
        loss = d(f(z_t, w, c, t), f_ema(z', w, c, t - k)),      d(a, b) = sqrt((a - b)^2 + c^2) - c,   c = 0.001

    where f_ema has the moving average of the student's weights, of decay 0.95. Sampling (algorithm 3) asks for the end, noises
    it to the next timestep and asks again: of n steps the i-th is at the floor(50 i / n)-th of the 50, one evaluation each.

    `lcm_finetuned` is latent consistency fine-tuning (algorithm 4): a student of the network `base`, which knows nothing of the
    task's style, goes on with pictures of that style and without a teacher. Both of its points have the same noise:

        loss = d(f(alpha_t z + sigma_t n, w, c, t), f_ema(alpha_s z + sigma_s n, w, c, s)),      s = t - k

    Controls: `lcm_folded` has the same architecture, data, scales and updates, but only learns what guidance adds, and makes
    steps of DDIM (the first stage of guided distillation, which the paper compares with). `lcm_undistilled` is the teacher,
    guided from outside, in the sampler above: what noise and its timesteps do alone. `lcm_strong` and `lcm_weak` are the same
    student, told another scale. `lcm_every_step` is the ablation of the skipped steps: k = 1.

    Differs from the paper: the scales in training are 2 to 5, where the teacher's best is 3 (6 to 16 in the authors' code, in
    this convention); 240 updates of 32 latents at a rate of 5e-4, which warms up and falls (there thousands at 1e-6, constant);
    the input for w starts at zero. The student for fine-tuning was distilled for 240 updates on pictures that `base` drew
    itself, in 8 guided steps, since the task holds none of its data; 150 updates follow.

    What limits it here: a network of noise says little of the data at timestep 999, where its error is divided by an alpha of
    0.07, so that one step is poor; the claims begin at two evaluations, as do those of a guided sampler.
    """

    paper = Paper(
        id="lcm",
        title="Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        authors="Luo, Tan, Huang, Li, Zhao",
        year=2023,
        arxiv="2310.04378",
        code="luosiallen/latent-consistency-model",
    )
    tasks = ("text_to_image/scenes_eps", "free/scenes_eps", "text_to_image/scenes_pastel")
    baselines = ("ddim_guided", "dpm_guided", "lcm_folded", "lcm_undistilled")
    claims = (
        Claim(
            "fd[lcm,2..8] < min(fd[ddim_guided,2..8], fd[dpm_guided,2..8], fd[lcm_folded,2..8], fd[lcm_undistilled,2..8]) "
            "and caption[lcm,2..8] > max(caption[ddim_guided,2..8], caption[dpm_guided,2..8], caption[lcm_folded,2..8], "
            "caption[lcm_undistilled,2..8])",
            says="in few evaluations nearer to the data and truer to the caption than guided solvers, than guidance folded in "
            "and nothing more, and than its sampler without distillation",
            headline=True,
        ),
        Claim(
            "fd[lcm,4] <= 1.1 * fd[ddim_guided,64] and caption[lcm,4] >= 0.9 * caption[ddim_guided,64]",
            says="four steps come near to thirty-two guided ones of the teacher",
        ),
        Claim(
            "fd[lcm,2..8] < fd[lcm_every_step,2..8] and caption[lcm,2..8] > caption[lcm_every_step,2..8]",
            says="pairs that lie twenty timesteps apart teach more in as many updates than neighbours",
        ),
        Claim(
            "fd[lcm_finetuned,2..8] < min(fd[lcm_of_base,2..8], fd[ddim_guided,2..8]) "
            "and caption[lcm_finetuned,2..8] > max(caption[lcm_of_base,2..8], caption[ddim_guided,2..8])",
            says="fine-tuned on another style without a teacher, few steps are better than before, and than those of a network "
            "that was tuned to it and is guided",
            task="text_to_image/scenes_pastel",
        ),
    )

    arm = "distilled"  # | "folded" | "undistilled" | "every_step" | "of_base" | "finetuned"
    guidance = GUIDANCE
    variants = (
        Variant(
            "lcm_folded",
            says="control: the same student learns what guidance adds, as long, and nothing of consistency; steps of DDIM",
            arm="folded",
            tasks=("text_to_image/scenes_eps",),
            baselines=("ddim_guided",),
        ),
        Variant(
            "lcm_undistilled",
            says="control: the teacher itself in the same sampler, guided by a second evaluation",
            arm="undistilled",
            tasks=("text_to_image/scenes_eps",),
            baselines=("ddim_guided",),
        ),
        Variant(
            "lcm_strong",
            says="control: the same student, told a scale of 5",
            guidance=5.0,
            tasks=("text_to_image/scenes_eps", "free/scenes_eps"),
            baselines=("lcm",),
        ),
        Variant(
            "lcm_weak",
            says="control: the same student, told a scale of 2",
            guidance=2.0,
            tasks=("text_to_image/scenes_eps", "free/scenes_eps"),
            baselines=("lcm",),
        ),
        Variant(
            "lcm_every_step",
            says="ablation: pairs of neighbouring timesteps, k = 1",
            arm="every_step",
            tasks=("text_to_image/scenes_eps",),
            baselines=("lcm",),
        ),
        Variant(
            "lcm_finetuned",
            says="latent consistency fine-tuning: a student of another network, tuned to the style without a teacher",
            arm="finetuned",
            tasks=("text_to_image/scenes_pastel",),
            baselines=("lcm_of_base", "ddim_guided"),
        ),
        Variant(
            "lcm_of_base",
            says="control: that student before it was tuned",
            arm="of_base",
            tasks=("text_to_image/scenes_pastel",),
            baselines=("ddim_guided",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {} if self.arm == "undistilled" else {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        updates, first, then = (session.scale(n, 2) for n in (UPDATES, UPDATES_OF_BASE, 150))
        if self.arm == "undistilled":
            return
        if self.arm == "distilled":
            found = session.once(lcm_student, updates)
        elif self.arm == "folded":
            found = session.once(folded_student, updates)
        elif self.arm == "every_step":
            found = session.once(every_step_student, updates)
        elif self.arm == "of_base":
            found = session.once(student_of_base, first)
        else:
            found = session.once(finetuned_student, first, then)
        session.networks["student"].load_state_dict(found)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if self.arm == "undistilled":
            if rung < 2:
                skip("a guided step takes two evaluations")
            teacher = session.networks["teacher"]
            return sample(teacher, batch, rung // 2, session.rng, None, schedule_of(teacher), outside=self.guidance)
        student = session.networks["student"]
        if self.arm == "folded":
            return follow(student, batch, rung, self.guidance, schedule_of(student))
        return sample(student, batch, rung, session.rng, self.guidance, schedule_of(student))


# --- training --------------------------------------------------------------------------------------------------------


def folded_student(session: Session, updates: int) -> dict[str, Tensor]:
    """A student that predicts in one evaluation what the guided teacher does in two."""
    student = session.clone("teacher")
    student.words.requires_grad_(False)
    fold(session, student, updates)
    return student.state_dict()


def every_step_student(session: Session, updates: int) -> dict[str, Tensor]:
    """As `lcm_student`, but on the grid of all timesteps."""
    student = session.clone("teacher")
    student.words.requires_grad_(False)
    distil(session, student, updates, grid=schedule_of(student).steps)
    return student.state_dict()


def finetuned_student(session: Session, first: int, updates: int) -> dict[str, Tensor]:
    """`student_of_base`, trained on with the pictures of the task and no teacher."""
    student = session.clone("base")
    student.load_state_dict(session.once(student_of_base, first))
    student.words.requires_grad_(False)
    distil(session, student, updates, ahead=None)
    return student.state_dict()
