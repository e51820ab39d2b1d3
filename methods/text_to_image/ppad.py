"""PPAD: while a picture is denoised an observer looks at what it will be, and what is wrong is sent back and corrected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.backbones.scenes import HEADS
from stepmark.backbones.scenes_judges import parted
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.scenes.captions import PLACES, Caption, Thing, read, swapped, texts, tokens, write
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, noisy_step
from stepmark.tracks.text_to_image.search import JUDGED, ROOM

MOST = 3  # objects of a negative prompt


def observed(logits: dict[str, Tensor], said: Caption) -> tuple[list[int], Caption] | None:
    """What the reader of one picture finds wrong: which objects of its caption, and what it sees in their place (the negative
    prompt); None where nothing is wrong.

    logits: by attribute [9, kinds + 1] (the last: nothing there), and of the background [8]. An object lies where its caption
    says, else where it most likely does.
    """
    seen = {name: logits[name].argmax(-1).tolist() for name in HEADS}
    logs = {name: logits[name].log_softmax(-1) for name in HEADS}
    wrong, instead, left = [], [], set(range(len(PLACES))) - {thing.place for thing in said.objects}
    for number, thing in enumerate(said.objects):
        wanted = {name: value for name, value in thing.named().items() if name in HEADS}
        place = thing.place
        if place is None:
            fits = logs["shape"][:, :-1].logsumexp(1)  # that something lies there
            for name, value in wanted.items():
                fits = fits + logs[name][:, value]
            place = max(sorted(left), key=fits.tolist().__getitem__)
            left.remove(place)
        if seen["shape"][place] == HEADS["shape"]:
            wrong.append(number)  # it is missing
            continue
        false = {name: seen[name][place] for name, value in wanted.items() if seen[name][place] != value}
        if false:
            wrong.append(number)
            named = {name: value for name, value in false.items() if value < HEADS[name]}
            instead.append(Thing(**{"shape": seen["shape"][place], **named, "place": place}))
    for place in sorted(left):
        if seen["shape"][place] < HEADS["shape"]:  # one too many
            instead.append(Thing(shape=seen["shape"][place], place=place))
    background = int(logits["background"].argmax())
    false_ground = background if said.background not in (None, background) else None
    if not wrong and not instead and false_ground is None:
        return None
    return wrong, Caption(tuple(instead[:MOST]), background=false_ground)


def foremost(said: Caption, wrong: list[int]) -> Caption:
    """The same caption with the objects that are wrong named first, as far as the relation of the first two leaves it free."""
    if said.relation is not None:
        return swapped(said) if 1 in wrong and 0 not in wrong else said
    order = sorted(range(len(said.objects)), key=lambda number: number not in wrong)
    return replace(said, objects=tuple(said.objects[number] for number in order))


class PPAD(Method):
    """Ping-pong-ahead diffusion: an observer reads a preview of the picture, and what it finds wrong is corrected at once.

    At a few times t the sampler looks ahead (lookahead sketch): it predicts x0, where the signal-to-noise ratio is below 1 by
    way of one more step, and decodes it. The observer compares the sketch with the caption. A picture that matches goes on
    and is looked at no more. Of another one the observer says what is missing and what is there instead, which becomes a
    corrected caption c' and a negative prompt n. The latent is sent back and comes down again (ping-pong):

        x_u = DDIM inversion from t to u, the time before, along eps(x_t, n)
        x_t = ancestral step from u to t along eps(x_u, n) + 5 (eps(x_u, c') - eps(x_u, n))

    and sampling goes on with the caption itself. Steps, guidance (0 up and 5 down) and the one step back are those of the
    authors' code, where the sketch is looked at between a half and four fifths of the way.

    The observer is the reward network: it says what lies in each of nine places. n names what it sees in the place of an
    object that is wrong, with the wrong attributes, one object too many, and a wrong background; c' is the caption with the
    objects that are missing or wrong named first: a caption of this grammar says all there is to say, and emphasis is all
    that is left to add.

    Looking takes two evaluations, four where a step leads ahead, the way back and down three, and the step after it two more
    than what was predicted before. 64 evaluations pay for 24 steps and two looks, 32 for eleven and one look. A picture that
    matches spends less than the rung. With 16 there would be three steps.

    `ppad_unprompted` sends back the same pictures, and brings them down with their own caption and no negative prompt:
    resampling with stronger guidance, and the observer only says which. `ppad_unseen` does that to all pictures, with no
    observer, and takes more steps.

    Differs from the paper: no language model writes the prompts, and n names objects, where the authors ask theirs for faults
    of quality alone; a relation of two objects is not checked; the variant with trained feedback is left out. The authors'
    code looks every fifth step of 50, as long as a picture does not match. The fraction of pictures that are sent back is
    whatever the observer finds.

    What limits it here: the reader was trained on finished pictures, sketches are smoother than those.
    """

    paper = Paper(
        id="ppad",
        title="Multimodal LLM-Guided Semantic Correction in Text-to-Image Diffusion",
        authors="Lv, Chen, Tian, Yin, Zhang, Wu",
        year=2025,
        arxiv="2505.20053",
        code="HelloZicky/PPAD",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("ddim_guided", "best_of_n")
    claims = (
        Claim(
            "caption[ppad,32..64] > max(caption[ddim_guided,32..64], caption[best_of_n,32..64], "
            "caption[ppad_unprompted,32..64], caption[ppad_unseen,32..64]) and fd[ppad,32..64] <= 1.1 * fd[ddim_guided,32..64]",
            says="one or two corrections on the way make pictures that follow their captions better than more steps, than the "
            "better of several by the same observer, and than the same detour without what it says",
            headline=True,
            setting="the observer is a small reader of scenes, no language model: it writes no prompts of its own",
        ),
        Claim(
            "caption[ppad,32..64] > caption[ddim_guided,32..64] and parts[ppad,32..64] > parts[ddim_guided,32..64]",
            says="alignment is better than that of the plain sampler",
        ),
        Claim(
            "parts[ppad,32..64] > max(parts[ppad_unprompted,32..64], parts[ppad_unseen,32..64])",
            says="it is what the observer says that corrects, not the detour with stronger guidance",
        ),
    )

    shares, correction, least = (
        (0.5, 0.8),
        5.0,
        1.0,
    )  # of the way; guidance on the way down; SNR below which a step leads ahead
    observer, prompted = True, True
    variants = (
        Variant(
            "ppad_unprompted", says="control: the same pictures are sent back, with their own caption", prompted=False
        ),
        Variant(
            "ppad_unseen",
            says="control: all pictures are sent back, with their own caption, and nobody looks",
            observer=False,
            prompted=False,
        ),
    )

    def blurred(self, schedule: Schedule, t: float) -> bool:
        """Whether a step leads ahead before x0 is predicted."""
        return (schedule.alpha(t) / schedule.sigma(t)) ** 2 < self.least

    def plan(self, schedule: Schedule, rung: int) -> tuple[list[float], list[int]]:
        """The times of the most steps that the rung pays for if all pictures are sent back, and at which of them one looks."""
        for steps in range(rung // 2, 1, -1):
            times = uniform_times(steps)
            looks = [int(share * steps) for share in self.shares[: rung // (2 * ROOM)]]
            looking = sum(JUDGED + 2 * self.blurred(schedule, times[look]) for look in looks) * self.observer
            if 2 * steps + looking + 5 * len(looks) <= rung:
                return times, looks
        raise ValueError(f"{rung} evaluations pay for no step and a look")

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2 * ROOM:
            skip("with a look at the picture and a way back there are evaluations for three steps left")
        network, x = session.networks["teacher"], batch["noise"]
        schedule, states = schedule_of(network), network.words(batch["condition"])
        times, looks = self.plan(schedule, rung)
        denoise, captions = Denoiser(network, states, GUIDANCE), [read(text) for text in texts(batch["condition"])]
        waiting = torch.arange(len(x), device=x.device)  # pictures that have not been found to match
        for step, (t, s) in enumerate(pairwise(times)):
            x0, eps = denoise(x, t)
            if step in looks and len(waiting):
                found: dict[int, tuple[list[int], Caption]] = {row: ([], Caption()) for row in waiting.tolist()}
                if self.observer:
                    sketch = self.sketch(network, x0[waiting], eps[waiting], t, states[waiting])
                    found = look(session, sketch, {row: captions[row] for row in found})
                waiting = torch.tensor([*found], dtype=torch.int64, device=x.device)
            if step in looks and len(waiting):
                if self.prompted:
                    right = [write(foremost(captions[row], wrong)) for row, (wrong, _) in found.items()]
                    prompts = {"condition": right, "negative": [write(instead) for _, instead in found.values()]}
                    ids = {name: tokens(lines).to(x.device) for name, lines in prompts.items()}
                    strong: Denoiser = GuidedByCaption(network, ids, self.correction)
                else:
                    strong = Denoiser(network, states[waiting], self.correction)
                x[waiting] = ping_pong(strong, x[waiting], t, times[step - 1], session.rng)
                x0[waiting], eps[waiting] = Denoiser(network, states[waiting], GUIDANCE)(x[waiting], t)
            x = ddim_step(schedule, x0, eps, s)
        return x

    def sketch(self, network: nn.Module, x0: Tensor, eps: Tensor, t: float, states: Tensor) -> Tensor:
        """What is shown to the observer at time t: x0 as predicted there, or from half of t."""
        schedule = schedule_of(network)
        if not self.blurred(schedule, t):
            return x0
        return Denoiser(network, states, GUIDANCE)(ddim_step(schedule, x0, eps, t / 2), t / 2)[0]


def look(session: Session, sketch: Tensor, captions: dict[int, Caption]) -> dict[int, tuple[list[int], Caption]]:
    """Of pictures by number, in the order of `sketch` [n, 4, 8, 8], those in which something is wrong, and what (`observed`).
    Two evaluations each."""
    logits = session.networks["reward"](session.networks["vae"](sketch).clamp(-1, 1)).cpu()
    found = {}
    for (number, said), row in zip(captions.items(), logits, strict=True):
        seen = observed({name: part[0] for name, part in parted(row[None]).items()}, said)
        if seen is not None:
            found[number] = seen
    return found


def ping_pong(strong: Denoiser, x: Tensor, t: float, u: float, rng: torch.Generator) -> Tensor:
    """x_t sent back to the noisier time u along the negative prompt alone, and down to t again with guidance. Three
    evaluations."""
    schedule, negative = strong.schedule, strong.condition[: len(x)]
    up = ddim_step(schedule, *Denoiser(strong.network, negative)(x, t), u)
    return noisy_step(schedule, *strong(up, u), u, t, 1.0, rng)
