"""MC-VTON: the tokens of figure and garment stand beside those of the picture in one transformer, and adapters do the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.pairs import Pairs, denoised
from stepmark.tracks.editing.transformer import SIDE, TokenTransformer, route
from stepmark.tracks.image.schedules import Schedule, add_noise
from stepmark.tracks.image.training import fit
from stepmark.tracks.text_to_image.sampling import noise_like, noised

PLACES = ((0, 0, 0), (0, 0, 0), (0, 0, SIDE))  # of picture, figure and garment: the garment lies beside the other two
PICTURE, FIGURE, GARMENT = range(3)
FLOW = Schedule("flow")


def places(*frames: int, device: torch.device) -> Tensor:
    """Where those frames lie, int64 [F, 3]."""
    return torch.tensor([PLACES[frame] for frame in frames], device=device)


def dressed(network: nn.Module, x: Tensor, t: Tensor, hole: Tensor, garment: Tensor) -> Tensor:
    """The velocity of pictures x [B, 4, 8, 8] at times t [B]; figure and garment are clean, at time 0. One evaluation a row."""
    frames = torch.stack([x, hole, garment], 1)
    times = torch.stack([t, torch.zeros_like(t), torch.zeros_like(t)], 1)
    return network(frames, times, places(PICTURE, FIGURE, GARMENT, device=x.device))[:, 0]


def looked(network: nn.Module, hole: Tensor, garment: Tensor) -> Sequence[Tensor]:
    """What the blocks of a reference network see of figure and garment, which do not change while a picture is made."""
    frames = torch.stack([hole, garment], 1)
    return network(frames, frames.new_zeros(len(hole), 2), places(FIGURE, GARMENT, device=hole.device), keep=True)


def beside(network: nn.Module, x: Tensor, t: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """The velocity by a network that looks at what a reference network has seen beside its own tokens."""
    return network(x[:, None], t[:, None], places(PICTURE, device=x.device), further=maps)[:, 0]


def landed(network: nn.Module, x: Tensor, t: Tensor, step: float, parts: int, *told: Tensor) -> Tensor:
    """The mean velocity of a network from times t [B] to t - step, on `parts` steps of Euler's: with it, one step lands where
    those land."""
    y = x
    for k in range(parts):
        y = y - step / parts * dressed(network, y, t - k * step / parts, *told)
    return (x - y) / step


# --- what the variants share -----------------------------------------------------------------------------------------


def painter(session: Session, updates: int, size: int, rate: float) -> dict[str, Tensor]:
    """A flow transformer of single pictures, figures and garments, as they come: what stands for the pretrained one."""
    network, pairs = TokenTransformer().to(session.device, session.dtype), Pairs(session, ("x0", "person", "garment"))
    everything = torch.cat(list(pairs.latents.values()))

    def loss() -> Tensor:
        rows = torch.randint(len(everything), (size,), generator=session.rng, device=session.device)
        x, t, eps = noised(session, FLOW, everything[rows])
        found = network(x[:, None], t[:, None], places(PICTURE, device=x.device))[:, 0]
        return (found - (eps - everything[rows])).square().mean()

    fit(session, network, loss, updates, rate, ema=0.995, clip=1.0)
    return network.state_dict()


def pairs_of(session: Session) -> Pairs:
    """Figures, the same with their holes, and garments. Asked for before a network is changed, they are encoded once for all."""
    return Pairs(session, ("x0", "agnostic", "garment"))


def matched(
    session: Session,
    pairs: Pairs,
    parts: nn.Module,
    velocity: Callable[..., Tensor],
    updates: int,
    size: int,
    rate: float,
) -> None:
    """Train in place what can learn, by flow matching on pairs: velocity(x, t, figure, garment)."""

    def loss() -> Tensor:
        rows = pairs.draw(size)
        x0, *told = (pairs.latents[name][rows] for name in ("x0", "agnostic", "garment"))
        x, t, eps = noised(session, FLOW, x0)
        return (velocity(x, t, *told) - (eps - x0)).square().mean()

    fit(session, parts, loss, updates, rate, clip=1.0)


def adapted(
    session: Session, ranks: Sequence[int], base: Sequence[int], base_rate: float, updates: int, size: int, rate: float
) -> dict[str, Tensor]:
    """The first stage: the weights with their adapters of figure and garment."""
    network, pairs = TokenTransformer().to(session.device, session.dtype), pairs_of(session)
    network.load_state_dict(session.once(painter, *base, base_rate))
    route(network, {FIGURE: ranks[0], GARMENT: ranks[1]})
    matched(session, pairs, network, lambda *asked: dressed(network, *asked), updates, size, rate)
    return network.state_dict()


class MCVTON(Method):
    """MC-VTON: no reference network, no encoder of pictures, no text; clean pictures as tokens, low-rank adapters, eight steps.

    The latents of the figure with its hole and those of the garment are cut into tokens like the noisy picture and appended to
    it. All attend to all. The two are clean: their time is 0 while that of the picture is t. The figure lies where the picture
    lies, the garment beside it. Only low-rank adapters of the attention learn, on

        loss = |v(x_t, t; figure, garment) - (eps - x0)|^2   over the tokens of the picture, x_t = (1 - t) x0 + t eps

    and they act on the tokens of the figure (rank 4) and of the garment (rank 8), so that those come to say what the frozen
    network can use. Then adapters of the picture's own tokens (rank 8) learn to take eight steps: one step of 1/8 must land where
    four steps of 1/32 of the first stage land,

        loss = |v_student(x_t, t) - (x_t - Euler^4(x_t, t -> t - 1/8)) / (1/8)|^2,   t in 1/8, 2/8, ..., 1

    There is no guidance anywhere. With more than eight evaluations allowed, eight are made.

    `mc_vton_multistep` is the first stage in as many Euler steps as the rung allows. `mc_vton_undistilled` trains the same
    adapters of the picture's tokens as long on the loss of the first stage, and samples like the student. `mc_vton_full` is a
    first stage that trains all weights. `mc_vton_reference` has a second network for figure and garment, asked once, whose
    tokens the first one looks at in every block; all weights of both learn. `catvton_pasted`, of another plugin, is no network.

    Differs from the paper, of which there is no code: the abstract does not say what is distilled, so that the loss of the second
    stage is a reading, and no adversary is added; that adapters act on the tokens of the two conditions alone, and their ranks,
    come from what others write of it. The network is small and pretrained here, 500 updates on the figures and garments of the
    train split as single pictures; 250 updates of the first stage and 120 of the second follow.

    The adapters of the first stage are 55 thousand weights beside 768 thousand, 7 %, for a width of 96 is not much more than the
    ranks; the paper's are 0.33 %.

    What limits it here: the frozen network has never seen a second picture. A worn garment covers a handful of latents, its
    pattern is as fine as one of them, and so the error inside the mask is compared, never the pattern alone.
    """

    paper = Paper(
        id="mc_vton",
        title="MC-VTON: Minimal Control Virtual Try-On Diffusion Transformer",
        authors="Luan, Li, Zhao, Xing",
        year=2025,
        arxiv="2501.03630",
    )
    tasks = ("tryon/figures",)
    baselines = (
        "mc_vton_multistep",
        "mc_vton_undistilled",
        "mc_vton_reference",
        "mc_vton_full",
        "catvton_pasted",
        "copy_source",
    )
    trainings = 3
    claims = (
        Claim(
            "inside[mc_vton,8] >= inside[mc_vton_multistep,28] - 0.25 and kept[mc_vton,8] <= 1.1 * kept[mc_vton_multistep,28] "
            "and inside[mc_vton,8] > max(inside[mc_vton_multistep,8], inside[mc_vton_undistilled,8], inside[copy_source,8])",
            says="eight steps are about as good as twenty-eight, and better than eight that were not distilled",
            headline=True,
            setting="a distillation of 120 updates, whose loss is a reading",
        ),
        Claim(
            "inside[mc_vton_multistep,16..50] > inside[mc_vton_reference,16..50] "
            "and kept[mc_vton_multistep,16..50] <= 1.05 * kept[mc_vton_reference,16..50]",
            says="a few adapters are truer to the garment than a reference network",
            headline=True,
            setting="a network of 500 updates, where the paper's was made from billions of pictures",
        ),
        Claim(
            "inside[mc_vton,8..50] > inside[catvton_pasted,8..50]",
            says="better than the flat garment stretched over the hole",
            headline=True,
            setting="worn garments are flat ones that were moved and cut, and have neither folds nor poses",
        ),
        Claim(
            "inside[mc_vton_multistep,16..50] >= inside[mc_vton_full,16..50] - 0.25",
            says="adapters of 7 % of the weights are about as good as training all",
            setting="a network of 500 updates, where the paper's was made from billions of pictures",
        ),
    )

    stage = "distilled"  # "first" | "distilled" | "longer"
    learns = "adapters"  # "adapters" | "all" | "reference": of the first stage
    person_rank, garment_rank, picture_rank = 4, 8, 8
    base_updates, base_batch, base_rate = 500, 64, 1.5e-3
    updates, last_updates, batch, rate = 250, 120, 32, 1e-3
    steps, parts = 8, 4  # of the student, and the teacher's for one of them
    variants = (
        Variant("mc_vton_multistep", says="The first stage, in Euler steps", stage="first", baselines=("copy_source",)),
        Variant(
            "mc_vton_undistilled",
            says="The same adapters, trained as long on the loss of the first stage",
            stage="longer",
            baselines=("mc_vton_multistep",),
        ),
        Variant(
            "mc_vton_full",
            says="A first stage that trains all weights, in Euler steps",
            stage="first",
            learns="all",
            baselines=("mc_vton_multistep",),
        ),
        Variant(
            "mc_vton_reference",
            says="A second network for figure and garment; all weights of both learn; in Euler steps",
            stage="first",
            learns="reference",
            baselines=("mc_vton_multistep",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        network = TokenTransformer().to(session.device, session.dtype)
        if self.learns == "adapters":
            ranks = {FIGURE: self.person_rank, GARMENT: self.garment_rank}
            route(network, ranks | ({PICTURE: self.picture_rank} if self.stage != "first" else {}))
        found: dict[str, nn.Module] = {"dresser": network}
        if self.learns == "reference":
            found["wardrobe"] = TokenTransformer().to(session.device, session.dtype)
        return found

    def prepare(self, session: Session) -> None:
        base = session.scale((self.base_updates, self.base_batch), (1, 4))
        first, last, size = session.scale((self.updates, self.last_updates, self.batch), (1, 1, 4))
        network, pairs = session.networks["dresser"], pairs_of(session)
        have = session.once(painter, *base, self.base_rate)
        if self.learns == "adapters":
            ranks = (self.person_rank, self.garment_rank)
            have = session.once(adapted, ranks, base, self.base_rate, first, size, self.rate)
            network.load_state_dict(have, strict=False)  # the adapters of the picture are not among them
            if self.stage != "first":
                self.finish(session, pairs, network, last, size)
            return
        parts = nn.ModuleDict({r: session.networks[r] for r in ("dresser", "wardrobe") if r in session.networks})
        for part in parts.values():
            part.load_state_dict(have)

        def velocity(x: Tensor, t: Tensor, hole: Tensor, garment: Tensor) -> Tensor:
            if self.learns == "reference":
                return beside(parts["dresser"], x, t, looked(parts["wardrobe"], hole, garment))
            return dressed(parts["dresser"], x, t, hole, garment)

        matched(session, pairs, parts, velocity, first, size, self.rate)

    def finish(self, session: Session, pairs: Pairs, student: nn.Module, updates: int, size: int) -> None:
        """The second stage, in place: the adapters of the picture learn, and nothing else."""
        for name, weight in student.named_parameters():
            weight.requires_grad_(f".up.{PICTURE}." in name or f".down.{PICTURE}." in name)
        if self.stage == "longer":
            matched(session, pairs, student, lambda *asked: dressed(student, *asked), updates, size, self.rate)
            return
        teacher = session.clone("dresser").requires_grad_(False)

        def loss() -> Tensor:
            rows = pairs.draw(size)
            x0, *told = (pairs.latents[name][rows] for name in ("x0", "agnostic", "garment"))
            t = torch.randint(1, self.steps + 1, (size,), generator=session.rng, device=x0.device).to(x0) / self.steps
            x = add_noise(FLOW, x0, noise_like(x0, session.rng), t)
            with torch.no_grad():
                wanted = landed(teacher, x, t, 1 / self.steps, self.parts, *told)
            return (dressed(student, x, t, *told) - wanted).square().mean()

        fit(session, student, loss, updates, self.rate, clip=1.0)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, hole, garment = session.networks["dresser"], batch["agnostic_latents"], batch["garment_latents"]
        steps = rung if self.stage == "first" else min(rung, self.steps)
        if self.learns == "reference":
            steps = rung - 1 or skip("the reference network takes one evaluation")
            maps = looked(session.networks["wardrobe"], hole, garment)
            return denoised(lambda x, t: beside(network, x, t, maps), FLOW, batch["noise"], steps)
        return denoised(lambda x, t: dressed(network, x, t, hole, garment), FLOW, batch["noise"], steps)
