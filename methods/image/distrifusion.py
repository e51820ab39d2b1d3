from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.patches import Bands
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step


class DistriFusion(Method):
    """DistriFusion: one image on several devices, each with a band of it, on activations that are one step old.

    The image is cut into as many horizontal bands as there are devices. In every layer a device computes on its own band
    and needs something of the others: rows beyond the border for a convolution, all keys and values for self-attention,
    mean and variance for a group norm. To wait for them in every layer would cost what parallelism gains. Activations of
    neighbouring steps are nearly the same, so in step i (displaced patch parallelism, section 4.2, figure 4)

        attention     fresh queries; keys and values: fresh own ones, those of step i-1 of the other bands
        convolution   fresh rows; beyond the border those of step i-1
        group norm    stale global moments + (fresh own moments - stale own moments), own variance where that is negative

    and what is fresh is sent while computation goes on, to be there in step i+1. The latents at the borders are exchanged
    in each step, and the first steps (a tenth of them, at least one) are synchronous: they change too much.

    The bands live in two processes, which Stepmark starts, and exchange tensors through `session.group`, which counts the
    bytes. An evaluation of half an image counts half.

    The two ends that it is measured against (section 4.1, figure 3): `naive_patches` samples each band as if it were an
    image of its own that only knows where in the whole it lies, with zeros beyond the border, attention within the band
    and its own moments in group norms, and puts the finished bands together; `synchronous_patches` takes everything from
    the same step, so that the image is that of one device up to rounding, and waits for every exchange.

    Differs from the paper: keys and values, and the bands next to each other, are sent to those that use them, while the
    authors gather the borders of convolutions everywhere; the variance of a group norm is the biased one, so that a
    synchronous step is exactly that of one device; no guidance, hence no splitting of its two branches; Euler steps; two
    devices, of the eight with which the paper is six times as fast. No arm stops sending after the synchronous steps, so that
    what renewing old activations adds to keeping them is not told apart.

    What limits it here: stale activations are good where steps are small, and 16 steps are a third of the paper's; with
    50 the digits of the UNet are still worse than on one device. The deepest maps of the UNets have two rows to a band,
    so that every row is a border; a transformer, whose blocks see all tokens alike, minds less. The devices are cores
    of one machine, which wait for each other in every layer of a network that takes a few milliseconds.
    """

    paper = Paper(
        id="distrifusion",
        title="DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models",
        authors="Li, Cai, Cao, Zhang, Cai, Bai, Jia, Liu, Li, Han",
        year=2024,
        arxiv="2402.19481",
        code="mit-han-lab/distrifuser",
    )
    tasks = ("attributes_to_image/shapes16", "class_to_image/digits_flow", "class_to_image/digits_dit")
    baselines = ("euler", "synchronous_patches")
    claims = (
        Claim(
            "latency_ms[distrifusion,50] < latency_ms[euler,50] and fd[distrifusion,50] <= 1.05 * fd[euler,50]",
            says="two devices are faster than one, at no loss of quality, with 50 steps as in the paper",
            task="class_to_image/digits_flow",
            headline=True,
            setting="the devices are cores of one machine, which wait for each other in every layer of a network of "
            "milliseconds; of eight rows of pixels every one is a border at the deepest level",
        ),
        Claim(
            "latency_ms[distrifusion,16] < latency_ms[euler,16]",
            says="and with the largest images",
            setting="the devices are cores of one machine, which wait for each other in every layer of a network of milliseconds",
        ),
        Claim(
            "fd[distrifusion,4..16] <= 1.05 * fd[euler,4..16] and fd[distrifusion,4..16] < fd[naive_patches,4..16]",
            says="bands on two devices give the quality of one device, which bands without context do not",
            setting="the paper takes 50 steps, between which activations change less",
        ),
        Claim(
            "fd[distrifusion,50] <= 1.05 * fd[euler,50] and fd[distrifusion,50] < fd[naive_patches,50]",
            says="the same with 50 steps, as in the paper, whatever it takes",
            task="class_to_image/digits_flow",
            setting="of eight rows of pixels every one is a border at the deepest level; the paper's images have a thousand",
        ),
        Claim(
            "fd[distrifusion,16..50] <= 1.05 * fd[euler,16..50] and fd[distrifusion,16..50] < fd[naive_patches,16..50]",
            says="the same with a transformer",
            task="class_to_image/digits_dit",
        ),
        Claim(
            "latency_ms[distrifusion,16] < latency_ms[synchronous_patches,16]",
            says="not to wait for the other bands is faster than to wait",
            setting="the devices are cores of one machine, which wait for each other in every layer of a network of milliseconds",
        ),
    )

    ranks = 2
    reach = "all"  # whose keys, values, rows and moments a band sees (`Bands`)
    warm_up = 0.1  # share of the steps that are synchronous
    variants = (
        Variant(
            "naive_patches",
            says="Naive patches: bands of an image on several devices that know nothing of each other",
            reach="none",
            warm_up=1.0,
            baselines=("euler",),
            claims=(
                Claim(
                    "fd[naive_patches,4..16] > 1.1 * fd[euler,4..16]",
                    says="bands that know nothing of each other do not fit",
                ),
            ),
        ),
        Variant(
            "synchronous_patches",
            says="Synchronous patch parallelism: bands on several devices, which wait for each other in every layer",
            warm_up=1.0,
            baselines=("euler",),
        ),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network = session.networks["teacher"]
        denoise, bands = Denoiser(network, batch["condition"]), Bands(session.group, self.reach)
        x = bands.own(batch["noise"])
        with bands.on(network):
            for step, (t, s) in enumerate(pairwise(uniform_times(rung))):
                bands.synchronous = step < max(1, round(self.warm_up * rung))
                x = euler_step(x, bands.output(denoise, x, t), t, s)
        return bands.join(x)
