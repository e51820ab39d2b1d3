"""SDTT: a masked diffusion language model learns from its own longer sampling (Deschenaux and Gulcehre, ICLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import encode
from stepmark.backbones.mdlm import MASK, mask_some, spread, word_losses
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import (
    Denoiser,
    ancestral,
    continuations,
    denoiser,
    draw_words,
    masked_texts,
    uniforms,
    word_log_probabilities,
)


class SDTT(Method):
    """SDTT: in rounds, the student learns to say at once what its teacher says in two steps, then becomes the teacher.

    For a text masked at a random t, the teacher takes two ancestral steps of length 1/K. At each mask the target is the
    teacher's distribution in the step in which the mask was replaced, for masks that remain that of its last step
    (algorithm 1). The student sees the text masked at t and minimises KL(student || target) over all masks, the
    divergence of the official code's default. Then it is copied to the teacher and K halves (algorithm 2). Sampling is
    MDLM's, with fewer steps.

    Differs from the paper: rounds from K = 64 down to 4, for texts of 64 words where theirs have 1024 and K starts at
    1024; tens of updates a round instead of 10 000, with a new optimiser and a falling rate in each, where the official
    code keeps its optimiser at a constant rate; no moving average of the weights, from which the authors sample. The
    official code puts its teacher's two steps at other times than t and t - 1/K, which changes how many masks each of them
    replaces; here they are those of algorithm 1.

    `sdtt_data` is the control: as many updates on as many texts, with the model's own likelihood bound for a loss. What
    more training alone gives is the difference to the undistilled model, what distillation gives is the difference to it;
    the teacher's two evaluations of each text are the price of distillation and come on top.

    What limits it here: tens of updates. With a quarter of the steps texts are likelier than the teacher's, though fewer
    are wholly right; with a sixteenth they are not likelier either: of 64 words written sixteen at a time, names that
    must repeat fall into one step, which no model of single words can see. The student gains at 64 steps too, where
    nothing is saved, for the reverse divergence makes likely words likelier.
    """

    paper = Paper(
        id="sdtt",
        title="Beyond Autoregression: Fast LLMs via Self-Distillation Through Time",
        authors="Justin Deschenaux, Caglar Gulcehre",
        year=2024,
        arxiv="2410.21035",
        code="jdeschena/sdtt",
    )
    tasks = ("generation/stories64",)
    baselines = ("mdlm_ancestral", "mdlm_sharp", "sdtt_data", "ar_lm")
    claims = (
        Claim(
            "gen_ppl[sdtt,4] <= gen_ppl[mdlm_ancestral,64] and entropy[sdtt,4] >= 0.985 * entropy[mdlm_ancestral,64]",
            says="four steps give texts as good as the teacher's 64, and as varied",
            headline=True,
            setting="eighty updates a round where the paper takes 10 000, and sixteen of 64 words at once",
        ),
        Claim(
            "gen_ppl[sdtt,8] <= gen_ppl[ar_lm,64] and entropy[sdtt,8] >= 0.985 * entropy[ar_lm,64] "
            "and latency_ms[sdtt,8] <= latency_ms[ar_lm,64] / 2",
            says="eight steps give better text than the autoregressive model, in half its time",
            setting="eighty updates a round where the paper takes 10 000",
        ),
        Claim(
            "gen_ppl[sdtt,4..32] < gen_ppl[mdlm_ancestral,4..32] and gen_ppl[sdtt,4..32] < gen_ppl[sdtt_data,4..32] "
            "and entropy[sdtt,4..32] >= 0.985 * entropy[mdlm_ancestral,4..32]",
            says="in few steps better texts than undistilled, and than after as much plain training, as varied",
        ),
        Claim(
            "gen_ppl[sdtt,4..32] < gen_ppl[mdlm_sharp,4..32] and entropy[sdtt,4..32] > entropy[mdlm_sharp,4..32]",
            says="better and more varied than by drawing likelier words",
        ),
        Claim(
            "gen_ppl[sdtt,16] <= gen_ppl[mdlm_ancestral,64] and gen_ppl[sdtt,8] <= gen_ppl[mdlm_ancestral,32]",
            says="a quarter of the steps is enough",
        ),
    )

    rounds, steps, batch, rate = (64, 32, 16, 8), 80, 32, 3e-4
    distilled = True  # else the loss is the model's own, on the same texts
    variants = (
        Variant(
            "sdtt_data",
            says="The model trained on for as many updates with its own loss, without a teacher",
            distilled=False,
            baselines=("mdlm_ancestral",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The student, a copy of the model, and the teacher, so that its evaluations count as well."""
        names = ("student", "teacher") if self.distilled else ("student",)
        return {name: session.clone("model").requires_grad_(name == "student") for name in names}

    def prepare(self, session: Session) -> None:
        """All rounds."""
        tokens = torch.tensor(
            [encode(text) for text in session.train["text"][: session.scale(8_000, 64)]], device=session.device
        )
        student, rng = session.networks["student"], session.rng
        batch = session.scale(self.batch, 2)
        for k in self.rounds:
            if self.distilled:
                session.networks["teacher"].load_state_dict(student.state_dict())
            optimiser = torch.optim.AdamW(student.parameters(), lr=self.rate, weight_decay=0.0)
            steps = session.scale(self.steps, 1)
            for step in session.progress(range(steps), f"from {k} steps to {k // 2}"):
                for group in optimiser.param_groups:
                    group["lr"] = self.rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
                text = tokens[torch.randint(len(tokens), (batch,), generator=rng, device=session.device)]
                if self.distilled:
                    loss = self.distil(student, denoiser(session.networks["teacher"]), text, k, rng)
                else:
                    loss = word_losses(student, text, mask_some(text, spread(batch, rng), rng)).mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimiser.step()

    def distil(self, student: nn.Module, teacher: Denoiser, text: Tensor, k: int, rng: torch.Generator) -> Tensor:
        """The loss of one batch of texts: two teacher steps of length 1/k against one prediction (algorithm 1)."""
        batch = len(text)
        t = (torch.rand((), generator=rng) + torch.arange(batch)).to(text.device) / batch
        x = text.masked_fill(torch.rand(text.shape, generator=rng, device=text.device) < t[:, None], MASK)
        with torch.no_grad():
            target = targets_through_time(teacher, x, t, 1 / k, 2, rng)
        masked = x == MASK
        found = word_log_probabilities(denoiser(student)(x)[masked])
        return distillation_loss(found, target[masked].to(found))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x = masked_texts(batch, session.device)
        return continuations(batch, ancestral(denoiser(session.networks["student"]), x, rung, session.rng))


