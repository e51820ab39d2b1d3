"""Meta-Reasoner: a contextual bandit chooses how a chain of thought goes on (Sui, He, Cao et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, STOP, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.moves import State, behind, longest, proposed, solves, start, values, whole

CONTINUE, BACKTRACK, RESTART, EXPLORE = range(4)  # the strategies
TRIES, TEMPERATURE = 3, 0.7  # moves that EXPLORE compares; of all sampling
BONUS = 0.5  # c of the upper confidence bound
FEATURES = 9


class Bandit:
    """LinUCB with a model of its own for each strategy (Li et al. 2010, algorithm 1). `a` [K, D, D], `b` [K, D]."""

    def __init__(self, a: Tensor | None = None, b: Tensor | None = None) -> None:
        self.a = torch.eye(FEATURES, dtype=torch.double).repeat(4, 1, 1) if a is None else a.double().cpu().clone()
        self.b = torch.zeros(4, FEATURES, dtype=torch.double) if b is None else b.double().cpu().clone()

    def scores(self, x: Tensor) -> Tensor:
        """Upper confidence bounds [K] of the strategies in a context [D]."""
        inverse = torch.linalg.inv(self.a)
        theta = (inverse @ self.b[..., None])[..., 0]
        return theta @ x + BONUS * (x @ inverse @ x).clamp(min=0).sqrt()

    def update(self, x: Tensor, strategy: int, reward: float) -> None:
        """Learn that a strategy earned a reward in a context."""
        self.a[strategy] += torch.outer(x, x)
        self.b[strategy] += reward * x


@dataclass
class Game:
    """The chain of one question: its states from the start on, where each stands in the text, what the model said of each
    (impossible, likely, sure), rows spent, rounds played."""

    target: int
    states: list[State]
    ends: list[int]
    said: list[list[float]]
    spent: int = 0
    rounds: int = 0
    open: bool = True

    @property
    def numbers(self) -> int:
        """How many numbers are left."""
        return len(self.states[-1])

    def back(self, moves: int) -> None:
        """Forget all moves but the first so many."""
        del self.states[moves + 1 :], self.ends[moves + 1 :], self.said[moves + 1 :]

    def report(self) -> Tensor:
        """The progress report as a vector [D]: 1, what the model says of the state, how many numbers are left, rounds."""
        left = [float(self.numbers == n) for n in range(1, 5)]
        return torch.tensor([1.0, *self.said[-1], *left, self.rounds / 10], dtype=torch.double)

    def progress(self) -> float:
        """The reward: what the model gives the state, by the share of the moves that are made."""
        _, likely, sure = self.said[-1]
        return (sure + likely / 2) * (len(self.states) - 1) / (len(self.states[0]) - 1)

    def offers(self, rung: int) -> list[int]:
        """Strategies that mean something here and leave enough of the rung to write the chain to its end."""
        moves, given = len(self.states) - 1, len(self.states[0])
        room = rung - self.spent
        need = {
            CONTINUE: (self.numbers > 1, longest(self.numbers) + 1 + whole(self.numbers - 1)),
            BACKTRACK: (moves > 0, longest(self.numbers + 1) + 1 + whole(self.numbers)),
            RESTART: (moves > 1, longest(given) + 1 + whole(given - 1)),
            EXPLORE: (self.numbers > 1, 1 + TRIES * longest(self.numbers) + whole(self.numbers - 1)),
        }
        return [strategy for strategy, (possible, rows) in need.items() if possible and rows <= room]


class MetaReasoner(Method):
    """Meta-Reasoner: after each round of reasoning a bandit reads a short report and says how to go on.

    A round adds one move to the chain. Then the progress report is made and turned into a vector x, and of
    the strategies that are offered the one is taken of the greatest

        theta_a^T x + c sqrt(x^T A_a^-1 x),   theta_a = A_a^-1 b_a

    with A_a = I + sum of x x^T and b_a = sum of r x over the rounds in which a was chosen (LinUCB). The strategies: continue
    the chain; backtrack, taking the last move back; restart from scratch; explore, where three moves are proposed in the
    format <propose> and the one is made behind which the state is worth most. The first round always continues. The report
    is the state that is left, as the model judges it: probabilities of the words of the format <value> (a row), how many
    numbers are left, and the count of rounds. The reward r is sure + likely / 2 of the new state times the share of moves
    that are made, 1 where the target alone is left by the model's own word; there the search stops.

    A and b are learned in `prepare`, in games on the train split, and go on learning from the rewards of a batch in `run`,
    each batch from the same beginning. Rewards are the model's own words: no check is used.

    The rung sets how many rounds there are. A strategy is offered if a whole chain can be written behind it; where none is,
    the chain is written to its end. Where there is no room for one report (32, and four numbers), that is a chain of thought.

    Differs from the paper: no code was found; the algorithm is the catalogue's row and LinUCB's. The strategies are the
    fixed ones that this model can be given without reading instructions; it cannot propose new ones. The report is no text:
    a state says all there is. An LLM judge's points become words on states. The paper's bandit meets one question after the
    other; here questions are played side by side, so that it is taught before. c = 0.5.

    Its controls: `random_strategy` takes any strategy that is offered. `meta_reasoner_checked` holds the exact check, which can
    be made from the question alone: it stops only at a right solution, as `checked_chains`, and is told where a text claims a
    wrong one; so do `random_strategy_checked` and `meta_reasoner_blind`, which does without the report (x = 1).
    `trusted_chains` are chains begun anew until one says that it solved, in as many tokens.

    What limits it here: a chain has two or three moves, so that a restart is nearly as cheap as a step back.
    """

    paper = Paper(
        id="meta_reasoner",
        title="Meta-Reasoner: Dynamic Guidance for Optimized Inference-time Reasoning in Large Language Models",
        authors="Yuan Sui, Yufei He, Tri Cao, Simeng Han, Yulin Chen, Bryan Hooi",
        year=2025,
        arxiv="2502.19918",
    )
    tasks = ("solve/game24", "solve/countdown")
    baselines = (
        "chain_of_thought",
        "tree_of_thoughts",
        "trusted_chains",
        "random_strategy",
    )
    trainings = 3
    claims = (
        Claim(
            "accuracy[meta_reasoner,256..1024] > accuracy[tree_of_thoughts,256..1024] "
            "and accuracy[meta_reasoner,256..1024] > accuracy[chain_of_thought,256..1024] "
            "and nfe[meta_reasoner,256..1024] <= 0.72 * nfe[tree_of_thoughts,256..1024]",
            says="more is solved than by Tree of Thoughts and by a chain of thought within the same budget, with 28 % fewer "
            "tokens than the tree (the paper: 9 to 12 points more, in 28 to 35 % less time)",
            headline=True,
        ),
        Claim(
            "accuracy[meta_reasoner,256..1024] > accuracy[trusted_chains,256..1024] "
            "and accuracy[meta_reasoner_checked,256..1024] > accuracy[checked_chains,256..1024]",
            says="more than by chains that are begun anew, within as many tokens: without a check on either side, and with it",
        ),
        Claim(
            "accuracy[meta_reasoner,256..1024] > accuracy[random_strategy,256..1024] "
            "and accuracy[meta_reasoner_checked,256..1024] > accuracy[random_strategy_checked,256..1024]",
            says="it matters which strategy is chosen",
        ),
        Claim(
            "accuracy[meta_reasoner_checked,256..1024] > accuracy[meta_reasoner_blind,256..1024]",
            says="and the report is what tells, with an exact check on both sides",
        ),
        Claim(
            "accuracy[meta_reasoner,256..512] > accuracy[tree_of_thoughts,256..512] "
            "and accuracy[meta_reasoner,256..512] > accuracy[trusted_chains,256..512] "
            "and nfe[meta_reasoner,256..512] <= 0.72 * nfe[tree_of_thoughts,256..512]",
            says="countdown with three and four numbers too",
            task="solve/countdown",
        ),
    )
    choice, sees, check = "bandit", True, False
    variants = (
        Variant("random_strategy", says="any strategy that is offered", choice="any", tasks=("solve/game24",)),
        Variant(
            "random_strategy_checked",
            says="the same with the exact check at the end",
            choice="any",
            check=True,
            tasks=("solve/game24",),
        ),
        Variant(
            "meta_reasoner_checked",
            says="stops only at what an exact check passes",
            check=True,
            tasks=("solve/game24",),
        ),
        Variant(
            "meta_reasoner_blind",
            says="a bandit that sees no report, with the exact check",
            sees=False,
            check=True,
            tasks=("solve/game24",),
        ),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor] | None:
        """{"a": [K, D, D], "b": [K, D]} after games on the train split."""
        if self.choice == "any":
            return None
        return session.once(after_games, session.scale(240, 2), session.scale(512, 96), self.sees)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The moves of one chain a question."""
        bandit = Bandit(session.state.get("a"), session.state.get("b")) if self.choice == "bandit" else None
        return play(session, batch["question"], rung, bandit, self.sees, self.check)


