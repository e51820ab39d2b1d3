"""AGD: small adapters on a frozen network learn what guidance does, so that it costs one evaluation a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.backbones.unet import TRAIN_TIMESTEPS
from stepmark.session import Session
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import add_noise, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.image.training import fit, sinusoids

States = tuple[Tensor, ...]  # x, network times, conditions, scales, and the guided outputs that are to be learned


class GuidanceAdapter(nn.Module):
    """Cross-attention from features [B, C, H, W] to tokens [B, n, width], one head; gives zero until it is trained."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, width, bias=False)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        score = self.query(features.flatten(2).mT) @ self.key(tokens).mT / math.sqrt(tokens.shape[-1])
        return self.out(score.softmax(-1) @ self.value(tokens)).mT.reshape(features.shape)


class AdaptedUNet(nn.Module):
    """A frozen UNet with a `GuidanceAdapter` behind every residual block, told time, condition and guidance scale.

    Called as network(x, t, condition, scale) with scale float [B]. Adapters share three small projections of the
    time and condition as the UNet itself embeds them, and of sinusoids of the scale.
    """

    def __init__(self, base: nn.Module, width: int = 10) -> None:
        super().__init__()
        from diffusers.models.resnet import ResnetBlock2D

        self.base, self.prediction = base.requires_grad_(False), base.prediction
        features = base.table.embedding_dim
        self.embed = nn.ModuleList(nn.Linear(n, width) for n in (features, features, 32))
        blocks = [part for part in base.unet.modules() if isinstance(part, ResnetBlock2D)]
        self.adapters = nn.ModuleList(GuidanceAdapter(block.out_channels, width) for block in blocks)
        self._tokens = torch.zeros(0)
        for block, adapter in zip(blocks, self.adapters, strict=True):
            block.register_forward_hook(
                lambda _, inputs, output, adapter=adapter: output + adapter(output, self._tokens)
            )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        base = self.base
        step = t * TRAIN_TIMESTEPS if self.prediction == "flow" else t
        time = base.unet.time_embedding(base.unet.time_proj(step))
        parts = (time, base.embed(base.table(condition)), sinusoids(scale, top=10.0))
        self._tokens = torch.stack([embed(part) for embed, part in zip(self.embed, parts, strict=True)], 1)
        return base(x, t, condition)


@torch.no_grad()
def guided_trajectories(network: nn.Module, noise: Tensor, condition: Tensor, scale: Tensor, steps: int) -> States:
    """States, network times, conditions, scales and guided outputs [steps * B, ...] that DDIM with guidance meets."""
    schedule, x, met = schedule_of(network), noise, []
    for t, s in pairwise(uniform_times(steps)):
        time = torch.full((len(x),), schedule.network_time(t), dtype=x.dtype, device=x.device)
        output = guided_rows(network, x, time, condition, scale)
        met.append((x, time, condition, scale, output))
        x = ddim_step(schedule, *to_x0_eps(schedule.prediction, output, x, schedule.alpha(t), schedule.sigma(t)), s)
    return tuple(torch.cat(part) for part in zip(*met, strict=True))


def states_of_sampling(session: Session, paths: int, steps: int, scales: tuple[float, float]) -> States:
    """What so many guided paths of so many steps meet, with classes of the training data and scales drawn uniformly."""
    rng, device, (low, high) = session.rng, session.device, scales
    label, shape = session.train["condition"].to(device), session.train["x0"].shape[1:]
    condition = label[torch.randint(len(label), (paths,), generator=rng, device=device)]
    noise = torch.randn(paths, *shape, generator=rng, device=device)
    scale = low + (high - low) * torch.rand(paths, generator=rng, device=device)
    parts = zip(*(part.split(100) for part in (noise, condition, scale)), strict=True)
    teacher = session.networks["teacher"]
    found = [guided_trajectories(teacher, *part, steps) for part in session.progress(list(parts))]
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


@torch.no_grad()
def states_of_data(session: Session, paths: int, steps: int, scales: tuple[float, float]) -> States:
    """As many states at the same times, of training images with noise, and the guided outputs there."""
    teacher, rng, device, (low, high) = session.networks["teacher"], session.rng, session.device, scales
    schedule = schedule_of(teacher)
    data, label = (session.train[key].to(device) for key in ("x0", "condition"))
    n = steps * paths
    pick = torch.randint(len(data), (n,), generator=rng, device=device)
    t = torch.tensor(uniform_times(steps)[:-1], device=device).repeat(paths)
    x = add_noise(schedule, data[pick], torch.randn(data[pick].shape, generator=rng, device=device), t)
    scale = low + (high - low) * torch.rand(n, generator=rng, device=device)
    states = (x, schedule.network_time(t), label[pick], scale)
    parts = zip(*(part.split(100) for part in states), strict=True)
    return (*states, torch.cat([guided_rows(teacher, *part) for part in session.progress(list(parts))]))


