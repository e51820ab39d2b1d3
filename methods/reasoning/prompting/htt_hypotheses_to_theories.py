"""Hypotheses-to-Theories: rules that the model makes up are counted, those that lead to right answers kept (Zhu et al.,
2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import (
    MOST,
    Shown,
    greedy,
    kept,
    listed,
    owned,
    prompts,
    rules_of,
    stacked,
    together,
    true_rules,
    unstacked,
)
from stepmark.tracks.reasoning.solving import answer_of

FORM = "<rules>"  # steps that each say by which rule they go
SHOTS, TAUGHT = 5, 10  # examples in front of a question, and most that the model has met there
QUESTIONS, SAMPLES = 40, 2  # own questions of a person that are worked in induction, and texts of each
COVERAGE, CONFIDENCE = 2, 0.3  # least times that a rule has to be there, and least share of these with the right answer
Rule = tuple[str, str]


class HypothesesToTheories(Method):
    """Hypotheses-to-Theories (HtT): a library of rules, induced from answers alone.

    A rule is a sign with one of its readings; a text in the format <rules> says by which rule each step goes.

        1. Induction: behind 5 worked examples the model works 40 of the other own questions twice, at temperature 1.
           Every rule in a text counts once for each time that it is there: coverage is how often, confidence the share
           of these whose text has the right answer. What has coverage >= 2 and confidence >= 0.3 is the library.
        2. Deduction: the library stands in front, then the same 5 examples, then the question; the model names the sign
           and reads off its rule. One greedy text is written.

    A rule that is wrong can lead to a right answer by chance alone, about one time in nine. Induction is done in
    `prepare`, once for all variants; a question costs what it costs without a library. 80 texts of each person hold
    every sign some 16 times: counted for a reader that reads 85 in 100 of the signs that its examples tell, the library
    has the right reading of 94 signs in 100 (of 95 with all 59 questions), the most frequent reading is right for 89.
    Texts fit into 64 tokens, which is where the claims are.

    `htt_cot` is 5-shot chain of thought without a library, with the same examples. Its controls: `htt_frequent` has the
    most frequent rule of each sign, which needs no answers, and `htt_examples` spends the answers on further examples:
    own texts that have the right one, as many as make 10 with the 5. `htt_oracle` has the true rules in front, a bound.

    Differs from the paper: the tags by which rules are looked up are the signs, with which rules begin; there are
    twelve, so that one level of them is enough. The library is in their order. Of one sign's rules that pass the surest
    stands alone; the authors' prompt for arithmetic has one rule under a tag as well, whichever comes last. Coverage 2
    and confidence 0.3 are the commonest of their settings, which they tune by task. The paper learns what holds for all
    questions of a task, in 2 000 texts; here a library holds for one person's. Transfer of a library to another model
    is left out.

    What limits it here: rules name a reading which the model has been taught, the paper's say what is so. The 5
    examples already tell more than half of the signs.
    """

    paper = Paper(
        id="htt_hypotheses_to_theories",
        title="Large Language Models can Learn Rules",
        authors="Zhaocheng Zhu, Yuan Xue, Xinyun Chen, Denny Zhou, Jian Tang, Dale Schuurmans, Hanjun Dai",
        year=2023,
        arxiv="2310.07064",
        code="google-deepmind/llms_can_learn_rules",
    )
    tasks = ("shown/bare",)
    baselines = ("htt_cot", "few_shot_ruled", "chain_of_thought", "htt_frequent", "htt_examples", "htt_oracle")
    claims = (
        Claim(
            "accuracy[htt_hypotheses_to_theories,64] >= accuracy[htt_cot,64] + 0.1",
            says="ten points or more above chain of thought behind the same examples",
            headline=True,
        ),
        Claim(
            "accuracy[htt_hypotheses_to_theories,64] > accuracy[htt_frequent,64]",
            says="it is the filter by answers: the rules that are made up most often are worse",
        ),
        Claim(
            "accuracy[htt_hypotheses_to_theories,64] > accuracy[htt_examples,64] "
            "and accuracy[htt_hypotheses_to_theories,64] > accuracy[few_shot_ruled,64]",
            says="rules are a better use of the answers than examples, own or given",
        ),
        Claim(
            "accuracy[htt_hypotheses_to_theories,64] >= accuracy[htt_oracle,64] - 0.1",
            says="the library is nearly as good as the true rules",
        ),
    )
    shows = "library"
    trainings = 3
    variants = (
        Variant("htt_cot", says="the same examples, no library", shows="nothing"),
        Variant("htt_frequent", says="the most frequent rule of each sign, answers unseen", shows="frequent"),
        Variant("htt_examples", says="own texts with right answers as further examples", shows="examples"),
        Variant("htt_oracle", says="the true rules in front", shows="truth"),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person: a library, examples."""
        train, most = session.train, session.scale(QUESTIONS, 4)
        groups, before = divided(session, most), dict[str, list[int]]()
        shown = {name: together(examples(train, rows)) for name, (rows, _) in groups.items()}
        if self.shows == "nothing":
            return kept(shown)
        if self.shows == "truth":
            return kept({name: headed(true_rules(name), shown[name]) for name in groups})
        trials: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in groups}
        tried = session.once(induced, most)
        for row, text in zip(tried["row"].tolist(), unstacked(tried["text"]), strict=True):
            trials[train["name"][row]].append((row, text))
        for name, texts in trials.items():
            right = [answer_of(text) == train["answer"][row] for row, text in texts]
            if self.shows == "examples":
                own = {
                    row: Shown(train["question"][row], FORM, decode(t))
                    for (row, t), r in zip(texts, right, strict=True)
                    if r
                }
                before[name] = [*together(list(own.values())[: TAUGHT - SHOTS]), *shown[name]]
            else:
                told = [decode(text) for _, text in texts]
                before[name] = headed(self.library(list(zip(told, right, strict=True))), shown[name])
        return kept(before)

    def library(self, trials: Sequence[tuple[str, bool]]) -> list[Rule]:
        """Of each sign the surest rule that passes both thresholds, or the most frequent one, from texts of which it is
        known whether their answers are right."""
        count, right = Counter[Rule](), Counter[Rule]()
        for text, fine in trials:
            rules = rules_of(text)
            count.update(rules)
            right.update(rules if fine else [])
        worth = {rule: float(times) for rule, times in count.items()}
        if self.shows != "frequent":
            sure = {rule: right[rule] / times for rule, times in count.items() if times >= COVERAGE}
            worth = {rule: share for rule, share in sure.items() if share >= CONFIDENCE}
        best = {sign: max((rule for rule in worth if rule[0] == sign), key=worth.__getitem__) for sign, _ in worth}
        return [best[sign] for sign in sorted(best)]

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        return greedy(session, batch, prompts(session.state, batch, FORM))