def after_games(session: Session, count: int, rung: int, sees: bool) -> dict[str, Tensor]:
    """A bandit after games on the first questions of the train split, 40 side by side."""
    questions, bandit = [encode(question) for question in session.train["question"][:count]], Bandit()
    with torch.no_grad():
        for first in session.progress(range(0, len(questions), 40), "games"):
            play(session, questions[first : first + 40], rung, bandit, sees, False)
    return {"a": bandit.a, "b": bandit.b}


def play(
    session: Session, questions: Sequence[list[int]], rung: int, bandit: Bandit | None, sees: bool, check: bool
) -> list[list[int]]:
    """The chains of all questions at their ends, at most `rung` rows each. `bandit`: None takes any strategy; it learns from
    every round of all games, when all have played it."""
    chains = Chains(session.networks["model"], [[*question, *encode("<cot>")] for question in questions])
    games = []
    for i, (state, target) in enumerate(map(start, questions)):
        games.append(Game(target, [state], [chains.starts[i]], [[0.0] * 3]))
    while True:
        turns: dict[int, tuple[int, Tensor]] = {}
        for i, game in enumerate(games):
            offered = game.offers(rung) if game.open else []
            if not offered:
                game.open = False
                continue
            x = game.report() if sees else torch.eye(FEATURES, dtype=torch.double)[0]
            turns[i] = choose(session, bandit, x, offered, first=game.rounds == 0), x
        if not turns:
            break
        moved = go_on(session, chains, games, {i: strategy for i, (strategy, _) in turns.items()})
        for i, (strategy, x) in turns.items():
            game = games[i]
            if moved[i] and game.states[-1] == (game.target,):
                game.open = check and not solves(questions[i], chains.written(i))
                if game.open:
                    game.said[-1] = [1.0, 0.0, 0.0]  # here the check knows better than the text
            if bandit is not None and game.rounds > 0:
                bandit.update(x, strategy, game.progress() if moved[i] else 0.0)
            game.rounds += 1
    rest = [i for i, game in enumerate(games) if game.numbers > 1]
    limits = [max(0, min(whole(games[i].numbers) + 1, rung - games[i].spent)) for i in rest]
    chains.write(rest, limit=limits, temperature=TEMPERATURE, generator=session.rng)
    return [chains.written(i) or [EOS] for i in range(len(chains))]


