from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image import DecoupledDiT, fit_decoupled, sample_decoupled, state_similarity


def chosen_steps(similarity: Tensor, count: int) -> list[int]:
    """The `count` steps to recompute at, step 0 among them, that maximise the sum over steps i of S[i, last one <= i].

    Dynamic programming (section 3.5): best[k][i] is the least loss of the first i steps with k recomputations, the last
    of them at some j < i, so that best[k][i] = min over j of best[k-1][j] + sum of 1 - S[l, j] for l = j .. i - 1.
    """
    loss = (1 - similarity.double()).tolist()
    steps, infinite = len(loss), float("inf")
    spans = [[0.0] * (steps + 1) for _ in range(steps)]  # spans[j][i]: steps j .. i - 1 use the z of step j
    for j in range(steps):
        for i in range(j, steps):
            spans[j][i + 1] = spans[j][i] + loss[i][j]
    best = [[0.0] + [infinite] * steps]
    origin: list[list[int]] = []
    for _ in range(count):
        reached = [
            min((best[-1][j] + spans[j][i], j) for j in range(i)) if i else (infinite, 0) for i in range(steps + 1)
        ]
        best.append([value for value, _ in reached])
        origin.append([j for _, j in reached])
    chosen, end = [], steps
    for places in reversed(origin):
        end = places[end]
        chosen.append(end)
    return chosen[::-1]


class DDT(Method):
    """DDT: a diffusion transformer split into an encoder, which may be left out in some steps, and a decoder.

    The encoder (4 of 6 blocks) turns x_t, time and class into z, the decoder draws the velocity from x_t and z, by which
    each of its tokens is modulated (equations 9 to 12):

        z_t = Encoder(x_t, t, y),   v_t = Decoder(x_t, t, z_t)
        loss = |v_t - (eps - x0)|^2 + 0.5 (1 - cos(h(encoder block 2), r(x0)))

    where r are features of a self-supervised encoder of clean images. z changes slowly from step to step, so that half
    of the steps keep the z of an earlier one and run the decoder alone. Which ones is found by dynamic programming: the
    recomputed steps maximise the sum over all steps of the mean cosine between a step's own z and the one it is given,
    S_ij, measured on 64 trajectories in prepare (section 3.5).

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
        Claim(
            "fd[ddt,16] <= fd[ddt_uniform,16]", says="steps found by dynamic programming are no worse than equal ones"
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        data, kinds = session.train["x0"], 1 + int(session.train["condition"].max())
        return {"ddt": DecoupledDiT(data.shape[-1], data.shape[1], kinds)}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        network = session.networks["ddt"]
        fit_decoupled(session, network)
        rungs = session.scale(session.task.rungs, session.task.smoke_rungs)
        similar = {rung: state_similarity(session, network, rung) for rung in rungs}
        return {f"steps_{n}": torch.tensor(chosen_steps(s, max(1, n // 2))) for n, s in similar.items()}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        found = session.state.get(f"steps_{rung}")
        steps = range(rung) if found is None else found.tolist()
        return sample_decoupled(session.networks["ddt"], batch["noise"], batch["condition"], rung, steps)[0]
