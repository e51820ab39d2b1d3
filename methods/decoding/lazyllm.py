"""LazyLLM: tokens are pruned layer by layer, anew for every token that is written (Fu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.recall import PrunedDecoder, cuts_of, write_with

# Share of the tokens of a layer that the layers after it run over, by depth (share of the layers).
CUTS = ((1 / 2, 0.3), (2 / 3, 0.5), (5 / 6, 0.5))


class LazyLLM(Method):
    """LazyLLM: the prefill computes only what the next token needs; the rest is caught up with if it is asked for.

    After each of some layers l the tokens of that layer are ranked by the attention that the newest token paid them
    there, s_i = mean over heads of A_l[h, N, i] (equation 1), and all but the best share are left behind: deeper
    layers run over, and look at, fewer tokens (section 3.2; later layers keep less). The newest token always stays. A
    token that is left behind waits in an auxiliary cache with its hidden state of that layer (section 3.3). Every
    further token of the text repeats the choice: a token that now is chosen and has no keys and values in the deeper
    layers goes on from its hidden state, so that no token runs twice through a layer and the worst case is plain
    decoding. What waits is part of the cache that is counted: one hidden state in place of the keys and values of all
    deeper layers.

    Differs from the paper: shares are fixed by depth, where the paper takes percentiles found by hand for each model.

    What limits the second claim here: all names that will be asked for stand in the prompt, so that what its end attends to is
    what later tokens need as well, and a choice made once is good enough.
    """

    paper = Paper(
        id="lazyllm",
        title="LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
        authors="Qichen Fu, Minsik Cho, Thomas Merth, Sachin Mehta, Mohammad Rastegari, Mahyar Najibi",
        year=2024,
        arxiv="2407.14057",
    )
    tasks = ("recall/needles",)
    baselines = ("autoregressive", "static_prune")
    claims = (
        Claim(
            "target_positions[lazyllm,1] <= 0.65 * target_positions[autoregressive,1] "
            "and accuracy[lazyllm,16] >= accuracy[autoregressive,16] - 0.02",
            says="the first token comes after at most 65 % of the token-layers, and no answers are lost",
        ),
        Claim(
            "accuracy[lazyllm,16] > accuracy[static_prune,16]",
            says="pruning anew for every token answers more than pruning once by the same shares",
        ),
        Claim(
            "target_positions[lazyllm,16] < target_positions[autoregressive,16]",
            says="tokens that are caught up with later leave a saving over the whole answer",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        model, outputs = session.networks["target"], []
        cuts = cuts_of(len(model.model.layers), CUTS)
        for prompt, room, temperature in zip(
            batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True
        ):
            target = PrunedDecoder(model, len(prompt) + room, cuts)
            outputs.append(write_with(target, prompt, room, rung, temperature, session.rng))
        return outputs
