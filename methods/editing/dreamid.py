"""DreamID: one step that is taught by triplets, whose truth is a real picture and whose faults are all in the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.pairs import Editor, beside, boxed, denoised, encoded, kept
from stepmark.tracks.image.schedules import Schedule, schedule_of
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image.sampling import noise_like, noised

KINDS = (3, 4, 8, 8)  # of cut, pattern and the two colours: what makes the identity of a garment
FEATURES, WORDS, WIDTH = 64, 4, 64  # of an identity; the tokens that it becomes, and their width


class Recogniser(nn.Module):
    """The identity [B, 64] of what a figure wears, of pictures [B, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, FEATURES))
        self.head = nn.Linear(FEATURES, sum(KINDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Swapper(Editor):
    """The network that swaps: it is shown the target's latents, and cross-attention looks at tokens that an adapter makes of an
    identity [B, 64].

    Args:
        direct: its last layer is learnt anew, from zero, for another output than the painter's.
    """

    def __init__(self, painter: Any, direct: bool) -> None:
        super().__init__(painter, 4)
        like = self.unet.conv_in.weight
        self.adapter = nn.Linear(FEATURES, WORDS * WIDTH).to(like.device, like.dtype)
        if direct:
            nn.init.zeros_(self.unet.conv_out.weight)
            nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, x: Tensor, time: Tensor, target: Tensor, identity: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, time, target, self.adapter(identity).unflatten(1, (WORDS, WIDTH)))


def recognised(session: Session, updates: int, size: int, rate: float) -> dict[str, Tensor]:
    """A recogniser, trained to tell cut, pattern and colours of the garments of the train split on whoever wears them."""
    network, data = Recogniser().to(session.device, session.dtype), session.train
    pictures, truth = (data[name].to(session.device) for name in ("x0", "attributes"))

    def loss() -> Tensor:
        rows = torch.randint(len(pictures), (size,), generator=session.rng, device=session.device)
        x = pictures[rows].to(session.dtype)
        said = network.head(network(x + 0.1 * noise_like(x, session.rng))).split(KINDS, 1)
        return torch.stack([cross_entropy(each, truth[rows, i]) for i, each in enumerate(said)]).sum()

    fit(session, network, loss, updates, rate, clip=1.0)
    return network.state_dict()


class Triplets:
    """Figures of the train split by what they wear, for `prepare`: who wears the same, and who wears something of that cut."""

    def __init__(self, session: Session) -> None:
        data, self.rng = session.train, session.rng
        self.x0, self.mask, self.attributes = (data[name].to(session.device) for name in ("x0", "mask", "attributes"))
        self.x0 = self.x0.to(session.dtype)
        self.same = self._groups((0, 1, 2, 3))
        self.cut = self._groups((0,))
        self.rows = (self.same[2] > 1).nonzero()[:, 0]  # those who are not alone in what they wear

    def _groups(self, which: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows by group, and of every row where its group begins there, how large it is, and where in it the row stands."""
        code = torch.zeros_like(self.attributes[:, 0])
        for i in which:
            code = code * 8 + self.attributes[:, i]
        order = code.argsort(stable=True)
        first = torch.searchsorted(code[order], code)
        count = torch.searchsorted(code[order], code, right=True) - first
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return order, first, count, place - first

    def other(self, groups: tuple[Tensor, Tensor, Tensor, Tensor], rows: Tensor) -> Tensor:
        """Of every row another one of its group, at random."""
        order, first, count, place = (groups[0], *(each[rows] for each in groups[1:]))
        u = torch.rand(len(rows), generator=self.rng, device=rows.device)
        step = 1 + (u * (count - 1)).long()
        return order[first + (place + step) % count]

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of n triplets: A2, the real picture; A1, another figure in the same garment; B, one in another garment."""
        real = self.rows[torch.randint(len(self.rows), (n,), generator=self.rng, device=self.rows.device)]
        return real, self.other(self.same, real), self.other(self.cut, real)

    def swapped(self, real: Tensor, other: Tensor) -> Tensor:
        """The pseudo targets: what a simple tool makes of figures that are to wear what others wear. It stretches the others so
        that the boxes of the two garments meet, and cuts out what the figures' own garments cover."""
        moved = boxed(self.x0[other], self.mask[other], self.mask[real])
        return torch.where(self.mask[real][:, None], moved, self.x0[real])


class DreamID(Method):
    """DreamID: triplets make the truth of a swap known, and one step makes it possible to train on the picture itself.

    Of a swap there is no truth: a target in its own pose that has the identity of somebody else. It is made backwards. A1 and A2
    are two pictures of one identity, B one of another; a tool swaps B's identity into A2, and the network, which gets A1 and that
    pseudo target, has to give A2 (section 3.1). What the tool does wrong is in the input only. Here an identity is a garment: A1
    and A2 are two figures in the same one, and the tool stretches what B wears over what A2 wears.

    The network makes a latent in one step from noise, as SD Turbo does, so that the picture is there to be looked at,

        loss = |z - z(A2)|^2 + 10 |D(z) - A2|^2 + 0.5 (1 - cos(e(D(z)), e(A1)))

    with decoder D and a recogniser's embedding e. It has three parts (section 3.2): the UNet that is shown the latents of the
    target beside the noise; a second one that looks at A1, whose keys and values stand in every layer of self-attention of the
    first beside its own; and an adapter that makes four tokens for cross-attention of e(A1). A picture asks the recogniser, the
    second UNet and the first once each: three evaluations, whatever the budget, and none can be had for less.

    `dreamid_implicit` is how swaps are trained without triplets: half of the targets are the real A2, which is to be given back,
    half are B, for which only the loss of identity is known. `dreamid_multistep` is trained on the triplets by noise prediction,
    and sampled by DDIM in two steps less than the rung. `dreamid_latent` has the first term of the loss alone.

    Differs from the paper, of which no code was released: the weights of the losses are choices made here; there is no
    adversary, and no triplets that are changed to keep an attribute; the UNets begin as the teacher, which is no network of one
    step, and the output is read as the latent itself by a last layer that begins at zero, because x0 = (x - sigma eps) / alpha
    would make fifteen times the error of it at the last timestep. The recogniser learns from the labels of the train split.
    300 updates of 16 triplets.

    What limits it here: the tool is nearly right, so that its faults are small ones; the target of a test is a real picture.
    """

    paper = Paper(
        id="dreamid",
        title="DreamID: High-Fidelity and Fast diffusion-based Face Swapping via Triplet ID Group Learning",
        authors="Ye, Hua, Zhang, Li, Sun, Zhao, He, Wu",
        year=2025,
        arxiv="2504.14509",
    )
    tasks = ("swapping/figures",)
    baselines = ("dreamid_implicit", "dreamid_multistep", "dreamid_latent", "copy_source")
    trainings = 3
    claims = (
        Claim(
            "inside[dreamid,4..50] > max(inside[dreamid_implicit,4..50], inside[copy_source,4..50]) "
            "and kept[dreamid,4..50] <= kept[dreamid_implicit,4..50]",
            says="triplets make the swap truer than implicit supervision, and keep the rest as well",
            headline=True,
            setting="garments of figures, not faces; 300 updates from a network that is not one of a single step",
        ),
        Claim(
            "inside[dreamid,4] >= inside[dreamid_multistep,25] - 0.25 and kept[dreamid,4] <= 1.1 * kept[dreamid_multistep,25]",
            says="one step, three evaluations in all, is about as good as twenty-three steps",
            headline=True,
            setting="garments of figures, not faces; 300 updates from a network that is not one of a single step",
        ),
        Claim(
            "inside[dreamid,4..50] > inside[dreamid_latent,4..50]",
            says="losses on the picture make the swap truer than one on the latent alone",
            setting="garments of figures, not faces; 300 updates from a network that is not one of a single step",
        ),
    )

    kind = "explicit"  # "explicit" | "implicit" | "multistep"
    pixels, alike = 10.0, 0.5  # weights of the picture and of the identity
    seen_updates, seen_batch, seen_rate = 400, 64, 2e-3  # of the recogniser
    updates, batch, rate = 300, 16, 5e-4
    variants = (
        Variant(
            "dreamid_implicit",
            says="No triplets: targets are given back to their own, and for others only the identity is known",
            kind="implicit",
            baselines=("copy_source",),
        ),
        Variant(
            "dreamid_multistep",
            says="Noise prediction on the same triplets, sampled by DDIM",
            kind="multistep",
            baselines=("copy_source",),
        ),
        Variant(
            "dreamid_latent",
            says="Without the losses on the picture",
            pixels=0.0,
            alike=0.0,
            baselines=("copy_source",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {
            "swapper": Swapper(session.clone("teacher"), self.kind != "multistep"),
            "wearer": Editor(session.clone("teacher")),
            "recogniser": Recogniser().to(session.device, session.dtype),
        }

    def prepare(self, session: Session) -> None:
        recogniser, seen = session.networks["recogniser"], (self.seen_updates, self.seen_batch)
        recogniser.load_state_dict(session.once(recognised, *session.scale(seen, (1, 4)), self.seen_rate))
        recogniser.eval().requires_grad_(False)
        parts = nn.ModuleDict({role: session.networks[role] for role in ("swapper", "wearer")})
        triplets, schedule = Triplets(session), schedule_of(parts["swapper"])
        size, updates = session.scale((self.batch, self.updates), (4, 1))

        def loss() -> Tensor:
            real, one, other = triplets.draw(size)
            source, wanted = triplets.x0[one], triplets.x0[real]
            if self.kind == "implicit":
                known = torch.arange(size, device=real.device) % 2 == 0
                target = torch.where(known.view(-1, 1, 1, 1), wanted, triplets.x0[other])
            else:
                known, target = torch.ones_like(real, dtype=torch.bool), triplets.swapped(real, other)
            asked = encoded(session, target), encoded(session, source), recogniser(source)
            if self.kind != "multistep":
                z = self.swap(parts, schedule, noise_like(asked[0], session.rng), *asked)
                return self.loss(session, z, wanted, known, asked[2])
            x, t, eps = noised(session, schedule, encoded(session, wanted))
            maps = kept(parts["wearer"], asked[1])
            found = beside(parts["swapper"], maps, x, schedule.network_time(t), asked[0], asked[2])
            return (found - eps).square().mean()

        fit(session, parts, loss, updates, self.rate, clip=1.0)

    def loss(self, session: Session, z: Tensor, wanted: Tensor, known: Tensor, identity: Tensor) -> Tensor:
        """The loss of latents z [B, 4, 8, 8]: to be the pictures that are wanted where these are known [B], and of an identity
        [B, 64] everywhere."""
        near = (z - encoded(session, wanted)).square().mean((1, 2, 3))
        if self.pixels == 0 and self.alike == 0:
            return (known * near).mean()
        picture = session.networks["vae"](z)
        near = near + self.pixels * (picture - wanted).square().mean((1, 2, 3))
        apart = 1 - cosine_similarity(session.networks["recogniser"](picture), identity)
        return (known * near).mean() + self.alike * apart.mean()

    def swap(
        self, parts: Any, schedule: Schedule, noise: Tensor, target: Tensor, source: Tensor, identity: Tensor
    ) -> Tensor:
        """The latents of the swap in one step from noise. One evaluation of each UNet."""
        time = torch.full_like(noise[:, 0, 0, 0], schedule.network_time(1.0))
        return beside(parts["swapper"], kept(parts["wearer"], source), noise, time, target, identity)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 3:
            skip("the recogniser and two UNets are asked once each")
        parts, noise = session.networks, batch["noise"]
        target, source = batch["target_latents"], batch["identity_latents"]
        identity, schedule = parts["recogniser"](batch["identity"].to(noise.dtype)), schedule_of(parts["swapper"])
        if self.kind != "multistep":
            return self.swap(parts, schedule, noise, target, source, identity)
        maps = kept(parts["wearer"], source)
        return denoised(
            lambda x, time: beside(parts["swapper"], maps, x, time, target, identity), schedule, noise, rung - 2
        )
