from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import quadratic_times, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, heun_step
from stepmark.tracks.image.training import fit


class JumpMLP(nn.Module):
    """Mean velocity from time t to s < t at points of the plane: x_s = x_t - (t - s) u(x_t, t, s).

    aware: whether it is told s. Without it, u is one direction for every s: the mean of the exact ones over s, as they are
        met.
    """

    def __init__(self, kinds: int, aware: bool, width: int = 128) -> None:
        super().__init__()
        self.aware = aware
        self.table = nn.Embedding(kinds, 16)
        sizes = (2 + 64 + 16, width, width, width)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        """u [B, 2] at x [B, 2], t and s float [B], condition int64 [B]."""
        times = torch.stack([t, s if self.aware else torch.zeros_like(s)], 1)
        angle = times[:, :, None] * torch.logspace(0, 2, 16, device=x.device, dtype=x.dtype)
        waves = torch.cat([angle.sin(), angle.cos()], 2).flatten(1)
        return self.body(torch.cat([x, waves, self.table(condition)], 1))


@torch.no_grad()
def take_jumps(network: nn.Module, x: Tensor, condition: Tensor, times: Sequence[float]) -> Tensor:
    """From noise through `times`, one evaluation of u for each jump."""
    for t, s in pairwise(times):
        now, then = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, s))
        x = x - (t - s) * network(x, now, then, condition)
    return x


@torch.no_grad()
def flow_paths(denoise: Denoiser, noise: Tensor, times: Sequence[float]) -> Tensor:
    """States [len(times), B, ...] of the exact ODE of a flow at each of `times`, by Heun's method, the last step DDIM's."""
    states = [noise]
    for t, s in pairwise(times):
        x = states[-1]
        states.append(heun_step(denoise, x, t, s) if s > 0 else ddim_step(denoise.schedule, *denoise(x, t), s))
    return torch.stack(states)


def fit_jumps(session: Session, network: nn.Module, steps: int = 6000, batch: int = 1024) -> None:
    """Regress u on the mean velocity (x_t - x_s) / (t - s) between random times of the teacher's own trajectories."""
    rng, device, labels = session.rng, session.device, session.train["condition"].to(session.device)
    n = session.scale(8000, 64)
    condition = labels[torch.randint(len(labels), (n,), generator=rng, device=device)]
    noise = torch.randn(n, 2, generator=rng, device=device)
    grid = quadratic_times(session.scale(96, 8))
    paths = flow_paths(Denoiser(session.networks["teacher"], condition), noise.double(), grid).float()
    times = torch.tensor(grid, dtype=torch.float32, device=device)

    def loss() -> Tensor:
        item = torch.randint(n, (batch,), generator=rng, device=device)
        first, second = torch.randint(len(times) - 1, (2, batch), generator=rng, device=device)
        early, late = torch.minimum(first, second), torch.maximum(first, second) + 1
        t, s, x = times[early], times[late], paths[early, item]
        target = (x - paths[late, item]) / (t - s)[:, None]
        return (network(x, t, s, condition[item]) - target).square().mean()

    fit(session, network, loss, session.scale(steps, 4), rate=2e-3, ema=0.997)


class InferenceFirst(Method):
    """Inference first: a network that is told where to jump, against one that is not.

    A DDIM step from t to s moves along a direction that the network finds from x_t and t alone, x_s = x_t - (t - s) u(x_t, t)
    on straight paths, so the outcomes for all s lie on one line through x_t. Where trajectories bend, the exact jump

        x_t - x_s = (t - s) u*(x_t, t, s),   u* = 1 / (t - s) times the integral of v from s to t

    needs another direction for each s. However good the network is, it then takes many steps: a limit of the inference
    process, not of training. The paper's conclusion is to design the process first, here to give the network s as well,
    and to find a training for it afterwards, which leads to inductive moment matching (`imm`).

    This runs the argument alone. Two perceptrons of equal size learn u* by regression on the teacher's exact
    trajectories, with equal data and updates; this one is told s, `imm_target_blind` is not: that one becomes the mean
    over s of the exact mean velocities, E_s[(x_t - x_s) / (t - s)], which is right for no s unless the trajectory is
    straight, and its jump is a DDIM step. It is trained for all s at once: on one fixed grid s is a function of t, and a
    blind network that is trained on that grid alone could be exact on it, which is not run. DDIM itself, `euler`, takes
    the direction that is right for s near t: it wins once the steps are short. One evaluation a jump, times equally
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
            "fd[imm,4] <= fd[imm_flow_matching,50]",
            says="trained by moment matching, four such jumps give images as good as more than ten times as many steps of flow "
            "matching",
            task="class_to_image/digits_flow",
            headline=True,
            setting="2500 updates, and r 128 times as far below t as in the paper",
        ),
        Claim(
            "sliced_w2[imm,2] <= 1.1 * sliced_w2[imm_flow_matching,32]",
            says="on points two such jumps are as good as more than ten times as many steps of flow matching",
            setting="a minute of training, and r 32 times as far below t as in the paper",
        ),
        Claim(
            "endpoint_error[imm_inference_first,*] < endpoint_error[imm_target_blind,*]",
            says="told where to jump, a network of equal size ends nearer to the exact solution than one that is trained for "
            "all targets at once, at every number of jumps",
        ),
        Claim(
            "endpoint_error[imm_inference_first,1..8] < endpoint_error[euler,1..8]",
            says="up to eight such jumps end nearer than as many DDIM steps of the teacher, whose velocity is exact",
        ),
    )

    aware = True  # whether the network is told where a jump ends
    variants = (
        Variant(
            "imm_target_blind",
            says="Target-blind jumps: a network that is trained for all targets at once and not told where a jump ends",
            aware=False,
            baselines=("euler",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"jumps": JumpMLP(1 + int(session.train["condition"].max()), self.aware)}

    def prepare(self, session: Session) -> None:
        fit_jumps(session, session.networks["jumps"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return take_jumps(session.networks["jumps"], batch["noise"], batch["condition"], uniform_times(rung))
