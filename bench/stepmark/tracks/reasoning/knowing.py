"""What methods share on knowledge: questions and facts as text, beliefs, likelihoods of words, and a store of pages to search.

Words that a method puts together cost nothing; a row is spent on each prompt that the model reads and each word that it writes.
The pages are the world's, all of its facts: finding and reading them is what a method may do with them. What stands
below *bounds* works out what is so, of use as a bound only; a method that asks it has to say so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, WORDS, decode, encode
from stepmark.datasets import closed_world, knowledge
from stepmark.datasets.closed_world import CHECKS as CHECKS
from stepmark.datasets.closed_world import KINDS as KINDS
from stepmark.datasets.closed_world import VALUES as VALUES
from stepmark.datasets.closed_world import Fact as Fact
from stepmark.datasets.closed_world import read_facts as read_facts
from stepmark.datasets.closed_world import route as route
from stepmark.datasets.closed_world import said as said
from stepmark.datasets.closed_world import told_facts as told_facts
from stepmark.datasets.fact_chains import ATTRIBUTIONS as ATTRIBUTIONS
from stepmark.datasets.fact_chains import YES as YES
from stepmark.datasets.fact_chains import Chain as Chain
from stepmark.datasets.fact_chains import read_chain
from stepmark.datasets.knowledge import VERBS as VERBS
from stepmark.datasets.knowledge import VERDICTS as VERDICTS
from stepmark.datasets.knowledge import Question as Question
from stepmark.datasets.knowledge import told as told
from stepmark.session import Session

SPELT = ("true", "false")
K1, B = 1.5, 0.75  # of BM25, as usual


# -- texts -----------------------------------------------------------------------------------------------------------


def question_of(ids: Sequence[int]) -> Question:
    """A question from its token ids; of chains there is `chain_of`."""
    return knowledge.read(decode(ids))


def chain_of(ids: Sequence[int]) -> Chain:
    """A chain with its pages and its question from token ids."""
    return read_chain(decode(ids))


def asked(question: Question, form: str, shown: str = "") -> list[int]:
    """A prompt: pages or facts where some are shown, a question, a format."""
    return encode(f"{shown} -> {told(question)} {form}" if shown else f"{told(question)} {form}")


def ended(text: str) -> list[int]:
    """Token ids of a text, with the end of the sequence."""
    return [*encode(text), EOS]


def claimed(fact: Fact, sign: bool = True) -> Question:
    """The claim that a fact is so, or is not."""
    return Question("claim", fact[0], (fact[1],), (fact[2],), sign)


def denied(claim: Question) -> Question:
    """The claim of the opposite."""
    return replace(claim, sign=not claim.sign)


# -- what the model holds --------------------------------------------------------------------------------------------


def texts(session: Session, prompts: Sequence[Sequence[int]], most: int, left: list[int]) -> list[list[int]]:
    """The likeliest text behind the prompt of each question, of `most` tokens at most and no more than are left of its rung;
    what it takes is taken off `left`."""
    found = Chains(session.networks["model"], prompts).write(limit=[min(most, rows) for rows in left])
    left[:] = [rows - len(own) for rows, own in zip(left, found, strict=True)]
    return found


def likelihoods(session: Session, prompts: Sequence[Sequence[int]], words: Sequence[str]) -> Tensor:
    """Probabilities [B, W] of words as what comes next behind each prompt, out of all words: a row each."""
    if not prompts:
        return torch.empty(0, len(words))
    logits = Chains(session.networks["model"], prompts).read()
    return logits.softmax(-1)[:, [WORDS.index(word) for word in words]]


def likeliest(session: Session, prompts: Sequence[Sequence[int]], words: Sequence[str]) -> list[str]:
    """The likeliest of some words behind each prompt: a row each."""
    return [words[k] for k in likelihoods(session, prompts, words).argmax(-1).tolist()] if prompts else []


def recalled(session: Session, pairs: Sequence[tuple[str, str]], words: Sequence[str]) -> Tensor:
    """Probabilities [B, W] of values of a subject's relation, as a chain of thought about it would tell them: a row each."""
    prompts = [encode(f"{who} {relation} ? <cot> {who} {relation}") for who, relation in pairs]
    return likelihoods(session, prompts, words)


def beliefs(session: Session, claims: Sequence[Question], shown: Sequence[str] = ()) -> list[float]:
    """Probability that the model calls each claim true rather than false, behind what is shown to it: a row each."""
    if not claims:
        return []
    prompts = [asked(claim, "<dir> ans", text) for claim, text in zip(claims, shown or [""] * len(claims), strict=True)]
    found = likelihoods(session, prompts, SPELT).clamp_min(1e-30)
    return [float(p) for p in found[:, 0] / found.sum(-1)]


def both_ways(session: Session, claims: Sequence[Question]) -> list[tuple[float, float]]:
    """Beliefs in each claim and in its denial: two rows each, one call."""
    found = beliefs(session, [each for claim in claims for each in (claim, denied(claim))])
    return list(zip(found[::2], found[1::2], strict=True))


# -- the store -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def pages() -> dict[str, str]:
    """All pages by title."""
    return {title: closed_world.page(title) for title in closed_world.titles()}


@lru_cache(maxsize=1)
def _index() -> tuple[list[str], list[Counter[str]], list[float], dict[str, float]]:
    """(titles, word counts, lengths over the mean, weights of words) of all pages."""
    found = pages()
    counts = [Counter(word for word in text.split() if word not in (".", ":")) for text in found.values()]
    lengths = [sum(each.values()) for each in counts]
    held = Counter(word for each in counts for word in each)
    weights = {word: math.log(1 + (len(counts) - n + 0.5) / (n + 0.5)) for word, n in held.items()}
    return list(found), counts, [length * len(lengths) / sum(lengths) for length in lengths], weights


def retrieved(query: str, most: int) -> list[str]:
    """Titles of the pages that fit a query best, by BM25 (Robertson, Zaragoza 2009); of equals those that come first. No more
    than hold any of its words."""
    titles, counts, lengths, weights = _index()
    words = [word for word in query.split() if word in weights]
    scores = [
        sum(weights[w] * each[w] * (K1 + 1) / (each[w] + K1 * (1 - B + B * length)) for w in words if w in each)
        for each, length in zip(counts, lengths, strict=True)
    ]
    order = sorted(range(len(titles)), key=lambda i: -scores[i])
    return [titles[i] for i in order[:most] if scores[i] > 0]


def opened(titles: Sequence[str]) -> str:
    """Pages one after the other, as a prompt shows them; titles that there are not are left out."""
    known = pages()
    return " ".join(known[title] for title in titles if title in known)


def cited(titles: Sequence[str]) -> str:
    """The clauses by which a text names pages."""
    return " ".join(f"see {title} ." for title in titles)


# -- bounds ----------------------------------------------------------------------------------------------------------


def gold_steps(question: Question) -> list[Fact]:
    """The facts that a question takes, looked up in the world."""
    return knowledge.steps(question)


def gold_needs(question: Question) -> str:
    """The relations that decide a question of the kind could, as ``<needs>`` would name them."""
    return knowledge.solution(question, "<needs>")
