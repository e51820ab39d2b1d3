"""Hybrid SD: a large network in the cloud makes the first steps of a picture, a pruned one on the device makes the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from stepmark import Claim, Method, Paper, Variant
from stepmark.distributed import Group
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, dpm_solver_pp_step
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.consistency import descend
from stepmark.tracks.text_to_image.inside import blocks, outputs
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.sampling import dpm_solver_pp, noised

HOME = {"edge": 0, "teacher": 1}  # process of each network: the device, where the picture is wanted, and the cloud
LEAST, MIDDLE = 19 / 28, 21 / 28  # ranks of layers, by significance, up to which a quarter and a half of one are kept


class HybridSD(Method):
    """Hybrid SD: early steps by the teacher in the cloud, late steps by a small network on the device.

    Both work on the same latents and the same schedule. Of S guided steps of DPM-Solver++ (2M) the cloud makes the first
    third, where it is settled what is to be seen; then the latent goes to the device, whose network makes the rest. Two
    processes run at once, the device (rank 0) and the cloud (rank 1), and exchange what the solver needs to go on, the
    latent and the latest prediction of the data: 2 KiB a picture. `teacher_evaluations` are the cloud's cost.

    The small network is pruned from the teacher. Every residual block and every attention is halved by itself, and pictures
    are drawn with it; its significance is how far their mean and their deviation lie from those of the whole teacher,

        score = |mean(z) - mean(z')| + |std(z) - std(z')|

    over 24 captions of the train split. Of the least significant two thirds a quarter is kept, of the next a half, of the
    most significant quarter three quarters: of residual blocks the inner channels whose rows in the first convolution have
    the greatest norm, of attentions the first heads. The block in the middle goes altogether. What is left learns for 500
    updates

        loss = |eps' - eps|^2 + |eps' - eps_teacher|^2 + sum over blocks of |h' - h_teacher|^2

    Controls: `hybrid_sd_reversed` has the device first and the cloud last, for as many evaluations of each, and a latent
    more to send; `hybrid_sd_edge` is the small network alone; the large one alone is `dpm_guided`. `hybrid_sd_short` leaves
    the device out: the cloud makes as few steps as it does for the hybrid, and those are all.

    As in the authors' code: the score, the shares that are kept and the fractions of layers that keep them (19, 2 and 7 of
    28 there), the three losses with weight 1, the solver. Differs: there pruning starts from a copy that was made smaller
    and distilled before, without the block in the middle, and scores are of that; their code leaves whole what would keep
    two heads or fewer, which spares all attentions that are to keep a quarter; here captions are left out of an eighth of
    the pictures in training, since both networks are guided; 8 steps, not 25, and 24 captions, not 50, for the score. The
    light decoder is left out, since pictures are decoded by the task, and so is the hybrid of two consistency models.

    What limits it here: of a UNet of 64 channels much stays that is not pruned, so that the small network has more than
    half of the teacher's arithmetic, where the paper's has a quarter of its weights; and it learns for minutes.
    """

    paper = Paper(
        id="hybrid_sd",
        title="Hybrid SD: Edge-Cloud Collaborative Inference for Stable Diffusion Models",
        authors="Yan, Liu, Liu, Peng, Wang, Chen, Fu, Mei",
        year=2024,
        arxiv="2408.06646",
        code="bytedance/Hybrid-SD",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("dpm_guided", "hybrid_sd_reversed", "hybrid_sd_edge", "hybrid_sd_short")
    claims = (
        Claim(
            "teacher_evaluations[hybrid_sd,16..64] <= 0.34 * teacher_evaluations[dpm_guided,16..64] "
            "and fd[hybrid_sd,16..64] <= 1.15 * fd[dpm_guided,16..64] "
            "and caption[hybrid_sd,16..64] >= 0.9 * caption[dpm_guided,16..64] "
            "and fd[hybrid_sd,16..64] < min(fd[hybrid_sd_reversed,16..64], fd[hybrid_sd_edge,16..64], "
            "fd[hybrid_sd_short,16..64]) "
            "and caption[hybrid_sd,16..64] > max(caption[hybrid_sd_reversed,16..64], caption[hybrid_sd_edge,16..64])",
            says="the cloud works two thirds less, at hardly less quality; and pictures are better than with the networks in the "
            "other order, of the device alone, and of as few steps of the cloud alone",
            headline=True,
        ),
        Claim(
            "flops[hybrid_sd_edge,16..64] <= 0.75 * flops[dpm_guided,16..64] "
            "and fd[hybrid_sd_edge,16..64] <= 1.25 * fd[dpm_guided,16..64] "
            "and caption[hybrid_sd_edge,16..64] >= 0.8 * caption[dpm_guided,16..64]",
            says="the pruned network alone is not far from the one that it was pruned from",
            headline=True,
            setting="500 updates, not 50 000, and more than half of the arithmetic, not a quarter of the weights",
        ),
    )

    arm = "hybrid"  # or "reversed", "edge", "short"
    share = 1 / 3  # of the steps that the cloud makes
    ranks = 2
    variants = (
        Variant(
            "hybrid_sd_reversed",
            says="control: the device makes the first steps, the cloud as many as before, but the last",
            arm="reversed",
            baselines=("hybrid_sd", "dpm_guided"),
        ),
        Variant(
            "hybrid_sd_edge",
            says="control: the small network makes all steps",
            arm="edge",
            ranks=1,
            baselines=("dpm_guided",),
        ),
        Variant(
            "hybrid_sd_short",
            says="control: the cloud's steps are the only ones",
            arm="short",
            ranks=1,
            baselines=("dpm_guided",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {} if self.arm == "short" else {"edge": fitting(session.clone("teacher"))}

    def prepare(self, session: Session) -> None:
        if self.arm != "short":
            session.networks["edge"].load_state_dict(session.once(pruned, session.scale(500, 1)))

    def plan(self, steps: int) -> list[str]:
        """Which network makes each step."""
        cloud = max(1, int(self.share * steps))
        parts = {
            "hybrid": ["teacher"] * cloud + ["edge"] * (steps - cloud),
            "reversed": ["edge"] * (steps - cloud) + ["teacher"] * cloud,
            "edge": ["edge"] * steps,
            "short": ["teacher"] * cloud,
        }
        return parts[self.arm]

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 4:
            skip("a guided step of each network takes four evaluations")
        group, networks, plan = session.group, session.networks, self.plan(rung // 2)
        here = {role for role in plan if group.size == 1 or HOME[role] == group.rank}
        denoise = {r: Denoiser(networks[r], networks[r].words(batch["condition"]), GUIDANCE) for r in sorted(here)}
        schedule = schedule_of(networks["teacher"])
        times = list(pairwise(uniform_times(len(plan))))
        x = x0 = batch["noise"]
        past: list[tuple[float, Tensor]] = []
        for number, (role, (t, s)) in enumerate(zip(plan, times, strict=True)):
            if number and role != plan[number - 1]:
                x, x0 = sent(group, torch.stack([x, x0]), plan[number - 1])
                past = [(times[number - 1][0], x0)]
            if role in here:
                x0 = denoise[role](x, t)[0]
                past.append((t, x0))
                x = dpm_solver_pp_step(schedule, x, past, s)
        return sent(group, x, "teacher") if plan[-1] == "teacher" else x  # the picture is wanted on the device


def sent(group: Group, what: Tensor, role: str) -> Tensor:
    """What the process of a network has, in all of them."""
    return what if group.size == 1 else group.spread(what, HOME[role])


# --- pruning ---------------------------------------------------------------------------------------------------------


def units(network: Any) -> dict[str, Any]:
    """The residual blocks and the attentions of a UNet by their names: what can be made smaller inside."""
    found = network.unet.named_modules()
    return {name: layer for name, layer in found if hasattr(layer, "time_emb_proj") or hasattr(layer, "to_q")}


def size(layer: Any) -> int:
    """Inner channels of a residual block, heads of an attention."""
    return layer.heads if hasattr(layer, "to_q") else len(layer.conv1.weight)


def share_of(layer: Any, ratio: float) -> int:
    """So many of them, of channels whole numbers of each group of the norm."""
    if hasattr(layer, "to_q"):
        return int(layer.heads * ratio)
    groups = layer.norm2.num_groups
    return math.ceil(int(size(layer) * ratio) / groups) * groups


def cut(layer: Any, keep: int) -> Any:
    """Leave so many channels or heads of a layer, in place."""
    if hasattr(layer, "to_q"):
        rows = torch.arange(len(layer.to_q.weight) // layer.heads * keep, device=layer.to_q.weight.device)
        inner, outer, layer.heads = (layer.to_q, layer.to_k, layer.to_v), layer.to_out[0], keep
    else:
        rows = layer.conv1.weight.detach().flatten(1).norm(dim=1).topk(keep).indices.sort().values
        inner, outer = (layer.conv1, layer.time_emb_proj, layer.norm2), layer.conv2
        layer.norm2.num_channels = keep
    for part in inner:
        for name, value in list(part.named_parameters()):
            setattr(part, name, nn.Parameter(value.detach()[rows], value.requires_grad))
    outer.weight = nn.Parameter(outer.weight.detach()[:, rows], outer.weight.requires_grad)
    return layer


def fitting(network: Any) -> Any:
    """The network, changed in place: without the block in the middle, and it takes on the size of weights that it is given."""
    network.unet.mid_block = None
    network.register_load_state_dict_pre_hook(take_on)
    return network


def take_on(network: Any, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Cut layers as weights that are to be loaded have been cut."""
    for name, layer in units(network).items():
        first = "to_q" if hasattr(layer, "to_q") else "conv1"
        rows = len(state[f"{prefix}unet.{name}.{first}.weight"])
        keep = rows * layer.heads // len(layer.to_q.weight) if first == "to_q" else rows
        if keep < size(layer):
            cut(layer, keep)


