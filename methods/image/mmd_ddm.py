from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import leading_times, schedule_of
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.image.training import fit


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of features [n, d] and [m, d] under the kernel (x.y / d + 1)^3."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    within = []
    for a in (x, y):
        k = kernel(a, a)
        within.append((k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1)))
    return within[0] + within[1] - 2 * kernel(x, y).mean()


class MMDFinetuning(Method):
    """MMD-DDM: fine-tune the network through all steps of a short sampler, until what comes out is distributed as data.

    The number of DDIM steps is fixed (4) and the deterministic chain is run with gradients, all of it kept in memory
    (the paper recomputes it step by step). The loss is the unbiased squared MMD between features of a batch of samples
    and of a batch of training images of the same labels, with the cubic kernel; there is no target for the single
    sample, no adversary and no teacher. In the paper a few hundred updates are enough.

    Features are those of a small perceptron that learns to classify the training images in prepare: the metric's own
    classifier is out of reach, so matching the features of the loss cannot flatter the metric. As in the authors' code
    samples are clamped to the range of images, features are taken as they are, and the optimiser is Adam at a constant
    rate of 5e-6, without decay, on batches of 64, with gradients clipped at 0.5. The network is fine-tuned for 4 steps and
    sampled at every rung, to show what becomes of the others.

    Timesteps are those of the authors' sampler, the multiples of 1000 / S from zero up. Where sampling begins matters for
    the gradients: at the last timestep, where `ddim` begins, a guess of the image is the error of the noise prediction
    times more than a hundred, and the smallest of updates upsets it. `mmd_ddm_untuned` is the same sampler before
    fine-tuning.

    Differs from the paper: features of a perceptron instead of Inception or CLIP; the network is conditional, and a batch of
    images has the labels of the batch of samples; one network, for 4 steps, where the paper fine-tunes one for each of 5, 10,
    15 and 20; 200 updates, where the checkpoints that the authors' code reads have 400 to 700; no flipped images.

    What limits it here: the fine-tuning does what it is asked for, as the discrepancy of its own features is gone after it,
    on noises that it did not see. But a few features of a small classifier leave much of an image undetermined, and what
    they do not see moves freely while their moments are matched: to another classifier the images are worse than before.
    There are 32 of them for 64 pixels; whether more, or those of a convolutional classifier, hold an image better has not
    been tried.
    """

    paper = Paper(
        id="mmd_ddm",
        title="Fast Inference in Denoising Diffusion Models via MMD Finetuning",
        authors="Aiello, Valsesia, Magli",
        year=2023,
        arxiv="2301.07969",
        code="diegovalsesia/MMD-DDM",
    )
    tasks = ("class_to_image/digits_eps", "class_to_image/digits_eps_b")
    baselines = ("mmd_ddm_untuned", "ddim", "dpm_solver_pp")
    claims = (
        Claim(
            "fd[mmd_ddm,4] <= 0.7 * fd[mmd_ddm_untuned,4]",
            says="at four steps, those that the network is tuned for, fine-tuning takes 30 % or more off the distance",
            headline=True,
            setting="features of a small perceptron, not of Inception or CLIP: their discrepancy falls, the rest gets worse",
        ),
        Claim(
            "fd[mmd_ddm,4] < fd[ddim,4] and fd[mmd_ddm,4] < fd[dpm_solver_pp,4] and fd[mmd_ddm,4] <= fd[mmd_ddm_untuned,10]",
            says="four fine-tuned steps are better than four of other fast samplers, and no worse than ten before",
            setting="features of a small perceptron, not of Inception or CLIP: their discrepancy falls, the rest gets worse",
        ),
    )

    tuned, batch, steps, rate = 4, 64, 200, 5e-6
    variants = (
        Variant(
            "mmd_ddm_untuned",
            says="the same sampler on the same timesteps before fine-tuning",
            steps=0,
            baselines=("ddim",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        if not self.steps:
            return
        data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
        self.finetune(session, self.features(session, data, label), data, label)

    @staticmethod
    def features(session: Session, data: Tensor, label: Tensor) -> nn.Module:
        """What the last hidden layer of a perceptron sees that has learnt to classify the images, [B, ...] -> [B, 32]."""
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(data[0].numel(), 128), nn.SiLU(), nn.Linear(128, 32), nn.SiLU())
        judge = nn.Sequential(trunk, nn.Linear(32, 1 + int(label.max()))).to(session.device)

        def classify() -> Tensor:
            pick = torch.randint(len(data), (128,), generator=session.rng, device=session.device)
            return cross_entropy(judge(data[pick]), label[pick])

        fit(session, judge, classify, session.scale(400, 20))
        return trunk.requires_grad_(False)

    def finetune(self, session: Session, features: nn.Module, data: Tensor, label: Tensor) -> None:
        """Minimise the discrepancy between features of samples and of images, through all steps of the sampler."""
        student, size = session.networks["student"], session.scale(self.batch, 16)
        times = self.times(student, self.tuned)
        optimiser = torch.optim.Adam(student.parameters(), lr=self.rate)
        for _ in session.progress(range(session.scale(self.steps, 3)), "fine-tuning"):
            pick = torch.randint(len(data), (size,), generator=session.rng, device=session.device)
            noise = torch.randn(data[pick].shape, generator=session.rng, device=session.device)
            samples = self.sample(student, noise, label[pick], times).clamp(-1, 1)
            optimiser.zero_grad(set_to_none=True)
            squared_mmd(features(samples), features(data[pick])).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            optimiser.step()

    @staticmethod
    def times(network: nn.Module, steps: int) -> list[float]:
        """The timesteps of the authors' sampler, the lowest multiples of 1000 / steps."""
        return leading_times(steps, schedule_of(network).steps)

    @staticmethod
    def sample(network: nn.Module, x: Tensor, condition: Tensor, times: list[float]) -> Tensor:
        """DDIM samples [B, ...] on a grid of times, with gradients through all steps where they are on."""
        denoise = Denoiser(network, condition)
        for t, s in pairwise(times):
            x = ddim_step(denoise.schedule, *denoise(x, t), s)
        return x

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        return self.sample(student, batch["noise"], batch["condition"], self.times(student, rung))
