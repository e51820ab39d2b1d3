"""Self-verification: an answer is worth as many numbers of the question as can be told from it (Weng et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import DIGITS, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.oracles import right
from stepmark.tracks.reasoning.sharing import share
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, left, plurality, prompts, write_chains

CANDIDATES, TIMES = 5, 10  # K chains forward, P texts backward for each number that is masked
FORWARD, BACKWARD = 0.7, 0.2  # temperatures
ANS, FIND, X = (encode(word)[0] for word in ("ans", "<find>", "X"))


def told(text: Sequence[int]) -> list[int] | None:
    """The number, digit by digit, that a text that has ended gives as its answer."""
    digits = encode(answer_of(text) or "")
    return digits if digits and all(token in DIGITS for token in digits) else None


def places(question: Sequence[int]) -> list[slice]:
    """Where the numbers of a question stand, in their order."""
    digit = [False, *(token in DIGITS for token in question), False]
    edges = [k for k in range(len(question) + 1) if digit[k] != digit[k + 1]]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def backward(question: Sequence[int], place: slice, answer: Sequence[int]) -> list[int]:
    """The prompt that hides a number, tells an answer and asks for the number."""
    return [*question[: place.start], X, *question[place.stop :], ANS, *answer, FIND]


class SelfVerification(Method):
    """Self-verification: K chains give candidates, and each is tried by asking for what the question had told.

    Forward, K chains of thought are sampled. Their distinct answers are the candidates; where there is one only, it is
    given. Backward (condition mask verification), each number of the question in turn is replaced by X, the candidate is
    told as if it were known, and the model is asked for X, P times. A candidate scores one for each text that finds the
    number that stood there, summed over all numbers; the greatest score wins, the earlier candidate where two are level.
    The chain that gave it is returned.

    The rung sets K and P. Chains are begun while less than half of it is spent, at most K = 5. What the batch has left goes
    to the questions with more than one candidate: one backward text for every number and candidate, then another, at most
    P = 10, until a text of `CHAIN` tokens has no room for each. At 32 and 64 tokens there is one chain, and nothing to
    verify; at 128 there are two at most.

    `self_verification_vote` lets the same K chains vote, `self_verification_likelihood` takes the chain of the greatest mean
    log-probability, `self_verification_coin` any candidate, `self_verification_exact` a right one where there is one, a
    bound: all four leave the other half of the rung. `self_consistency` spends all of it on chains.

    Differs from the paper: the question backwards is a format that the model was trained in, <find>, with the answer behind
    the question; the paper has the model turn question and answer into a statement and shows examples. All numbers are
    masked, as in the paper; its code stops at the third. The temperature forward is self-consistency's here, 0.7 (its
    code: 0.3), so that both have chains of one kind; backward it is the code's 0.2. True-false verification, of tasks
    without numbers, is left out.

    What limits it here: numbers that do not matter for the answer cannot be told from it. They are masked all the same, since
    nobody knows which they are, and score by chance.
    """

    paper = Paper(
        id="self_verification_cot",
        title="Large Language Models are Better Reasoners with Self-Verification",
        authors="Yixuan Weng, Minjun Zhu, Fei Xia, Bin Li, Shizhu He, Shengping Liu, Bin Sun, Kang Liu, Jun Zhao",
        year=2022,
        arxiv="2212.09561",
        code="WENGSYX/Self-Verification",
    )
    tasks = ("solve/problems",)
    baselines = ("chain_of_thought", "self_consistency", "self_verification_likelihood", "self_verification_coin")
    claims = (
        Claim(
            "accuracy[self_verification_cot,256..512] > accuracy[chain_of_thought,256..512]",
            says="more answers are right than with one chain (the paper: 65.1 for 60.8 % on GSM8K)",
            headline=True,
        ),
        Claim(
            "accuracy[self_verification_cot,256..512] > accuracy[self_consistency,256..512]",
            says="and than with a vote of as many chains as the same tokens buy",
        ),
        Claim(
            "accuracy[self_verification_cot,256..512] > accuracy[self_verification_coin,256..512] "
            "and accuracy[self_verification_cot,256..512] > accuracy[self_verification_likelihood,256..512] "
            "and accuracy[self_verification_cot,256..512] > accuracy[self_verification_vote,256..512]",
            says="verification chooses better among the candidates than a coin, their likelihood, or their votes",
        ),
    )

    choice = "backward"
    variants = (
        Variant("self_verification_coin", says="any of the candidates", choice="coin"),
        Variant("self_verification_likelihood", says="the chain of the greatest likelihood", choice="likelihood"),
        Variant("self_verification_vote", says="a vote of the same chains", choice="vote"),
        Variant("self_verification_exact", says="a right candidate where there is one: a bound", choice="exact"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The chain of the best candidate of each question."""
        asked = prompts(batch, "<cot>")
        texts: list[list[list[int]]] = [[] for _ in asked]
        likely: list[list[float]] = [[] for _ in asked]
        first = Chains(session.networks["model"], asked)
        first.read()
        while not texts[0] or (
            len(texts[0]) < CANDIDATES and left(session, batch) >= CHAIN and 2 * session.spent < session.limit
        ):
            chains = first.take(range(len(asked)))
            write_chains(session, chains, min(CHAIN, max(1, left(session, batch))), FORWARD)
            for i in range(len(asked)):
                own = chains.logprobs[i][chains.starts[i] :]
                texts[i].append(chains.written(i))
                likely[i].append(sum(own) / len(own))
        answers = [[told(text) for text in each] for each in texts]
        candidates = [[a for k, a in enumerate(each) if a is not None and a not in each[:k]] for each in answers]
        if self.choice == "vote":
            return [
                each[plurality([answer_of(text) if a else None for text, a in zip(each, said, strict=True)])]
                for each, said in zip(texts, answers, strict=True)
            ]
        if self.choice == "likelihood":
            best = [
                max(range(len(each)), key=lambda k: (said[k] is not None, each[k]))
                for each, said in zip(likely, answers, strict=True)
            ]
            return [each[k] for each, k in zip(texts, best, strict=True)]
        pairs = [(i, k) for i, each in enumerate(candidates) if len(each) > 1 for k in range(len(each))]
        if self.choice == "coin":
            score = torch.rand(len(pairs), generator=session.rng, device=session.device).tolist()
        elif self.choice == "exact":
            said_so = [texts[i][answers[i].index(candidates[i][k])] for i, k in pairs]
            score = [right(batch["question"][i], text) for (i, _), text in zip(pairs, said_so, strict=True)]
        else:
            questions = [batch["question"][i] for i, _ in pairs]
            score = self.verified(session, questions, [candidates[i][k] for i, k in pairs])
        worth = dict(zip(pairs, score, strict=True))
        chosen = []
        for i, each in enumerate(candidates):
            best_one = max(range(len(each)), key=lambda k: worth.get((i, k), 0), default=None)
            chosen.append(texts[i][0 if best_one is None else answers[i].index(each[best_one])])
        return chosen

    @staticmethod
    def verified(session: Session, questions: Sequence[list[int]], answers: Sequence[list[int]]) -> list[int]:
        """How often the numbers of each question were found again from the answer told with it."""
        hidden = [places(question) for question in questions]
        scores = [0] * len(questions)
        asked: dict[int, Chains] = {}  # by number: each prompt is read once for all of its texts
        for number in [*range(max(map(len, hidden), default=0))] * TIMES:
            mine = [k for k, found in enumerate(hidden) if number < len(found)]
            if share(session, len(mine)) < CHAIN:
                break
            if number not in asked:
                texts = [backward(questions[k], hidden[k][number], answers[k]) for k in mine]
                asked[number] = Chains(session.networks["model"], texts)
                asked[number].read()
            chains = asked[number].take(range(len(mine)))
            write_chains(session, chains, CHAIN, BACKWARD)
            for row, k in enumerate(mine):
                scores[k] += told(chains.written(row)) == questions[k][hidden[k][number]]
        return scores
