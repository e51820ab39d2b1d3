"""CatVTON: figure and garment lie in one picture, and the self-attention of the denoiser carries one over to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.pairs import (
    Editor,
    Pairs,
    beside,
    blanked,
    boxed,
    denoised,
    encoded,
    grown,
    kept,
    on_grid,
)
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.image.training import fit
from stepmark.tracks.scenes.captions import LENGTH
from stepmark.tracks.text_to_image.sampling import noise_like, noised

SHOWN = 5  # further channels of a network that fills holes: the mask, and the latents of the picture with the hole


def canvas(above: Tensor, below: Tensor) -> Tensor:
    """Two maps [B, c, 8, 8] one above the other, [B, c, 16, 8]."""
    return torch.cat([above, below], 2)


def shown(figure: Tensor, mask: Tensor, garment: Tensor) -> Tensor:
    """What the network is shown beside the noisy canvas, [B, 5, 16, 8]: the mask above nothing, the latents of the figure with
    its hole above those of the garment."""
    return torch.cat([canvas(mask, torch.zeros_like(mask)), canvas(figure, garment)], 1)


def rectified(x: Tensor, eps: Tensor, predicted: Tensor, sigma: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The noisy latents and the noise that DREAM trains on (Zhou et al. 2023): moved by sigma^power of the error that the network
    makes, as it will meet them when it samples. sigma broadcasts against x."""
    change = sigma**power * (eps - predicted)
    return x + sigma * change, eps + change


def inpainter(session: Session, updates: int, size: int, rate: float) -> dict[str, Tensor]:
    """The teacher, taught to fill holes: it is shown a mask and the picture with the hole, and learns to predict the noise of the
    whole. Pictures are figures and garments, holes are boxes, in a quarter of the cases everything. Its weights but for those of
    cross-attention, which looks at the empty caption meanwhile."""
    painter: Any = session.clone("teacher")  # which is asked itself, so that it is counted
    painter.unet.conv_in = grown(painter.unet.conv_in, SHOWN)
    painter.words.requires_grad_(False)
    pairs, schedule = Pairs(session, ("x0", "person", "garment")), schedule_of(painter)
    pictures = {name: session.train[name][pairs.rows].to(session.device) for name in pairs.latents}
    with torch.no_grad():
        ids = torch.zeros(size, LENGTH, dtype=torch.int64, device=session.device)
        nothing = painter.words(painter.null_condition(ids))
    lines = torch.arange(32, device=session.device)

    def sides() -> Tensor:
        """Of every picture, which lines a box of 8 to 24 of them covers [size, 32]."""
        u = torch.rand(2, size, 1, generator=session.rng, device=session.device)
        long = (8 + 17 * u[0]).floor()
        first = (u[1] * (33 - long)).floor()
        return (lines >= first) & (lines < first + long)

    def loss() -> Tensor:
        name = ("x0", "person", "garment")[int(torch.randint(3, (), generator=session.rng, device=session.device))]
        rows = pairs.draw(size)
        whole = torch.rand(size, 1, 1, generator=session.rng, device=session.device) < 0.25
        mask = sides()[:, :, None] & sides()[:, None] | whole
        hole = encoded(session, blanked(pictures[name][rows], mask))
        x, t, eps = noised(session, schedule, pairs.latents[name][rows])
        told = torch.cat([on_grid(mask).to(x.dtype), hole], 1)
        return (painter(torch.cat([x, told], 1), schedule.network_time(t), nothing) - eps).square().mean()

    fit(session, painter, loss, updates, rate, clip=1.0)
    return Editor(painter, text=False).state_dict()


