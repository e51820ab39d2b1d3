"""PartEdit: a token is learned for a part, and its attention says at every step where an edit may change the picture."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy, interpolate

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.attention import Control, Layer, PromptToPrompt, Words, controlled, corresponding
from stepmark.tracks.editing.inversion import inverted, leap
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.scenes.captions import LENGTH
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import descend, grid_times
from stepmark.tracks.text_to_image.sampling import noise_like

SIDE = 8  # of maps


def filled(tokens: Tensor) -> Tensor:
    """The states [B, 32, 64] of a prompt of two tokens [B, 2, 64], of what is not the part and of the part: the first one stands
    in all other places too."""
    found = tokens[:, :1].repeat(1, LENGTH, 1)
    return torch.cat([found[:, :1], tokens[:, 1:], found[:, 2:]], 1)


def enlarged(maps: Tensor) -> Tensor:
    """Maps [B, n] of n pixels as [B, 8, 8]."""
    side = round(maps.shape[1] ** 0.5)
    return interpolate(maps.unflatten(1, (1, side, side)), size=(SIDE, SIDE), mode="bilinear")[:, 0]


def otsu(x: Tensor) -> Tensor:
    """The threshold [B] that parts the values [B, n] into two classes whose means lie farthest apart, each class weighted by how
    many it holds (Otsu 1979): the middle between the greatest of the lower and the least of the upper."""
    ordered = x.sort(1).values
    n = x.shape[1]
    below = torch.arange(1, n, device=x.device, dtype=x.dtype)
    total = ordered.cumsum(1)
    low, high = total[:, :-1] / below, (total[:, -1:] - total[:, :-1]) / (n - below)
    best = (below * (n - below) * (high - low).square()).argmax(1, keepdim=True)
    return 0.5 * (ordered.gather(1, best) + ordered.gather(1, best + 1))[:, 0]


def soft_mask(maps: Tensor, lower: float, upper: float) -> Tensor:
    """Maps [B, 8, 8] scaled to 0 .. 1, then 0 below `lower` and 1 from `upper` on, in units of their Otsu threshold, and as they
    are between."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp(min=1e-8)
    threshold = otsu(scaled.flatten(1))[:, None, None]
    return torch.where(scaled < lower * threshold, 0.0, torch.where(scaled >= upper * threshold, 1.0, scaled))


