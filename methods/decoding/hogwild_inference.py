"""Hogwild! inference: workers of one model write at once on a shared attention cache (Rodionov et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.lm import encode
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.parallel import BlockDecoder, write_together

NAMES = ("tom", "anna")
# The prompt's own view, then for each worker: the prompt, what the other has written, its own text (section 3.2).
VIEWS = ((0,), (0, 2, 1), (0, 1, 2))


class HogwildInference(Method):
    """Hogwild! inference: two workers of one model share the work and see each other's tokens as these are written.

    The cache is one set of blocks: the prompt, and one block for the text of each worker. Worker w reads them as

        prompt, what the others have written so far, its own text

    so that everybody's own block stands last. As others go on, its place moves, but nothing is computed again: keys stay
    rotated at their places within their blocks, and for each block the query is rotated by the distance between the
    starts of that block and its own in this worker's view (section 3.3). The next tokens of all workers come from one
    forward, in which all write before any looks. No rule says who does what: each worker has its name, and the model
    decides from what it sees.

    Differs from the paper: the layout is its contiguous one throughout; the combined one, which moves finished
    paragraphs to a common history, is for texts of thousands of words. A model of this size does not take to working in
    pairs by itself: it was trained on transcripts of one worker and of two, where whoever is free takes the next
    question that nobody has begun. The reminder to look for redundant work is a matter of prompting and left out.
    """

    paper = Paper(
        id="hogwild_inference",
        title="Hogwild! Inference: Parallel LLM Generation via Concurrent Attention",
        authors="Gleb Rodionov, Roman Garipov, Alina Shutova, George Yakushev, Erik Schultheis, Vage Egiazarian, "
        "Anton Sinitsin, Denis Kuznedelev, Dan Alistarh",
        year=2025,
        arxiv="2504.06261",
        code="eqimp/hogwild_llm",
    )
    tasks = ("parallel/friend_lists",)
    baselines = ("single_worker",)
    claims = (
        Claim(
            "nfe[hogwild_inference,64] <= 0.65 * nfe[single_worker,64] "
            "and accuracy[hogwild_inference,64] >= accuracy[single_worker,64] - 0.02",
            says="two workers are as right as one, in at most 65 % of its forwards one after the other",
        ),
        Claim(
            "accuracy[hogwild_inference,24] >= accuracy[single_worker,24] + 0.1",
            says="more questions are answered where the steps do not suffice for one worker",
        ),
        Claim(
            "repeated[hogwild_inference,64] <= 0.05",
            says="workers see what the other has begun: hardly any question is answered twice",
        ),
        Claim(
            "latency_ms[hogwild_inference,64] <= 0.8 * latency_ms[single_worker,64]",
            says="lists are answered in at most four fifths of the time",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The workers' texts, one after the other."""
        outputs = []
        for prompt, room in zip(batch["prompt"], batch["max_new_tokens"], strict=True):
            target = BlockDecoder(session.networks["target"], len(prompt) + room, VIEWS)
            start = {0: prompt, 1: encode(NAMES[0]), 2: encode(NAMES[1])}
            texts = write_together(target, start, (1, 2), room, rung)
            outputs.append([*texts[1], *texts[2]])
        return outputs
