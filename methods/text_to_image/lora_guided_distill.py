"""LoRA-enhanced distillation: guidance is folded into low-rank adapters, beside weights that teacher and student share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.adapters import ALPHA, RANK, adapt, merge, tensors
from stepmark.tracks.text_to_image.consistency import fold, follow
from stepmark.tracks.text_to_image.students import UPDATES

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what is adapted
TOLD = "time_embedding.cond_proj.weight"  # what takes in the guidance scale; zero in the teacher


class LoRAGuidedDistill(Method):
    """LoRA-enhanced distillation: one evaluation a step instead of the two of classifier-free guidance, by adapters alone.

    Distillation of guidance (Meng et al. 2023, stage 1) keeps a teacher and a whole student that learns. Here the student is the
    teacher itself with low-rank matrices beside the frozen weights of all attention projections,

        W x + (alpha / r) B A x,      B = 0 at first, r = alpha = 8

    told the guidance scale w by an embedding of sines and cosines, and one further matrix that takes it in. It learns, on
    pictures noised to any time and for w uniform in [2, 5],

        loss = |eps_student(x_t, t, c, w) - (eps(x_t, t) + w (eps(x_t, t, c) - eps(x_t, t)))|^2

    in 240 updates of 32 latents. Nothing but the adapters and that matrix, 4 % of the parameters, has a gradient or a state of
    the optimiser, and the weights W are there once. For sampling the adapters are merged into them: DDIM with w = 3, one
    evaluation a step. `lora_same_steps` makes as many steps as the guided sampler would, with half of the evaluations.

    Controls: `lcm_folded` trains all weights to the same loss, on the same data, as long; `ddim_unguided` is the teacher
    with as many evaluations and no guidance.

    There is no code of the paper, and it does not say which rank it takes; r = 8, the layers and the rate of 2e-3 are choices
    made here. Adapters are kept by the names and in the shapes of the library PEFT.

    What limits it here: memory while training is not measured, only what a call of the sampler holds beside the weights. With
    64 channels rank 8 is an eighth of the whole.
    """

    paper = Paper(
        id="lora_guided_distill",
        title="LoRA-Enhanced Distillation on Guided Diffusion Models",
        authors="Golnari",
        year=2023,
        arxiv="2312.06899",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("ddim_guided", "ddim_unguided", "lcm_folded")
    trainings = 3
    claims = (
        Claim(
            "caption[lora_same_steps,*] >= caption[ddim_guided,*] - 0.05 and fd[lora_same_steps,*] <= 1.1 * fd[ddim_guided,*] "
            "and nfe[lora_same_steps,*] <= 0.5 * nfe[ddim_guided,*] "
            "and latency_ms[lora_same_steps,*] <= 0.6 * latency_ms[ddim_guided,*] "
            "and caption[lora_guided_distill,*] > caption[ddim_unguided,*]",
            says="as many steps take half the evaluations and little more than half the time, pictures and captions are what "
            "they were, and it is guidance that was learned",
            headline=True,
        ),
        Claim(
            "memory_mib[lora_same_steps,*] <= 0.55 * memory_mib[ddim_guided,*]",
            says="and little more than half the memory",
            headline=True,
            setting="what a call holds beside the weights; the paper's figure includes the weights and the training",
        ),
        Claim(
            "caption[lora_guided_distill,*] >= caption[lcm_folded,*] - 0.02 "
            "and fd[lora_guided_distill,*] <= 1.05 * fd[lcm_folded,*]",
            says="adapters do what training all weights as long does",
        ),
    )

    halved = False
    updates, rate = UPDATES, 2e-3
    variants = (
        Variant(
            "lora_same_steps",
            says="as many steps as the guided sampler makes, with half of its evaluations",
            halved=True,
            baselines=("ddim_guided", "lora_guided_distill"),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Train the adapters and put them into the student's weights; returns them."""
        student: Any = session.networks["student"]
        found = dict(session.once(folded_adapters, session.scale(self.updates, 2), self.rate))
        merge(student, {name: value for name, value in found.items() if name != TOLD})
        with torch.no_grad():
            student.unet.get_parameter(TOLD).copy_(found[TOLD])
        return found

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student, steps = session.networks["student"], rung // 2 if self.halved else rung
        if steps < 1:
            skip("a guided step takes two evaluations")
        return follow(student, batch, steps, GUIDANCE, schedule_of(student))


def adapted(session: Session) -> Any:
    """The teacher with untrained adapters, of which only they and the matrix for the scale can learn."""
    student: Any = adapt(session.clone("teacher"), session.rng, RANK, ALPHA, targets=ATTENTION)
    student.unet.get_parameter(TOLD).requires_grad_(True)
    return student


def folded_adapters(session: Session, updates: int, rate: float) -> dict[str, Tensor]:
    """Adapters that fold guidance in, by PEFT's names, and the matrix for the scale."""
    student = adapted(session)
    fold(session, student, updates, rate=rate)
    return tensors(student) | {TOLD: student.unet.get_parameter(TOLD).detach()}
