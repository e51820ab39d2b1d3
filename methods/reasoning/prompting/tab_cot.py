"""Tab-CoT: the chain of thought is a table, row by row, and the answer is asked for behind it (Jin and Lu, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import answer_of, left, plurality, prompts

ANS = encode("ans")[0]
ANSWER = 4  # tokens that are kept for the answer
MOST, ROOM = 300, 100  # most tokens of a text, and of one of several that vote


class TabCoT(Method):
    """Tab-CoT: a table of steps in the place of sentences, then a second call for the answer.

    The header `|step|subquestion|process|result|` makes the model write a row for each step: a cell goes by the row above
    and by the cells to its left. Here the format <table> has that header's place: the rows are number, kind of step, process
    and result. Two calls, at the likeliest token each:

        1. the table is written, up to where it ends, an answer begins, or all but `ANSWER` tokens of the rung are spent;
        2. behind it stands "ans" (the paper: "Therefore, the answer is"), and the model gives the answer.

    So a table that was cut gives an answer too. `tab_cot_prose` does the same with the steps in sentences, the paper's
    zero-shot chain of thought. `tab_cot_vote` and `tab_cot_prose_vote` sample texts at temperature 0.7 while `ROOM` tokens
    are left for each question and take the answer of most. Alone, a text that has ended leaves the rest of the rung.

    Differs from the paper: the model was trained to write tables. The paper's self-consistency asks once with each of six
    headers; here one header is sampled often, as its baseline does. Few-shot prompts are left out.

    What limits it here: the second cell names the verb of the sentence that asks for the step, it is no question.
    """

    paper = Paper(
        id="tab_cot",
        title="Tab-CoT: Zero-shot Tabular Chain of Thought",
        authors="Ziqi Jin, Wei Lu",
        year=2023,
        arxiv="2305.17812",
        code="Xalp/Tab-CoT",
    )
    tasks = ("solve/problems",)
    baselines = ("tab_cot_prose", "direct_answer", "chain_of_thought", "self_consistency")
    claims = (
        Claim(
            "accuracy[tab_cot,128..512] >= accuracy[tab_cot_prose,128..512] - 0.02 "
            "and accuracy[tab_cot,128..512] > accuracy[direct_answer,128..512]",
            says="answers from tables are as right as those from sentences or more so, and more than those without steps",
            headline=True,
            setting="the model was trained in both formats, each in 12 % of the examples; the paper prompts models that were "
            "trained in neither",
        ),
        Claim(
            "nfe[tab_cot,*] <= nfe[tab_cot_prose,*] and nfe[tab_cot,128..512] < 0.9 * nfe[tab_cot_prose,128..512] "
            "and accuracy[tab_cot,*] >= accuracy[tab_cot_prose,*] - 0.02",
            says="with fewer tokens, also where texts are cut",
        ),
        Claim(
            "accuracy[tab_cot_vote,256..512] > accuracy[tab_cot,256..512] "
            "and accuracy[tab_cot_vote,256..512] >= accuracy[tab_cot_prose_vote,256..512] - 0.02",
            says="a vote of tables is better than one table, and as good as a vote of sentences with as many tokens",
        ),
        Claim(
            "accuracy[tab_cot_vote,256..512] >= accuracy[self_consistency,256..512]",
            says="and as a vote of bare clauses",
            setting="the model was trained on half as many chains of bare clauses again (18 % of the examples)",
        ),
    )

    form, vote = "<table>", False
    variants = (
        Variant("tab_cot_prose", says="the steps in sentences", form="<prose>"),
        Variant("tab_cot_vote", says="several tables, the answer of most", vote=True),
        Variant("tab_cot_prose_vote", says="several texts of sentences, the answer of most", form="<prose>", vote=True),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """A table and its answer for each question."""
        asked = prompts(batch, self.form)
        first = Chains(session.networks["model"], asked)
        if not self.vote:
            return self.solved(session, batch, first, MOST, 0.0)
        first.read()  # the prompts are read once for all texts
        found: list[list[list[int]]] = [[] for _ in asked]
        while not found[0] or left(session, batch) >= ROOM:
            chains = first.take(range(len(asked)))
            for texts, text in zip(found, self.solved(session, batch, chains, ROOM, 0.7), strict=True):
                texts.append(text)
        return [texts[plurality([answer_of(text) for text in texts])] for texts in found]

    @staticmethod
    def solved(
        session: Session, batch: Mapping[str, Any], chains: Chains, most: int, temperature: float
    ) -> list[list[int]]:
        """What is written behind each prompt: the steps, then the answer, at most `most` tokens."""
        room = min(most, left(session, batch)) - ANSWER
        chains.write(stop=(ANS,), limit=max(0, room), temperature=temperature, generator=session.rng)
        for i in range(len(chains)):
            if chains.ended(i):
                chains.cut(i, len(chains.texts[i]) - 1)
            if chains.texts[i][-1] != ANS:
                chains.put(i, [ANS])
        chains.write(limit=min(ANSWER, left(session, batch)), temperature=temperature, generator=session.rng)
        return [chains.written(i) for i in range(len(chains))]
