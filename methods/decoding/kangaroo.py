"""Kangaroo: drafts from a shallow part of the target, with a double early exit (Liu et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import EOS, batches, encode
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.early_exit import EarlyExitDecoder, ExitAdapter, train_exit_adapter
from stepmark.tracks.decoding.speculation import draw, speculate

ETA, GAMMA = 0.6, 6  # confidence below which drafting stops; tokens drafted at most


class Kangaroo(Method):
    """Kangaroo: the first layers of the target, an adapter and the target's own output head write the drafts.

    First exit: with f_l the first l layers, A the adapter and W the output head, the draft is
    q(. | x) = softmax(W A(f_l(x))). A is one attention layer with two norms and no feed-forward part, trained so that
    q follows the full model's p on the train split (equation 3: minimise -sum_t sum_v p_t(v) log q_t(v)).
    Second exit: drafting stops after the first token with max q < eta (equation 4), or after gamma tokens. The layers
    after l then run once over the hidden states f_l of all drafted tokens, which were kept: the shallow layers do not
    run again. Greedy tokens are kept while they match, sampled ones by the rule of speculative sampling, so that the
    output is the target's own. k drafted tokens and their check take 1 + k l / L evaluations of L layers, the adapter's
    attention beside them.

    Differs from the paper: the adapter's last norm starts as the target's, and Muon trains its matrices, for seconds
    and on texts of the task. A low-confidence token stays in the draft, as in the official code: it is paid for.

    What limits the second exit here: a drafted token costs one layer of twelve, so a wrong one is cheap; and in stories
    several words are often equally good, so that the right draft has q < eta and drafting stops for nothing.
    """

    paper = Paper(
        id="kangaroo",
        title="Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting",
        authors="Fangcheng Liu, Yehui Tang, Zhenhua Liu, Yunsheng Ni, Kai Han, Yunhe Wang",
        year=2024,
        arxiv="2404.18911",
        code="Equationliu/Kangaroo",
    )
    tasks = (
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
        "greedy/sums",
        "greedy/words",
        "greedy/stories",
        "sampling/stories",
    )
    baselines = ("autoregressive", "early_exit_fixed", "speculative")
    claims = (
        Claim(
            "exact_match[kangaroo,64] >= 1 "
            "and target_layer_evaluations[kangaroo,64] < target_layer_evaluations[autoregressive,64] "
            "and target_layer_evaluations[kangaroo,64] <= target_layer_evaluations[early_exit_fixed,64]",
            says="the output is greedy decoding's, in fewer layer evaluations, and no more than without the second exit",
        ),
        Claim(
            "exact_match[kangaroo,96] >= 1 "
            "and target_layer_evaluations[kangaroo,96] < target_layer_evaluations[autoregressive,96] "
            "and target_layer_evaluations[kangaroo,96] <= target_layer_evaluations[early_exit_fixed,96]",
            says="the same on stories",
            task="greedy/stories_deep",
        ),
        Claim(
            "latency_ms[kangaroo,64] <= 0.75 * latency_ms[autoregressive,64]",
            says="decoding takes at most three quarters of the time (the paper's 1.4 to 1.7 times the speed)",
        ),
    )

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
                while len(text) <= min(GAMMA, most) and target.spent + cost + 1 <= rung:
                    logits = target.exit_logits(text[-1]).double()
                    if temperature == 0:
                        text.append(int(logits.argmax()))
                    else:
                        q.append((logits / temperature).softmax(-1))
                        text.append(draw(q[-1], float(torch.rand((), generator=session.rng, device=target.device))))
                    if text[-1] == target.eos or float(logits.softmax(-1).max()) < ETA:
                        break
                return text[1:], torch.stack(q) if q else None

            outputs.append(speculate(target, prompt, room, rung, temperature, propose, session.rng))
        return outputs


def exit_depth(model: nn.Module) -> int:
    """Layers before the first exit: 2 of 32 and 3 of 40 as in the paper, 1 of 12."""
    return max(1, len(model.model.layers) // 13)
