"""Track decoding, tasks of checkpoint folders: greedy decoding of a language model that somebody brings.

Prompts are those of a file, our own, or random tokens. Nobody knows right answers: what can be judged is whether a text is the
one that plain greedy decoding of the same network writes, and how much of it a budget of target forwards buys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.hub.prompts import decode, encode, has_tokenizer, spread
from stepmark.hub.source import current
from stepmark.hub.text_tasks import RANDOM_PROMPT, calibration, encoded, end, longest, scored, vocabulary
from stepmark.task import BadOutput, Score, Task, harness_only, skip
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding import steps_of as steps_of
from stepmark.tracks.decoding.metrics import TIE

TEXTS_KEPT = 20  # texts of a cell that are kept to look at
TRIED, LISTENED, LIKELY = 4, 48, 8  # texts, their tokens and the likeliest next ones that rounding is measured on


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` of the prompts, of every kind as many as can be, or as many of random tokens."""
    harness_only("the prompts")
    made = current()
    given = scored(made.choice)
    if given:
        order = spread([prompt.kind for prompt in given], torch.randperm(len(given), generator=generator).tolist(), n)
        chosen = [encoded(made, given[i]) for i in order]
    else:
        chosen = torch.randint(vocabulary(made), (n, RANDOM_PROMPT), generator=generator).tolist()
        stop = end(made.parts["target"])
        chosen = [[token if token != stop else (stop + 1) % vocabulary(made) for token in row] for row in chosen]
    n = len(chosen)
    return {"prompt": chosen, "max_new_tokens": [made.new_tokens] * n, "temperature": [0.0] * n}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per prompt, not empty, not too long, nothing after the end of the sequence."""
    made = current()
    size, stop = vocabulary(made), end(made.parts["target"])
    if not isinstance(outputs, list) or len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return a list of {len(batch['prompt'])} lists of token ids")
    for ids, limit in zip(outputs, batch["max_new_tokens"], strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {size})")
        if not 1 <= len(ids) <= limit:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {limit}")
        if stop in ids[:-1]:
            raise BadOutput("an output goes on after its end-of-sequence token")


class Looked(dict[str, list[str]]):
    """Prompts to look at beforehand. A method that asks for more is skipped."""

    def __missing__(self, key: str) -> NoReturn:
        skip(current().task.untrained)


def train(task: Task) -> Mapping[str, Any]:
    """What a method may look at beforehand: prompts of the checkpoint that are never scored, as texts for `lm.encode`."""
    found = calibration(current().choice)
    return Looked(prompt=[prompt.text for prompt in found]) if found else skip(task.untrained)


def text_of(ids: Sequence[int]) -> str:
    """The text of token ids; the ids themselves where the folder has no tokenizer."""
    folder = current().parts["target"].folder
    return decode(folder, ids) if has_tokenizer(folder) else " ".join(map(str, ids))


def ids_of(text: str, room: int) -> list[int]:
    """Token ids of a text, the last ones where it and `room` new tokens are more than the models see."""
    made = current()
    ids = encode(made.parts["target"].folder, text, made.choice.chat)
    return ids[-(min(map(longest, made.parts.values())) - room) :]


def new_tokens() -> int:
    """Tokens written to a prompt at most."""
    return current().new_tokens


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The layers of the model itself, or all of it: run once, it is an evaluation, whoever calls it."""
    return list(getattr(network, "counted", []))


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids alone.

    first_divergence: mean number of leading tokens that are plain greedy decoding's, which a faster method writes more of
    in the same budget. exact_match: share of outputs that are, as a prefix where the budget ended. tokens: mean number
    of new tokens. tie: logits less than this apart count as equal, being what rounding alone moves them by (`tolerance`).
    """
    harness_only("scoring")
    lengths = np.array([len(ids) for ids in outputs], dtype=float)
    network: Any = networks["target"]
    tie = tolerance(network, [tuple(prompt[:LISTENED]) for prompt in batch["prompt"][:TRIED]])
    agreeing = np.array(
        [agreement(network, prompt, ids, tie) for prompt, ids in zip(batch["prompt"], outputs, strict=True)],
        dtype=float,
    )

    def mean(values: NDArray[np.float64]) -> Score:
        return Score(float(values.mean()), values[resample].mean(axis=1).tolist())

    return {
        "first_divergence": mean(agreeing),
        "exact_match": mean((agreeing == lengths).astype(float)),
        "tokens": mean(lengths),
        "tie": mean(np.full(len(lengths), tie)),
    }


def tolerance(network: Any, texts: Sequence[Sequence[int]]) -> float:
    """How far apart two logits must be for their order to mean something.

    Twice the most by which the distance of a likely token from the likeliest one differs between a forward over a whole
    text and passes on a cache, which round otherwise: no fixed number serves float32, where that is 1e-4, and bfloat16.
    """
    from stepmark.hub.text_networks import in_passes

    most = 0.0
    for text in texts:
        with torch.no_grad():
            whole, parts = (
                logits.double() for logits in (network(torch.tensor([list(text)], device=network.device)).logits[0],
                                               in_passes(network, list(text)))
            )  # fmt: skip
        likely = whole.topk(min(LIKELY, whole.shape[1]), dim=1).indices
        apart = [logits.gather(1, likely) - logits.gather(1, likely[:, :1]) for logits in (whole, parts)]
        most = max(most, float((apart[0] - apart[1]).nan_to_num(0.0).abs().max()))
    return max(TIE, 2 * most)


def agreement(network: Any, prompt: Sequence[int], output: Sequence[int], tie: float) -> int:
    """How many leading tokens of `output` are those of plain greedy decoding, logits less than `tie` apart being equal.

    One forward over prompt and output, without a cache: token i is greedy if it has the greatest logit after all
    tokens before it, and by induction the prefix up to the first other token is the greedy continuation.
    """
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *output[:-1]]], device=network.device)
        logits = network(ids).logits[0, len(prompt) - 1 :].float()
    taken = logits.gather(1, torch.tensor(output, device=network.device)[:, None])[:, 0]
    wrong = (taken < logits.amax(1) - tie).nonzero()
    return int(wrong[0]) if len(wrong) else len(output)
