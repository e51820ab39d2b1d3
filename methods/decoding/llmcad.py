"""LLMCad: a small model grows a tree of drafts until it is unsure of all of it (Xu et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding import Decoder

# Nodes of a tree at most, tokens that one node may branch into, how likely a second one must be, the first threshold.
NODES, WIDTH, BRANCH, ALPHA = 24, 3, 0.1, 0.1


class Tree:
    """Drafts after a root: token, parent (-1: the root), depth, cumulative confidence and the slot in the draft's cache."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.sure: list[float] = []
        self.slots: dict[int, int] = {}  # of the nodes that the small model has read

    def add(self, parent: int, p: Tensor, room: int) -> None:
        """Branch into the likeliest next token, and into others that are likely too; p [V] follows the parent."""
        confidence = self.sure[parent] if parent >= 0 else 1.0
        likely, chosen = p.topk(WIDTH)
        for rank, (share, token) in enumerate(zip(likely.tolist(), chosen.tolist(), strict=True)):
            if rank < room and (rank == 0 or share >= BRANCH):
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(self.depths[parent] + 1 if parent >= 0 else 1)
                self.sure.append(confidence * share)

    def path(self, node: int) -> list[int]:
        """The nodes from the root, left out, to this one."""
        return [*self.path(self.parents[node]), node] if node >= 0 else []


class LLMCad(Method):
    """LLMCad: the target is asked as seldom as can be, a small model in memory writes trees of drafts meanwhile.

    Tree (section 3.2): the branch of the greatest cumulative confidence, the product of the small model's p along it,
    is written on by one token at a time; where further tokens are likely as well it branches. So confident stretches
    grow deep and doubtful ones wide. One pass of the target checks all branches under a tree mask, and the longest
    correct path is kept with the target's own next token: the output is greedy decoding's.
    Fallback (section 3.3): drafting ends when the confidence of the best branch falls below a threshold,

        T_c = max over branches of prod p < alpha

    the whole branch's and not one token's. After each check, with N_correct of the N_all tokens of the branch that
    matched best,

        alpha <- alpha / 2                                    where all are correct
        alpha <- alpha 2^((N_all - N_correct) / N_all)        else

    Differs from the paper: the pipeline of section 3.4 goes on drafting while the target's weights are read from
    storage. It hides time and saves no target forward; here all weights lie in memory, so it is left out, and a target
    forward stands for a reading of the weights. Trees have at most 24 nodes, for small texts; a node branches into at
    most 3 tokens of p >= 0.1.
    """

    paper = Paper(
        id="llmcad",
        title="LLMCad: Fast and Scalable On-device Large Language Model Inference",
        authors="Daliang Xu, Wangsong Yin, Xin Jin, Ying Zhang, Shiyun Wei, Mengwei Xu, Xuanzhe Liu",
        year=2023,
        arxiv="2309.04255",
    )
    tasks = ("greedy/sums", "greedy/words", "greedy/stories", "greedy/sums_deep")
    baselines = ("autoregressive", "speculative")
    claims = (
        Claim(
            "exact_match[llmcad,64] >= 1 and nfe[llmcad,64] <= 0.5 * nfe[autoregressive,64]",
            says="the output is greedy decoding's, with at most half of its target forwards",
        ),
        Claim(
            "nfe[llmcad,64] < nfe[speculative,64]",
            says="trees and the moving threshold need fewer target forwards than chains of fixed length",
        ),
        Claim(
            "exact_match[llmcad,96] >= 1 and nfe[llmcad,96] < nfe[speculative,96]",
            says="the same on stories",
            task="greedy/stories",
        ),
        Claim(
            "latency_ms[llmcad,64] <= 0.5 * latency_ms[autoregressive,64]",
            says="decoding takes at most half the time also where the weights lie in memory",
            task="greedy/sums_deep",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        outputs = []
        for prompt, room in zip(batch["prompt"], batch["max_new_tokens"], strict=True):
            roles = (session.networks["target"], session.networks["draft"])
            target, small = (Decoder(model, len(prompt) + room + NODES + 1) for model in roles)
            outputs.append(self.decode(target, small, prompt, room, rung))
        return outputs

    @classmethod
    def decode(cls, target: Decoder, small: Decoder, prompt: Sequence[int], room: int, budget: float) -> list[int]:
        """New token ids for one prompt in at most `budget` target forwards."""
        tokens, end, alpha = list(prompt), len(prompt) + room, ALPHA
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
            alpha = cls.threshold(alpha, len(kept) - 1, cls.length_of_best(tree, kept[-1]))
            target.cache.compact(start, [start + 1 + node for node in kept])
            target.length = start + len(kept)
            read = [tree.slots[node] for node in kept if node in tree.slots]
            small.cache.compact(small.length, read)
            small.length += len(read)

    @staticmethod
    def grow(small: Decoder, tokens: Sequence[int], most: int, alpha: float) -> Tree:
        """A tree of drafts after a text, at most `most` tokens deep."""
        tree = Tree()
        p = small.forward(tokens[small.length :], last=1)[0].softmax(-1)
        leaves = {-1}
        while True:
            best = max(leaves, key=lambda leaf: tree.sure[leaf] if leaf >= 0 else 1.0)
            depth, room = (tree.depths[best] if best >= 0 else 0), NODES - len(tree.tokens)
            confidence = tree.sure[best] if best >= 0 else 1.0
            if confidence < alpha or depth >= most or room == 0 or (best >= 0 and tree.tokens[best] == small.eos):
                return tree
            if best >= 0:
                slot = tree.slots[best] = small.length + len(tree.slots)
                mask = torch.zeros(1, slot + 1, dtype=torch.bool, device=small.device)
                mask[0, : small.length] = True
                mask[0, [tree.slots[node] for node in tree.path(best)]] = True
                at = torch.tensor([small.length + depth - 1], device=small.device)
                p = small.logits(small.run(small.embed([tree.tokens[best]]), slot, None, at, mask))[0].softmax(-1)
            leaves.remove(best)
            before = len(tree.tokens)
            tree.add(best, p, room)
            leaves |= set(range(before, len(tree.tokens)))

    @staticmethod
    def length_of_best(tree: Tree, last: int) -> int:
        """Tokens of the branch that matched best: the surest of those that go through the last node kept."""
        ends = set(range(len(tree.tokens))) - set(tree.parents)
        through = [node for node in ends if last < 0 or last in tree.path(node)]
        return tree.depths[max(through, key=lambda node: tree.sure[node])] if through else 0

    @staticmethod
    def threshold(alpha: float, correct: int, drafted: int) -> float:
        """The next threshold, after `correct` of `drafted` tokens of the branch that matched best."""
        return alpha * 2 ** ((drafted - correct) / drafted) if correct < drafted else alpha / 2