def targets_through_time(
    denoise: Denoiser, x: Tensor, t: Tensor, step: float, count: int, rng: torch.Generator
) -> Tensor:
    """What a student should predict at once where the teacher takes `count` ancestral steps: log p, [B, L, V].

    Deschenaux and Gulcehre 2025, algorithm 1: at each mask the teacher's log probabilities of the step in which it was
    replaced, for masks that remain those of its last step. Positions visible in x hold 0.

    Args:
        t: [B], the times of x. step: length of one teacher step.
    """
    masked = x == MASK
    target = torch.zeros(*x.shape, 1, dtype=torch.float64, device=x.device)
    for i in range(count):
        now, then = (t - i * step).clamp(min=1e-6), (t - (i + 1) * step).clamp(min=0)
        log_p = word_log_probabilities(denoise(x).double())
        u, v = uniforms(x, rng)
        moved = (x == MASK) & (u < ((now - then) / now)[:, None])
        open_ = (x == MASK)[..., None]
        target = torch.where(open_, log_p, target)  # stays, once the mask is gone
        x = x.masked_scatter(moved, draw_words(log_p[moved].exp(), v[moved]))
    return torch.where(masked[..., None], target, torch.zeros_like(target))


def distillation_loss(student: Tensor, target: Tensor) -> Tensor:
    """KL(student || target), mean over positions: log probabilities [N, V]; -inf in both is a word of no weight.

    The target's least log probability is bounded, for a single rounded 0 would outweigh all else.
    """
    return (student.exp() * (student.clamp(min=-60) - target.clamp(min=-60))).sum(-1).mean()