def divided(session: Session, most: int) -> dict[str, tuple[list[int], list[int]]]:
    """By person, rows of the train split: those that are shown, and those that are worked, at most so many."""
    found = {}
    for name, own in owned(session.train, session.task).items():
        order = torch.randperm(len(own), generator=session.rng, device=session.device).tolist()
        rows = [own[k] for k in order]
        found[name] = rows[:SHOTS], rows[SHOTS : SHOTS + most]
    return found


def induced(session: Session, most: int) -> dict[str, Tensor]:
    """What the model writes of people's other questions behind their examples: {"row": int64 [N], numbers in the train
    split, "text": int64 [N, L], padded}. For `session.once`, whose random stream begins as that of `prepare`."""
    train, rows, texts = session.train, list[int](), list[list[int]]()
    for shown, rest in divided(session, most).values():
        first = Chains(session.networks["model"], [together(examples(train, shown))])
        chains = first.take([0] * (len(rest) * SAMPLES))  # the examples are read once for all texts
        for i, row in enumerate(rest * SAMPLES):
            chains.put(i, encode(f"{train['question'][row]} {FORM}"))
            chains.starts[i] = len(chains.texts[i])
        chains.write(limit=MOST, temperature=1.0, generator=session.rng)
        rows += rest * SAMPLES
        texts += [chains.written(i) for i in range(len(chains))]
    return {"row": torch.tensor(rows), "text": stacked(texts)}


def examples(train: Mapping[str, Any], rows: Sequence[int]) -> list[Shown]:
    """Right texts that say by which rule each step goes."""
    return [Shown(train["question"][row], FORM, train["ruled"][row]) for row in rows]


def headed(rules: Sequence[Rule], shown: Sequence[int]) -> list[int]:
    """Examples, with rules in front of them where there are any."""
    return [*(encode(f"{listed(rules)} |") if rules else []), *shown]
