from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.decoupled import (
    DecoupledDiT,
    chosen_steps,
    fit_decoupled,
    sample_decoupled,
    state_similarity,
)


class DDTFifth(Method):
    """DDT with its encoder in a fifth of the steps, those that dynamic programming finds.

    `ddt` with K = N / 5 runs of the encoder in N steps, a ratio of sharing of 0.8, where it begins to matter which steps
    they are. z is kept from the last of them; the K steps maximise the sum over all steps of the mean cosine between a
    step's own z and the one it is given (section 4.3, equations 6 to 8). Network and training are those of `ddt`.

    With fewer than ten steps K is 1: the z of the first step serves all of them.

    What limits it here: images of sixteen tokens have a z that changes so little between steps that it is nearly all the
    same which of them renew it; the cosine of z is then a weak guide to what a stale one costs the image.
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
    baselines = ("ddt_every_step", "ddt_uniform_fifth")
    claims = (
        Claim(
            "fd[ddt_fifth,50] <= fd[ddt_uniform_fifth,50]",
            says="where four of five encoders are left out, found steps are no worse than equal ones",
        ),
        Claim(
            "fd[ddt_fifth,50] <= 1.1 * fd[ddt_every_step,50] and flops[ddt_fifth,50] < 0.55 * flops[ddt_every_step,50]",
            says="and the images are within 10 % of those of all encoders, for little more than half of the cost",
        ),
    )

    shared = 5  # steps for each run of the encoder

    def networks(self, session: Session) -> dict[str, nn.Module]:
        data, kinds = session.train["x0"], 1 + int(session.train["condition"].max())
        return {"ddt": DecoupledDiT(data.shape[-1], data.shape[1], kinds)}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        network = session.networks["ddt"]
        fit_decoupled(session, network)
        rungs = session.scale(session.task.rungs, session.task.smoke_rungs)
        similar = {rung: state_similarity(session, network, rung) for rung in rungs}
        return {f"steps_{n}": torch.tensor(chosen_steps(s, max(1, n // self.shared))) for n, s in similar.items()}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        found = session.state.get(f"steps_{rung}")
        steps = range(rung) if found is None else found.tolist()
        return sample_decoupled(session.networks["ddt"], batch["noise"], batch["condition"], rung, steps)[0]
