"""Track decoding, tasks of checkpoint folders: decoding of a language model that somebody brings.

Prompts are those of a file, our own, or random tokens. Nobody knows right answers: what can be judged is whether a text is the
one that plain greedy decoding of the same network writes, or of drawn texts whether they are drawn from its distributions,
and how much text a budget of target forwards buys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.hub.prompts import decode, encode, going_on, has_tokenizer, spread
from stepmark.hub.source import current
from stepmark.hub.text_tasks import RANDOM_PROMPT, calibration, encoded, end, longest, scored, vocabulary
from stepmark.task import BadOutput, Score, Task, harness_only, skip
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding import steps_of as steps_of
from stepmark.tracks.decoding.metrics import TIE, token_deviation

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
    n, temperature = len(chosen), made.choice.temperature
    return {"prompt": chosen, "max_new_tokens": [made.new_tokens] * n, "temperature": [temperature] * n}


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


def ids_of(text: str, room: int, message: bool = True) -> list[int]:
    """Token ids of a text, the last ones where it and `room` new tokens are more than the models see. In the chat template
    where one was asked for; not where the text is no `message`, but stands for itself."""
    made = current()
    ids = encode(made.parts["target"].folder, text, made.choice.chat and message)
    return ids[-(min(map(longest, made.parts.values())) - room) :]


def answer_of(text: str) -> list[int] | None:
    """Token ids of a text as the answer to a message in the chat template, whose turn begins without a space; None where
    there is no template, and a text goes on with its context word by word."""
    made = current()
    return going_on(made.parts["target"].folder, text.lstrip(" ")) if made.choice.chat else None


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
    Of drawn texts: tokens, and token_bias: squared deviation of the token counts from what the network's own distributions
    promise, over its expectation for exact draws: about 1 if lossless, greater if tokens are favoured.
    """
    harness_only("scoring")
    lengths = np.array([len(ids) for ids in outputs], dtype=float)
    network: Any = networks["target"]
    if "token_bias" in task.metrics:
        return {"tokens": _mean(lengths, resample), "token_bias": bias(network, batch, outputs, resample)}
    tie = tolerance(network, [tuple(prompt[:LISTENED]) for prompt in batch["prompt"][:TRIED]])
    agreeing = np.array(
        [agreement(network, prompt, ids, tie) for prompt, ids in zip(batch["prompt"], outputs, strict=True)],
        dtype=float,
    )
    return {
        "first_divergence": _mean(agreeing, resample),
        "exact_match": _mean((agreeing == lengths).astype(float), resample),
        "tokens": _mean(lengths, resample),
        "tie": _mean(np.full(len(lengths), tie), resample),
    }


def _mean(values: NDArray[np.float64], resample: NDArray[np.int64]) -> Score:
    return Score(float(values.mean()), values[resample].mean(axis=1).tolist())


class Tempered(nn.Module):
    """A language model whose logits [B, T, V] are divided by a temperature."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, ids: Tensor) -> Any:
        """What the network gives, with its logits cooler or warmer."""
        return SimpleNamespace(logits=self.network(ids).logits.float() / self.temperature)


def bias(
    network: nn.Module, batch: Mapping[str, Any], outputs: Sequence[Sequence[int]], resample: NDArray[np.int64]
) -> Score:
    """Token bias of drawn texts, over all of them and over resamples."""
    found = [
        token_deviation(Tempered(network, temperature), prompt, ids)
        for prompt, ids, temperature in zip(batch["prompt"], outputs, batch["temperature"], strict=True)
    ]
    deviation, expected = torch.stack([d for d, _ in found]).numpy(), np.array([e for _, e in found])

    def over(rows: NDArray[np.int64]) -> float:
        return float((deviation[rows].sum(0) ** 2).sum() / max(expected[rows].sum(), 1e-12))

    return Score(over(np.arange(len(outputs))), [over(rows) for rows in resample])


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
