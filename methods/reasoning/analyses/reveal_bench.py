"""Reveal: verifiers of chains, by what each step is worth, and by the weakest of them (Jacovi et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import (
    ATTRIBUTIONS,
    YES,
    Chain,
    asked,
    chain_of,
    ended,
    likeliest,
    said,
    texts,
    told,
    told_facts,
)
from stepmark.tracks.reasoning.solving import prompts

ANSWER, LABELS = 16, 20  # most tokens of an answer of its own, and of labels in one text


class RevealBench(Method):
    """Reveal: is a chain of thought right? It is if each step is relevant and attributed to the pages and the answer follows.

    The protocol (section 2) takes a chain apart, and a verifier labels the parts, here the model itself, by the likelier word,
    a row each:

        relevance     question, steps before, step <agree>     yes | no
        attribution   pages -> step ? <holds>                  true (supported) | false (contradicted) | unknown
        logic         question, steps, answer <follows>        yes | no

    A chain is as strong as its weakest link: it is called right where all labels are (yes, true, yes). Two rows a step and one,
    nine at most: a rung with less room, 4, asks for the logic first, then for attributions, then for relevance, and takes the
    rest for right.

    Its arms: `reveal_whole` asks for the whole in one row, <whole>; `reveal_written` writes all labels in one text, <verify>;
    `reveal_answer` answers the question itself and calls a chain right whose answer is the same, the correctness of the
    answer as a proxy. `reveal_no_relevance`, `reveal_no_attribution` and `reveal_no_logic` leave one kind of link out. Whoever
    finds all of it right has a macro F1 of .34 for chains.

    Differs from the paper: chains are made, with at most one kind of fault, not written by models and labelled by people, so
    that labels are exact. Steps hold evidence alone and the answer logic alone; there is no step of both, and no partial
    attribution. The verifier was trained in these formats, on
    more examples of single links than of whole chains, where the paper's verifiers are prompted or were trained on other data.

    What limits it here: logic is one comparison, the end of the last step with the answer. A page says a fact word for word.
    """

    paper = Paper(
        id="reveal_bench",
        title="A Chain-of-Thought Is as Strong as Its Weakest Link: A Benchmark for Verifiers of Reasoning Chains",
        authors="Alon Jacovi, Yonatan Bitton, Bernd Bohnet, Jonathan Herzig, Or Honovich, Michael Tseng, Michael Collins, "
        "Roee Aharoni, Mor Geva",
        year=2024,
        arxiv="2402.00559",
    )
    tasks = ("know/chains",)
    baselines = ("reveal_whole", "reveal_written", "reveal_answer")
    claims = (
        Claim(
            "attribution[reveal_bench,16..64] > logic[reveal_bench,16..64]",
            says="whether an answer follows is harder to verify than whether a step is in the pages",
            headline=True,
            setting="logic is one comparison of words here, in the paper a conclusion from all steps before",
        ),
        Claim(
            "supported[reveal_bench,16..64] > contradicted[reveal_bench,16..64]",
            says="that pages contradict a step is found less often than that they support it",
            headline=True,
            setting="the verifier was trained on as many contradictions as supports, and both are one comparison of words",
        ),
        Claim(
            "chain[reveal_bench,16..64] > chain[reveal_whole,16..64] "
            "and chain[reveal_bench,16..64] > chain[reveal_answer,16..64] and chain[reveal_bench,16..64] > 0.35",
            says="chains are verified better link by link than as a whole, by their answers, or by calling all of them right",
            headline=True,
        ),
        Claim(
            "chain[reveal_bench,32..64] > chain[reveal_written,32..64]",
            says="and better than by writing all labels in one text",
        ),
        Claim(
            "chain[reveal_bench,16..64] > chain[reveal_no_relevance,16..64] "
            "and chain[reveal_bench,16..64] > chain[reveal_no_attribution,16..64] "
            "and chain[reveal_bench,16..64] > chain[reveal_no_logic,16..64]",
            says="it takes all three kinds of links",
        ),
    )
    verify, dropped = "links", ""
    variants = (
        Variant("reveal_whole", says="the whole chain in one row", verify="whole"),
        Variant("reveal_written", says="all labels in one text", verify="written"),
        Variant("reveal_answer", says="right where its answer is the model's own", verify="answer"),
        Variant("reveal_no_relevance", says="relevance is left out", dropped="relevance"),
        Variant("reveal_no_attribution", says="attribution is left out", dropped="attribution"),
        Variant("reveal_no_logic", says="logic is left out", dropped="logic"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The labels of each chain and of its parts."""
        chains, left = [chain_of(ids) for ids in batch["question"]], [rung] * len(batch["question"])
        if self.verify == "written":
            return texts(session, prompts(batch, "<verify>"), LABELS, left)
        if self.verify == "whole":
            return [ended(f"ans {word}") for word in likeliest(session, prompts(batch, "<whole>"), YES)]
        if self.verify == "answer":
            own = texts(session, [asked(chain.asked, "<cot>") for chain in chains], ANSWER, left)
            same = [decode(ids).rpartition("ans ")[2] == chain.answer for ids, chain in zip(own, chains, strict=True)]
            return [ended(f"ans {YES[not fine]}") for fine in same]
        return [ended(together(own)) for own in self.links(session, chains, rung)]

    def links(self, session: Session, chains: Sequence[Chain], rung: int) -> list[dict[str, list[str]]]:
        """By kind the labels of each chain's links. At most `rung` of a chain are asked for, the others are right."""
        rooms = [rung] * len(chains)
        found: list[dict[str, list[str]]] = [{} for _ in chains]
        for kind, words in (("logic", YES), ("attribution", ATTRIBUTIONS), ("relevance", YES)):
            asks = [prompts_of(kind, chain) for chain in chains]
            some = [own[: room if kind != self.dropped else 0] for own, room in zip(asks, rooms, strict=True)]
            labels = iter(likeliest(session, [encode(prompt) for own in some for prompt in own], words))
            for i, (own, every) in enumerate(zip(some, asks, strict=True)):
                found[i][kind] = [*(next(labels) for _ in own), *words[:1] * (len(every) - len(own))]
                rooms[i] -= len(own)
        return found


def prompts_of(kind: str, chain: Chain) -> list[str]:
    """What is asked of the links of a kind."""
    question = told(chain.asked)
    if kind == "logic":
        return [f"{question} {told_facts(chain.steps)} ans {chain.answer} <follows>"]
    if kind == "attribution":
        return [f"{chain.pages} -> {said(step)} ? <holds>" for step in chain.steps]
    before = [told_facts(chain.steps[:k]) for k in range(len(chain.steps))]
    return [" ".join(f"{question} {b} {said(s)} <agree>".split()) for b, s in zip(before, chain.steps, strict=True)]


def together(links: Mapping[str, Sequence[str]]) -> str:
    """Labels as the format <verify> has them, and what follows of them for the chain."""
    parts = [f"{useful} {held} ." for useful, held in zip(links["relevance"], links["attribution"], strict=True)]
    right = all(label in ("yes", "true") for labels in links.values() for label in labels)
    return " ".join([*parts, *links["logic"], ".", "ans", YES[not right]])
