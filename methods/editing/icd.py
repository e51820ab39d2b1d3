"""iCD: a picture is encoded in four steps and decoded in four, by two consistency students that undo each other."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.attention import PromptToPrompt, controlled, corresponding
from stepmark.tracks.editing.inversion import leap
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import Schedule, add_noise, schedule_of
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import GRID, descend, fold, huber
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.sampling import column, noise_like

ENDS = (0, 13, 26, 39, 50)  # of the segments, on the grid of 50 times k/50: the data, timesteps 259, 519, 779 and 999
FIRST = 1  # where encoding begins, on the grid: timestep 19
SCALES = (1.0, 2.0, 3.0, 4.0)  # of guidance, one of which is drawn for every row


def below(k: Tensor) -> Tensor:
    """The greatest end that is no greater than k."""
    ends = torch.tensor(ENDS, device=k.device)
    return ends[torch.bucketize(k, ends, right=True) - 1]


def above(k: Tensor) -> Tensor:
    """The least end that is no less than k."""
    ends = torch.tensor(ENDS, device=k.device)
    return ends[torch.bucketize(k, ends)]


def jump(
    network: nn.Module, x: Tensor, t: Tensor, s: Tensor, states: Tensor, scale: Tensor, schedule: Schedule
) -> Tensor:
    """Where a student that is told the guidance scales [B] says that x at times t [B] will be at times s [B]."""
    time = schedule.network_time(t).clamp(min=0).to(x.dtype)
    return leap(schedule, x, network(x, time, states, scale), column(t), column(s))


@dataclass(frozen=True)
class Drawn:
    """What the losses of an update are of: latents, noise and states of captions; guidance scales [B]; and numbers on the grid
    [B], from which the decoder jumps down (1 .. 50) and the encoder up (1 .. 49), and of segments (0 .. 3)."""

    x0: Tensor
    eps: Tensor
    states: Tensor
    scale: Tensor
    down: Tensor
    up: Tensor
    segment: Tensor


def losses(
    encoder: nn.Module, decoder: nn.Module, teacher: nn.Module, drawn: Drawn, schedule: Schedule
) -> dict[str, Tensor]:
    """The four terms, of the decoder's and the encoder's consistency and of their preservation of what the other one made."""
    x0, eps, states, free = drawn.x0, drawn.eps, drawn.states, torch.ones_like(drawn.scale)

    def at(k: Tensor) -> tuple[Tensor, Tensor]:
        t = (k / GRID).to(x0.dtype)
        return t, add_noise(schedule, x0, eps, t)

    found = {}
    for name, student, k, step, scale in (
        ("decoder", decoder, drawn.down, -1, drawn.scale),
        ("encoder", encoder, drawn.up, 1, free),
    ):
        end = (below if step < 0 else above)(k + step)
        (t, x), s, goal = at(k), (k + step).to(x0.dtype) / GRID, end.to(x0.dtype) / GRID
        with torch.no_grad():
            ahead = leap(schedule, x, teach(teacher, x, t, states, scale, schedule), column(t), column(s))
            there = jump(student, ahead, s, goal, states, scale, schedule)
            target = torch.where(column(k + step == end), ahead, there)
        found[name] = huber(jump(student, x, t, goal, states, scale, schedule), target)
    ends = torch.tensor(ENDS, device=x0.device)
    low, high = at(ends[drawn.segment].clamp(min=FIRST)), at(ends[drawn.segment + 1])
    for name, first, second, start, turn in (
        ("encoder_preserves", decoder, encoder, high, low),
        ("decoder_preserves", encoder, decoder, low, high),
    ):
        with torch.no_grad():
            there = jump(first, start[1], start[0], turn[0], states, free, schedule)
        found[name] = huber(jump(second, there, turn[0], start[0], states, free, schedule), start[1])
    return found


def teach(teacher: nn.Module, x: Tensor, t: Tensor, states: Tensor, scale: Tensor, schedule: Schedule) -> Tensor:
    """The teacher's noise, guided by scales [B]; where none is guided, by one evaluation a row."""
    time = schedule.network_time(t).to(x.dtype)
    if bool((scale == 1).all()):
        return teacher(x, time, states)
    return guided_rows(teacher, x, time, states, scale)


