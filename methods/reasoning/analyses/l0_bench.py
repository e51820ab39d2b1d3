"""L0-Bench: programs traced line by line, where one wrong line spoils all, and what more compute is worth (Sun et al.,
2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, PAD, decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.populations import drawn, texts_that_fit
from stepmark.tracks.reasoning.solving import answer_of, left, plurality, prompts

MOST = 180  # tokens of a trace, a third more than the longest has
SAMPLES = 16  # most traces of a vote
SHELF = 64  # programs among which examples are drawn


class L0Bench(Method):
    """L0-Bench: a program and its input are given, and the model writes one line for each statement that is carried
    out.

    A trace is right (`valid`) only if every line is, and the answer behind it; with a chance p for each line that is
    p^T of T lines. `prefix` is the share of lines before the first wrong one, `accuracy` the answer alone. Grades go by
    the length of the trace: valid_few (2 to 6 lines) and valid_many (7 to 12) within the lengths that the models were
    trained on, valid_longer (13 to 24) beyond them. The method is one greedy trace of the middle model; `l0_small` and
    `l0_large` are the other sizes, `l0_direct` is the answer at once. From 256 on every right trace fits, and greedy
    ones are the same at every rung; that is where the claims are.

    Of the three ways in which the paper spends more at inference, two are here. `l0_vote` samples up to 16 traces at
    temperature 0.7 and returns the one that most of them are, whole; another is begun for a question while it may still
    have as many tokens as its longest so far, so that a rung of 1024 holds 16 of 60 tokens, and one of 256 four.
    `l0_answer_vote` takes the first of those whose answer most of them give. `l0_shots` puts two programs with their
    traces before, drawn anew for each question from 64 of training.

    Differs from the paper: no code is published. Programs have assignments, sums and differences, lists, conditions and
    loops over numbers to 99, in the grammar of this track; the paper's are Python functions with a tracer's output. A
    line says which variable has changed and to what, without a number of its statement, and tests of conditions and
    loops have none of their own; behind the last line stands the value of a variable that is asked for. Difficulty is
    the number of lines, up to 24, where the paper has up to hundreds. The paper's models were trained on all sorts of
    text and learn the form of a trace by four examples, here the form was trained and all arms but `l0_shots` have
    none; it goes on to more examples, in longer contexts, and to more votes. Its third way, models that think before
    they trace, has no counterpart: none here was trained to.

    What limits it here: lengths beyond 12 lines were never seen, so that what falls there falls for its length as such;
    within 12 it is the lines. Nearly equal traces of one program differ in a line each, so that a vote over whole
    traces needs a right one to be drawn more than once.
    """

    paper = Paper(
        id="l0_bench",
        title="L0-Reasoning Bench: Evaluating Procedural Correctness in Language Models via Simple Program Execution",
        authors="Simeng Sun, Cheng-Ping Hsieh, Faisal Ladhak, Erik Arakelyan, Santiago Akle Serano, Boris Ginsburg",
        year=2025,
        arxiv="2503.22832",
    )
    tasks = ("carry/traces",)
    baselines = ("l0_direct", "l0_small", "l0_large", "l0_vote")
    claims = (
        Claim(
            "valid_few[l0_small,256..1024] > valid_many[l0_small,256..1024] and "
            "valid_few[l0_bench,256..1024] > valid_many[l0_bench,256..1024] and "
            "valid_few[l0_large,256..1024] > valid_many[l0_large,256..1024] and "
            "valid_many[l0_small,256..1024] > valid_longer[l0_small,256..1024] and "
            "valid_many[l0_bench,256..1024] > valid_longer[l0_bench,256..1024] and "
            "valid_many[l0_large,256..1024] > valid_longer[l0_large,256..1024]",
            says="models of every size get fewer traces right the more lines these have",
            headline=True,
        ),
        Claim(
            "valid_many[l0_small,256..1024] < valid_many[l0_bench,256..1024] < valid_many[l0_large,256..1024] and "
            "prefix[l0_small,256..1024] < prefix[l0_bench,256..1024] < prefix[l0_large,256..1024]",
            says="larger models stay right over more lines",
            headline=True,
        ),
        Claim(
            "valid_trained[l0_vote,256..1024] > valid_trained[l0_bench,256..1024]",
            says="the trace that most of up to sixteen are is right more often than the greedy one",
        ),
        Claim(
            "valid_trained[l0_vote,1024] > valid_trained[l0_vote,256]",
            says="and more often than that of those for which a quarter of the tokens has room",
        ),
        Claim(
            "valid_trained[l0_vote,256..1024] >= valid_trained[l0_answer_vote,256..1024]",
            says="a vote over traces finds right ones as often as a vote over their answers",
        ),
        Claim(
            "valid_trained[l0_shots,256..1024] > valid_trained[l0_bench,256..1024]",
            says="with examples before the program more traces are right",
            setting="the models were trained on this one form of trace, of which the paper's models learn by examples "
            "alone",
        ),
        Claim(
            "accuracy[l0_bench,256..1024] > accuracy[l0_direct,256..1024]",
            says="behind a trace more answers are right than at once",
        ),
    )
    role, form, choice, shots = "model", "<trace>", "greedy", 0
    variants = (
        Variant("l0_small", says="the small model", role="small"),
        Variant("l0_large", says="the large model", role="large"),
        Variant("l0_direct", says="the answer at once", form="<last>"),
        Variant("l0_vote", says="the trace that most of up to 16 are", choice="traces"),
        Variant("l0_answer_vote", says="a trace with the answer that most of up to 16 give", choice="answers"),
        Variant("l0_shots", says="behind two programs with their traces", shots=2),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """Worked programs to draw examples from: {"shown": int64 [N, T], padded}; none where none are shown."""
        if not self.shots:
            return {}
        rows = zip(session.train["prompt"][:SHELF], session.train["target"][:SHELF], strict=True)
        worked = [encode(f"{prompt} {target} |") for prompt, target in rows]
        longest = max(map(len, worked))
        return {"shown": torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in worked])}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """A trace a question, or its answer at once."""
        first = Chains(session.networks[self.role], self.asked(session, prompts(batch, self.form)))
        if self.choice == "greedy":
            first.write(limit=min(left(session, batch), MOST))
            return [first.written(i) for i in range(len(first))]
        found = texts_that_fit(session, first, rung, MOST, temperature=0.7, most=SAMPLES)
        return [texts[self.chosen(texts)] for texts in found]

    def asked(self, session: Session, questions: Sequence[list[int]]) -> list[list[int]]:
        """The prompts, each behind examples of its own."""
        if not self.shots:
            return list(questions)
        shelf = [[token for token in row if token != PAD] for row in session.state["shown"].tolist()]
        chosen = [drawn(session, [1.0] * len(shelf), self.shots) for _ in questions]
        return [
            [*(token for k in numbers for token in shelf[k]), *question]
            for numbers, question in zip(chosen, questions, strict=True)
        ]

    def chosen(self, texts: Sequence[Sequence[int]]) -> int:
        """Number of the trace that is returned; what was cut has no vote."""
        if self.choice == "answers":
            return plurality([answer_of(text) for text in texts])
        return plurality([decode(text) if text[-1] == EOS else None for text in texts])
