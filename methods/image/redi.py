from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step


def combination(query: Tensor, keys: Tensor, values: Tensor, neighbours: int) -> Tensor:
    """Values [B, d] for queries [B, d]: least squares of a query on its nearest keys, the same weights on their values.

    keys and values [K, d]. The weights need not be convex. No more than d neighbours are used, so that they are unique;
    where the query is one of the keys, its value is returned.
    """
    nearest = torch.cdist(query, keys).topk(min(neighbours, *keys.shape), largest=False).indices
    near = keys[nearest].mT.double()
    # A little ridge: neighbours of one class are almost collinear.
    gram = near.mT @ near
    ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(gram.shape[-1]).to(gram)
    weights = torch.linalg.solve(gram + ridge, near.mT @ query.double()[:, :, None])
    return (values[nearest].mT.double() @ weights)[:, :, 0].to(query.dtype)


class ReDi(Method):
    """ReDi: skip the middle of a trajectory by looking up trajectories that began alike.

    Offline the S-step sampler runs from many noises, and of every trajectory a key (the state after k steps) and a value
    (the state after v > k steps) are stored (algorithm 1). Online the first k steps are taken; the partial state is
    written as a linear combination of the H nearest keys by least squares, the same combination of their values stands
    for the state after v steps, and the remaining S - v steps are taken (algorithm 2). That costs k + S - v evaluations
    instead of S; the error of the jump is bounded by the distance to the keys (theorem 1).

    Here S is twice the rung, k half of it and v three quarters of S, so that a rung buys the grid of a sampler of twice
    its steps. Neighbours are looked for among trajectories of the same label. One evaluation leaves nothing to skip:
    rung 1 is Euler's, and so are rungs whose trajectories were not stored.

    Differs from the paper: the sampler is Euler's on a flow instead of PNDM on a diffusion; ten neighbours with a trace of
    ridge; and every stored trajectory starts from a noise of its own, as a query does, where the authors' knowledge base
    starts all prompts from one noise. Keys then differ by what the prompts say alone.

    What limits it here: soon after its start a state is mostly its own noise. Ten neighbours with other noises, even the
    nearest of some hundreds, span ten of the 64 directions of an image, and what a query has in the others is lost in the
    jump. Points of the plane, which two neighbours span, do not have this limit.
    """

    paper = Paper(
        id="redi",
        title="ReDi: Efficient Learning-Free Diffusion Inference via Trajectory Retrieval",
        authors="Zhang, Yang, Wang, Li",
        year=2023,
        arxiv="2302.02285",
        code="zkx06111/ReDiffusion",
    )
    tasks = ("class_to_image/digits_flow", "class_to_image/digits_flow_b", "sampling/mixtures_flow")
    baselines = ("euler",)
    claims = (
        Claim(
            "fd[redi,8] <= 1.1 * fd[euler,16]",
            says="eight evaluations within 10 % of the sixteen of the sampler that is cut short",
        ),
        Claim("fd[redi,8] < fd[euler,8]", says="and better than as many without retrieval"),
    )

    trajectories, neighbours, most = 2000, 10, 16

    @staticmethod
    def cuts(rung: int) -> tuple[int, int, int]:
        """S, k and v: steps of the whole sampler, those before the jump, and the step that it lands on."""
        return 2 * rung, rung // 2, 2 * rung - (rung - rung // 2)

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """{"key_<rung>", "value_<rung>": states [K, d], "condition": labels [K]} for the rungs up to 16."""
        data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
        n = session.scale(self.trajectories, 40)
        condition = label[torch.randint(len(label), (n,), generator=session.rng, device=session.device)]
        noise = torch.randn(n, *data.shape[1:], generator=session.rng, device=session.device)
        state = {"condition": condition}
        denoise = Denoiser(session.networks["teacher"], condition)
        wanted = [rung for rung in session.task.rungs if 2 <= rung <= self.most]
        for rung in session.progress(session.scale(wanted, [2, 4]), "trajectories"):
            steps, k, v = self.cuts(rung)
            x = noise
            with torch.no_grad():
                for i, (t, s) in enumerate(list(pairwise(uniform_times(steps)))[:v]):
                    if i == k:
                        state[f"key_{rung}"] = x.flatten(1)
                    x = euler_step(x, denoise.output(x, t), t, s)
            state[f"value_{rung}"] = x.flatten(1)
        return state

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        condition, x, state = batch["condition"], batch["noise"], session.state
        denoise = Denoiser(session.networks["teacher"], condition)
        stored = f"key_{rung}" in state
        steps, k, v = self.cuts(rung) if stored else (rung, rung, rung)
        times = list(pairwise(uniform_times(steps)))
        for t, s in times[:k]:
            x = euler_step(x, denoise.output(x, t), t, s)
        if stored:
            landed = torch.empty_like(x).flatten(1)
            for kind in condition.unique():
                own, known = condition == kind, state["condition"] == kind
                keys, values = (state[f"{name}_{rung}"][known].to(x) for name in ("key", "value"))
                landed[own] = combination(x[own].flatten(1), keys, values, self.neighbours)
            x = landed.view_as(x)
        for t, s in times[v:]:
            x = euler_step(x, denoise.output(x, t), t, s)
        return x