def significance(whole: Tensor, less: Tensor) -> float:
    """How far latents [n, ...] drawn with less lie from those of the whole: of their mean and of their deviation."""
    mean, spread = (whole.mean(0) - less.mean(0)).norm(), (whole.std(0, False) - less.std(0, False)).norm()
    return float(mean + spread)


@torch.no_grad()
def scores(session: Session) -> dict[str, float]:
    """The significance of every unit of the teacher that is not in the middle: with half of it, all else being whole."""
    network, rng, device = session.clone("teacher"), session.rng, session.device
    n, steps = session.scale((24, 8), (2, 1))
    tokens = session.train["tokens"].to(device)
    asked = tokens[torch.randint(len(tokens), (n,), generator=rng, device=device)]
    noise = torch.randn(n, *LATENT, generator=rng, device=device, dtype=session.dtype)
    denoise = Denoiser(network, network.words(asked), GUIDANCE)

    def drawn() -> Tensor:
        return dpm_solver_pp(denoise, noise, uniform_times(steps))

    whole, found = drawn(), {}
    for name, layer in units(network).items():
        if not name.startswith("mid_block"):
            parent, _, last = name.rpartition(".")
            holder = network.unet.get_submodule(parent)
            setattr(holder, last, cut(deepcopy(layer), share_of(layer, 0.5)))
            found[name] = significance(whole, drawn())
            setattr(holder, last, layer)
    return found