class AGD(Method):
    """Adapter guidance distillation: small adapters on a frozen network do the work of its unconditional branch.

    Guidance needs eps_w = eps(x_t) + w (eps(x_t, c) - eps(x_t)), two evaluations a step. Here the network stays as it is
    and gets adapters behind every residual block: cross-attention from the features (queries) to three tokens made of
    the time, the condition and the scale w,

        h <- h + O softmax(Q h K^T / sqrt(d)) V,      K, V of (time, condition, w)

    with O zero at first, so that training starts from the network itself. They have 4 % of its parameters. Training
    takes no images: guided trajectories are sampled with w uniform in [1, 6], every state is stored with its guided
    prediction, and the adapted network learns to predict the same in one evaluation,

        loss = |eps_adapted(x_t, t, c, w) - eps_w|^2.

    The inputs of training are thus the states that sampling meets, not noised data x_t = (1 - t) x0 + t eps, as earlier
    distillation of guidance takes them: guided sampling leaves the paths of noised data, and does so the further the
    larger w is. `agd_noised_data` is the ablation. Sampling is DDIM with the scale that
    the batch asks for, in the convention above, one evaluation a step.

    Differs from the paper: the network is a class-conditional UNet without cross-attention, so that adapters sit where
    time and class enter it; they read what a block gives, while the authors' read what it is given, in parallel to it, and
    add positional encodings to the tokens; the tokens' projections are shared by all adapters and linear in sinusoids of the
    scale, where the authors have a small perceptron in each; the network predicts a velocity, to which guidance applies
    alike; trajectories are DDIM's of 20 steps instead of ancestral sampling's of a thousand; 1500 updates at a rate of 2e-3,
    with weight decay and an average of the weights, instead of 5000 at 1e-4.

    For class-conditional networks the release adds an offset, made by a small perceptron from time, condition and scale, to
    what attention gives; the cross-attention here is its adapter for networks that are told a text.

    On this task guidance leads away from the data, the further the stronger it is: a student that follows it by half is
    nearer to them than guidance. So the headline asks for the ends of guidance beside the Frechet distance: less than half
    as far from them as without guidance, which a scale of 1.5 in place of 3 does not reach, from eight steps on, as with
    four guidance itself is further off. Two steps are left out of it: no budget of the paper is so small.

    What limits it here: 4 % of the parameters of a small network leave little room for all scales up to 6, and two
    minutes of training little time. The distance to the end of each path also counts every error on the way, which the
    Frechet distance of the paper forgives as long as the samples as a whole are right. That one is, from four steps on,
    about that of as many steps of guidance or less; but from eight steps on further ones hardly bring samples nearer to
    where guidance leads, and they stay more than half as far from there as without it. For the same evaluations
    guidance in half as many steps ends nearer from sixteen on.
    """

    paper = Paper(
        id="agd",
        title="Efficient Distillation of Classifier-Free Guidance using Adapters",
        authors="Jensen, Sadat",
        year=2025,
        arxiv="2503.07274",
        code="cristianpjensen/agd",
    )
    tasks = ("guided/digits_flow",)
    baselines = ("ddim_cfg", "agd_noised_data", "euler")
    trainings = 3
    claims = (
        Claim(
            "fd[agd,4] <= 1.05 * fd[ddim_cfg,8] and fd[agd,8] <= 1.05 * fd[ddim_cfg,16] "
            "and fd[agd,16] <= 1.05 * fd[ddim_cfg,32] and fd[agd,32] <= 1.05 * fd[ddim_cfg,64] "
            "and endpoint_error[agd,4..32] < endpoint_error[euler,4..32] "
            "and endpoint_error[agd,8..32] < 0.5 * endpoint_error[euler,64]",
            says="in four steps or more as near to the data as as many steps of guidance, which cost twice the evaluations, "
            "and nearer to its ends than without guidance: from eight steps on less than half as far",
            headline=True,
            setting="two minutes of training, and a distance for each path that the paper does not take",
        ),
        Claim(
            "endpoint_error[agd,2..64] < endpoint_error[ddim_cfg,2..64]",
            says="for the same evaluations they end nearer to where guidance leads than guidance in half as many steps",
            setting="two minutes of training, and a distance for each path that the paper does not take",
        ),
        Claim(
            "endpoint_error[agd,2..64] < endpoint_error[agd_noised_data,2..64] "
            "and fd[agd,2..64] < fd[agd_noised_data,2..64]",
            says="trained on the states of guided sampling they follow it better than trained on noised data, to better images",
        ),
    )

    trajectories, length, scales = 1000, 20, (1.0, 6.0)
    batch, steps, rate = 64, 1500, 2e-3
    noised_data = False  # train on noised data instead of the states of sampling
    variants = (
        Variant(
            "agd_noised_data",
            says="the same adapters, updates and number of states, trained on noised data instead of guided trajectories",
            baselines=(),
            noised_data=True,
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"adapted": AdaptedUNet(session.clone("teacher"))}

    def prepare(self, session: Session) -> None:
        adapted, rng, device = session.networks["adapted"], session.rng, session.device
        find = states_of_data if self.noised_data else states_of_sampling
        stored = find(session, session.scale(self.trajectories, 8), session.scale(self.length, 3), self.scales)

        def loss() -> Tensor:
            pick = torch.randint(len(stored[0]), (self.batch,), generator=rng, device=device)
            x, t, condition, scale, target = (part[pick] for part in stored)
            return (adapted(x, t, condition, scale) - target).square().mean()

        fit(session, adapted, loss, session.scale(self.steps, 3), self.rate)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        adapted, x, scale = session.networks["adapted"], batch["noise"], batch["guidance"]
        schedule = schedule_of(adapted)
        for t, s in pairwise(uniform_times(rung)):
            output = adapted(x, torch.full_like(scale, schedule.network_time(t)), batch["condition"], scale)
            x = ddim_step(schedule, *to_x0_eps(schedule.prediction, output, x, schedule.alpha(t), schedule.sigma(t)), s)
        return x
