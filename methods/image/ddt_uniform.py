from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.decoupled import DecoupledDiT, fit_decoupled, sample_decoupled


class DDTUniform(Method):
    """DDT with uniform sharing: the encoder of the decoupled transformer runs in every other step.

    The network of `ddt`, trained in the same way; steps 0, 2, 4, ... recompute z, the others keep that of the step before.
    `ddt` chooses its steps by dynamic programming; `ddt_uniform_fifth` leaves out more.
    """

    paper = Paper(
        id="ddt",
        title="DDT: Decoupled Diffusion Transformer",
        authors="Wang, Tian, Huang, Wang",
        year=2025,
        arxiv="2504.05741",
        code="MCG-NJU/DDT",
    )
    tasks = ("class_to_image/digits_dit",)
    baselines = ("ddt_every_step",)
    claims = (
        Claim(
            "fd[ddt_uniform,16] <= 1.25 * fd[ddt_every_step,16] and flops[ddt_uniform,16] < 0.75 * flops[ddt_every_step,16]",
            says="every other encoder can be left out at little loss, for less than three quarters of the cost",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        data, kinds = session.train["x0"], 1 + int(session.train["condition"].max())
        return {"ddt": DecoupledDiT(data.shape[-1], data.shape[1], kinds)}

    def prepare(self, session: Session) -> None:
        fit_decoupled(session, session.networks["ddt"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, condition = session.networks["ddt"], batch["condition"]
        return sample_decoupled(network, batch["noise"], condition, rung, range(0, rung, 2))[0]
