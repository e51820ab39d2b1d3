"""Medusa: extra output heads draft a tree of continuations, checked in one forward (Cai et al., ICML 2024)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from stepmark.backbones.lm import EOS, batches, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each

HEADS, NODES, RANKS, DECAY = 4, 20, 6, 0.8  # K, nodes of the tree, guesses considered per head, lambda

Path = tuple[int, ...]


class MedusaHeads(nn.Module):
    """K heads on the target's last hidden state: head k says what stands k + 1 tokens on (section 2.1.1).

    p_k = softmax(W2_k (SiLU(W1_k h) + h)); W1 starts at nought and W2 as the output head, so that an untrained head
    repeats the target's own next token.
    """

    def __init__(self, model: nn.Module, heads: int = HEADS) -> None:
        super().__init__()
        head: Any = model.lm_head
        words, width = head.weight.shape
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(heads))
        self.outputs = nn.ModuleList(nn.Linear(width, words, bias=False) for _ in range(heads))
        for block, output in zip(self.blocks, self.outputs, strict=True):
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
            output.load_state_dict({"weight": head.weight.detach().clone()})

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, D] -> logits [N, K, V]."""
        pairs = zip(self.blocks, self.outputs, strict=True)
        return torch.stack([output(silu(block(hidden)) + hidden) for block, output in pairs], dim=1)


def sparse_tree(accuracy: Tensor, nodes: int) -> list[Path]:
    """The `nodes` likeliest paths of guesses, parents before children (section 2.3.3).

    accuracy [K, R]: how often guess r of head k is right, falling in r; a path is as likely as the product over it.
    """
    table = accuracy.tolist()
    waiting: list[tuple[float, Path]] = [(-table[0][0], (0,))]
    tree: list[Path] = []
    while waiting and len(tree) < nodes:
        likely, path = heapq.heappop(waiting)
        tree.append(path)
        depth, rank = len(path), path[-1]
        if depth < len(table):
            heapq.heappush(waiting, (likely * table[depth][0], (*path, 0)))
        if rank + 1 < len(table[0]) and table[depth - 1][rank] > 0:
            sibling = likely / table[depth - 1][rank] * table[depth - 1][rank + 1]
            heapq.heappush(waiting, (sibling, (*path[:-1], rank + 1)))
    return tree


