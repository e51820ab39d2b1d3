"""LLMCad: a small model grows a tree of drafts until it is unsure of all of it (Xu et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each

# Nodes of a tree at most, how likely a second branch must be, the first threshold.
NODES, BRANCH, ALPHA = 24, 0.3, 0.01


class Tree:
    """Drafts after a root: token, parent (-1: the root), depth, cumulative confidence and the slot in the draft's cache."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.sure: list[float] = []
        self.slots: dict[int, int] = {}  # of the nodes that the small model has read

    def add(self, parent: int, p: Tensor, room: int, width: int) -> None:
        """Branch into the likeliest next token, and into others that are likely too; p [V] follows the parent."""
        confidence = self.sure[parent] if parent >= 0 else 1.0
        likely, chosen = p.topk(width)
        for rank, (share, token) in enumerate(zip(likely.tolist(), chosen.tolist(), strict=True)):
            if rank < room and (rank == 0 or share >= BRANCH):
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(self.depths[parent] + 1 if parent >= 0 else 1)
                self.sure.append(confidence * share)

    def path(self, node: int) -> list[int]:
        """The nodes from the root, left out, to this one."""
        return [*self.path(self.parents[node]), node] if node >= 0 else []

    def leaves(self) -> list[int]:
        """The last nodes of the branches."""
        return sorted({*range(len(self.tokens))} - {*self.parents})

    def behind(self, leaf: int) -> float:
        """How many tokens the branch of a leaf lacks to its share by confidence (equation 1)."""
        leaves = self.leaves()
        tokens, confidence = sum(self.depths[each] for each in leaves), sum(self.sure[each] for each in leaves)
        return tokens * self.sure[leaf] / confidence - self.depths[leaf]


