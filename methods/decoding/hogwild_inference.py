"""Hogwild! inference: workers of one model write at once on a shared attention cache (Rodionov et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepmark.backbones.lm import EOS, batches, encode, fit, rotate_by
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.held_cache import HeldCache, HeldDecoder
from stepmark.tracks.decoding.speculation import write_plainly

NAMES = ("tom", "anna")
# The prompt's own view, then for each worker: the prompt, what the other has written, its own text (section 3.2).
VIEWS = ((0,), (0, 2, 1), (0, 1, 2))
ALONE = ((0,), (0, 1), (0, 2))  # nobody sees the other


class HogwildInference(Method):
    """Hogwild! inference: two workers of one model share the work and see each other's tokens as these are written.

    The cache is one set of blocks: the prompt, and one block for the text of each worker. Worker w reads them as

        prompt, what the others have written so far, its own text

    so that everybody's own block stands last. As others go on, its place moves, but nothing is computed again: keys stay
    rotated at their places within their blocks, and for each block the query is rotated by the distance between the
    starts of that block and its own in this worker's view (section 3.3). The next tokens of all workers come from one
    forward, in which all write before any looks. No rule says who does what: each worker has its name, and the model
    decides from what it sees.

    Its control `single_worker` goes through the whole list by plain greedy decoding: the same model, prompt and name, one block
    of text instead of two, so that nothing is shared out. Each forward gives one token, and a list takes as many forwards
    as its solutions have words.

    Three more controls. `hogwild_unshared`: two workers who do not see each other. `hogwild_untrained` and its baseline
    `single_untrained` take a model that has been taught lists by texts of single workers alone, from what the target was
    before: what the shared cache does without training for it, as in the paper's headline.

    Differs from the paper: the layout is its contiguous one throughout; the combined one, which moves finished
    paragraphs to a common history, is for texts of thousands of words. A model of this size does not take to working in
    pairs by itself: it was trained on transcripts of one worker and of two, where whoever is free takes the next
    question that nobody has begun. Workers are told their names and nothing else: rules for working together and the
    reminder to look for redundant work are a matter of prompting and left out.

    A fixed split, the paper's third comparison, is left out too. These questions do not depend on each other, so that a rule
    (odd ones for tom, even ones for anna) could share them out without a shared cache: the claims say that the model shares
    work out, not that this needs a shared cache. Every other question alone in its prompt is no such split for this target:
    trained on whole lists, it then answers about a quarter of all.

    The claims on the trained target rest on one training of it and 48 lists; those on the untrained one on three trainings.
    Against workers who cannot see each other 8 steps tell little: they suffice for one solution a worker, and the first ones
    differ by the workers' names alone. From 16 on the others answer far less: of the solutions that they begin about two in
    five had been begun before.

    What limits it here: without training for it both workers go through the same questions. Half of the solutions that they
    begin, or more, had been begun before, and from 24 steps on they answer less than one worker.
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
    baselines = ("single_worker", "hogwild_unshared", "hogwild_untrained", "single_untrained")
    claims = (
        Claim(
            "accuracy[hogwild_untrained,8..32] >= accuracy[single_untrained,8..32] + 0.05 "
            "and accuracy[hogwild_untrained,64] >= accuracy[single_untrained,64] - 0.02",
            says="without training for it, two workers on a shared cache answer more in as many steps",
            headline=True,
            setting="a model of this size has no notion of dividing work up; the paper's reasoning models are told to",
        ),
        Claim(
            "nfe[hogwild_inference,64] <= 0.65 * nfe[single_worker,64] "
            "and accuracy[hogwild_inference,*] >= accuracy[single_worker,*] - 0.02",
            says="two workers are as right as one, in at most 65 % of its forwards one after the other",
        ),
        Claim(
            "accuracy[hogwild_inference,8..32] >= accuracy[single_worker,8..32] + 0.1",
            says="more questions are answered where the steps do not suffice for one worker",
        ),
        Claim(
            "accuracy[hogwild_inference,8..32] >= accuracy[hogwild_unshared,8..32] + 0.05 "
            "and repeated[hogwild_inference,*] <= 0.05",
            says="more than by two workers who cannot see each other where the steps do not suffice for one: "
            "hardly any question is answered twice",
        ),
        Claim(
            "latency_ms[hogwild_inference,64] <= 0.8 * latency_ms[single_worker,64]",
            says="lists are answered in at most four fifths of the time",
            setting="blocks are attended to one by one in Python, dear beside a forward this small; the paper has a kernel",
        ),
    )

    workers = 2  # of `NAMES`; one is plain decoding
    shared = True  # each sees what the other writes
    trained = True  # on texts of two workers as well as of one
    variants = (
        Variant(
            "single_worker",
            says="one worker: greedy decoding of a list of questions, one after the other",
            workers=1,
            baselines=(),
        ),
        Variant(
            "hogwild_unshared",
            says="two workers who see the prompt and their own text alone: no shared cache",
            shared=False,
            baselines=("single_worker",),
        ),
        Variant(
            "hogwild_untrained",
            says="a shared cache with a model that has seen texts of single workers only",
            trained=False,
            trainings=3,
            baselines=("single_untrained",),
        ),
        Variant(
            "single_untrained",
            says="one worker, by a model that has seen texts of single workers only",
            trained=False,
            trainings=3,
            workers=1,
            baselines=(),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """Where the target's training in pairs is not to count: what it was before."""
        return {} if self.trained else {"student": session.clone("source")}

    def prepare(self, session: Session) -> None:
        """And teach it lists, by single workers."""
        if not self.trained:
            session.networks["student"].load_state_dict(session.once(train_alone))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The workers' texts, one after the other."""
        model = session.networks["target" if self.trained else "student"]

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            if self.workers == 1:
                named = [*prompt, *encode(NAMES[0])]
                return write_plainly(Decoder(model, len(named) + room), named, room, rung, 0.0)
            target = BlockDecoder(model, len(prompt) + room, VIEWS if self.shared else ALONE)
            start = {0: prompt, 1: encode(NAMES[0]), 2: encode(NAMES[1])}
            texts = write_together(target, start, (1, 2), room, rung)
            return [*texts[1], *texts[2]]

        return write_each(batch, write)


def train_alone(session: Session) -> dict[str, Tensor]:
    """Train the network `student` on lists that one worker answers, whatever its name: its weights."""
    data = session.train
    pairs = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(len(data["prompt"]), 8)]
    rows = [([*encode(p), *encode(NAMES[i % 2])], [*encode(t), EOS]) for i, (p, t) in enumerate(pairs)]
    student: Any = session.networks["student"]
    stream = batches(rows, session.scale(1500, 200), session.seed)
    fit(student, session.progress, steps=session.scale(400, 1), lr=3e-3, seed=session.seed, stream=stream)
    return student.state_dict()


class BlockCache(HeldCache):
    """Keys and values in blocks that several readers share, each of whom sees them in an order of its own.

    A block holds its keys rotated as if it stood alone, from position 0 on, and they are never touched again. A token
    of block b looks at the blocks of `views[b]`, of which b itself is the last, as if they stood one after the other.
    Rotary attention only knows differences, so instead of moving a block by the offset of its place, the query is
    moved by how much further on its own block stands (section 3.3). One softmax spans all blocks.

    New tokens are written to all blocks before any of them looks: writers see each other's newest token.
    """

    def __init__(self, depth: int, views: Sequence[Sequence[int]], rotary: nn.Module) -> None:
        super().__init__(depth)
        self.views, self.rotary = [tuple(view) for view in views], rotary
        self.stored: list[list[tuple[Tensor, Tensor] | None]] = [[None] * len(views) for _ in range(depth)]
        self.owners = torch.zeros(0, dtype=torch.long)  # blocks [T] of the tokens that run, in ascending order

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs [H, T, d] of the tokens at `now`, positions in their own blocks."""
        blocks, groups = self.stored[layer], len(queries) // len(keys)
        rows = {block: (self.owners == block).nonzero()[:, 0] for block in self.owners.unique().tolist()}
        for block, at in rows.items():
            new, before = (keys[:, at], values[:, at]), blocks[block]
            blocks[block] = (
                new if before is None else (torch.cat((before[0], new[0]), 1), torch.cat((before[1], new[1]), 1))
            )
        outputs = torch.empty_like(queries)
        for block, at in rows.items():
            seen = [(other, held) for other in self.views[block] if (held := blocks[other]) is not None]
            ahead = sum(held[0].shape[1] for other, held in seen if other != block)
            logits = []
            for other, (held, _) in seen:
                moved = queries[:, at]
                if other != block:
                    amount = torch.full(moved.shape[:2], ahead, device=moved.device)
                    moved, ahead = rotate_by(moved, amount, self.rotary), ahead - held.shape[1]
                logits.append(moved @ held.repeat_interleave(groups, 0).transpose(1, 2) * moved.shape[2] ** -0.5)
            own = torch.arange(logits[-1].shape[2], device=queries.device)
            logits[-1] = logits[-1].masked_fill(own > self.now[at, None], float("-inf"))
            held_values = torch.cat([held for _, (_, held) in seen], 1).repeat_interleave(groups, 0)
            outputs[:, at] = torch.cat(logits, 2).softmax(-1) @ held_values
        return outputs


class BlockDecoder(HeldDecoder):
    """A decoder whose forwards write to several blocks at once."""

    def __init__(self, model: nn.Module, capacity: int, views: Sequence[Sequence[int]]) -> None:
        """`capacity`: tokens of the longest block. `views`: as in `BlockCache`."""
        self.blocks = BlockCache(len(model.model.layers), views, model.model.rotary_emb)
        super().__init__(model, capacity, self.blocks)
        self.written = [0] * len(views)

    def write(self, new: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Append tokens to blocks, in one evaluation. Logits [V] after the last one of each."""
        parts = sorted((block, ids) for block, ids in new.items() if ids)
        ids = [token for _, part in parts for token in part]
        at = [self.written[block] + i for block, part in parts for i in range(len(part))]
        self.blocks.owners = torch.tensor([block for block, part in parts for _ in part], device=self.device)
        hidden = self.run(self.embed(ids), 0, positions=torch.tensor(at, device=self.device))
        ends = np.cumsum([len(part) for _, part in parts]) - 1
        logits = self.logits(hidden[:, ends.tolist()])
        for block, part in parts:
            self.written[block] += len(part)
        return {block: row for (block, _), row in zip(parts, logits, strict=True)}


def write_together(
    decoder: BlockDecoder, start: Mapping[int, Sequence[int]], workers: Sequence[int], room: int, budget: float
) -> dict[int, list[int]]:
    """Let workers write greedily, a token each per forward, until all have ended.

    Args:
        start: what the blocks hold at first, the workers' own ones included.
        workers: their blocks. room: tokens in all. budget: evaluations.

    Returns: the tokens that each has written.
    """
    texts: dict[int, list[int]] = {block: [] for block in workers}
    new = start
    while True:
        logits = decoder.write(new)
        going = [block for block in workers if decoder.eos not in texts[block]]
        for block in going:
            texts[block].append(int(logits[block].argmax()))
        left = room - sum(map(len, texts.values()))
        still = [block for block in going if texts[block][-1] != decoder.eos]
        if not still or left < len(still) or decoder.spent + 1 > budget + 1e-9:
            return texts
        # An end of the sequence is written to the cache as well: the others see who has stopped.
        new = {block: texts[block][-1:] for block in going}