class InvertibleConsistency(Method):
    """Invertible consistency distillation: an encoder and a decoder of four steps each, trained to undo each other.

    Time is cut into four segments, at timesteps 259, 519, 779 and 999. The decoder CD jumps from anywhere in a segment to its
    lower end, the encoder fCD to its upper end, both by one step of DDIM with their own noise, and both are made consistent
    along steps of the teacher, 20 timesteps long (sg: no gradient):

        L_CD = d(CD(x_t), sg CD(x_{t-1})),   x_{t-1}: the guided teacher's step down from x_t
        L_fCD = d(fCD(x_t), sg fCD(x_{t+1})),   x_{t+1}: the teacher's step up, not guided

    Two more losses make each undo the other, at the ends of a segment and without guidance:

        L_f = d(fCD(sg CD(x_high)), x_high),   L_r = d(CD(sg fCD(x_low)), x_low)

    d is the pseudo-Huber distance with c = 0.001, the sum is L_CD + L_fCD + 1.5 (L_f + L_r). The decoder is told the scale w of
    guidance. An edit encodes the source with its caption, from a trace of noise at timestep 19, and decodes with the target
    caption. Guidance is dynamic: off where there is most noise, w(t) = w for t <= 0.8 and 1 above, so that here it
    is off in the first step. Four evaluations up and four down are 8. Where the budget has four more, the source is decoded
    beside the target and lends it its attention maps (Prompt-to-Prompt, of words in 0.3, of pixels in 0.6 of the steps), as in
    the authors' script for edits: 12. More is not spent, and with less than 8 nothing can be done.

    All this, ends and constants are the authors' code of its four-step model.

    Differs from the paper: all weights of both students are trained, where the paper has adapters of rank 64, which is all of a
    layer here; the teacher is guided by two evaluations and not distilled before; the four losses make one update, not one
    each; w is one of 1 to 4 of null + w (conditional - null), around the teacher's best, 3, with which edits are made, not 8 to
    20; no words are marked whose surroundings are kept (local blending), nor is their attention raised. 250 updates of 8
    pictures at a rate of 5e-4.

    Controls: `icd_constant` guides in every step; `icd_unpreserved` is trained without L_f and L_r, `icd_uncontrolled` never
    lends maps. `icd_folded` is what the same training buys without consistency: the decoder learns only to be guided in one
    evaluation, with as many rows of the network in training, and the encoder is the teacher, so that both take four plain
    steps of DDIM.

    What limits it here: 250 updates, of the 6000 of the authors' script.
    """

    paper = Paper(
        id="icd",
        title="Invertible Consistency Distillation for Text-Guided Image Editing in Around 7 Steps",
        authors="Starodubcev, Khoroshikh, Babenko, Baranchuk",
        year=2024,
        arxiv="2406.14539",
        code="yandex-research/invertible-cd",
    )
    tasks = ("editing/scenes",)
    baselines = ("ddim_inversion", "prompt_to_prompt", "sdedit", "copy_source", "icd_folded")
    trainings = 3
    claims = (
        Claim(
            "edit[icd,8..16] > max(edit[ddim_inversion,8..16], edit[prompt_to_prompt,8..16], edit[sdedit,8..16], "
            "edit[icd_folded,8..16], edit[copy_source,8..16]) and kept[icd,8..16] < min(kept[ddim_inversion,8..16], "
            "kept[prompt_to_prompt,8..16], kept[sdedit,8..16], kept[icd_folded,8..16])",
            says="with 8 or 16 evaluations more scenes are edited as asked and more of the rest is kept than by DDIM inversion, "
            "alone or with exchanged attention, by noise on the source, or by guidance in one evaluation alone",
            headline=True,
        ),
        Claim(
            "edit[icd,16] >= 0.9 * max(edit[prompt_to_prompt,128], edit[ddim_inversion,128]) "
            "and kept[icd,16] <= 1.1 * min(kept[prompt_to_prompt,128], kept[ddim_inversion,128])",
            says="with 16 evaluations it competes with what inversion does with 128, in what is edited and in what is kept",
            headline=True,
        ),
        Claim(
            "kept[icd,8..16] < kept[icd_constant,8..16] and edit[icd,8..16] >= 0.95 * edit[icd_constant,8..16]",
            says="guidance that is off at first keeps more, and edits as well",
        ),
        Claim(
            "kept[icd,8..16] < kept[icd_unpreserved,8..16] and edit[icd,8..16] >= 0.95 * edit[icd_unpreserved,8..16]",
            says="students that are trained to undo each other keep more, and edit as well",
        ),
        Claim(
            "kept[icd,16] < kept[icd_uncontrolled,16] and edit[icd,16] >= 0.95 * edit[icd_uncontrolled,16]",
            says="the source's attention maps keep more, and the edit is made all the same",
        ),
    )

    preserve, folded = 1.5, False
    off = 0.8  # tau: guidance is off at later times
    control = True
    variants = (
        Variant("icd_constant", says="guidance in every step", off=1.0, baselines=("icd",)),
        Variant("icd_unpreserved", says="nothing trains them to undo each other", preserve=0.0, baselines=("icd",)),
        Variant("icd_uncontrolled", says="no attention maps of the source", control=False, baselines=("icd",)),
        Variant(
            "icd_folded",
            says="control: guidance in one evaluation, and no consistency",
            folded=True,
            baselines=("ddim_inversion",),
        ),
    )

    updates = 250
    kept, own = 0.3, 0.6  # shares of the steps in which maps to words, and of the picture, are taken over

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"encoder": session.clone("teacher"), "decoder": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        updates = session.scale(self.updates, 1)
        state = session.once(folding, updates) if self.folded else session.once(distilled, self.preserve, updates)
        for role in ("encoder", "decoder"):
            own = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(role)}
            session.networks[role].load_state_dict(own)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        steps = len(ENDS) - 1
        if rung < 2 * steps:
            skip("four steps up and four down")
        encoder, decoder = session.networks["encoder"], session.networks["decoder"]
        schedule, z = schedule_of(decoder), batch["source_latents"]
        told, wanted = (decoder.words(batch[name]) for name in ("source_condition", "condition"))
        times = [k / GRID for k in (FIRST, *ENDS[1:])]
        ones = torch.ones_like(z[:, 0, 0, 0])
        x = schedule.alpha(times[0]) * z + schedule.sigma(times[0]) * batch["noise"]
        for t, s in pairwise(times):
            x = jump(encoder, x, t * ones, s * ones, told, ones, schedule)
        beside = self.control and rung >= 3 * steps
        control = PromptToPrompt(
            corresponding(batch["source_condition"], batch["condition"]),
            steps,
            (0, 1, 2),
            self.kept,
            self.kept,
            self.own,
        )
        both, states = (torch.cat([x, x]), torch.cat([told, wanted])) if beside else (x, wanted)
        with controlled(decoder, control) if beside else nullcontext():
            for number, (t, s) in enumerate(pairwise([*times[:0:-1], 0.0])):
                w = (GUIDANCE if t <= self.off else 1.0) * ones
                scale = torch.cat([ones, w]) if beside else w
                control.step, all_ones = number, torch.ones_like(scale)
                both = jump(decoder, both, t * all_ones, s * all_ones, states, scale, schedule)
        return both[-len(x) :]


