"""AdaDiff: a small network reads the caption and says in how many steps its picture is to be made."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import ddim
from stepmark.tracks.text_to_image.search import judged

STEPS = (2, 3, 5, 7, 11, 15, 23, 31)  # what is chosen from; at a rung, those that it pays for beside the choice itself
RUNGS = (16, 32, 64)
PENALTY = 1.0  # gamma


def choices(rung: int) -> tuple[int, ...]:
    """The numbers of steps that a rung pays for: two evaluations each, and one of the policy."""
    return tuple(n for n in STEPS if 2 * n + 1 <= rung)


def rewards(quality: Tensor, steps: Tensor) -> Tensor:
    """R [N, C] of pictures of qualities [N, C] made in so many steps [C]: what is saved of the most, 1 - s / s_max, where the
    picture is among the better half of those of its caption, else -gamma."""
    enough = quality.topk(quality.shape[1] // 2, dim=1).values[:, -1:]
    return torch.where(quality >= enough, 1 - steps / steps.max(), -PENALTY)


class Policy(nn.Module):
    """Logits [B, choices] from the states of captions [B, 32, 64]: self-attention, the mean, and a small head."""

    def __init__(self, kinds: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.mix, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, kinds))

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(states).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head((states + self.join(mixed)).mean(1))


def sampled(network: nn.Module, states: Tensor, x: Tensor, steps: int) -> Tensor:
    """Pictures from noise x [B, 4, 8, 8] by so many guided DDIM steps: two evaluations each."""
    return ddim(Denoiser(network, states, GUIDANCE), x, uniform_times(steps))


def reinforce(policy: nn.Module, states: Tensor, reward: Tensor, rng: torch.Generator, size: int = 64) -> Tensor:
    """Loss of REINFORCE on a random batch of captions with rewards [N, C] of every choice: - (R(a) - R(greedy)) log pi(a), for
    a drawn from the policy."""
    rows = torch.randint(len(states), (size,), generator=rng, device=states.device)
    law = policy(states[rows]).log_softmax(1)
    drawn = torch.multinomial(law.detach().exp(), 1, generator=rng)
    greedy = law.argmax(1, keepdim=True)
    advantage = reward[rows].gather(1, drawn) - reward[rows].gather(1, greedy)
    return -(advantage * law.gather(1, drawn)).mean()


def policies(session: Session, captions: int, updates: int, only: tuple[int, ...]) -> dict[str, Tensor]:
    """Weights of a policy for each of some rungs, `<rung>.<name>`; and what it chooses for the captions that it learned from:
    the mean steps, `mean_<rung>`, and the share of every choice, `share_<rung>`."""
    network, rng, device = session.networks["teacher"], session.rng, session.device
    rows = torch.randperm(len(session.train["tokens"]), generator=rng, device=device)[:captions].cpu()
    condition = session.train["tokens"][rows].to(device)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        states = network.words(condition)
        noise = torch.randn(captions, 4, 8, 8, generator=rng, device=device, dtype=session.dtype)
        columns = []
        for steps in session.progress(choices(max(only)), "pictures"):
            parts = []
            for part in torch.arange(captions, device=device).split(80):
                picture = sampled(network, states[part], noise[part], steps)
                parts.append(judged(session, picture, condition[part])[0])
            columns.append(torch.cat(parts))
        quality = torch.stack(columns, 1)
    for rung in only:
        n = torch.tensor(choices(rung), device=device, dtype=session.dtype)
        policy, reward = Policy(len(n)).to(device), rewards(quality[:, : len(n)], n)
        fit(session, policy, lambda: reinforce(policy, states, reward, rng), updates)
        with torch.no_grad():
            chosen = policy(states).argmax(1)
        found |= {f"{rung}.{name}": value for name, value in policy.state_dict().items()}
        found[f"mean_{rung}"] = n[chosen].mean()
        found[f"share_{rung}"] = torch.bincount(chosen, minlength=len(n)) / captions
    return found


class AdaDiff(Method):
    """AdaDiff: the number of denoising steps is chosen for each caption, by a policy that a small network holds.

    The network reads the states of the text encoder, mixes them by self-attention, and gives probabilities pi(s | c) of the
    numbers of steps that there are to choose from. Model and sampler stay as they are. It is trained by REINFORCE with the
    reward of what its own greedy choice would have got as a baseline (self-critical),

        R(s) = 1 - s / s_max    where the picture of s steps is good enough, else -gamma
        loss = -(R(s) - R(argmax pi)) log pi(s | c),   s ~ pi(s | c)

    and asked for argmax pi when pictures are made. A picture is good enough if its quality, the log-probability that the
    reward network gives to the caption, is in the better half of those of its caption made in each number of steps, from
    one noise.

    A rung pays for at most s_max = 31, 15 or 7 steps of two evaluations and for the one of the policy, and has a policy of
    its own. The choices are 2, 3, 5, 7, 11, 15, 23, 31 as far as the rung pays for them. What the method does not take stays
    unspent: it has to be as good as the sampler that takes it all.

    `adadiff_fixed` takes for every caption the mean that the policy took for those it learned from, rounded up, and
    `adadiff_at_random` draws from the shares in which it took each number, whatever the caption: what the choice is worth
    beyond the mean. Neither asks the policy.

    Differs from the paper: there is no code, and the reward is read from the paper's text: that half is good enough, and
    gamma = 1, is a reading. The authors choose among 10, 15, ..., 50. The qualities of 240 captions are taken once, and 600
    updates of each policy are drawn from them, where every update there makes new pictures. Human preference is not asked.

    What limits it here: 240 captions, and one noise for each: what is noise in a quality is learned with it.
    """

    paper = Paper(
        id="adadiff_step_selection",
        title="AdaDiff: Adaptive Step Selection for Fast Diffusion",
        authors="Zhang, Wu, Xing, Shao, Jiang",
        year=2023,
        arxiv="2311.14768",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("ddim_guided",)
    trainings = 3
    claims = (
        Claim(
            "latency_ms[adadiff_step_selection,16..64] <= 0.67 * latency_ms[ddim_guided,16..64] and "
            "caption[adadiff_step_selection,16..64] >= 0.97 * caption[ddim_guided,16..64] and "
            "caption[adadiff_step_selection,16..64] > max(caption[adadiff_fixed,16..64], caption[adadiff_at_random,16..64])",
            says="a third of the time less than with all steps for every caption, as true to captions, and truer than with as "
            "many steps for every caption or at random",
            headline=True,
            setting="a third of 8 to 32 steps, not of 50",
        ),
        Claim(
            "nfe[adadiff_step_selection,16..64] <= 0.67 * nfe[ddim_guided,16..64] and "
            "fd[adadiff_step_selection,16..64] <= 1.1 * fd[ddim_guided,16..64]",
            says="a third of the evaluations less, for pictures as good",
        ),
        Claim(
            "caption[adadiff_step_selection,16..64] > max(caption[adadiff_fixed,16..64], caption[adadiff_at_random,16..64])",
            says="it is worth more to choose by the caption than to take the mean, or the same numbers at random",
        ),
    )

    chooser = "policy"  # "policy" | "fixed" | "random"
    variants = (
        Variant(
            "adadiff_fixed", says="control: the mean number of steps of the policy for every caption", chooser="fixed"
        ),
        Variant("adadiff_at_random", says="control: numbers of steps in the policy's shares, by lot", chooser="random"),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        if self.chooser != "policy":
            return {}
        return {f"policy_{rung}": Policy(len(choices(rung))) for rung in RUNGS}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        only = session.scale(RUNGS, (32,))
        found = session.once(policies, session.scale(240, 2), session.scale(600, 2), only)
        if self.chooser == "policy":
            for rung in only:
                start = f"{rung}."
                weights = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
                session.networks[f"policy_{rung}"].load_state_dict(weights)
        return {name: value for name, value in found.items() if "." not in name}

    def steps(self, session: Session, states: Tensor, rung: int) -> Tensor:
        """The number of steps int64 [B] for captions of those states [B, 32, 64]."""
        n = torch.tensor(choices(rung), device=states.device)
        if self.chooser == "policy":
            return n[session.networks[f"policy_{rung}"](states).argmax(1)]
        if self.chooser == "random":
            return n[torch.multinomial(session.state[f"share_{rung}"], len(states), True, generator=session.rng)]
        mean = float(session.state[f"mean_{rung}"]) + 0.5  # the policy's own evaluation is worth half a step
        return torch.full((len(states),), min(math.ceil(mean), rung // 2), device=states.device)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < min(RUNGS):
            skip("there are two numbers of steps to choose from at most")
        network, x = session.networks["teacher"], batch["noise"].clone()
        states = network.words(batch["condition"])
        steps = self.steps(session, states, rung)
        for n in steps.unique().tolist():
            rows = (steps == n).nonzero()[:, 0]
            x[rows] = sampled(network, states[rows], x[rows], n)
        return x
