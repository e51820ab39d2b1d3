from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.jumps import JumpMLP, fit_jumps, take_jumps
from stepmark.tracks.image.schedules import uniform_times


class TargetBlind(Method):
    """Target-blind jumps: the best that a network can do which is not told where a jump ends.

    The counterpart of `imm_inference_first`: the same perceptron, data and updates, but u(x_t, t) without s. By regression
    it becomes the mean over s of the exact mean velocities, E_s[(x_t - x_s) / (t - s)], which is right for no s unless the
    trajectory is straight. A jump is a DDIM step, x_s = x_t - (t - s) u(x_t, t), one evaluation each.
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
    baselines = ("euler",)
    claims = (
        Claim(
            "endpoint_error[imm_target_blind,16] < 0.5 * endpoint_error[imm_target_blind,1]",
            says="what one jump cannot express, many small ones can: a sampler of this kind needs its steps",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"jumps": JumpMLP(1 + int(session.train["condition"].max()), aware=False)}

    def prepare(self, session: Session) -> None:
        fit_jumps(session, session.networks["jumps"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return take_jumps(session.networks["jumps"], batch["noise"], batch["condition"], uniform_times(rung))