class Medusa(Method):
    """Medusa-1: heads on a frozen target guess several tokens ahead; a tree of their guesses is checked in one forward.

    Head k guesses the token k + 1 places on from the same hidden state. Guesses are joined to a sparse tree: the paths
    with the greatest product of measured accuracies. The root, which is the target's own last token, and all nodes run
    through the target at once under a tree mask, each at position length + depth. The longest path of which every node
    is the greedy token after its parent is kept, with the target's token after it; the keys and values of the other
    branches are dropped. So the output is greedy decoding's. Only the heads are trained, with the loss
    sum_k lambda^k CE_k (equation 1), lambda = 0.8, on completions of the train split.

    `medusa_chain` has the same heads and checks one chain of their likeliest guesses, 4 nodes: what the tree is worth.

    The tree is chosen by accuracies on batches that the heads were not trained on.

    Differs from the paper: 20 nodes instead of 64, as a tiny model's forward grows with every position; training takes
    seconds. Left out are Medusa-2, which trains the target with the heads (the paper's 2.3 to 3.6 times), self-distilled
    texts to train on, and typical acceptance, which is not lossless, and with it temperatures above 0.

    What limits it here: on one core a forward over 21 positions takes longer than one over a single position, so that
    time falls less than forwards do, and the paper's 2.2 times are not reached at every budget.
    """

    paper = Paper(
        id="medusa",
        title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        authors="Tianle Cai, Yuhong Li, Zhengyang Geng, Hongwu Peng, Jason D. Lee, Deming Chen, Tri Dao",
        year=2024,
        arxiv="2401.10774",
        code="FasterDecoding/Medusa",
    )
    tasks = (
        "greedy/sums",
        "greedy/words",
        "greedy/stories",
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
    )
    baselines = ("autoregressive", "speculative")
    trainings = 3
    claims = (
        Claim(
            "exact_match[medusa,*] >= 1 and 2.2 * latency_ms[medusa,*] / tokens[medusa,*] "
            "<= latency_ms[autoregressive,*] / tokens[autoregressive,*]",
            says="greedy decoding's own text at 2.2 times its speed, whatever the budget, on stories",
            task="greedy/stories_deep",
            setting="one CPU core pays for each of the tree's 21 positions; the paper's GPU reads its weights once for all",
            headline=True,
        ),
        Claim(
            "exact_match[medusa,*] >= 1 and 2.2 * latency_ms[medusa,*] / tokens[medusa,*] "
            "<= latency_ms[autoregressive,*] / tokens[autoregressive,*]",
            says="the same on sums",
            task="greedy/sums_deep",
            setting="one CPU core pays for each of the tree's 21 positions; the paper's GPU reads its weights once for all",
        ),
        Claim(
            "exact_match[medusa,*] >= 1 and 1.5 * latency_ms[medusa,*] / tokens[medusa,*] "
            "<= latency_ms[autoregressive,*] / tokens[autoregressive,*]",
            says="1.5 times the speed on word problems, whose texts are short",
            task="greedy/words_deep",
        ),
        Claim(
            "tokens[medusa,*] / nfe[medusa,*] >= 1.1 * tokens[medusa_chain,*] / nfe[medusa_chain,*]",
            says="a tree of guesses gives a tenth more tokens per forward than the likeliest chain, on sums",
        ),
        Claim(
            "tokens[medusa,*] / nfe[medusa,*] >= 1.1 * tokens[medusa_chain,*] / nfe[medusa_chain,*]",
            says="the same on word problems",
            task="greedy/words",
        ),
        Claim(
            "tokens[medusa,*] / nfe[medusa,*] >= 1.1 * tokens[medusa_chain,*] / nfe[medusa_chain,*]",
            says="the same on stories",
            task="greedy/stories",
        ),
        Claim(
            "latency_ms[medusa,*] / tokens[medusa,*] < latency_ms[medusa_chain,*] / tokens[medusa_chain,*]",
            says="and the larger forwards of the tree are worth their time",
            task="greedy/sums_deep",
        ),
        Claim(
            "tokens[medusa,*] / nfe[medusa,*] > tokens[prompt_lookup,*] / nfe[prompt_lookup,*]",
            says="trained heads give more tokens per forward than n-grams looked up in the text, on stories with a refrain",
            task="greedy/stories_deep",
        ),
        Claim(
            "latency_ms[medusa,*] / tokens[medusa,*] < latency_ms[speculative,*] / tokens[speculative,*]",
            says="heads cost less time than a draft model, on stories",
            task="greedy/stories_deep",
        ),
    )

    tree = True  # of guesses; otherwise the likeliest guess of each head, one after the other
    variants = (
        Variant(
            "medusa_chain",
            says="the same heads without a tree: one chain of their likeliest guesses",
            tree=False,
            baselines=("autoregressive", "medusa"),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The heads, untrained."""
        return {"heads": MedusaHeads(session.networks["target"])}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Train the heads and choose the tree. {"tree": ranks along each path, int64 [nodes, K], -1 after its end}."""
        found = dict(session.once(train_heads))
        accuracy = found.pop("accuracy")
        session.networks["heads"].load_state_dict(found)
        tree = sparse_tree(accuracy, NODES) if self.tree else [(0,) * depth for depth in range(1, HEADS + 1)]
        return {"tree": torch.tensor([[*path, *[-1] * (HEADS - len(path))] for path in tree])}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        tree = [tuple(rank for rank in path if rank >= 0) for path in session.state["tree"].tolist()]
        model, heads = session.networks["target"], session.networks["heads"]

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(model, len(prompt) + room + len(tree) + 1)
            return self.decode(target, heads, prompt, room, tree, rung)

        return write_each(batch, write)

    @staticmethod
    def decode(
        target: Decoder, heads: nn.Module, prompt: Sequence[int], room: int, tree: Sequence[Path], budget: float
    ) -> list[int]:
        """New token ids for one prompt in at most `budget` forwards."""
        places = {path: slot for slot, path in enumerate(tree, start=1)}  # slot 0 holds the root
        depth = torch.tensor([0, *map(len, tree)], device=target.device)
        sees = torch.eye(len(depth), dtype=torch.bool, device=target.device)
        for path, slot in places.items():
            sees[slot, [0, *(places[path[:n]] for n in range(1, len(path)))]] = True
        tokens, end = list(prompt), len(prompt) + room
        hidden = target.run(target.embed(tokens), 0)
        target.length, at = len(tokens), -1
        new = [int(target.logits(hidden[:, -1:]).argmax())]
        while True:
            tokens += new[: new.index(target.eos) + 1] if target.eos in new else new
            if tokens[-1] == target.eos or len(tokens) >= end or target.spent + 1 > budget:
                return tokens[len(prompt) : end]
            guesses = heads(target.inner.norm(hidden[0, at][None]))[0].topk(RANKS).indices.tolist()
            nodes = [tokens[-1], *(guesses[len(path) - 1][path[-1]] for path in tree)]
            start = target.length
            mask = torch.cat([sees.new_ones(len(nodes), start), sees], 1)
            hidden = target.run(target.embed(nodes), start, None, start + depth, mask)
            greedy = target.logits(hidden).argmax(-1).tolist()
            children = {(places.get(path[:-1], 0), nodes[slot]): slot for path, slot in places.items()}
            kept = [0]
            while (child := children.get((kept[-1], greedy[kept[-1]]))) is not None:
                kept.append(child)
            at, new = kept[-1], [greedy[slot] for slot in kept]
            target.cache.compact(start, [start + slot for slot in kept])
            target.length = start + len(kept)


def train_heads(session: Session) -> dict[str, Tensor]:
    """Train the network `heads`: its weights, and "accuracy" [K, RANKS], how often each guess of each head is right."""
    target: Any = session.networks["target"]
    heads = session.networks["heads"]
    texts = list(zip(session.train["prompt"], session.train["target"], strict=True))
    rows = [(encode(prompt), [*encode(text), EOS]) for prompt, text in texts[: session.scale(len(texts), 100)]]
    stored = []
    for ids, labels in islice(batches(rows, session.scale(1500, 300), session.seed), session.scale(48, 3)):
        with torch.no_grad():
            hidden = target.model(ids.to(session.device), use_cache=False).last_hidden_state
        # Column k holds the token k + 1 places on; a place past the end of the text holds -100.
        padded = nn.functional.pad(labels, (0, HEADS), value=-100)
        ahead = torch.stack([padded[:, k : k + labels.shape[1]] for k in range(1, HEADS + 1)], -1)
        wanted = labels >= 0
        stored.append((hidden[wanted], ahead[wanted].to(session.device)))
    held, stored = stored[: max(1, len(stored) // 8)], stored[max(1, len(stored) // 8) :]
    optimiser = torch.optim.AdamW(heads.parameters(), lr=2e-3, weight_decay=0.0)
    steps = session.scale(500, 4)
    for step in session.progress(range(steps), "heads"):
        hidden, ahead = stored[step % len(stored)]
        logits = heads(hidden)
        losses = [DECAY**k * cross_entropy(logits[:, k], ahead[:, k]) for k in range(HEADS)]
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimiser.zero_grad()
        torch.stack(losses).nansum().backward()  # a batch of short texts may hold nothing for the last head
        optimiser.step()
    right, count = torch.zeros(HEADS, RANKS), torch.zeros(HEADS, 1)
    with torch.no_grad():
        for hidden, ahead in held:
            guesses = heads(hidden).topk(RANKS).indices
            right += (guesses == ahead[:, :, None]).float().sum(0).cpu()
            count += (ahead >= 0).float().sum(0)[:, None].cpu()
    # Sorted, as the tree asks for: of two rare guesses the measured order may be chance.
    accuracy = (right / count.clamp(min=1)).sort(dim=1, descending=True).values
    return {**heads.state_dict(), "accuracy": accuracy}