class CatVTON(Method):
    """CatVTON: no network for the garment, no text; the two pictures are one canvas, and only self-attention learns.

    The base is a denoiser that fills holes: 4 channels of noise, the mask, and the latents of the picture with its hole. Text is
    taken from it with all layers of cross-attention. Figure and garment are then put one above the other (section 3.3), in the
    noise, in the mask and in what is shown,

        X_t = [x_t(figure); x_t(garment)],   [mask; 0],   [figure with its hole; garment]

    so that every layer of self-attention sees both, and the upper half of what is denoised is the answer. Only the layers of
    self-attention learn, on the loss of noise prediction over the whole canvas, with the rectified target of DREAM (section 3.4,
    p = 10): a first prediction without a gradient moves noise and noisy latents by sigma^p times its own error,

        eps' = eps + sigma^p (eps - eps_theta),   x' = x + sigma (eps' - eps),   loss = |eps_theta(x', t) - eps'|^2

    In one case in ten the garment that is shown is zero, for guidance, null + 2.5 (conditional - null), which costs two
    evaluations a step (a single one is unguided); steps are those of DDIM with eta = 1, as in the authors' code.

    `catvton_reference` is what the paper leaves out: a second network of the same size looks at the garment, once, and its keys
    and values stand beside those of the first, on a canvas of one picture; all weights of both learn. `catvton_full` trains all
    weights of the canvas's network, `catvton_plain` without DREAM. `catvton_blind` is never shown the garment.
    `catvton_pasted` is no network: the flat garment is stretched over the box of the hole, and the picture is encoded.

    Differs from the paper: there is no network here that fills holes, so the teacher is taught it first, 200 updates on pictures
    of the train split with boxes cut out, the same for all arms; 250 updates of 16 canvases follow, in the paper 16000 of 128.
    The mask is averaged over a latent, not taken at the nearest pixel. With cross-attention its norm goes too, which the authors'
    code leaves in place and adds.

    Of 1.6 million parameters 115 thousand learn, 7 %, and the reference network doubles them. A canvas of two pictures costs two
    pictures in every step, though, where the reference network is asked once: fewer parameters, not fewer operations.

    What limits it here: a worn garment covers a handful of latents, and its pattern is as fine as one of them, so that what is
    compared is the error inside the mask, and never the pattern alone. Worn garments are flat ones that were moved and cut, which
    no photograph is: a paste is nearly right.
    """

    paper = Paper(
        id="catvton",
        title="CatVTON: Concatenation Is All You Need for Virtual Try-On with Diffusion Models",
        authors="Chong, Dong, Li, Zhang, Zhang, Zhang, Zhao, Jiang, Liang",
        year=2024,
        arxiv="2407.15886",
        code="Zheng-Chong/CatVTON",
    )
    tasks = ("tryon/figures",)
    baselines = ("catvton_reference", "catvton_full", "catvton_plain", "catvton_blind", "catvton_pasted", "copy_source")
    trainings = 3
    claims = (
        Claim(
            "inside[catvton,8..50] > inside[catvton_reference,8..50] "
            "and inside[catvton,8..50] > max(inside[catvton_blind,8..50], inside[copy_source,8..50]) "
            "and kept[catvton,8..50] <= 1.05 * kept[catvton_reference,8..50]",
            says="the garment is truer than with a network of its own for it, by half of the parameters, and the rest is kept",
            headline=True,
            setting="250 updates after 200 of a base that fills holes",
        ),
        Claim(
            "inside[catvton,8..50] >= inside[catvton_full,8..50] - 0.25 "
            "and kept[catvton,8..50] <= 1.1 * kept[catvton_full,8..50]",
            says="training self-attention alone, 7 % of the weights, is as good as training all",
            headline=True,
            setting="250 updates after 200 of a base that fills holes",
        ),
        Claim(
            "inside[catvton,8..50] > inside[catvton_pasted,8..50]",
            says="better than the flat garment stretched over the hole",
            headline=True,
            setting="worn garments are flat ones that were moved and cut, and have neither folds nor poses",
        ),
        Claim(
            "psnr[catvton,8..50] > psnr[catvton_plain,8..50]",
            says="DREAM's target makes pictures that are closer to the truth",
            setting="250 updates after 200 of a base that fills holes",
        ),
    )

    kind = "canvas"  # "canvas" | "reference" | "pasted"
    learns = "attn1"  # what the names of the weights that learn contain; "": all
    power: float | None = 10.0  # of DREAM
    dropout, guidance, eta = 0.1, 2.5, 1.0
    base_updates, base_batch, base_rate = 200, 32, 5e-4
    updates, batch, rate = 250, 16, 5e-4
    variants = (
        Variant(
            "catvton_reference",
            says="A second network looks at the garment; all weights of both learn",
            kind="reference",
            learns="",
            baselines=("copy_source",),
        ),
        Variant("catvton_full", says="All weights learn", learns="", baselines=("copy_source",)),
        Variant("catvton_plain", says="The plain loss of noise prediction", power=None, baselines=("copy_source",)),
        Variant(
            "catvton_blind",
            says="The garment is never shown, as if the hole were to be filled",
            dropout=1.0,
            guidance=1.0,
            baselines=("copy_source",),
        ),
        Variant(
            "catvton_pasted",
            says="No network: the flat garment stretched over the box of the hole",
            kind="pasted",
            baselines=("copy_source",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        roles = {"canvas": ("dresser",), "reference": ("dresser", "wardrobe"), "pasted": ()}[self.kind]
        return {role: Editor(session.clone("teacher"), SHOWN, text=False) for role in roles}

    def prepare(self, session: Session) -> None:
        if self.kind == "pasted":
            return
        pairs = Pairs(session, ("x0", "agnostic", "garment"))  # before a network is changed, as in `inpainter`
        base = session.once(inpainter, *session.scale((self.base_updates, self.base_batch), (1, 4)), self.base_rate)
        parts = nn.ModuleDict({r: session.networks[r] for r in ("dresser", "wardrobe") if r in session.networks})
        for part in parts.values():
            part.load_state_dict(base)
        for name, weight in parts.named_parameters():
            weight.requires_grad_(self.learns in name)
        size, updates = session.scale((self.batch, self.updates), (4, 1))
        masks = on_grid(session.train["mask"][pairs.rows]).to(session.device, session.dtype)

        def loss() -> Tensor:
            rows = pairs.draw(size)
            figure, hole, garment = (pairs.latents[name][rows] for name in ("x0", "agnostic", "garment"))
            unseen = torch.rand(size, generator=session.rng, device=session.device) < self.dropout
            seen = garment.masked_fill(unseen.view(-1, 1, 1, 1), 0.0)
            x0 = canvas(figure, garment) if self.kind == "canvas" else figure
            return self.loss(session, parts, x0, hole, masks[rows], seen)

        fit(session, parts, loss, updates, self.rate, clip=1.0)

    def loss(self, session: Session, parts: Any, x0: Tensor, hole: Tensor, mask: Tensor, garment: Tensor) -> Tensor:
        """The loss of one batch; x0 is what is noised, the canvas or the figure alone."""
        schedule = schedule_of(parts["dresser"])
        x, t, eps = noised(session, schedule, x0)
        time = schedule.network_time(t)
        if self.power is not None:
            with torch.no_grad():
                first = self.predict(parts, x, time, hole, mask, garment)
            x, eps = rectified(x, eps, first, schedule.sigma(t).view(-1, 1, 1, 1), self.power)
        return (self.predict(parts, x, time, hole, mask, garment) - eps).square().mean()

    def predict(
        self, parts: Any, x: Tensor, time: Tensor, hole: Tensor, mask: Tensor, garment: Tensor, maps: Any = None
    ) -> Tensor:
        """The noise of x [B, 4, 16 or 8, 8]. One evaluation a row, and where a reference network has not been asked yet (`maps`)
        one of it."""
        if self.kind == "canvas":
            return parts["dresser"](x, time, shown(hole, mask, garment))
        maps = self.look(parts, garment) if maps is None else maps
        return beside(parts["dresser"], maps, x, time, torch.cat([mask, hole], 1))

    def look(self, parts: Any, garment: Tensor) -> Any:
        """Keys and values of the reference network, which is shown the garment and no hole."""
        return kept(parts["wardrobe"], garment, garment.new_zeros(len(garment), SHOWN, *garment.shape[2:]))

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if self.kind == "pasted":
            flat = (batch["garment"] < 0.99).any(1)
            moved = boxed(batch["garment"], flat, batch["mask"])
            return encoded(session, torch.where(batch["mask"][:, None], moved, batch["agnostic"]))
        hole, garment = batch["agnostic_latents"], batch["garment_latents"]
        mask, once = on_grid(batch["mask"]).to(hole.dtype), self.kind == "reference"
        guided = self.guidance != 1 and rung >= (4 if once else 2)
        rows = 2 if guided else 1
        steps = (rung - rows * once) // rows or skip("the garment is looked at first")
        if guided:
            hole, mask = torch.cat([hole, hole]), torch.cat([mask, mask])
            garment = torch.cat([torch.zeros_like(garment), garment])
        elif self.dropout == 1:
            garment = torch.zeros_like(garment)
        maps = self.look(session.networks, garment) if once else None

        def evaluate(x: Tensor, time: Tensor) -> Tensor:
            out = self.predict(
                session.networks, torch.cat([x] * rows), torch.cat([time] * rows), hole, mask, garment, maps
            )
            if not guided:
                return out
            null, conditional = out.chunk(2)
            return torch.lerp(null, conditional, self.guidance)

        x = batch["noise"] if once else canvas(batch["noise"], noise_like(batch["noise"], session.rng))
        x = denoised(evaluate, schedule_of(session.networks["dresser"]), x, steps, self.eta, session.rng)
        return x[:, :, :8]