def choose(session: Session, bandit: Bandit | None, x: Tensor, offered: list[int], first: bool) -> int:
    """The first round continues; later the bandit chooses among what is offered, or chance does."""
    if first:
        return offered[0]
    if bandit is None:
        return offered[int(torch.randint(len(offered), (), generator=session.rng, device=session.device))]
    scores = bandit.scores(x)
    return max(offered, key=lambda strategy: float(scores[strategy]))


def go_on(session: Session, chains: Chains, games: list[Game], turns: Mapping[int, int]) -> dict[int, bool]:
    """One round of the games that have a turn: whether each has a move more than the strategy left it."""
    for i, strategy in turns.items():
        game = games[i]
        if strategy in (BACKTRACK, RESTART):
            game.back(len(game.states) - 2 if strategy == BACKTRACK else 0)
            chains.cut(i, game.ends[-1])
    writing = [i for i, strategy in turns.items() if strategy != EXPLORE]
    limits = [longest(games[i].numbers) for i in writing]
    written = chains.write(writing, stop=(STOP,), limit=limits, temperature=TEMPERATURE, generator=session.rng)
    moves: dict[int, list[tuple[list[int], State]]] = {}
    for i, clause in zip(writing, written, strict=True):
        games[i].spent += len(clause)
        state = behind(clause, games[i].numbers)
        moves[i] = [] if state is None else [(clause, state)]
        if state is None:  # no move: what was written is forgotten
            chains.cut(i, games[i].ends[-1])
    exploring = [i for i, strategy in turns.items() if strategy == EXPLORE]
    asked = [(games[i].states[-1], games[i].target) for i in exploring]
    if exploring:
        found, rows = proposed(session, asked, [TRIES] * len(exploring), TEMPERATURE)
        for i, each, spent in zip(exploring, found, rows, strict=True):
            moves[i] = each
            games[i].spent += spent
    said = judge(session, games, moves)
    for i, each in moves.items():
        if each:
            clause, state = max(each, key=lambda move: said[i, move[1]][2] + said[i, move[1]][1] / 2)
            if turns[i] == EXPLORE:
                chains.put(i, clause)
            games[i].states.append(state)
            games[i].ends.append(len(chains.texts[i]))
            games[i].said.append(said[i, state])
    return {i: bool(each) for i, each in moves.items()}


def judge(
    session: Session, games: list[Game], moves: Mapping[int, list[tuple[list[int], State]]]
) -> dict[tuple[int, State], list[float]]:
    """What the model says of the states behind moves, by game: a row each, but for a single number, which speaks for itself."""
    found: dict[tuple[int, State], list[float]] = {}
    new = []
    for i, each in moves.items():
        for state in dict.fromkeys(state for _, state in each):
            found[i, state] = [0.0, 0.0, 1.0] if state == (games[i].target,) else [1.0, 0.0, 0.0]
            if len(state) > 1:
                new.append((i, state))
                games[i].spent += 1
    if new:
        said = values(session, [(state, games[i].target) for i, state in new]).tolist()
        found |= dict(zip(new, said, strict=True))
    return found
