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


class DDT(Method):
    """DDT: a diffusion transformer split into an encoder, which may be left out in some steps, and a decoder.

    The encoder (4 of 6 blocks) turns x_t, time and class into z, the decoder draws the velocity from x_t and z, by which
    each of its tokens is modulated (equations 2 to 5):

        z_t = Encoder(x_t, t, y),   v_t = Decoder(x_t, t, z_t)
        loss = |v_t - (eps - x0)|^2 + 0.5 (1 - cos(h(encoder block 2), r(x0)))

    where r are features of a self-supervised encoder of clean images. z changes slowly from step to step, so that half
    of the steps keep the z of an earlier one and run the decoder alone. Which ones is found by dynamic programming: the
    recomputed steps maximise the sum over all steps of the mean cosine between a step's own z and the one it is given,
    S_ij, measured on 64 trajectories in prepare (section 4.3, equations 6 to 8). `ddt_fifth` leaves out more.

    Differs from the paper: learned positions instead of rotary ones and layer norms instead of root mean squares; the
    features r come from a small convolutional network trained to fill in blanked patches, in place of DINOv2; no
    guidance. A step costs one evaluation of the rung with or without its encoder: what sharing saves shows in FLOPs.
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
    baselines = ("ddt_every_step", "ddt_uniform")
    claims = (
        Claim(
            "fd[ddt,16] <= 1.1 * fd[ddt_every_step,16] and flops[ddt,16] < 0.75 * flops[ddt_every_step,16]",
            says="with the encoder in half of the steps the images are as good, for less than three quarters of the cost",
        ),
        Claim(
            "fd[ddt,50] <= 1.1 * fd[ddt_every_step,50] and flops[ddt,50] < 0.75 * flops[ddt_every_step,50]",
            says="the same with 50 steps",
        ),
    )

    shared = 2  # steps for each run of the encoder

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