def pruned(session: Session, updates: int) -> dict[str, Tensor]:
    """The small network, cut and trained: its weights."""
    score, edge = scores(session), fitting(session.clone("teacher"))
    layers = units(edge)
    for rank, name in enumerate(sorted(score, key=lambda name: score[name])):
        ratio = 0.25 if rank < int(LEAST * len(score)) else 0.5 if rank < int(MIDDLE * len(score)) else 0.75
        cut(layers[name], share_of(layers[name], ratio))
    edge.words.requires_grad_(False)
    recover(session, edge, updates)
    return edge.state_dict()


def recover(session: Session, edge: Any, updates: int) -> None:
    """Train a pruned network in place on the data, on the teacher's predictions and on what the teacher's blocks give."""
    teacher, data = session.networks["teacher"], Latents(session)
    schedule, learned = schedule_of(teacher), [p for p in edge.parameters() if p.requires_grad]
    with torch.no_grad():
        nothing = teacher.words(teacher.null_condition(data.tokens[:1]))
    for step in descend(session, learned, updates, 5e-4):
        x0, _, states = data.batch(session.scale(32, 2))
        x, t, eps = noised(session, schedule, x0)
        dropped = torch.rand(len(x0), generator=session.rng, device=session.device) < 1 / 8
        asked = x, schedule.network_time(t), torch.where(dropped[:, None, None], nothing, states)
        with torch.no_grad(), outputs(*blocks(teacher.unet)) as theirs:
            wanted = teacher(*asked)
        with outputs(*blocks(edge.unet)) as ours:
            found = edge(*asked)
        inside = torch.stack([mse_loss(a, b) for a, b in zip(ours, theirs, strict=True)]).sum()
        step(mse_loss(found, eps) + mse_loss(found, wanted) + inside)
