"""Track decoding, tasks of shared work: how soon is a list of questions answered where several workers write at once?

A prompt lists questions that can be answered in any order. The workers are one target: their next tokens come from one
forward, a position for each of them. A rung counts target forwards as on the other tasks, so that it is the number of
steps one after the other that a list may take; what workers cost beside each other shows in `target_positions`, FLOPs
and time.

`run` receives {"prompt": lists of token ids, "max_new_tokens": ints, "temperature": floats (0: greedy)} and returns one
list of token ids per prompt: the texts of the workers, one after the other, at most `max_new_tokens` in all. A worker's
text begins with its name in the cache, which is given and not returned, and may end with the end-of-sequence token.

What methods share stands below: a cache of blocks that each reader lays out in an order of its own (`BlockCache`), and
writing to several blocks in one forward (`BlockDecoder`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.backbones.lm import rotate_by
from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding.recall import HeldCache, HeldDecoder

TASKS = (
    Task(
        id="parallel/friend_lists",
        version=1,
        summary="Eight questions in one prompt, 6-layer target that can share them out among two workers",
        dataset="friend_lists",
        backbones={"target": "lm_workers"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 24, 32, 64),
        metrics={"accuracy": "higher", "complete": "higher", "repeated": "lower"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=1,
        smoke_rungs=(16,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = 100


# -- what the harness calls ---------------------------------------------------------------------------------------


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` prompts of the test split."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    return {
        "prompt": [encode(prompts[i]) for i in chosen],
        "max_new_tokens": [MAX_NEW_TOKENS] * n,
        "temperature": [0.0] * n,
    }


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per prompt, not empty, not too long."""
    from stepmark.backbones.lm import VOCABULARY

    if not isinstance(outputs, list) or len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return a list of {len(batch['prompt'])} lists of token ids")
    for ids, limit in zip(outputs, batch["max_new_tokens"], strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(VOCABULARY) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(VOCABULARY)})")
        if not 1 <= len(ids) <= limit:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {limit}")


def answers(text: str) -> list[tuple[str, str]]:
    """(number of the question, friends) of every solution that a text holds whole, in its order.

    A solution begins with a number and a name and ends with a full stop.
    """
    return re.findall(r"(\d) \w+ ([^\d.]*) \.", text)


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids alone.

    accuracy: share of the questions answered rightly; of several answers to one question the first counts. complete:
    share of the lists of which every answer is right. repeated: share of the solutions begun that had been begun before.
    """
    from stepmark.backbones.lm import VOCABULARY

    harness_only("scoring")
    data = load_split(task.dataset, "test")
    truth = dict(zip(data["prompt"], data["answer"], strict=True))
    rows = []
    for prompt, ids in zip(batch["prompt"], outputs, strict=True):
        wanted = truth[" ".join(VOCABULARY[i] for i in prompt)].split(" , ")
        text = " ".join(VOCABULARY[i] for i in ids)
        found = dict(reversed(answers(text)))
        right = sum(found.get(str(number)) == friends for number, friends in enumerate(wanted, start=1))
        begun = re.findall(r"\d", text)
        rows.append((right / len(wanted), right == len(wanted), 1 - len(set(begun)) / max(1, len(begun))))
    table = np.array(rows, dtype=float)
    return {
        name: Score(float(table[:, i].mean()), table[resample, i].mean(axis=1).tolist())
        for i, name in enumerate(("accuracy", "complete", "repeated"))
    }


# -- a cache of blocks ----------------------------------------------------------------------------------------------


class BlockCache(HeldCache):
    """Keys and values in blocks that several readers share, each of whom sees them in an order of its own.

    A block holds its keys rotated as if it stood alone, from position 0 on, and they are never touched again. A token
    of block b looks at the blocks of `views[b]`, of which b itself is the last, as if they stood one after the other.
    Rotary attention only knows differences, so instead of moving a block by the offset of its place, the query is
    moved by how much further on its own block stands (Rodionov et al. 2025, section 3.3). One softmax spans all blocks.

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
