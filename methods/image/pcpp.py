from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.patches import Bands
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step


class PCPP(Method):
    """Partially conditioned patch parallelism: as DistriFusion, but bands see only the nearest part of their neighbours.

    Bands of the image live on different devices and work on activations of the step before, as in displaced patch
    parallelism. Instead of gathering the keys and values of the whole image, a device exchanges with the bands next to it
    alone, and of them only the rows beside the border (section 3): attention of band n runs over

        K_n, V_n fresh;  the last f rows of K_{n-1}, V_{n-1} and the first f rows of K_{n+1}, V_{n+1} of the step before

    with f = 1/4 of a band, a share chosen here, and at least one row. That shortens the messages and the attention; context
    from afar is lost. Borders of convolutions and moments of group norms come from the neighbours too, and the first steps
    are synchronous, with the same part of the neighbours.

    Differs from the paper: it runs on two bands here, so that every other band is a neighbour; Euler steps instead of
    DDIM; no guidance.

    What limits it here: with two bands there are no distant ones to save the traffic to, which is most of what the paper
    saves; bands of two to eight rows cannot send less than one of them; and of small images the borders of convolutions,
    which stay, are three fifths of what DistriFusion sends, and more. So what is sent is 0.81 of DistriFusion's in the UNet
    of shapes and half in the transformer, whatever is sampled, and with four bands it would be 0.79 and half. In the UNets
    little hangs on distant keys and values, so that fewer stale ones can make better images; in the transformer images are
    worse for it, the more so the more steps there are. Borders of convolutions alone may be what makes it better in the
    UNets than bands without context, so that this is claimed of the transformer only.
    """

    paper = Paper(
        id="pcpp",
        title="Partially Conditioned Patch Parallelism for Accelerated Diffusion Model Inference",
        authors="Zhang, Luo, Lu",
        year=2024,
        arxiv="2412.02962",
    )
    tasks = ("attributes_to_image/shapes16", "class_to_image/digits_flow", "class_to_image/digits_dit")
    baselines = ("distrifusion", "euler")
    claims = (
        Claim(
            "sent_bytes[pcpp,*] <= 0.4 * sent_bytes[distrifusion,*] and fd[pcpp,*] <= 1.2 * fd[distrifusion,*]",
            says="two fifths of what DistriFusion sends, at hardly less quality",
            headline=True,
            setting="the paper saves the traffic between bands that are far apart; two bands are all neighbours, and of small "
            "images most of what is sent are the rows that convolutions need",
        ),
        Claim(
            "latency_ms[pcpp,16] < latency_ms[distrifusion,16]",
            says="and is faster than DistriFusion",
            headline=True,
            setting="the devices are cores of one machine, which wait for each other in every layer of a network of milliseconds",
        ),
        Claim(
            "sent_bytes[pcpp,*] <= 0.4 * sent_bytes[distrifusion,*] and fd[pcpp,*] <= 1.2 * fd[distrifusion,*]",
            says="the same with a transformer, whose traffic is keys and values alone",
            task="class_to_image/digits_dit",
            setting="a band is two rows of tokens, of which no less than one can be sent: half, not a quarter",
        ),
        Claim(
            "fd[pcpp,4..50] < fd[naive_patches,4..50] and flops[pcpp,4..50] < flops[distrifusion,4..50]",
            says="a part of the neighbours' keys and values is better than none, for less arithmetic than with all; of a "
            "transformer, where nothing else crosses a border",
            task="class_to_image/digits_dit",
        ),
        Claim(
            "fd[pcpp,*] <= 1.2 * fd[distrifusion,*] and sent_bytes[pcpp,*] < sent_bytes[distrifusion,*] "
            "and flops[pcpp,*] < flops[distrifusion,*]",
            says="on digits less is sent and computed, at hardly less quality",
            task="class_to_image/digits_flow",
        ),
    )

    ranks = 2
    fraction, warm_up = 0.25, 0.1

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network = session.networks["teacher"]
        denoise, bands = Denoiser(network, batch["condition"]), Bands(session.group, self.fraction)
        x = bands.own(batch["noise"])
        with bands.on(network):
            for step, (t, s) in enumerate(pairwise(uniform_times(rung))):
                bands.synchronous = step < max(1, round(self.warm_up * rung))
                x = euler_step(x, bands.output(denoise, x, t), t, s)
        return bands.join(x)
