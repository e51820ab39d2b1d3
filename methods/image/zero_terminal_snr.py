from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.shades import finetune_v, sample_v, signal_of


class ZeroTerminalSNR(Method):
    """Zero terminal SNR: a model fine-tuned so that its last timestep is the pure noise that sampling starts from.

    On common schedules sqrt(abar_T) > 0: the last training timestep still shows a little of the picture, its brightness
    most of all. Sampling starts from noise that shows nothing, which the model takes for a picture of medium brightness.
    Three fixes, in `bench/stepmark/tracks/image/shades.py`:

        s'_t = (s_t - s_T) s_1 / (s_1 - s_T),   s_t = sqrt(abar_t)           (algorithm 1: s'_T = 0, s'_1 = s_1)
        loss = |v_theta(x_t, t) - v|^2,   v = s'_t eps - (1 - s'_t^2)^{1/2} x0    (equation 9)
        timesteps round(T - i T / S) - 1,   i = 0..S-1                        (table 2, "trailing")

    v because at s'_T = 0 noise prediction is trivial and says nothing of x0. The student starts from the teacher, which
    predicts eps on the flawed schedule, and samples with DDIM; one evaluation a step. The fourth fix, guidance that is
    scaled back, is `zero_terminal_snr_guided`.

    Differs from the paper: pictures instead of latents, of 64 values, so the flawed schedule keeps more signal at its end;
    brightness is not named by the condition.
    """

    paper = Paper(
        id="zero_terminal_snr",
        title="Common Diffusion Noise Schedules and Sample Steps are Flawed",
        authors="Lin, Liu, Li, Yang",
        year=2023,
        arxiv="2305.08891",
    )
    tasks = ("class_to_image/shades",)
    baselines = (
        "ddim_leading",
        "ddim",
    )
    claims = (
        Claim(
            "w1_brightness[zero_terminal_snr,25] <= 0.5 * w1_brightness[ddim_leading,25]",
            says="brightness is at most half as far from that of the data as with the flawed schedule and grid",
        ),
        Claim(
            "w1_brightness[zero_terminal_snr,25] < w1_brightness[trailing_finetuned,25] "
            "and fd[zero_terminal_snr,25] < fd[trailing_finetuned,25]",
            says="grid and further training alone do not mend it: the schedule must be fixed too",
        ),
    )

    guidance, share = 1.0, 0.0

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        finetune_v(session, session.networks["student"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        steps = rung if self.guidance == 1.0 else rung // 2
        signal = signal_of(session.networks["teacher"])
        student, x, condition = session.networks["student"], batch["noise"], batch["condition"]
        return sample_v(student, signal, x, condition, steps, self.guidance, self.share)
