"""Prompt-to-Prompt: the source's attention maps for the target's picture."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Method
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.attention import PromptToPrompt, controlled, corresponding
from stepmark.tracks.editing.inversion import inverted, leap
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image import GUIDANCE


class PromptToPromptEditing(Method):
    """Prompt-to-Prompt (Hertz et al. 2023) with DDIM inversion: what lies where is said by the attention maps of the source.

    The source is inverted with its own caption, without guidance. On the way down the source and the target run side by side
    from the same noise, and the target's conditional evaluation takes over the maps M of the source's (algorithm 1),

        M_target[word] <- M_source[its word],   of words that both captions have, and that stand for each other
        M_target[pixel] <- M_source[pixel],   of the picture to itself

    the first in four fifths of the steps, the second in two fifths, as in the authors' code. Words that only one caption has, of
    an object that is added, keep their own maps, which is the refinement of that code.

    A step takes one evaluation up and three down: the source's, which lies on the path of the inversion and is not guided, and
    the guided target's two, w = 3. So there are a fourth as many steps as the budget.
    """

    paper = None
    tasks = ("editing/scenes", "parts/scenes")
    baselines = ("copy_source", "sdedit", "ddim_inversion")

    kept, own = 0.8, 0.4  # shares of the steps in which maps to words, and of the picture, are taken over

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 4:
            skip("a step takes one evaluation up and three down")
        teacher, z, steps = session.networks["teacher"], batch["source_latents"], rung // 4
        told, wanted = (teacher.words(batch[name]) for name in ("source_condition", "condition"))
        denoise = Denoiser(teacher, told)
        schedule, times = denoise.schedule, uniform_times(steps)
        path = inverted(denoise, z, times)
        words = corresponding(batch["source_condition"], batch["condition"])
        control = PromptToPrompt(words, steps, (0, 2, 3), self.kept, self.kept, self.own)
        x, states = path[0], torch.cat([told, teacher.null_condition(wanted), wanted])
        with controlled(teacher, control):
            for number, (t, s) in enumerate(pairwise(times)):
                control.step, rows = number, torch.cat([path[number], x, x])
                _, null, conditional = teacher(
                    rows, rows.new_full((len(rows),), schedule.network_time(t)), states
                ).chunk(3)
                x = leap(schedule, x, torch.lerp(null, conditional, GUIDANCE), t, s)
        return x
