"""LogiDynamics: analogies answered at once, or by a rule that is found, verified, refined, carried out (Zheng et al.,
2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, STOP, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.inferring import COLON, RULE, Thing, alone, longest, pairs_of
from stepmark.tracks.reasoning.populations import texts_that_fit
from stepmark.tracks.reasoning.solving import answer_of, left, plurality, prompts

WHOLE = 40  # tokens of a rule, what it gives, and the answer
FAILED = 3  # most rules that are said to have failed, as many as the model was trained with


@dataclass
class Inquiry:
    """Hypotheses about one question: its pairs, rows left, and of each rule that was held against the pairs how many it
    brought out."""

    pairs: list[tuple[Thing, str]]
    room: int
    tried: dict[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def needs(self) -> int:
        """Most rows of one more rule, held against the pairs, and of the answer behind it."""
        return RULE + sum(longest(thing) for thing, _ in self.pairs) + WHOLE

    @property
    def open(self) -> bool:
        """Whether no rule has brought out all pairs, and there is room for one more."""
        return max(self.tried.values(), default=-1) < len(self.pairs) and self.room >= self.needs


class LogiDynamics(Method):
    """LogiDynamics: two pipelines on analogies, and what more compute makes of the second.

        inductive                pairs and the query -> answer                                    (`logi_direct`)
        abductive + deductive    pairs -> rule; rule and the query -> answer                      (the method)

    Tasks have a modality (letters, people), a difficulty (1 to 3 operations) and a format (free, or one of four), and
    the track's metrics are by these. The method is one greedy rule carried out in the same text; it and the direct
    answer are the same at every rung from 64 on. With more compute, rules are sampled at temperature 1:

        verification    `logi_verified`    each is carried out by the model on the first of every pair; the first that
                                           brings out all seconds is taken, else the one that brings out most
        refinement      `logi_refined`     the same, and the next rule is asked for behind the last three that failed,
                                           ``no RULE .``

    A rule more is tried while the rung has room for it, its verification and the answer, each at its longest: at 64 and
    below for none, so that the greedy rule is carried out, at 128 for one or two, at 256 for three and more, at 512 for
    eight and more. A rule that comes again is not verified again. What a pair's second is, the question tells; whether
    a rule fits is otherwise the model's word. Controls: `logi_any` carries out one sampled rule, which is what a random
    choice among them gives; `logi_rules_vote` and `logi_direct_vote` spend the rung on a vote over answers by rules, or
    at once, sampled at temperature 0.7.

    Differs from the paper: two modalities of its three. Strings of letters are its symbols, which in its published
    questions are an invented language to translate into; relations of a fixed world are its text; there are no
    pictures. Rules are operations by name, so that a rule is three words at most and not a sentence. The paper also
    lets the model select among its hypotheses by a prompt, which this model never met, and which is left out. Refinement
    is told which rules have failed, not on which pair. The model was trained on both pipelines, on rules that are given,
    and on rules that have failed, and is asked without examples.

    What limits it here: the rules over people of two and three operations demand a search through what is known by
    heart, which may not be learnt, so that these cells say nothing; the claims take the easy ones. A rule has some
    thirty tokens, a direct answer a few: what more tokens are worth to the direct pipeline is `logi_direct_vote`.
    """

    paper = Paper(
        id="logidynamics",
        title="LogiDynamics: Unraveling the Dynamics of Logical Inference in Large Language Model Reasoning",
        authors="Tianshi Zheng, Jiayang Cheng, Chunyang Li, Haochen Shi, Zihao Wang, Jiaxin Bai, Yangqiu Song, "
        "Ginny Y. Wong, Simon See",
        year=2025,
        arxiv="2502.11176",
        code="HKUST-KnowComp/LogiDynamics",
    )
    tasks = ("infer/analogies",)
    baselines = ("logi_direct", "logi_rules_vote", "logi_any")
    claims = (
        Claim(
            "letters_hard[logidynamics,64..512] > letters_hard[logi_direct,64..512] and "
            "letters_hard[logidynamics,64..512] - letters_hard[logi_direct,64..512] > "
            "people_easy[logidynamics,64..512] - people_easy[logi_direct,64..512]",
            says="an explicit rule is ahead on symbols and hard items, and by more than on text and easy ones",
            headline=True,
            setting="two modalities, no pictures; the formats were trained, where the paper's models are prompted",
        ),
        Claim(
            "accuracy[logi_verified,256..512] > max(accuracy[logidynamics,256..512], accuracy[logi_any,256..512], "
            "accuracy[logi_rules_vote,256..512], accuracy[logi_direct_vote,256..512])",
            says="rules that are verified on the pairs answer more than one rule, than any of them, and than votes of "
            "as many tokens",
            headline=True,
        ),
        Claim(
            "accuracy[logi_refined,256..512] > accuracy[logidynamics,256..512] "
            "and fits[logi_refined,256..512] >= fits[logi_verified,256..512]",
            says="so do rules that are refined, and they find one that fits no less often than new draws do",
            headline=True,
        ),
        Claim(
            "accuracy[logidynamics,64..512] > accuracy[logi_direct,64..512]",
            says="over all questions a rule is ahead",
            setting="two modalities, no pictures; the formats were trained, where the paper's models are prompted",
        ),
        Claim(
            "letters_hard[logidynamics,64..512] - letters_hard[logi_direct,64..512] > "
            "letters_easy[logidynamics,64..512] - letters_easy[logi_direct,64..512]",
            says="of one modality, a rule gains more on the hard items than on the easy ones",
        ),
        Claim(
            "choice[logidynamics,64..512] - choice[logi_direct,64..512] > "
            "free[logidynamics,64..512] - free[logi_direct,64..512]",
            says="where the answer may be chosen, a rule gains more than where it must be written",
        ),
    )
    form, choice = "<rules>", "one"
    variants = (
        Variant("logi_direct", says="the answer at once", form="<dir>"),
        Variant("logi_rules_vote", says="a vote over answers by rules", choice="vote"),
        Variant("logi_direct_vote", says="a vote over answers at once", form="<dir>", choice="vote"),
        Variant("logi_any", says="one sampled rule", choice="any"),
        Variant("logi_verified", says="sampled rules held against the pairs", choice="verified"),
        Variant("logi_refined", says="each rule is told which have failed", choice="refined"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """An answer a question, with the rule that leads to it where one is asked for."""
        asked = prompts(batch, self.form)
        if self.choice == "vote":
            return self.voted(session, asked, rung)
        if self.choice == "any":
            asked = self.with_rules(asked, self.drawn(session, asked))
        elif self.choice != "one":
            inquiries = [Inquiry(pairs_of(question), rung) for question in batch["question"]]
            while going := [i for i, inquiry in enumerate(inquiries) if inquiry.open]:
                self.inquire(session, [(asked[i], inquiries[i]) for i in going])
            best = [max(inquiry.tried, key=inquiry.tried.__getitem__, default=()) for inquiry in inquiries]
            asked = self.with_rules(asked, best)
        chains = Chains(session.networks["model"], asked)
        chains.write(limit=min(left(session, batch), WHOLE))
        return [chains.texts[i][len(question) + 1 :] or [EOS] for i, question in enumerate(batch["question"])]

    @staticmethod
    def with_rules(asked: Sequence[list[int]], rules: Sequence[Sequence[int]]) -> list[list[int]]:
        """The prompts, each with its rule behind."""
        return [[*prompt, *rule] for prompt, rule in zip(asked, rules, strict=True)]

    def inquire(self, session: Session, asked: Sequence[tuple[list[int], Inquiry]]) -> None:
        """One rule more for each question, held against the pairs where it is new."""
        told = [[*prompt, *(refused(inquiry) if self.choice == "refined" else [])] for prompt, inquiry in asked]
        new = Chains(session.networks["model"], told).write(
            stop=(COLON,), limit=RULE, temperature=1.0, generator=session.rng
        )
        jobs = []
        for (_, inquiry), rule in zip(asked, new, strict=True):
            inquiry.room -= len(rule)
            if rule[-1] == COLON and tuple(rule) not in inquiry.tried:
                inquiry.tried[tuple(rule)] = 0
                jobs += [(inquiry, rule, pair) for pair in inquiry.pairs]
        chains = Chains(session.networks["model"], [alone(pair[0], rule) for _, rule, pair in jobs])
        texts = chains.write(limit=[longest(pair[0]) for _, _, pair in jobs])
        for (inquiry, rule, (_, second)), text in zip(jobs, texts, strict=True):
            inquiry.room -= len(text)
            inquiry.tried[tuple(rule)] += answer_of(text) == second

    @staticmethod
    def drawn(session: Session, asked: Sequence[list[int]]) -> list[list[int]]:
        """A sampled rule of each question; none where it is not whole."""
        rules = Chains(session.networks["model"], asked).write(
            stop=(COLON,), limit=RULE, temperature=1.0, generator=session.rng
        )
        return [rule if rule[-1] == COLON else [] for rule in rules]

    @staticmethod
    def voted(session: Session, asked: Sequence[list[int]], rung: int) -> list[list[int]]:
        """Of as many texts as there is room for, the first with the answer that most of them give."""
        found = texts_that_fit(session, Chains(session.networks["model"], asked), rung, WHOLE, temperature=0.7)
        return [texts[plurality([answer_of(text) for text in texts])] for texts in found]


def refused(inquiry: Inquiry) -> list[int]:
    """The last rules that have failed, as they are told."""
    rules = list(inquiry.tried)[-FAILED:]
    return [token for rule in rules for token in (*encode("no"), *rule[:-1], STOP)]
