from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.shades import finetune_flawed, flawed_signal, sample_v


class TrailingFinetuned(Method):
    """The trailing grid with a model that was fine-tuned further, but on the flawed schedule.

    What `zero_terminal_snr` is without zero terminal SNR: the same student, updates, prediction of v and grid, on the
    schedule whose last timestep still shows some of the picture. Whatever both gain over the teacher is due to further
    training.
    """

    paper = Paper(
        id="zero_terminal_snr",
        title="Common Diffusion Noise Schedules and Sample Steps are Flawed",
        authors="Lin, Liu, Li, Yang",
        year=2023,
        arxiv="2305.08891",
    )
    tasks = ("class_to_image/shades",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        finetune_flawed(session, session.networks["student"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        signal = flawed_signal(session.networks["teacher"])
        return sample_v(session.networks["student"], signal, batch["noise"], batch["condition"], rung, 1.0, 0.0)
