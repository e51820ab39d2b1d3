from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Method
from stepmark.session import Session
from stepmark.tracks.image.shades import finetune_v, sample_v, signal_of


class ZeroTerminalSNRUnscaled(Method):
    """Zero terminal SNR with plain classifier-free guidance: what `zero_terminal_snr_guided` is compared with.

    The same student, grid and strength of guidance, w = 5, with nothing scaled back:

        v = v_null + w (v_cond - v_null)

    Two rows a step, half as many steps as the rung counts.
    """

    tasks = ("class_to_image/shades",)
    baselines = ("zero_terminal_snr",)

    guidance, share = 5.0, 0.0

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
