from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step
from stepmark.tracks.image.training import PointField, fit_coupled


def assign(cost: Tensor) -> Tensor:
    """For every row of a cost matrix [n, n] its column in the cheapest one-to-one assignment."""
    columns = linear_sum_assignment(cost.double().cpu().numpy())[1]
    return torch.as_tensor(columns, device=cost.device)


class OTCFM(Method):
    """Optimal-transport conditional flow matching: noise and data of a batch are paired at least squared distance.

    Flow matching on straight paths, where the noise of each datum comes from the cheapest assignment within a pool,

        min over permutations p of sum_j |x0_j - eps_p(j)|^2

    (algorithm 3). Paths hardly cross, so the learnt flow is nearly straight. The pairing knows nothing of conditions:
    with a network that is given them, the noise paired with one condition is no longer Gaussian, while sampling starts
    from Gaussian noise for every condition.

    Exact assignments of 512 points take the place of the paper's exact plans on a batch.
    """

    paper = Paper(
        id="ot_cfm",
        title="Improving and generalizing flow-based generative models with minibatch optimal transport",
        authors="Tong, Fatras, Malkin, Huguet, Zhang, Rector-Brooks, Wolf, Bengio",
        year=2024,
        arxiv="2302.00482",
        code="atong01/conditional-flow-matching",
    )
    tasks = ("sampling/mixtures_flow",)
    baselines = ("flow_matching_points",)
    claims = (
        Claim(
            "sliced_w2[ot_cfm,1..4] < sliced_w2[flow_matching_points,1..4]",
            says="with up to four steps better than with random pairs",
            headline=True,
            setting="its flows have no conditions; here the pairing ignores those of the data, which is the subject of C2OT",
        ),
    )

    steps, pool = 4000, 512

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"field": PointField(1 + int(session.train["condition"].max()))}

    def prepare(self, session: Session) -> None:
        steps, pool = session.scale((self.steps, self.pool), (8, 128))
        fit_coupled(session, session.networks["field"], self.couple, steps, pool=pool)

    @staticmethod
    def couple(eps: Tensor, x0: Tensor, condition: Tensor) -> Tensor:
        """For each datum the index of its noise."""
        return assign(torch.cdist(x0.flatten(1), eps.flatten(1)).square())

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise, x = Denoiser(session.networks["field"], batch["condition"]), batch["noise"]
        for t, s in pairwise(uniform_times(rung)):
            x = euler_step(x, denoise.output(x, t), t, s)
        return x
