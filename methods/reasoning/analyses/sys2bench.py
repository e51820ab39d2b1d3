"""Sys2Bench: several ways to spend more at inference on several kinds of tasks, under one meter (Parashar et al.,
2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning import moves, navigate
from stepmark.tracks.reasoning.solving import CHAIN, STEP, prompts, self_judged, steps_form, write_step

SPREAD, BEAMS = 3, 2  # steps sampled from a node, nodes that a tree keeps on each level
ITERATIONS, LONGEST = 10, 120  # paths that are tried at most, and their tokens
EXPLORE = 1.0  # weight of what was tried seldom
WORTH = (0.0, 0.5, 1.0)  # impossible, likely, sure


@dataclass
class Node:
    """A text up to the end of a step: what that step is worth, how often a path went through it and the most that one
    of these was worth from here on."""

    text: list[int]
    reward: float = 0.5
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    best: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self.text[-1:] == [EOS] or len(self.text) >= LONGEST

    def bound(self) -> float:
        """What the next path may hope for here (UCT); of a node without paths, its own reward."""
        assert self.parent is not None
        value = self.best if self.visits else self.reward
        return value + EXPLORE * sqrt(log(max(1, self.parent.visits)) / max(1, self.visits))

    def path(self) -> list[Node]:
        """The nodes that lead here, the first step in front."""
        return [*(self.parent.path() if self.parent else []), *([self] if self.parent else [])]


@dataclass
class Search:
    """The search of one question: nodes to expand next, ends of paths, rows spent, paths tried."""

    root: Node
    frontier: list[Node]
    ends: list[Node] = field(default_factory=list)
    spent: int = 0
    tried: int = 0


class Sys2Bench(Method):
    """Sys2Bench: chain of thought, self-consistency, tree of thoughts and reasoning as planning (RAP), task by task.

    The method is RAP (Hao et al. 2023), Monte Carlo tree search in which the model gives steps and rewards. A node is a
    text up to the end of a step; from it 3 steps are sampled at temperature .7. Each path

        goes down by  Q(c) + sqrt(ln N(parent) / N(c)), where N counts paths and an untried c has its reward for Q,
        to a node without children, expands it, and goes on to the child of the greatest reward, expanded in turn, to an
        end;
        then every node on it has one path more, and Q is the greatest mean of rewards from there to an end so far

    until 10 paths are tried or the rung is spent; the path of the greatest mean reward is the answer. A step is
    rewarded by the model itself: problems, the mean digit of <score>, of nine; countdown and navigation, the words of
    <value> on the state behind it, 1 for sure and a half for likely; deduction, the mean probability of its words. What
    ends a text is worth what the step before it was.

    `sys2bench_tree` is breadth-first (ToT): on each level the 2 nodes of the greatest reward are kept. `sys2bench_coin`
    is RAP with random rewards. Chains of thought, votes and the tree of proposals stand beside them as methods of their
    own. A row is spent on each sampled token, each node that is expanded and each reward but the last kind. What is
    left at the end, and all of a rung below 128, is a greedy chain; at 256 two or three paths fit.

    Differs from the paper: of its five groups of tasks four are here, arithmetic (problems), logic (deduction),
    algorithms (Game of 24) and planning (walks over a graph); for common sense there is no reward that the model was
    taught. It compares at settings of each technique with the tokens they take; here rungs are equal. Its RAP samples 4
    steps and its tree keeps 5, of which a rung has no room; its number of paths, weight of exploration and Q (on
    arithmetic) are those here, and there it lets all paths vote on the answer, where here the best one gives it. That
    no technique is best on all tasks is a sentence about several tasks, of which a claim sees one: it is two claims,
    one where votes are to win and one where searches are, and holds if both do.

    What limits it here: where there is no single answer a vote means little by construction (24), so that part of the
    finding is in the kind of task. Each task has a model of its own that was trained on it.
    """

    paper = Paper(
        id="sys2bench",
        title="Inference-Time Computations for LLM Reasoning and Planning: A Benchmark and Insights",
        authors="Shubham Parashar, Blake Olson, Sambhav Khurana, Eric Li, Hongyi Ling, James Caverlee, Shuiwang Ji",
        year=2025,
        arxiv="2502.12521",
        code="divelab/sys2bench",
    )
    tasks = ("solve/problems", "deduce/chains", "solve/game24", "navigate/paths")
    baselines = (
        "chain_of_thought",
        "self_consistency",
        "trusted_chains",
        "tree_of_thoughts",
        "walk_vote",
        "tree_of_walks",
        "sys2bench_tree",
        "sys2bench_coin",
    )
    claims = (
        Claim(
            "accuracy[self_consistency,256..512] > "
            "max(accuracy[sys2bench,256..512], accuracy[sys2bench_tree,256..512])",
            says="on arithmetic with short answers a vote is ahead of both searches at equal tokens",
            headline=True,
        ),
        Claim(
            "max(accuracy[sys2bench,256..1024], accuracy[sys2bench_tree,256..1024], "
            "accuracy[tree_of_thoughts,256..1024]) > max(accuracy[chain_of_thought,256..1024], "
            "accuracy[trusted_chains,256..1024])",
            says="on the Game of 24 a search is ahead of chains: no technique is best on both",
            task="solve/game24",
            headline=True,
        ),
        Claim(
            "max(accuracy[sys2bench,128..512], accuracy[sys2bench_tree,128..512], accuracy[tree_of_walks,128..512]) > "
            "max(accuracy[chain_of_thought,128..512], accuracy[walk_vote,128..512])",
            says="in planning a walk a search is ahead of chains and votes",
            task="navigate/paths",
        ),
        Claim(
            "valid[self_consistency,128..512] > max(valid[sys2bench,128..512], valid[sys2bench_tree,128..512])",
            says="in logic a vote is ahead of both searches",
            task="deduce/chains",
        ),
        Claim(
            "accuracy[sys2bench,256..512] > accuracy[sys2bench_coin,256..512]",
            says="its rewards are of use: it is ahead of the same search with random ones",
        ),
    )
    technique, rewarded = "rap", "model"
    variants = (
        Variant("sys2bench_tree", says="breadth first, two nodes kept on each level", technique="tree"),
        Variant(
            "sys2bench_coin",
            says="random rewards",
            rewarded="coin",
            tasks=("solve/problems",),
            baselines=("chain_of_thought", "self_consistency"),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The best path of each question."""
        asked = prompts(batch, steps_form(session.task.id))
        searches = []
        for _ in asked:
            root = Node([])
            searches.append(Search(root, [root]))
        while jobs := [job for i, search in enumerate(searches) for job in self.due(i, search, rung)]:
            self.expand(session, asked, searches, jobs)
            for i in dict.fromkeys(i for i, _, _ in jobs):
                self.advance(searches[i])
        return self.answers(session, asked, searches, rung)

    def due(self, i: int, search: Search, rung: int) -> list[tuple[int, Node, int]]:
        """(question, node, steps) that are to be expanded. A chain can still be written to its end afterwards."""
        if not search.frontier:
            return []
        rest = max(STEP, CHAIN - min(len(node.text) for node in search.frontier))
        room = (rung - search.spent - rest) // len(search.frontier) - 1
        width = min(SPREAD, room // (STEP + 1))
        return [(i, node, width) for node in search.frontier] if width > 1 else []

    def expand(
        self, session: Session, asked: Sequence[list[int]], searches: Sequence[Search], jobs: Sequence[Any]
    ) -> None:
        """Give each node its children and these their rewards."""
        first = Chains(session.networks["model"], [[*asked[i], *node.text] for i, node, _ in jobs])
        chains = first.take([k for k, (_, _, width) in enumerate(jobs) for _ in range(width)])
        steps = iter(write_step(chains, None, session, 0.7))
        logprobs = iter(chains.logprobs)
        new: list[tuple[int, Node]] = []
        for i, node, width in jobs:
            searches[i].spent += 1  # the node's row gives all first tokens
            for _ in range(width):
                step, known = next(steps), next(logprobs)
                searches[i].spent += len(step) - 1
                if all(child.text[len(node.text) :] != step for child in node.children):
                    mean = exp(sum(known[-len(step) :]) / len(step))
                    node.children.append(Node([*node.text, *step], mean, node))
                    new.append((i, node.children[-1]))
        self.reward(session, asked, searches, new)

    def reward(
        self, session: Session, asked: Sequence[list[int]], searches: Sequence[Search], new: Sequence[tuple[int, Node]]
    ) -> None:
        """Set what the new nodes are worth; those of proofs have the mean probability of their words already."""
        if self.rewarded == "coin":
            drawn = torch.rand(len(new), generator=session.rng, device=session.device).tolist()
            for (_, node), worth in zip(new, drawn, strict=True):
                node.reward = worth
            return
        kind = session.task.dataset
        if kind == "deduction":
            return
        for _, node in new:
            node.reward = node.parent.reward if node.parent and node.text[-1] == EOS else 0.0
        going = [(i, node) for i, node in new if node.text[-1] != EOS]
        if kind == "problems" and going:
            said = self_judged(session.networks["model"], [asked[i][:-1] for i, _ in going], [n.text for _, n in going])
            worths = (said @ torch.arange(10.0, device=said.device) / 9).tolist()
        else:
            world = moves if kind == "countdown" else navigate
            states = [world.stands(asked[i][:-1], node.text) for i, node in going]
            going = [each for each, state in zip(going, states, strict=True) if state is not None]
            known = [state for state in states if state is not None]
            said = world.values(session, known) if known else torch.zeros(0, 3)
            worths = (said @ torch.tensor(WORTH, device=said.device)).tolist()
        for (i, node), worth in zip(going, worths, strict=True):
            node.reward = worth
            searches[i].spent += 1

    def advance(self, search: Search) -> None:
        """Which nodes are expanded next."""
        if self.technique == "tree":
            level = [child for node in search.frontier for child in node.children]
            best = sorted(level + search.ends, key=lambda node: -node.reward)[:BEAMS]
            search.ends = [node for node in best if node.ended]
            search.frontier = [node for node in best if not node.ended]
            return
        node = max(search.frontier[0].children, key=lambda child: child.reward)
        while node.ended or node.children:
            if node.ended:
                search.ends.append(node)
                search.tried += 1
                backed_up(node)
                node = search.root
                if search.tried == ITERATIONS:
                    search.frontier = []
                    return
            else:
                node = max(node.children, key=Node.bound)
        search.frontier = [node]

    def answers(
        self, session: Session, asked: Sequence[list[int]], searches: Sequence[Search], rung: int
    ) -> list[list[int]]:
        """The best end of each search; where none has one, the best text that it has is written to its end."""
        best = []
        for search in searches:
            worth = mean_reward if self.technique == "rap" else (lambda node: node.reward)
            best.append(max(search.ends or search.frontier, key=worth).text)
        chains = Chains(session.networks["model"], [[*prompt, *text] for prompt, text in zip(asked, best, strict=True)])
        chains.write(limit=[max(0, min(CHAIN, rung - search.spent)) for search in searches])
        return [chains.texts[i][len(prompt) :] or [EOS] for i, prompt in enumerate(asked)]


def mean_reward(node: Node) -> float:
    """Mean reward on the path to a node."""
    path = node.path()
    return sum(each.reward for each in path) / max(1, len(path))


def backed_up(end: Node) -> None:
    """One path more for all nodes on it, each of which is worth the mean of the rewards from it to the end, or more."""
    total, count = 0.0, 0
    for node in reversed(end.path()):
        total, count = total + node.reward, count + 1
        node.visits, node.best = node.visits + 1, max(node.best, total / count)
        root = node.parent
    assert root is not None
    root.visits += 1
