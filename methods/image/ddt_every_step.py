from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.decoupled import DecoupledDiT, fit_decoupled, sample_decoupled


class DDTEveryStep(Method):
    """DDT without sharing: the decoupled transformer with its encoder in every step.

    The network of `ddt`, trained in the same way, and Euler steps of z_t = Encoder(x_t, t, y), v_t = Decoder(x_t, t, z_t).
    What sharing z between steps is measured against; itself it is measured against a plain diffusion transformer.
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
    baselines = ("euler",)
    claims = (
        Claim(
            "fd[ddt_every_step,16] < fd[euler,16]",
            says="it is better than a diffusion transformer of as many blocks, though trained for half of the steps",
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
        return sample_decoupled(network, batch["noise"], condition, rung, range(rung))[0]
