"""Hypotheses-to-Theories: rules that the model makes up are counted, those that lead to right answers kept (Zhu et al., 2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
    together,
    true_rules,
    written,
)
from stepmark.tracks.reasoning.solving import answer_of

FORM = "<rules>"  # steps that each say by which rule they go
SHOTS, TAUGHT = 5, 10  # examples in front of a question, and most that the model has met there
SAMPLES, COVERAGE = 3, 2  # texts of each question, and least times that a rule has to be there
Rule = tuple[str, str]


class HypothesesToTheories(Method):
    """Hypotheses-to-Theories (HtT): a library of rules, induced from answers alone.

    A rule is a sign with one of its readings; a text in the format <rules> says by which rule each step goes.

        1. Induction: behind 5 worked examples the model works each of the other own questions three times, at temperature 1.
           Every rule in a text counts once for each time that it is there: coverage is how often, confidence the share of
           these whose text has the right answer. What has coverage >= 2 and confidence >= 0.3 is the library.
        2. Deduction: the library stands in front, then the same 5 examples, then the question; the model names the sign and
           reads off its rule. One greedy text is written.

    A rule that is wrong can lead to a right answer by chance alone, about one time in nine. Induction is done in `prepare`; a
    question costs what it costs without a library. Texts fit into 64 tokens, and claims are over the rungs from there on.

    `htt_cot` is 5-shot chain of thought without a library, with the same examples. Its controls: `htt_all` keeps rules of any
    confidence, `htt_frequent` the most frequent rule of each sign and no other, which needs no answers, and `htt_examples`
    spends the answers on further examples: own texts that have the right one, as many as make 10 with the 5. `htt_oracle` has
    the true rules in front, a bound.

    Differs from the paper: the tags by which rules are looked up are the signs, with which rules begin; there are twelve, so
    that one level of them is enough. The library is in the order of the signs, of one sign's rules the surer first. Coverage
    2 and confidence 0.3 are the commonest of the authors' settings, which they tune by task. The paper learns what holds for
    all questions of a task, here a library holds for one person's. Transfer of a library to another model is left out.

    What limits it here: rules name a reading which the model has been taught, the paper's say what is so. The 5 examples
    already tell some of the signs.
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
    baselines = ("htt_cot", "few_shot_ruled", "zero_shot_chain", "htt_all", "htt_examples", "htt_oracle")
    claims = (
        Claim(
            "accuracy[htt_hypotheses_to_theories,64..512] >= accuracy[htt_cot,64..512] + 0.1",
            says="ten points or more above chain of thought behind the same examples",
            headline=True,
        ),
        Claim(
            "accuracy[htt_hypotheses_to_theories,64..512] > accuracy[htt_all,64..512] "
            "and accuracy[htt_hypotheses_to_theories,64..512] > accuracy[htt_frequent,64..512]",
            says="it is the filter by answers: rules of any confidence are worse, and so are those made up most often",
        ),
        Claim(
            "accuracy[htt_hypotheses_to_theories,64..512] > accuracy[htt_examples,64..512] "
            "and accuracy[htt_hypotheses_to_theories,64..512] > accuracy[few_shot_ruled,64..512]",
            says="rules are a better use of the answers than examples, own or given",
        ),
        Claim(
            "accuracy[htt_hypotheses_to_theories,64..512] >= accuracy[htt_oracle,64..512] - 0.1",
            says="the library is nearly as good as the true rules",
        ),
    )
    confidence, shows = 0.3, "library"
    trainings = 3
    variants = (
        Variant("htt_cot", says="the same examples, no library", shows="nothing"),
        Variant("htt_all", says="rules of any confidence", confidence=0.0),
        Variant("htt_frequent", says="the most frequent rule of each sign, answers unseen", shows="frequent"),
        Variant("htt_examples", says="own texts with right answers as further examples", shows="examples"),
        Variant("htt_oracle", says="the true rules in front", shows="truth"),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person: a library, examples."""
        train, shown, rest = session.train, dict[str, list[Shown]](), dict[str, list[int]]()
        for name, own in owned(train, session.task).items():
            order = torch.randperm(len(own), generator=session.rng, device=session.device).tolist()
            rows = [own[k] for k in order]
            shown[name] = [Shown(train["question"][row], FORM, train["ruled"][row]) for row in rows[:SHOTS]]
            rest[name] = rows[SHOTS : SHOTS + session.scale(len(rows), 4)]
        if self.shows == "nothing":
            return kept({name: together(examples) for name, examples in shown.items()})
        if self.shows == "truth":
            return kept({name: headed(true_rules(name), examples) for name, examples in shown.items()})
        tried = self.tried(session, shown, rest)
        before = {}
        for name in rest:
            trials = [(row, decode(text), answer_of(text) == train["answer"][row]) for row, text in tried[name]]
            if self.shows == "examples":
                own = {row: Shown(train["question"][row], FORM, text) for row, text, right in trials if right}
                before[name] = together([*list(own.values())[: TAUGHT - SHOTS], *shown[name]])
            else:
                before[name] = headed(self.library([(text, right) for _, text, right in trials]), shown[name])
        return kept(before)

    def tried(
        self, session: Session, shown: Mapping[str, Sequence[Shown]], rest: Mapping[str, Sequence[int]]
    ) -> dict[str, list[tuple[int, list[int]]]]:
        """By person, texts of their other questions: (number in the train split, text), all samples."""
        pairs = [(name, row) for name, rows in rest.items() for row in rows] * SAMPLES
        before = {name: together(examples) for name, examples in shown.items()}
        asked = [[*before[name], *encode(f"{session.train['question'][row]} {FORM}")] for name, row in pairs]
        texts = written(session.networks["model"], asked, MOST, 1.0, session.rng)
        found: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in rest}
        for (name, row), text in zip(pairs, texts, strict=True):
            found[name].append((row, text))
        return found

    def library(self, trials: Sequence[tuple[str, bool]]) -> list[Rule]:
        """The rules of texts, of which it is known whether their answers are right, that pass both thresholds."""
        count, right = Counter[Rule](), Counter[Rule]()
        for text, fine in trials:
            rules = rules_of(text)
            count.update(rules)
            right.update(rules if fine else [])
        often = {rule: times for rule, times in count.items() if times >= COVERAGE}
        if self.shows == "frequent":
            most = {sign: max(often[rule] for rule in often if rule[0] == sign) for sign, _ in often}
            return sorted(rule for rule in often if often[rule] == most[rule[0]])
        sure = {rule: right[rule] / times for rule, times in often.items()}
        return sorted((r for r in sure if sure[r] >= self.confidence), key=lambda rule: (rule[0], -sure[rule]))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        return greedy(session, batch, prompts(session.state, batch, FORM))


def headed(rules: Sequence[Rule], examples: Sequence[Shown]) -> list[int]:
    """Examples, with rules in front of them where there are any."""
    return [*(encode(f"{listed(rules)} |") if rules else []), *together(examples)]
