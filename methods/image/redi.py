from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.captions import captions, start_noise
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step


def combination(query: Tensor, keys: Tensor, values: Tensor, neighbours: int) -> Tensor:
    """Values [B, d] for queries [B, d]: least squares of a query on its nearest keys, the same weights on their values.

    keys and values [K, d]. The weights need not be convex, nor sum to one: with one neighbour its value is scaled. No more
    than d neighbours are used, so that they are unique; where the query is one of the keys, its value is returned.
    """
    nearest = torch.cdist(query, keys).topk(min(neighbours, *keys.shape), largest=False).indices
    near = keys[nearest].mT.double()
    # A little ridge: neighbours from one noise are almost collinear.
    gram = near.mT @ near
    ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(gram.shape[-1]).to(gram)
    weights = torch.linalg.solve(gram + ridge, near.mT @ query.double()[:, :, None])
    return (values[nearest].mT.double() @ weights)[:, :, 0].to(query.dtype)


class ReDi(Method):
    """ReDi: skip the middle of a trajectory by looking up a trajectory that began alike.

    Offline the S-step sampler runs for many prompts from one start noise, and of every trajectory a key (the state after
    k steps) and a value (the state after v > k steps) are stored (algorithm 1). Online, for a new prompt and the same
    noise, the first k steps are taken; the partial state is written as a linear combination of the H nearest keys by
    least squares, the same combination of their values stands for the state after v steps, and the remaining S - v steps
    are taken with the new prompt (algorithm 2). That costs k + S - v evaluations instead of S; the error of the jump is
    bounded by the distance to the keys (theorem 1).

    As in the authors' experiments one start noise serves the knowledge base and all queries, and H = 1. S is twice the
    rung, so that half of the evaluations are saved, and k a fifth of S (theirs: 10 of 50). `redi_ten` combines ten
    neighbours. `redi_small` stores 200 trajectories. `redi_copy` is the control: it returns the end of the nearest
    trajectory, a picture for another prompt, after the first k steps alone; what a jump is worth has to be more than that.
    The whole sampler of the headline, of twice the rung, is on the ladder for all rungs but the last.

    What limits it here: captions are a continuum of five dimensions, and the nearest of two thousand is still another
    picture. The jump is worth more than the neighbour's picture, and up to eight evaluations more than as many plain steps;
    but what it misses by stays while plain steps come nearer with every further one, so that sixteen of them are ahead, and
    the whole sampler is throughout. Ten neighbours fit a query better than the nearest alone does and land nearer at every
    budget, nearer than sixteen plain steps too, though not as near as the whole sampler where that is on the ladder.

    Differs from the paper: the sampler is Euler's on a flow instead of PNDM on a diffusion; prompts are blends of shapes
    and colours, two thousand of them stored; quality is the distance to where the flow leads under the prompt.
    """

    paper = Paper(
        id="redi",
        title="ReDi: Efficient Learning-Free Diffusion Inference via Trajectory Retrieval",
        authors="Zhang, Yang, Wang, Li",
        year=2023,
        arxiv="2302.02285",
        code="zkx06111/ReDiffusion",
    )
    tasks = ("captions/shapes16",)
    baselines = ("euler", "redi_copy")
    claims = (
        Claim(
            "endpoint_error[redi,2] <= 1.1 * endpoint_error[euler,4] "
            "and endpoint_error[redi,4] <= 1.1 * endpoint_error[euler,8] "
            "and endpoint_error[redi,8] <= 1.1 * endpoint_error[euler,16]",
            says="half of the evaluations end within 10 % as near as all of the sampler that is cut short",
            headline=True,
            setting="2000 stored trajectories, there 82 800; and the distance to each picture's own end, where FID is lenient",
        ),
        Claim(
            "endpoint_error[redi,*] < endpoint_error[euler,*]",
            says="and nearer than as many without retrieval",
            setting="2000 stored trajectories, there 82 800; and the distance to each picture's own end, where FID is lenient",
        ),
        Claim(
            "endpoint_error[redi,*] < endpoint_error[redi_small,*]",
            says="the more trajectories are stored, the nearer: two thousand against two hundred",
        ),
        Claim(
            "endpoint_error[redi,4..16] < endpoint_error[redi_copy,4..16]",
            says="and than the picture of the prompt that began most alike",
        ),
    )

    trajectories, neighbours = 2000, 1
    copy = False  # jump to the end, with nothing left for the prompt itself
    variants = (
        Variant("redi_ten", says="Least squares on ten neighbours instead of the nearest alone", neighbours=10),
        Variant("redi_small", says="A tenth of the trajectories in the knowledge base", trajectories=200),
        Variant(
            "redi_copy",
            says="The end of the trajectory that began most alike, a picture for another prompt",
            copy=True,
            baselines=("euler",),
        ),
    )

    @staticmethod
    def cuts(rung: int) -> tuple[int, int, int]:
        """S, k and v: steps of the whole sampler, those before the jump, and the step that it lands on."""
        steps = 2 * rung
        k = max(1, round(steps / 5))
        return steps, k, steps - (rung - k)

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """{"key_<rung>", "value_<rung>": states [K, d]}."""
        n, rungs = session.scale((self.trajectories, session.task.rungs), (40, session.task.smoke_rungs))
        condition = captions(n, session.rng)
        noise = start_noise().to(session.device)
        state: dict[str, list[Tensor]] = {}
        for rung in session.progress(rungs, "trajectories"):
            steps, k, v = self.cuts(rung)
            last = steps if self.copy else v
            for part in condition.split(200):
                denoise, x = Denoiser(session.networks["teacher"], part), noise.expand(len(part), *noise.shape)
                with torch.no_grad():
                    for i, (t, s) in enumerate(list(pairwise(uniform_times(steps)))[:last]):
                        if i == k:
                            state.setdefault(f"key_{rung}", []).append(x.flatten(1))
                        x = euler_step(x, denoise.output(x, t), t, s)
                state.setdefault(f"value_{rung}", []).append(x.flatten(1))
        return {name: torch.cat(parts) for name, parts in state.items()}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        x, denoise = batch["noise"], Denoiser(session.networks["teacher"], batch["condition"])
        steps, k, v = self.cuts(rung)
        times = list(pairwise(uniform_times(steps)))
        for t, s in times[:k]:
            x = euler_step(x, denoise.output(x, t), t, s)
        keys, values = (session.state[f"{name}_{rung}"].to(x) for name in ("key", "value"))
        x = combination(x.flatten(1), keys, values, self.neighbours).view_as(x)
        for t, s in [] if self.copy else times[v:]:
            x = euler_step(x, denoise.output(x, t), t, s)
        return x
