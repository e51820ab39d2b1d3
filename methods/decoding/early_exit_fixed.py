"""Early-exit drafting of fixed length: Kangaroo's draft without its confidence exit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import EOS, batches, encode
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.early_exit import EarlyExitDecoder, ExitAdapter, train_exit_adapter
from stepmark.tracks.decoding.speculation import draw, speculate

GAMMA = 6  # tokens drafted per step


class EarlyExitFixed(Method):
    """Early-exit drafting of fixed length: what Kangaroo is compared with to show what its second exit brings.

    The first l layers, a trained adapter and the output head of the target write gamma tokens per step, however sure
    they are; the remaining layers check them in one pass over the kept hidden states. l, gamma, the adapter and its
    training are those of `kangaroo`.
    """

    tasks = (
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
        "greedy/sums",
        "greedy/words",
        "greedy/stories",
        "sampling/stories",
    )
    baselines = ("autoregressive",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The adapter, untrained."""
        return {"adapter": ExitAdapter(session.networks["target"])}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Train the adapter on completions of the train split."""
        texts = zip(session.train["prompt"], session.train["target"], strict=True)
        rows = [(encode(prompt), [*encode(text), EOS]) for prompt, text in texts]
        stored = list(islice(batches(rows, 1500, session.seed), session.scale(40, 2)))
        adapter, target = session.networks["adapter"], session.networks["target"]
        train_exit_adapter(adapter, target, exit_depth(target), stored, session.scale(400, 6), session.progress)
        return {}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        outputs = []
        model, adapter = session.networks["target"], session.networks["adapter"]
        for prompt, room, temperature in zip(
            batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True
        ):
            target = EarlyExitDecoder(model, len(prompt) + room, exit_depth(model), adapter)
            cost = target.depth / len(target.layers)

            def propose(tokens: list[int], most: int) -> tuple[list[int], Tensor | None]:
                text, q = [tokens[-1]], []
                while len(text) <= min(GAMMA, most) and target.spent + cost + 1 <= rung and text[-1] != target.eos:
                    logits = target.exit_logits(text[-1]).double()
                    if temperature == 0:
                        text.append(int(logits.argmax()))
                    else:
                        q.append((logits / temperature).softmax(-1))
                        text.append(draw(q[-1], float(torch.rand((), generator=session.rng, device=target.device))))
                return text[1:], torch.stack(q) if q else None

            outputs.append(speculate(target, prompt, room, rung, temperature, propose, session.rng))
        return outputs


def exit_depth(model: nn.Module) -> int:
    """Layers before the exit: 1 of 4 and of 12, 2 of 32, 3 of 40."""
    return max(1, len(model.model.layers) // 13)