# training ---------------------------------------------------------------------------------------


def distilled(session: Session, preserve: float, updates: int) -> dict[str, Tensor]:
    """Encoder and decoder, each from the teacher: their weights by "encoder." and "decoder."."""
    students = nn.ModuleDict({role: session.clone("teacher") for role in ("encoder", "decoder")})
    for student in students.values():
        student.words.requires_grad_(False)
    teacher, data, rng = session.networks["teacher"], Latents(session), session.rng
    schedule, n, device = schedule_of(teacher), session.scale(8, 4), session.device
    scales = torch.tensor(SCALES, device=device, dtype=session.dtype)

    def number(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=rng, device=device)

    for step in descend(session, [p for p in students.parameters() if p.requires_grad], updates, 5e-4):
        x0, _, states = data.batch(n)
        eps = noise_like(x0, rng)
        scale = scales[number(0, len(scales))]
        drawn = Drawn(x0, eps, states, scale, number(1, GRID + 1), number(1, GRID), number(0, len(ENDS) - 1))
        found = losses(students["encoder"], students["decoder"], teacher, drawn, schedule)
        kept = found["encoder_preserves"] + found["decoder_preserves"]
        step(found["decoder"] + found["encoder"] + preserve * kept)
    return students.state_dict()


def folding(session: Session, updates: int) -> dict[str, Tensor]:
    """The teacher as the encoder, and as the decoder a student that takes guidance in and nothing else, by the same names. Its
    update takes a fourth of the rows."""
    students = nn.ModuleDict({role: session.clone("teacher") for role in ("encoder", "decoder")})
    students["decoder"].words.requires_grad_(False)
    fold(session, students["decoder"], 4 * updates, batch=8, scales=(SCALES[0], SCALES[-1]))
    return students.state_dict()
