"""LCM-LoRA: consistency distillation into a low-rank adapter, which other networks of the family can put on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.adapters import ALPHA, RANK, adapt, merge, tensors
from stepmark.tracks.text_to_image.consistency import Drawn, distil, sample
from stepmark.tracks.text_to_image.students import UPDATES


class LCMLoRA(Method):
    """LCM-LoRA: what makes a network fast is learned as an adapter, and is added to networks that it was not learned on.

    Latent consistency distillation (`lcm`: pairs 20 timesteps apart, one guided step of DDIM, pseudo-Huber loss) trains low-rank
    matrices beside the frozen weights W of the teacher (section 3.1, equation 2 of LoRA),

        W x + (alpha / r) B A x,      B = 0 at first

    in all layers of attention, of the perceptrons behind it, of the residual blocks and between resolutions. They are the
    acceleration vector tau_LCM. A network that was tuned to a style is theta_base + tau'; the two are added with no more
    training (section 3.2):

        theta = theta_base + lambda_1 tau' + lambda_2 tau_LCM

    Sampling is that of `lcm`, without guidance, one evaluation a step. The adapter is kept by the names and in the shapes that
    the library PEFT gives it, and is merged into the weights before sampling, as it is there.

    As in the authors' code the scale of the teacher's guidance is drawn for every row and the student is not told it, and the
    target is the student itself without its gradient, not an average.

    On the task of the other style the adapter is learned on `base` alone. It sees neither the tuned network nor a picture of
    that style: what is noised are pictures that `base` drew itself, for captions without the word of the style. `lambda_1` and
    `lambda_2` are 1; `lcm_lora_mixed` takes the 0.8 and 1.0 that the report gives for a style's own adapter.

    Controls: `lcm_lora_absent` has no adapter and is guided, by two evaluations a step, in the same sampler;
    `lcm_lora_scrambled` adds the adapter with its numbers in random order, a change of the same size that says nothing;
    `lcm_lora_base` leaves the style out (lambda_1 = 0).

    Differs from the report: rank 8 of layers of 64 channels, not 64 of 320 to 1280; the scales of guidance lie between 2 and 4,
    around the teacher's best, not 6 and 16; 240 updates, as many as those of `lcm`, at a rate of 2e-3, which warms up and falls;
    the style is a tuned network, whose tau' has full rank, and no adapter.

    What limits it here: one style, and a network so small that the tuning moves every weight.
    """

    paper = Paper(
        id="lcm_lora",
        title="LCM-LoRA: A Universal Stable-Diffusion Acceleration Module",
        authors="Luo, Tan, Patil, Gu, von Platen, Passos, Huang, Li, Zhao",
        year=2023,
        arxiv="2311.05556",
        code="luosiallen/latent-consistency-model",
    )
    tasks = ("text_to_image/scenes_pastel", "text_to_image/scenes_eps")
    baselines = ("ddim_guided", "dpm_guided", "lcm", "lcm_lora_absent", "lcm_lora_scrambled")
    claims = (
        Claim(
            "fd[lcm_lora,2..8] < min(fd[ddim_guided,2..8], fd[dpm_guided,2..8], fd[lcm_lora_absent,2..8], "
            "fd[lcm_lora_scrambled,2..8], fd[lcm_lora_base,2..8]) and caption[lcm_lora,2..8] > max(caption[ddim_guided,2..8], "
            "caption[dpm_guided,2..8], caption[lcm_lora_absent,2..8], caption[lcm_lora_scrambled,2..8])",
            says="on a network of another style, which it never saw, few evaluations with the adapter are better than solvers, "
            "than its sampler alone, than an adapter of noise, and keep the style",
            headline=True,
        ),
        Claim(
            "fd[lcm_lora,2..8] <= 1.1 * fd[lcm,2..8] and caption[lcm_lora,2..8] >= 0.9 * caption[lcm,2..8]",
            says="where it was learned, the adapter does what training of all weights does",
            task="text_to_image/scenes_eps",
        ),
        Claim(
            "fd[lcm_lora_mixed,2..8] < min(fd[ddim_guided,2..8], fd[dpm_guided,2..8]) "
            "and caption[lcm_lora_mixed,2..8] > max(caption[ddim_guided,2..8], caption[dpm_guided,2..8])",
            says="so it is where four fifths of the style are added to it",
        ),
    )

    style, speed = 1.0, 1.0  # lambda_1, lambda_2
    scrambled = False
    variants = (
        Variant(
            "lcm_lora_absent",
            says="control: no adapter, guided, in the same sampler",
            speed=0.0,
            baselines=("ddim_guided",),
        ),
        Variant(
            "lcm_lora_scrambled",
            says="control: the numbers of the adapter in random order",
            scrambled=True,
            baselines=("ddim_guided",),
        ),
        Variant(
            "lcm_lora_base",
            says="control: the network that it was learned on, without the style",
            style=0.0,
            tasks=("text_to_image/scenes_pastel",),
            baselines=("lcm_lora",),
        ),
        Variant(
            "lcm_lora_mixed",
            says="four fifths of the style beside the whole of the adapter",
            style=0.8,
            tasks=("text_to_image/scenes_pastel",),
            baselines=("lcm_lora",),
        ),
    )

    updates = UPDATES

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        networks, adapter = session.networks, dict[str, Tensor]()
        role = "base" if "base" in networks else "teacher"
        if self.speed:  # before the student is changed, so that all variants ask for the same
            adapter |= session.once(acceleration, role, session.scale(self.updates, 2))
        if self.scrambled:
            adapter = {name: shuffled(value, session.rng) for name, value in adapter.items()}
        with torch.no_grad():  # theta_base + lambda_1 tau'
            for p, base, tuned in zip(*(networks[n].parameters() for n in ("student", role, "teacher")), strict=True):
                p.copy_(torch.lerp(base, tuned, self.style))
        merge(networks["student"], adapter, ALPHA, self.speed)
        return adapter

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        outside = GUIDANCE if self.speed == 0 else 1.0
        price = 1 if outside == 1.0 else 2
        if rung < price:
            skip("a guided step takes two evaluations")
        return sample(student, batch, rung // price, session.rng, None, schedule_of(student), outside)


def shuffled(value: Tensor, rng: torch.Generator) -> Tensor:
    """The numbers of a tensor in random order."""
    order = torch.randperm(value.numel(), generator=rng, device=value.device)
    return value.flatten()[order].view_as(value)


# --- training --------------------------------------------------------------------------------------------------------


def acceleration(session: Session, role: str, updates: int) -> dict[str, Tensor]:
    """The adapter tau_LCM of a network, by PEFT's names. Of `base` it is learned on pictures that this drew itself."""
    student = adapt(session.clone(role), session.rng, RANK, ALPHA)
    data = None if role == "teacher" else Drawn(session, role, session.scale(400, 4), session.scale(8, 1), GUIDANCE)
    distil(
        session,
        student,
        updates,
        rate=2e-3,
        scales=(2.0, 4.0),
        decay=0.0,  # the target is the student itself
        told=False,
        role=role,
        data=data,
    )
    return tensors(student)
