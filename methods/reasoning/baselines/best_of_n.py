"""Best of n: many sampled chains, and the one that a verifier likes best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.oracles import right
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, judged, left, plurality, prompts, write_chains


class BestOfN(Method):
    """The chains of `self_consistency`, as many within a rung, and of them the one that the outcome verifier likes best
    (Cobbe et al. 2021).

    `weighted_vote` sums its judgements by answer. `likeliest_of_n` asks no verifier and takes the chain of the greatest mean
    log-probability. Controls: `random_of_n` takes any of them, so that one is written, and `oracle_of_n` takes a right one
    where there is one, the bound of all that choose among whole chains.
    """

    tasks = ("solve/problems", "solve/judged")
    temperature, choice = 0.7, "verifier"
    variants = (
        Variant("weighted_vote", says="a vote weighted by the outcome verifier", choice="weighted"),
        Variant("likeliest_of_n", says="the chain of the greatest mean log-probability", choice="likelihood"),
        Variant("random_of_n", says="any of the chains", choice="any"),
        Variant("oracle_of_n", says="a right chain, where there is one: a bound", choice="oracle"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, chosen among all that were written."""
        asked = prompts(batch, "<cot>")
        first = Chains(session.networks["model"], asked)
        first.read()  # the prompts are read once for all chains
        found: list[list[list[int]]] = [[] for _ in asked]
        likely: list[list[float]] = [[] for _ in asked]
        while not found[0] or (self.choice != "any" and left(session, batch) >= CHAIN):
            chains = first.take(range(len(asked)))
            write_chains(session, chains, min(CHAIN, left(session, batch) + 1), self.temperature)
            for i, texts in enumerate(found):
                texts.append(chains.written(i))
                likely[i].append(sum(chains.logprobs[i][chains.starts[i] :]) / max(1, len(texts[-1])))
        return [
            texts[self.chosen(session, question, prompt, texts, mean)]
            for question, prompt, texts, mean in zip(batch["question"], asked, found, likely, strict=True)
        ]

    def chosen(
        self,
        session: Session,
        question: Sequence[int],
        prompt: Sequence[int],
        texts: Sequence[Sequence[int]],
        likely: Sequence[float],
    ) -> int:
        """Number of the text that is returned; one with an answer where there is one."""
        if self.choice == "any":
            return 0
        answers, worth = [answer_of(text) for text in texts], list(likely)
        if self.choice == "oracle":
            worth = [float(right(question, text)) for text in texts]
        elif self.choice != "likelihood":
            worth = judged(session.networks["outcome"], [[*prompt, *text] for text in texts])
        if self.choice == "weighted":
            return plurality(answers, worth)
        return max(range(len(texts)), key=lambda k: (answers[k] is not None, worth[k]))