class LLMCad(Method):
    """LLMCad: the target is asked as seldom as can be, a small model in memory writes trees of drafts meanwhile.

    Tree (section 3.2): a token of p >= 0.3 starts a branch of its own, the likeliest one always goes on. C_i, the product
    of the small model's p along branch i, says how far it deserves to be written on, and the next token goes to the
    branch that is furthest behind its share (equations 1 and 2), T_i being the tokens it has and M those of all:

        next = argmax over i of M C_i / sum C - T_i

    So confident stretches grow deep and doubtful ones wide. One pass of the target checks all branches under a tree
    mask, and the longest correct path is kept with the target's own next token: the output is greedy decoding's.
    Fallback (section 3.3): drafting ends when the confidence of the best branch falls below a threshold, 0.01 at first,

        T_c = max over branches of C_i < alpha

    the whole branch's and not one token's. It also ends when the best branch has come to its end (an end of the text, or
    all the room there is), whatever the others might still grow. After each check, with N_correct of the N_all tokens of
    the branch that matched best,

        alpha <- alpha / 2                                    where all are correct
        alpha <- alpha 2^((N_all - N_correct) / N_all)        else

    Differs from the paper: equation 3 prints the exponent alone for the second case, and the text divides alpha by a
    mean confidence: 0.5, what the first case takes it to be, to the power of the wrong share is read here. The pipeline
    of section 3.4 goes on drafting while the target's weights are read from storage. It hides time and saves no target
    forward; here all weights lie in memory, so it is left out, and a target forward stands for a reading of the weights.
    A forward of the small model is taken to cost a tenth of one in the claims. Trees have at most 24 nodes, for small
    texts.

    Its controls: `chain_of_drafts` drafts chains of up to 24 tokens, the dumb way to ask the target seldom, and
    `tree_fixed_threshold` leaves the threshold where it starts. `speculative` has the length that pays in time.

    What limits it here: chains of 24 tokens ask the target as seldom, and trees save forwards of the small model alone: more
    than half of them on stories, next to none on sums, where it hardly ever errs. At the smallest budget a token of a story
    costs about as much as with chains of a fixed length.
    """

    paper = Paper(
        id="llmcad",
        title="LLMCad: Fast and Scalable On-device Large Language Model Inference",
        authors="Daliang Xu, Wangsong Yin, Xin Jin, Ying Zhang, Shiyun Wei, Mengwei Xu, Xuanzhe Liu",
        year=2023,
        arxiv="2309.04255",
    )
    tasks = ("greedy/sums_deep", "greedy/sums", "greedy/words", "greedy/stories")
    baselines = ("autoregressive", "speculative", "chain_of_drafts", "tree_fixed_threshold")
    claims = (
        Claim(
            "exact_match[llmcad,*] >= 1 and (nfe[llmcad,*] + 0.1 * draft_evaluations[llmcad,*]) / tokens[llmcad,*] "
            "<= nfe[autoregressive,*] / tokens[autoregressive,*] / 2.9 "
            "and (nfe[llmcad,*] + 0.1 * draft_evaluations[llmcad,*]) / tokens[llmcad,*] "
            "< (nfe[chain_of_drafts,*] + 0.1 * draft_evaluations[chain_of_drafts,*]) / tokens[chain_of_drafts,*]",
            says="greedy decoding's own text at a third or less of its cost per token (the paper: 2.9 to 9.3 times as fast "
            "where the target is read from storage), and at less than with chains of as many tokens, on stories, where the "
            "small model often hesitates",
            task="greedy/stories",
            headline=True,
        ),
        Claim(
            "exact_match[llmcad,*] >= 1 and (nfe[llmcad,*] + 0.1 * draft_evaluations[llmcad,*]) / tokens[llmcad,*] "
            "<= nfe[autoregressive,*] / tokens[autoregressive,*] / 2.9 "
            "and (nfe[llmcad,*] + 0.1 * draft_evaluations[llmcad,*]) / tokens[llmcad,*] "
            "< (nfe[chain_of_drafts,*] + 0.1 * draft_evaluations[chain_of_drafts,*]) / tokens[chain_of_drafts,*]",
            says="the same on sums, where it hardly ever errs",
            headline=True,
        ),
        Claim(
            "(nfe[llmcad,*] + 0.1 * draft_evaluations[llmcad,*]) / tokens[llmcad,*] "
            "< (nfe[speculative,*] + 0.1 * draft_evaluations[speculative,*]) / tokens[speculative,*]",
            says="at less per token than chains of a fixed length, whatever the budget",
            task="greedy/stories",
        ),
        Claim(
            "nfe[llmcad,96] + 0.1 * draft_evaluations[llmcad,96] < nfe[speculative,96] + 0.1 * draft_evaluations[speculative,96]",
            says="the same for whole texts, which the paper times",
            task="greedy/stories",
        ),
        Claim(
            "nfe[llmcad,64] + 0.1 * draft_evaluations[llmcad,64] < nfe[speculative,64] + 0.1 * draft_evaluations[speculative,64]",
            says="the same on sums",
        ),
        Claim(
            "nfe[llmcad,96] + 0.1 * draft_evaluations[llmcad,96] "
            "<= nfe[tree_fixed_threshold,96] + 0.1 * draft_evaluations[tree_fixed_threshold,96]",
            says="the moving threshold pays, where a forward of the small model costs a tenth of a reading of the target",
            task="greedy/stories",
        ),
        Claim(
            "latency_ms[llmcad,64] <= 0.5 * latency_ms[autoregressive,64]",
            says="decoding takes at most half the time also where the weights lie in memory",
            setting="the paper's target is read from storage in every forward, which is what its trees save",
        ),
    )

    width, first, moves = 3, ALPHA, True  # branches of a node, the first threshold, whether it moves
    variants = (
        Variant(
            "chain_of_drafts",
            says="no branches and no fallback: chains as long as the tree has tokens",
            width=1,
            first=0.0,
            baselines=("autoregressive",),
        ),
        Variant(
            "tree_fixed_threshold",
            says="the same trees, with a threshold that stays where it starts",
            moves=False,
            baselines=("autoregressive",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            roles = (session.networks["target"], session.networks["draft"])
            target, small = (Decoder(model, len(prompt) + room + NODES + 1) for model in roles)
            return self.decode(target, small, prompt, room, rung)

        return write_each(batch, write)

    @classmethod
    def decode(cls, target: Decoder, small: Decoder, prompt: Sequence[int], room: int, budget: float) -> list[int]:
        """New token ids for one prompt in at most `budget` target forwards."""
        tokens, end, alpha = list(prompt), len(prompt) + room, cls.first
        new = [int(target.forward(tokens, last=1)[0].argmax())]
        while True:
            tokens += new[: new.index(target.eos) + 1] if target.eos in new else new
            if tokens[-1] == target.eos or len(tokens) >= end or target.spent + 1 > budget:
                return tokens[len(prompt) : end]
            tree = cls.grow(small, tokens, end - len(tokens) - 1, alpha)
            nodes, start = [tokens[-1], *tree.tokens], target.length
            depths = torch.tensor([0, *tree.depths], device=target.device)
            sees = torch.eye(len(nodes), dtype=torch.bool, device=target.device)
            for node in range(len(tree.tokens)):
                sees[node + 1, [0, *(other + 1 for other in tree.path(node))]] = True
            mask = torch.cat([sees.new_ones(len(nodes), start), sees], 1)
            hidden = target.run(target.embed(nodes), start, None, start + depths, mask)
            greedy = target.logits(hidden).argmax(-1).tolist()
            children = {pair: node for node, pair in enumerate(zip(tree.parents, tree.tokens, strict=True))}
            kept = [-1]
            while (child := children.get((kept[-1], greedy[kept[-1] + 1]))) is not None:
                kept.append(child)
            new = [greedy[node + 1] for node in kept]
            if cls.moves:
                alpha = cls.threshold(alpha, len(kept) - 1, cls.length_of_best(tree, kept[-1]))
            target.cache.compact(start, [start + 1 + node for node in kept])
            target.length = start + len(kept)
            read = [tree.slots[node] for node in kept if node in tree.slots]
            small.cache.compact(small.length, read)
            small.length += len(read)

    @classmethod
    def grow(cls, small: Decoder, tokens: Sequence[int], most: int, alpha: float) -> Tree:
        """A tree of drafts after a text, at most `most` tokens deep."""
        tree = Tree()
        p = small.forward(tokens[small.length :], last=1)[0].softmax(-1)
        if most > 0 and alpha <= 1:
            tree.add(-1, p, NODES, cls.width)
        while leaves := tree.leaves():
            going = [leaf for leaf in leaves if tree.depths[leaf] < most and tree.tokens[leaf] != small.eos]
            best, room = max(leaves, key=tree.sure.__getitem__), NODES - len(tree.tokens)
            if tree.sure[best] < alpha or best not in going or room == 0:
                break
            node = max(going, key=tree.behind)
            slot = tree.slots[node] = small.length + len(tree.slots)
            mask = torch.zeros(1, slot + 1, dtype=torch.bool, device=small.device)
            mask[0, : small.length] = True
            mask[0, [tree.slots[each] for each in tree.path(node)]] = True
            at = torch.tensor([small.length + tree.depths[node] - 1], device=small.device)
            p = small.logits(small.run(small.embed([tree.tokens[node]]), slot, None, at, mask))[0].softmax(-1)
            tree.add(node, p, room, cls.width)
        return tree

    @staticmethod
    def length_of_best(tree: Tree, last: int) -> int:
        """Tokens of the branch that matched best: the surest of those that go through the last node kept."""
        through = [node for node in tree.leaves() if last < 0 or last in tree.path(node)]
        return tree.depths[max(through, key=lambda node: tree.sure[node])] if through else 0

    @staticmethod
    def threshold(alpha: float, correct: int, drafted: int) -> float:
        """The next threshold, after `correct` of `drafted` tokens of the branch that matched best."""
        return alpha * 2 ** ((drafted - correct) / drafted) if correct < drafted else alpha / 2
