"""Tree of Thoughts: breadth-first search over moves that the model proposes and values itself (Yao et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, WORDS, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning import moves, navigate
from stepmark.tracks.reasoning.moves import longest, solves, true_word

WORLDS = {"numbers": moves, "places": navigate}
State = Any  # of a world; its length is the number of moves that may follow, and one
VALUE = {"impossible": 0.001, "likely": 1.0, "sure": 20.0}  # of a state by the word that the model says
BY_TOKEN = {WORDS.index(word): value for word, value in VALUE.items()}
SAMPLES = 3  # words asked for on a state
TEMPERATURE = 0.7


@dataclass
class Tree:
    """The search of one question: thoughts kept (text, state), what states are worth, rows spent."""

    target: Any
    width: int
    kept: list[tuple[list[int], State]]
    worth: dict[State, float] = field(default_factory=dict)
    spent: int = 0
    stuck: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers are left in each of the states kept; of places, how many moves, and one."""
        return len(self.kept[0][1])

    @property
    def going(self) -> bool:
        """Whether there is something left to propose."""
        return not self.stuck and self.numbers > 1


class TreeOfThoughts(Method):
    """Tree of Thoughts (ToT): a thought is a move; moves are proposed, the states behind them valued, and the b best kept.

    Breadth-first search (algorithm 1) over as many levels as there are moves to make. From each of the b states kept, k moves
    are sampled in the format <propose>. Each new state is valued by SAMPLES = 3 words in the format <value>:

        V(s) = sum over the words of 20 for "sure", 1 for "likely", 0.001 for "impossible"

    Of all moves of a level the b of the greatest V are kept; on the last level the first of them is the answer. A move that
    was proposed twice counts once, and a state is asked about once, as in the official code. Nothing is checked: a state is
    what the model says is left.

    The rung sets b and k. b is the greatest number up to 5 for which a search with k = b fits, were every move of the
    greatest length: with four numbers 1 at 64, 2 at 256, 3 at 512, 5 at 1024. k is at each level what the rest of the rung has
    room for, at most eight for each pair of numbers. Where not even one path fits a chain of thought is written.

    Differs from the paper: its prompt lists several proposals in one answer, here they are samples, as its other generator
    draws them; a text of this model cannot list and a list would not be shorter. Texts that are no move are dropped. A value
    that cannot change the choice is not asked for. Both formats were trained: moves at random from those allowed, words by
    the share of moves that lead on; the paper prompts GPT-4, temperature .7 here as there. The answer is the moves; no
    expression is made of them. The official script counts b answers, by their mean and by whether any is right; here the
    best one counts, and any of them in `tree_of_thoughts_any`, whose final choice is an exact check, which can be made from
    the question alone.

    Its controls: `tree_of_thoughts_narrow` is b = 1, `tree_of_thoughts_coin` has random values, `tree_of_thoughts_exact` has
    values from an exact search of the state, a bound. No vote can be taken here, as there is no single answer. In its place
    stand chains of thought sampled until one solves or the rung is spent, by its own word (`trusted_chains`), which is what
    the method has too, or by the exact check (`checked_chains`), which `tree_of_thoughts_any` has too.

    `tree_of_walks` is the same search over moves from place to place (task navigate), `tree_of_walks_coin` its control. Up to
    six moves follow each other, of four tokens each; a level on which a move is said to reach the goal is the last, and the
    first such move the best of it. No place is entered twice: the prompt leaves out the edges at those that were left.

    What limits it here: a chain of thought in this track was trained on solutions, a proposal on any move that is allowed, so
    that a chain chooses its moves and a proposal does not; all that a tree knows of the way comes from the values.
    """

    paper = Paper(
        id="tree_of_thoughts",
        title="Tree of Thoughts: Deliberate Problem Solving with Large Language Models",
        authors="Shunyu Yao, Dian Yu, Jeffrey Zhao, Izhak Shafran, Thomas L. Griffiths, Yuan Cao, Karthik Narasimhan",
        year=2023,
        arxiv="2305.10601",
        code="princeton-nlp/tree-of-thought-llm",
    )
    tasks = ("solve/game24", "solve/countdown")
    baselines = (
        "chain_of_thought",
        "trusted_chains",
        "checked_chains",
        "tree_of_thoughts_narrow",
        "tree_of_thoughts_coin",
    )
    claims = (
        Claim(
            "accuracy[tree_of_thoughts,256..1024] > accuracy[chain_of_thought,256..1024] "
            "and accuracy[tree_of_thoughts,256..1024] > accuracy[trusted_chains,256..1024]",
            says="the Game of 24 is solved more often than by a chain of thought (the paper: 74 against 4 in a hundred), and "
            "than by as many tokens of chains, without a check in either",
            headline=True,
            setting="the chain of thought was trained on solutions of this game, where the paper's is a general model's",
        ),
        Claim(
            "accuracy[tree_of_thoughts_any,256..1024] > accuracy[checked_chains,256..1024]",
            says="with an exact check on both sides it solves more than chains sampled until one passes (the paper: 74 against "
            "49 in a hundred chains)",
            setting="the chains were trained on solutions of this game, where the paper's are a general model's",
        ),
        Claim(
            "accuracy[tree_of_thoughts,512..1024] > accuracy[tree_of_thoughts_narrow,512..1024]",
            says="keeping several states solves more than keeping one (the paper: 74 against 45 in a hundred)",
        ),
        Claim(
            "accuracy[tree_of_thoughts,256..1024] > accuracy[tree_of_thoughts_coin,256..1024]",
            says="it is the model's own values that choose",
        ),
        Claim(
            "accuracy[tree_of_thoughts,256..512] > accuracy[chain_of_thought,256..512] "
            "and accuracy[tree_of_thoughts,256..512] > accuracy[trusted_chains,256..512]",
            says="countdown with three and four numbers too",
            task="solve/countdown",
            setting="the chain of thought was trained on solutions of this game, where the paper's is a general model's",
        ),
    )
    widest, value, check, world = 5, "words", "none", "numbers"
    variants = (
        Variant("tree_of_thoughts_narrow", says="one state kept on each level", widest=1, tasks=("solve/game24",)),
        Variant("tree_of_thoughts_coin", says="states valued at random", value="coin", tasks=("solve/game24",)),
        Variant(
            "tree_of_thoughts_exact",
            says="states valued by an exact search: a bound",
            value="exact",
            tasks=("solve/game24",),
        ),
        Variant(
            "tree_of_thoughts_any",
            says="the one of the last texts that an exact check passes",
            check="exact",
            tasks=("solve/game24",),
        ),
        Variant(
            "tree_of_walks",
            says="the same over walks from place to place",
            world="places",
            tasks=("navigate/paths",),
            baselines=("chain_of_thought", "walk_vote", "tree_of_walks_coin"),
        ),
        Variant(
            "tree_of_walks_coin",
            says="walks, places valued at random",
            world="places",
            value="coin",
            tasks=("navigate/paths",),
            baselines=("chain_of_thought",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The moves of one path a question."""
        world, trees = WORLDS[self.world], []
        for question in batch["question"]:
            state, target = world.start(question)
            widths = (b for b in range(self.widest, 0, -1) if most(len(state), 1, b, b, world.longest) <= rung)
            trees.append(Tree(target, next(widths, 0), [([], state)]))
        while True:
            growing = [tree for tree in trees if tree.width and tree.going]
            if not growing:
                break
            self.grow(session, growing, rung)
        self.write_short(session, batch, trees, rung)
        return [self.answer(question, tree) for question, tree in zip(batch["question"], trees, strict=True)]

    def grow(self, session: Session, trees: list[Tree], rung: int) -> None:
        """One level of each tree."""
        states, times, world = [], [], WORLDS[self.world]
        for tree in trees:
            count, numbers, room = len(tree.kept), tree.numbers, rung - tree.spent
            counts = range(1, 4 * numbers * (numbers - 1) + 1)
            fits = [k for k in counts if most(numbers, count, tree.width, k, world.longest) <= room]
            states += [(state, tree.target) for _, state in tree.kept]
            times += [max(fits, default=0)] * count
        found, rows = world.proposed(session, states, times, TEMPERATURE)
        levels: list[list[tuple[list[int], State]]] = []
        at = 0
        for tree in trees:
            level = []
            for text, _ in tree.kept:
                level += [([*text, *clause], state) for clause, state in found[at]]
                tree.spent += rows[at]
                at += 1
            ended = [thought for thought in level if self.world == "places" and navigate.arrived(thought[1])]
            levels.append(ended[:1] or level)
        self.weigh(session, trees, levels)
        for tree, level in zip(trees, levels, strict=True):
            tree.kept = sorted(level, key=lambda thought: -tree.worth.get(thought[1], 0.0))[: tree.width] or tree.kept
            tree.stuck = not level

    def weigh(self, session: Session, trees: list[Tree], levels: list[list[tuple[list[int], State]]]) -> None:
        """Value the new states of each tree, where there are more of them than are kept."""
        new: list[tuple[Tree, State]] = []
        for tree, level in zip(trees, levels, strict=True):
            final = bool(level) and len(level[0][1]) == 1
            if len(level) > (1 if final else tree.width):
                new += [
                    (tree, state) for state in dict.fromkeys(state for _, state in level) if state not in tree.worth
                ]
        if self.value == "coin":
            drawn = torch.rand(len(new), generator=session.rng, device=session.device).tolist()
            for (tree, state), worth in zip(new, drawn, strict=True):
                tree.worth[state] = worth
        elif self.value == "exact":
            for tree, state in new:
                tree.worth[state] = VALUE[true_word(state, tree.target)]
        elif new:
            said = WORLDS[self.world].words(
                session, [(state, tree.target) for tree, state in new], SAMPLES, TEMPERATURE
            )
            for (tree, state), tokens in zip(new, said, strict=True):
                tree.worth[state] = sum(BY_TOKEN.get(token, 0.0) for token in tokens)
                tree.spent += 1

    def answer(self, question: list[int], tree: Tree) -> list[int]:
        """The best text, or the one that the exact check passes."""
        texts = [text for text, _ in tree.kept]
        if self.check == "exact":
            texts.sort(key=lambda text: not solves(question, text))
        return texts[0] or [EOS]

    @staticmethod
    def write_short(session: Session, batch: Mapping[str, Any], trees: list[Tree], rung: int) -> None:
        """A chain of thought where the rung has no room for a path of proposals."""
        short = [i for i, tree in enumerate(trees) if not tree.width]
        chains = Chains(session.networks["model"], [[*batch["question"][i], *encode("<cot>")] for i in short])
        chains.write(limit=rung)
        for row, i in enumerate(short):
            trees[i].kept = [(chains.written(row), ())]


def most(numbers: int, kept: int, width: int, times: int, longest: Callable[[int], int] = longest) -> int:
    """Rows of a search at most, from `kept` states of so many numbers on: each state is read, `times` moves are written from
    it and the states behind them valued; then there are `width` states."""
    rows = 0
    for left in range(numbers, 1, -1):
        rows += kept * (1 + times * longest(left))
        kept = width
    return rows
