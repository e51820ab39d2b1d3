from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.shades import finetune_v, sample_v, signal_of


class ZeroTerminalSNRGuided(Method):
    """Zero terminal SNR with rescaled guidance: strong guidance without overexposure.

    Once the model may predict any brightness, strong classifier-free guidance overshoots the range of the data. The guided
    prediction is scaled back to the deviation of the conditional one, and mixed with itself unscaled as full scaling looks
    too plain (equations 14 to 16):

        x_cfg = x_null + w (x_cond - x_null)
        x_rs  = x_cfg std(x_cond) / std(x_cfg)
        output = phi x_rs + (1 - phi) x_cfg,   phi = 0.7

    x stands for what the network predicts, v. Schedule, training and grid are those of `zero_terminal_snr`; w is 5. A
    guided step evaluates two rows, so the rung pays for half as many steps. `zero_terminal_snr_unscaled` has phi = 0.

    What limits it here: scoring clamps images to the range of the data, and overexposure beyond that range, which rescaling
    repairs, is then not seen.
    """

    paper = Paper(
        id="zero_terminal_snr",
        title="Common Diffusion Noise Schedules and Sample Steps are Flawed",
        authors="Lin, Liu, Li, Yang",
        year=2023,
        arxiv="2305.08891",
    )
    tasks = ("class_to_image/shades",)
    baselines = ("zero_terminal_snr_unscaled", "zero_terminal_snr")
    claims = (
        Claim(
            "fd[zero_terminal_snr_guided,50] < fd[zero_terminal_snr_unscaled,50]",
            says="rescaled guidance keeps to the data better than plain guidance of the same strength",
        ),
    )

    guidance, share = 5.0, 0.7

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