class Looking(Control):
    """Keeps how much every pixel looks at the second word, mean over heads, of every layer that looks at words."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def maps(self, layer: Layer, maps: Tensor) -> Tensor:
        if layer.cross:
            self.seen.append(enlarged(maps[..., 1].mean(1)))
        return maps


class Blending(PromptToPrompt):
    """Prompt-to-Prompt, and what every layer of attention gives the edit, blended with what it gives the source: M edit + (1 - M)
    source, with the mask of the step before.

    Rows are those of the source without and with its caption, and of the edit likewise; `alone` while a call has the second
    group only. The part's maps are those of the source's queries and the keys of its states [B, 32, 64]; without such states,
    those of the words of the source that the edit exchanges.
    """

    def __init__(self, words: Words, steps: int, part: Tensor | None, cuts: tuple[float, float] | None) -> None:
        super().__init__(words, steps, (1, 3, 4), 1.0, 0.4, 0.0)
        self.part, self.cuts, self.alone = part, cuts, False
        self.mask: Tensor | None = None
        self.seen: list[Tensor] = []

    def inputs(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layer.cross and self.part is not None:
            own = query if self.alone else query.chunk(self.groups)[self.source]
            maps = (own @ layer.heads(layer.attn.to_k(self.part)).transpose(2, 3) * layer.attn.scale).softmax(-1)
            self.seen.append(enlarged(maps[..., 1].mean(1)))
        return query, key, value

    def maps(self, layer: Layer, maps: Tensor) -> Tensor:
        if layer.cross and self.part is None:
            own = maps if self.alone else maps.chunk(self.groups)[self.source]
            self.seen.append(enlarged((own.mean(1) * self.words.given_up[:, None]).sum(2)))
        return maps if self.alone else super().maps(layer, maps)

    def found(self, layer: Layer, found: Tensor) -> Tensor:
        if self.mask is None or self.alone:
            return found
        side = round(found.shape[1] ** 0.5)
        mask = interpolate(self.mask[:, None], size=(side, side), mode="bilinear").flatten(1)[..., None]
        null, told, null_edit, edit = found.chunk(self.groups)
        return torch.cat([null, told, torch.lerp(null, null_edit, mask), torch.lerp(told, edit, mask)])

    def look(self) -> None:
        """Make the mask of the step that is over, mean over layers, that of the next."""
        if self.cuts is not None:
            self.mask = soft_mask(torch.stack(self.seen).mean(0), *self.cuts)
        self.seen.clear()


class PartEdit(Method):
    """PartEdit: one half of an object is recoloured, where the attention of a learned token says that this half lies.

    Two tokens are learned for a part, of what it is and what it is not, with the network frozen. On 16 pictures with masks, the
    network is asked with a prompt of these two, the second one once and the first in all other places, about the picture
    noised to a uniform time; the attention A to the second token, mean over heads and layers, is to be the mask y:

        L = BCE(mean_l A_l, y)

    An edit runs the source and the edit prompt side by side from the same noise. At every step and in every layer
    the source's queries are also asked with the part's keys, which gives a map of the part; scaled to 0 .. 1, with Otsu's
    threshold k of it,

        M = 0 where A < k / 2,   1 where A >= omega k,   A between,   omega = 1.5

    In the next step every layer's features, of self- and cross-attention, with and without the prompt, are

        F_edit <- M F_edit + (1 - M) F_source

    An evaluation of the source before the first step gives the first M, which is an option of the authors' code. Maps of words
    are exchanged as in Prompt-to-Prompt: of those that stay in all steps, of the edited ones in two fifths, none of the picture
    to itself. All this is that code; how the tokens are trained is not in it, and is the reading here of what the paper says.

    The source is inverted by DDIM without guidance, and its row lies on that path. A step takes one evaluation up and four
    down, of source and edit without and with their captions; the edit alone is guided, w = 3. So n steps take 5 n + 1: the
    rung pays for 1, 3, 6, 12 and 25.

    Differs from the paper: it edits pictures that the network drew, and real ones by another inversion; 50 steps; the part's map
    is read by the source's own evaluation and needs no row of its own, as its queries are the source's in the code too; masks
    and maps have 8x8 pixels; 300 updates of both parts at once at a rate of 0.02.

    Controls: `partedit_worded` has no learned token, its mask is the source's attention to the colour that is exchanged;
    `partedit_untrained` has tokens that were never trained; `partedit_unblended` has no mask. `partedit_binary` cuts the mask at
    k into 0 and 1.

    What limits it here: half an object is one or two cells high, and a mask as coarse as that cannot follow its edge.
    """

    paper = Paper(
        id="partedit",
        title="PartEdit: Fine-Grained Image Editing using Pre-Trained Diffusion Models",
        authors="Cvejic, Eldesokey, Wonka",
        year=2025,
        arxiv="2502.04050",
        code="Gorluxor/PartEdit",
    )
    tasks = ("parts/scenes",)
    baselines = ("prompt_to_prompt", "ddim_inversion", "sdedit", "copy_source", "partedit_worded")
    trainings = 3
    claims = (
        Claim(
            "edit[partedit,32..128] > max(edit[prompt_to_prompt,32..128], edit[ddim_inversion,32..128], edit[sdedit,32..128], "
            "edit[partedit_worded,32..128], edit[partedit_untrained,32..128], edit[partedit_unblended,32..128], "
            "edit[copy_source,32..128]) and kept[partedit,32..128] < min(kept[prompt_to_prompt,32..128], "
            "kept[ddim_inversion,32..128], kept[sdedit,32..128], kept[partedit_unblended,32..128])",
            says="with as many evaluations more parts have the colour that was asked for and more of the rest is kept than by "
            "exchanged attention, by inversion and by noise on the source; no mask of a word or of chance edits as many",
            headline=True,
            setting="6 to 25 steps and real pictures; the paper takes 50, of pictures that the network drew",
        ),
        Claim(
            "inside[partedit,32..128] > max(inside[prompt_to_prompt,32..128], inside[partedit_worded,32..128], "
            "inside[partedit_untrained,32..128])",
            says="the part looks more like the part that was asked for",
        ),
        Claim(
            "edit[partedit,32..128] >= edit[partedit_binary,32..128] and kept[partedit,32..128] <= kept[partedit_binary,32..128]",
            says="a soft mask is no worse than one of 0 and 1, in what is edited and in what is kept",
        ),
    )

    token = "learned"
    cuts: tuple[float, float] | None = (0.5, 1.5)  # of the mask, in units of the threshold
    variants = (
        Variant(
            "partedit_worded",
            says="control: the mask of the exchanged colour, no token",
            token="word",
            baselines=("prompt_to_prompt",),
        ),
        Variant(
            "partedit_untrained", says="control: tokens as they were drawn", token="drawn", baselines=("partedit",)
        ),
        Variant("partedit_unblended", says="no mask: nothing is blended", cuts=None, baselines=("prompt_to_prompt",)),
        Variant(
            "partedit_binary", says="a mask of 0 and 1, cut at the threshold", cuts=(1.0, 1.0), baselines=("partedit",)
        ),
    )

    updates, pictures = 300, 16

    def prepare(self, session: Session) -> dict[str, Tensor]:
        if self.token == "word":
            return {}
        updates = session.scale(self.updates, 1) if self.token == "learned" else 0
        return dict(session.once(part_tokens, session.scale(self.pictures, 2), updates))

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        steps = (rung - 1) // 5
        if steps < 1:
            skip("a step takes five evaluations, and the first mask one")
        teacher, z = session.networks["teacher"], batch["source_latents"]
        told, wanted = (teacher.words(batch[name]) for name in ("source_condition", "condition"))
        denoise, null = Denoiser(teacher, told), teacher.null_condition(wanted)
        schedule, times = denoise.schedule, uniform_times(steps)
        path = inverted(denoise, z, times)
        part = None if self.token == "word" else filled(session.state["tokens"][batch["part"]])
        control = Blending(corresponding(batch["source_condition"], batch["condition"]), steps, part, self.cuts)
        x, states = path[0], torch.cat([null, told, null, wanted])
        with controlled(teacher, control):
            control.alone = True
            denoise.output(x, times[0])
            control.alone = False
            for number, (t, s) in enumerate(pairwise(times)):
                control.step = number
                control.look()
                rows = torch.cat([path[number], path[number], x, x])
                out = teacher(rows, rows.new_full((len(rows),), schedule.network_time(t)), states)
                none, edit = out.chunk(4)[2:]
                x = leap(schedule, x, torch.lerp(none, edit, GUIDANCE), t, s)
        return x


# training ---------------------------------------------------------------------------------------


def part_tokens(session: Session, pictures: int, updates: int) -> dict[str, Tensor]:
    """{"tokens": [2, 2, 64]}: of the upper and the lower half, of what is not the part and of what is. They begin as the
    state of the empty caption's start, shaken."""
    teacher, rng, device = session.networks["teacher"].requires_grad_(False), session.rng, session.device
    data, schedule = session.train, schedule_of(teacher)
    which = torch.randperm(len(data["x0"]), generator=rng, device=device)[:pictures].cpu()
    masks = (
        adaptive_avg_pool2d(data["masks"][which], SIDE).to(device, session.dtype).flatten(0, 1)
    )  # [pictures * 2, 8, 8]
    with torch.no_grad():
        x0 = session.networks["vae"].encode(data["x0"][which].to(device, session.dtype)).repeat_interleave(2, 0)
        start = teacher.words(teacher.null_condition(data["tokens"][:1].to(device)))[0, 0]
    shaken = 0.1 * torch.randn(2, 2, len(start), generator=rng, device=device, dtype=session.dtype)
    tokens = nn.Parameter(start + shaken)
    grid = grid_times(schedule, schedule.steps).to(device, session.dtype)
    for step in descend(session, [tokens], updates, 0.02):
        t = grid[torch.randint(len(grid), (len(x0),), generator=rng, device=device)]
        x = add_noise(schedule, x0, noise_like(x0, rng), t)
        looking = Looking()
        with controlled(teacher, looking):
            teacher(x, schedule.network_time(t), filled(tokens.repeat(pictures, 1, 1)))
        seen = torch.stack(looking.seen).mean(0).clamp(1e-6, 1 - 1e-6)
        step(binary_cross_entropy(seen, masks))
    return {"tokens": tokens.detach()}
