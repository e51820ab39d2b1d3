"""Self-consistency: many sampled chains, and the answer that most of them give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.navigate import ends
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, judged, left, plurality, prompts, write_chains


class SelfConsistency(Method):
    """As many chains as the rung has room for at temperature .7, and the plurality of their answers (Wang et al. 2022).

    A chain more is begun for all questions of a batch while each may still have `chain` tokens; the first may be cut.
    `best_of_n` takes the chain that the outcome verifier likes best, `weighted_vote` sums its judgements by answer, and
    `random_of_n` takes any of them.
    """

    tasks = ("solve/problems", "solve/problems_deep")
    temperature, choice, form, chain = 0.7, "vote", "<cot>", CHAIN
    variants = (
        Variant("best_of_n", says="the chain that the outcome verifier likes best", choice="best"),
        Variant("weighted_vote", says="a vote weighted by the outcome verifier", choice="weighted"),
        Variant(
            "proof_vote",
            says="the same of proofs",
            form="<proof>",
            tasks=("deduce/chains", "deduce/dense", "deduce/deep"),
        ),
        Variant(
            "walk_vote",
            says="the same of walks: the one that most are, among those that say to arrive",
            choice="walk",
            chain=32,
            tasks=("navigate/paths", "navigate/deep"),
        ),
        Variant("random_of_n", says="any of the chains", choice="any"),
        Variant(
            "know_vote",
            says="the same of short chains of facts",
            chain=16,
            tasks=("know/hops", "know/years", "know/claims", "know/options"),
        ),
        Variant(
            "know_vote_long",
            says="the same of chains of more facts",
            chain=36,
            tasks=("know/could", "know/odd"),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, chosen among all that were written."""
        asked = prompts(batch, self.form)
        first = Chains(session.networks["model"], asked)
        first.read()  # the prompts are read once for all chains
        found: list[list[list[int]]] = [[] for _ in asked]
        while not found[0] or left(session, batch) >= self.chain:
            chains = first.take(range(len(asked)))
            write_chains(session, chains, min(self.chain, left(session, batch) + 1), self.temperature)
            for i, texts in enumerate(found):
                texts.append(chains.written(i))
        return [texts[self.chosen(session, prompt, texts)] for prompt, texts in zip(asked, found, strict=True)]

    def chosen(self, session: Session, prompt: list[int], texts: list[list[int]]) -> int:
        """Number of the text that is returned."""
        if self.choice == "any":
            return 0
        answers = [answer_of(text) for text in texts]
        if self.choice == "vote":
            return plurality(answers)
        if self.choice == "walk":  # a walk is its own answer
            return plurality([decode(text) if ends(prompt[:-1], text) else None for text in texts])
        worth = judged(session.networks["outcome"], [[*prompt, *text] for text in texts])
        if self.choice == "weighted":
            return plurality(answers, worth)
        return max(range(len(texts)), key=lambda k: (answers[k] is not None, worth[k]))
