from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.jumps import JumpMLP, fit_jumps, take_jumps
from stepmark.tracks.image.schedules import uniform_times


class InferenceFirst(Method):
    """Inference first: a network that is told where to jump, against one that is not.

    A DDIM step from t to s moves along a direction that the network finds from x_t and t alone, x_s = x_t - (t - s) u(x_t, t)
    on straight paths, so the outcomes for all s lie on one line through x_t. Where trajectories bend, the exact jump

        x_t - x_s = (t - s) u*(x_t, t, s),   u* = 1 / (t - s) times the integral of v from s to t

    needs another direction for each s. However good the network is, it then takes many steps: a limit of the inference
    process, not of training. The paper's conclusion is to design the process first, here to give the network s as well,
    and to find a training for it afterwards, which leads to inductive moment matching (`imm`).

    This runs the argument alone. Two perceptrons of equal size learn u* by regression on the teacher's exact trajectories,
    with equal data and updates; this one is told s, `imm_target_blind` is not. One evaluation a jump, times equally
    spaced.

    Differs from the paper: its figures are those of a network trained from scratch by moment matching, here `imm`, to which
    the claims of quality belong; regression on exact trajectories leaves only what a jump can express.
    """

    paper = Paper(
        id="imm_inference_first",
        title="Ideas in Inference-time Scaling can Benefit Generative Pre-training Algorithms",
        authors="Song, Zhou",
        year=2025,
        arxiv="2503.07154",
        code="lumalabs/imm",
    )
    tasks = ("sampling/mixtures_flow",)
    baselines = ("euler", "imm_target_blind")
    claims = (
        Claim(
            "endpoint_error[imm_inference_first,1] < 0.5 * endpoint_error[imm_target_blind,1] "
            "and endpoint_error[imm_inference_first,2] < 0.5 * endpoint_error[imm_target_blind,2]",
            says="told where to jump, one and two jumps end less than half as far from the exact solution",
        ),
        Claim(
            "sliced_w2[imm,2] <= 1.1 * sliced_w2[euler,32]",
            says="trained by moment matching, two such jumps are within 10 % of more than ten times as many steps",
        ),
        Claim(
            "sliced_w2[imm,2] < sliced_w2[imm_target_blind,2]",
            says="and moment matching from scratch, told s, is better at two jumps than exact targets without s",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"jumps": JumpMLP(1 + int(session.train["condition"].max()), aware=True)}

    def prepare(self, session: Session) -> None:
        fit_jumps(session, session.networks["jumps"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return take_jumps(session.networks["jumps"], batch["noise"], batch["condition"], uniform_times(rung))
