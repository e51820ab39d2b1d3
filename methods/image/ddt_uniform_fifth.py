from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.decoupled import DecoupledDiT, fit_decoupled, sample_decoupled


class DDTUniformFifth(Method):
    """DDT with its encoder in a fifth of the steps, at equal distances.

    The network of `ddt`, trained in the same way; of N steps those numbered floor(i N / K) with K = N / 5 recompute z, the
    others keep it. What choosing as many steps by dynamic programming, `ddt_fifth`, is measured against.
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

    shared = 5  # steps for each run of the encoder

    def networks(self, session: Session) -> dict[str, nn.Module]:
        data, kinds = session.train["x0"], 1 + int(session.train["condition"].max())
        return {"ddt": DecoupledDiT(data.shape[-1], data.shape[1], kinds)}

    def prepare(self, session: Session) -> None:
        fit_decoupled(session, session.networks["ddt"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, condition = session.networks["ddt"], batch["condition"]
        runs = max(1, rung // self.shared)
        steps = [i * rung // runs for i in range(runs)]
        return sample_decoupled(network, batch["noise"], condition, rung, steps)[0]
