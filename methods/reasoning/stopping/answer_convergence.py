"""Answer convergence: a thought ends once the answer asked for after each sentence no longer changes (Liu and Wang, 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.reasoners import STOP, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import answer_of
from stepmark.tracks.reasoning.stopping import ANSWER, END, MOST, Thoughts, asked, eagerest, enough, share_right, sides

# What is tried for each rule, from the value that ends thoughts soonest: sentences k, logits, a probability.
TRIED = {"consistency": (2.0, 3.0, 4.0, 5.0, 6.0), "boost": (4.0, 3.0, 2.0, 1.0), "learned": (0.5, 0.6, 0.7, 0.8, 0.9)}
TUNED_ON, LEARNED_FROM = 150, 300  # train questions
HELD = 4_000  # the row of the train split from which on rules are tuned, behind all that something is learned from
WIDTH, EPOCHS = 64, 30  # of the LSTM, and of its training
RESERVE = {"consistency": 2 * ANSWER, "hindsight": 2 * ANSWER, "learned": ANSWER + 1}


def said(tokens: Sequence[int]) -> str | None:
    """The answer that `Thoughts.ask` was given."""
    return answer_of([*encode("ans"), *tokens])


def converged(answers: Sequence[str | None], last: str | None) -> int:
    """Number of the sentence after which the answer is the last one and stays it; how many there are where it never is."""
    at = len(answers)
    while at and answers[at - 1] == last:
        at -= 1
    return at


class Stopper(nn.Module):
    """An LSTM over the states at the ends of sentences that says whether the answer has converged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(width, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, states: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [A] after states [A, D]; the memory [A, 2, WIDTH] before and after them."""
        hidden, cell = self.cell(states, (memory[:, 0], memory[:, 1]))
        return self.head(hidden)[:, 0], torch.stack([hidden, cell], 1)


def decode(session: Session, questions: Sequence[Sequence[int]], rung: int, rule: str, knob: float) -> list[list[int]]:
    """Texts whose thoughts are ended by a rule and its knob.

    "consistency": the answers of `knob` sentences in a row are one; "boost": the terminator's logit is raised by `knob` at
    the end of a sentence; "learned": the stopper says more than `knob`; "length": after `knob` tokens; "coin": with
    probability `knob` after a sentence; "hindsight": the whole thought, cut at the sentence where the answer had converged;
    "never".
    """
    reserve, states = RESERVE.get(rule, ANSWER), rule == "learned"
    thoughts = Thoughts(session.networks["model"], questions, rung, reserve, states)
    chains, most = thoughts.chains, int(knob) if rule == "length" else MOST
    answers: list[list[str | None]] = [[] for _ in questions]
    marks: list[list[tuple[int, list[int]]]] = [[] for _ in questions]  # length of the text, tokens of the answer
    memory = torch.zeros(len(questions), 2, WIDTH, device=session.device)

    def raised(texts: list[int], logits: Tensor) -> Tensor:
        at = torch.tensor([chains.texts[i][-1] == STOP for i in texts], device=logits.device)
        logits = logits.clone()
        logits[:, END] += knob * at
        return logits

    while going := thoughts.thinking(most):
        thoughts.write(going, session.rng, most=most, adjust=raised if rule == "boost" else None)
        paused = thoughts.paused(going)
        if not paused:
            continue
        if rule in ("consistency", "hindsight"):
            for i, (tokens, _) in zip(paused, thoughts.ask(paused), strict=True):
                answers[i].append(said(tokens))
                marks[i].append((len(chains.texts[i]), tokens))
                recent = answers[i][-int(knob) :] if rule == "consistency" else []
                if recent and len(recent) == int(knob) and None not in recent and len(set(recent)) == 1:
                    thoughts.settle(i, tokens)
        elif rule == "learned":
            logits, memory[paused] = session.networks["stopper"](chains.states(paused), memory[paused])
            thoughts.answer([i for i, p in zip(paused, logits.sigmoid().tolist(), strict=True) if p > knob])
        elif rule == "coin":
            drawn = torch.rand(len(paused), generator=session.rng, device=session.device).tolist()
            thoughts.answer([i for i, u in zip(paused, drawn, strict=True) if u < knob])
    texts = thoughts.finish()
    if rule == "hindsight":
        for i, text in enumerate(texts):
            at = converged(answers[i], answer_of(text))
            if at < len(answers[i]):
                length, tokens = marks[i][at]
                texts[i] = [*chains.texts[i][chains.starts[i] : length], *encode("</think> ans"), *tokens]
    return texts


def watched(session: Session, count: int) -> dict[str, Tensor]:
    """Whole thoughts about train questions: {"states": [N, C, D] at the ends of sentences, "labels": [N, C], whether the
    answer asked for there is that of the whole text and stays it, -1 behind the last}."""
    questions, _ = asked(session.train, 0, count)
    rows: list[tuple[Tensor, list[float]]] = []
    for part in sides(questions):
        thoughts = Thoughts(session.networks["model"], questions[part], enough(session), 2 * ANSWER + 1, states=True)
        found: list[list[Tensor]] = [[] for _ in questions[part]]
        answers: list[list[str | None]] = [[] for _ in questions[part]]
        while going := thoughts.thinking():
            thoughts.write(going, session.rng)
            paused = thoughts.paused(going)
            for i, state in zip(paused, thoughts.chains.states(paused), strict=True):
                found[i].append(state)
            for i, (tokens, _) in zip(paused, thoughts.ask(paused), strict=True):
                answers[i].append(said(tokens))
        for states, each, text in zip(found, answers, thoughts.finish(), strict=True):
            at = converged(each, answer_of(text))
            if states and answer_of(text) is not None:
                rows.append((torch.stack(states), [float(k >= at) for k in range(len(each))]))
    longest = max((len(labels) for _, labels in rows), default=1)
    width = rows[0][0].shape[1] if rows else session.networks["model"].llama.config.hidden_size
    states, labels = torch.zeros(len(rows), longest, width), torch.full((len(rows), longest), -1.0)
    for i, (each, marks) in enumerate(rows):
        states[i, : len(marks)], labels[i, : len(marks)] = each, torch.tensor(marks)
    return {"states": states, "labels": labels}


def stopper(session: Session, count: int, epochs: int) -> dict[str, Tensor]:
    """Weights of a stopper trained on `watched` thoughts: cross entropy at every sentence."""
    with torch.no_grad():
        seen = watched(session, count)
    states, labels = seen["states"].to(session.device), seen["labels"].to(session.device)
    network = Stopper(states.shape[2]).to(session.device)
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -(WIDTH**-0.5), WIDTH**-0.5, generator=session.rng)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in session.progress(range(epochs), "stopper"):
        order = torch.randperm(len(states), generator=session.rng, device=session.device)
        for rows in order.split(32) if len(order) else ():  # at smoke no thought may have an answer
            memory = torch.zeros(len(rows), 2, WIDTH, device=session.device)
            loss = torch.zeros((), device=session.device)
            for k in range(states.shape[1]):
                logits, memory = network(states[rows, k], memory)
                there = labels[rows, k] >= 0
                loss = loss + F.binary_cross_entropy_with_logits(logits[there], labels[rows, k][there], reduction="sum")
            optimiser.zero_grad()
            (loss / len(rows)).backward()
            optimiser.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def thought(text: Sequence[int]) -> Sequence[int]:
    """A text up to the end of its thought."""
    return text[: text.index(END)] if END in text else text


def length_for(lengths: Sequence[int], mean: float) -> int:
    """The least L with which thoughts of these lengths have `mean` tokens in the mean if none has more than L."""
    return next(
        (most for most in range(1, MOST) if sum(min(most, n) for n in lengths) >= mean * len(lengths)), max(lengths)
    )


def coin_for(sentences: Sequence[int], mean: float) -> float:
    """The probability of ending after each sentence that leaves thoughts of so many sentences `mean` in the mean:
    of S there are 1 + (1 - q) + ... + (1 - q)^(S - 1)."""
    low, high = 0.0, 1.0
    for _ in range(40):
        q = (low + high) / 2
        if sum(sum((1 - q) ** k for k in range(n)) for n in sentences) > mean * len(sentences):
            low = q
        else:
            high = q
    return (low + high) / 2


def tuned(session: Session, rule: str, count: int) -> dict[str, Tensor]:
    """{"knob": of those tried, the one that ends thoughts soonest with which no fewer answers are right, but one in a hundred,
    than where none is ended, on train questions; "length", "coin": the knobs of those rules with which whole thoughts would
    have as many tokens, as many sentences, in the mean}."""
    questions, answers = asked(session.train, HELD, count)
    written: dict[float, list[list[int]]] = {}

    def right(knob: float, rule: str = rule) -> float:
        written[knob] = [
            text for part in sides(questions) for text in decode(session, questions[part], enough(session), rule, knob)
        ]
        return share_right(written[knob], answers)

    with torch.no_grad():
        least = right(-1.0, "never") - 0.01
        knob = eagerest(TRIED[rule][: session.scale(6, 2)], right, least)
    whole, ended = ([thought(text) for text in written[each]] for each in (-1.0, knob))
    tokens, sentences = (sum(map(len, ended)) / count, sum(text.count(STOP) for text in ended) / count)
    return {
        "knob": torch.tensor(knob),
        "length": torch.tensor(float(length_for([len(text) for text in whole], tokens))),
        "coin": torch.tensor(coin_for([text.count(STOP) for text in whole], sentences)),
    }


class AnswerConvergence(Method):
    """Answer convergence: after each sentence of a thought the answer is asked for, and the thought ends when it settles.

    The text up to a full stop gets ``</think> ans`` and the likeliest tokens behind it; then the thought goes on as if
    nothing had been asked. The convergence point is the first sentence after which the answer so found no longer changes.
    Three rules end a thought near it:

    - Answer Consistency, the method: the answers of k sentences in a row are one. The text ends with that answer.
    - Think-Adjust (`think_adjust`): at the end of a sentence the logit of ``</think>`` is raised; nothing is asked.
    - Learn-to-Stop (`learn_to_stop`): an LSTM reads the final states at the ends of sentences and says how likely it is that
      the answer has converged; above a threshold the thought is ended. It learns from whole thoughts about train
      questions, labelled by the model's own final answers, right or not.

    `convergence_point` is no rule but a measurement: the whole thought is written, and what is returned is cut where the
    answer had converged, which only hindsight knows. All that is asked for counts against the rung: an answer up to three rows;
    a state none where the thought goes on, as the row that reads the full stop gives the next token too. k, the raise and the
    threshold are tuned alike, each on 150 train questions: the value that ends thoughts soonest with which no fewer answers are
    right, but one in a hundred, than with whole thoughts. Thoughts are sampled at temperature 0.6. Where the rung ends a
    thought, the answer is asked for, as `forced_thinking` does, the whole thought that all is compared with.

    Its controls: `fixed_length_stop` ends every thought after one number of tokens, `coin_stop` after a sentence with one
    probability: those that leave thoughts about train questions as many tokens, as many sentences, in the mean, as Answer
    Consistency does. `chain_of_thought` is the same model asked for its steps without checking them again.

    Differs from the paper: sentences of these texts are steps of seven words, eight to a thought, where the paper's are
    sentences of English; so k is searched from 2 to 6. The raise is the same number at every full stop. The official code is
    not at hand; what the raise is exactly, and the size and training of the LSTM, are this file's reading.

    What limits it here: an answer asked for costs three rows, nearly half a sentence. What ends a thought early must first
    earn that back.
    """

    paper = Paper(
        id="answer_convergence",
        title="Answer Convergence as a Signal for Early Stopping in Reasoning",
        authors="Xin Liu, Lu Wang",
        year=2025,
        arxiv="2506.02536",
        code="launchnlp/reasoning_earlystop",
    )
    tasks = ("solve/problems",)
    baselines = (
        "forced_thinking",
        "think_adjust",
        "learn_to_stop",
        "fixed_length_stop",
        "coin_stop",
        "convergence_point",
        "chain_of_thought",
    )
    trainings = 3
    claims = (
        Claim(
            "accuracy[answer_convergence,128..512] >= accuracy[forced_thinking,128..512] - 0.01 "
            "and written[answer_convergence,128..512] <= 0.75 * written[forced_thinking,128..512] "
            "and nfe[answer_convergence,128..512] < nfe[forced_thinking,128..512]",
            says="texts are a quarter shorter, with fewer tokens in all, answers asked for included, and as many are right",
            headline=True,
            setting="thoughts of eight sentences of seven words, of which an answer asked for costs nearly half of one",
        ),
        Claim(
            "written[convergence_point,256..512] <= 0.6 * written[forced_thinking,256..512] "
            "and accuracy[convergence_point,256..512] >= accuracy[forced_thinking,256..512] - 0.01",
            says="answers have converged after 60 % of the thought",
            headline=True,
        ),
        Claim(
            "accuracy[think_adjust,128..512] >= accuracy[forced_thinking,128..512] - 0.01 "
            "and nfe[think_adjust,128..512] <= 0.9 * nfe[forced_thinking,128..512] "
            "and accuracy[learn_to_stop,128..512] >= accuracy[forced_thinking,128..512] - 0.01 "
            "and nfe[learn_to_stop,128..512] <= 0.9 * nfe[forced_thinking,128..512]",
            says="a raised terminator and a learned rule save a tenth of the tokens each, states included",
            headline=True,
        ),
        Claim(
            "accuracy[answer_convergence,128..512] > accuracy[fixed_length_stop,128..512] "
            "and accuracy[answer_convergence,128..512] > accuracy[coin_stop,128..512] "
            "and accuracy[answer_convergence,128..512] >= accuracy[chain_of_thought,128..512] - 0.01",
            says="more answers are right than where thoughts of that length are ended without looking at them, and no fewer than "
            "where steps are asked for unchecked",
        ),
    )
    rule, tuned_as, knob = "consistency", "consistency", "knob"
    variants = (
        Variant("think_adjust", says="the terminator is raised at full stops", rule="boost", tuned_as="boost"),
        Variant("learn_to_stop", says="an LSTM over states ends the thought", rule="learned", tuned_as="learned"),
        Variant("convergence_point", says="the whole thought, cut where the answer had converged", rule="hindsight"),
        Variant(
            "fixed_length_stop",
            says="ends after one number of tokens, in the mean those of Answer Consistency",
            rule="length",
            knob="length",
        ),
        Variant(
            "coin_stop",
            says="ends after a sentence by a coin, in the mean after as many as Answer Consistency",
            rule="coin",
            knob="coin",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The stopper, untrained, where states are looked at."""
        if self.rule != "learned":
            return {}
        return {"stopper": Stopper(session.networks["model"].llama.config.hidden_size)}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Train the stopper where there is one, and tune the rule: {"knob"}."""
        if self.rule == "hindsight":
            return {"knob": torch.tensor(0.0)}
        if self.rule == "learned":
            weights = session.once(stopper, session.scale(LEARNED_FROM, 4), session.scale(EPOCHS, 2))
            session.networks["stopper"].load_state_dict(weights)
        return {"knob": session.once(tuned, self.tuned_as, session.scale(TUNED_ON, 3))[self.knob]}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Texts whose thoughts end early."""
        return decode(session, batch["question"], rung, self.rule, float(session.state["knob"]))
