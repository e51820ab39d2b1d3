"""COP: the statements that matter, in the order of reasoning, and one proof behind them (Liu, Yan et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.deducing import (
    LONGEST_PROOF,
    Question,
    Statement,
    about,
    follows,
    implications,
    question_of,
    side_by_side,
    told_proof,
    verdicts,
    whole_proof,
)
from stepmark.tracks.reasoning.solving import CHAIN

ANSWER = 1  # row of true or false
Path = tuple[Statement, ...]  # a fact, then rules up to the word that is asked for


class CopDeductive(Method):
    """COP: concise and organized perception. A mind map is grown from the question, pruned, and told in its order.

    1. Concept maps: every rule is an edge from the word that it begins with to the one that it ends in; every fact marks a
       word for a being. The model reads the edges off: it says what each rule gives, in the format <infer>.
    2. Mind map: from the word that is asked for backward, all edges that end in it, whatever their sign; then those that end in
       where these begin, where they affirm it; and so on, to a depth of 8, until a fact is met. Branches that meet none are
       cut off, and so are those whose fact is about another being.
    3. Each branch that is left is told from its leaf to the root, the fact first, and behind it the question. One greedy
       proof is written from these statements alone.

    A proof by d rules and its answer takes 7d + 7 words, for which `CHAIN` rows are kept; a rule that is read takes three. So
    at 64 and below, or where the rules are too many, the model has the question as it stands, as where nothing is left of
    the map; at 128 twenty rules are read.

    Differs from the paper: no code was found, and this follows its description. There the model lists all edges in a call or
    two; here a list of a whole prompt would be longer than the rung, and each rule is read alone, all in one call.

    Its bound: here the search that grows the map solves the question by itself, for one branch is left, and that is the proof.
    `cop_path` takes that branch for the proof, and the model says no more than true or false behind it.

    Its ablations: `cop_unpruned` tells the other statements behind the map, in the order of the prompt; `cop_all_beings`
    keeps the branches of the other being; `cop_unorganized` tells the statements that are left in the order of the prompt.
    Its control: `cop_random` tells as many statements as the map has, drawn at random.

    What limits it here: statements have one form, so that edges are easily read and the map leaves nothing open; what the
    paper's perception has to do on free text is done before it begins.
    """

    paper = Paper(
        id="cop_deductive",
        title="Concise and Organized Perception Facilitates Large Language Models for Deductive Reasoning",
        authors="Junjie Liu, Shaotian Yan, Chen Shen, Zhengdong Xiao, Liang Xie, Wenxiao Wang, Jieping Ye",
        year=2023,
        arxiv="2310.03309",
    )
    tasks = ("deduce/chains", "deduce/dense", "deduce/deep")
    baselines = ("chain_of_thought", "selection_inference", "lambada", "self_consistency", "cop_random")
    claims = (
        Claim(
            "accuracy[cop_deductive,128..512] > accuracy[chain_of_thought,128..512] "
            "and accuracy[cop_deductive,128..512] > accuracy[selection_inference,128..512] "
            "and accuracy[cop_deductive,128..512] > accuracy[lambada,128..512] "
            "and accuracy[cop_deductive,128..512] > accuracy[cop_random,128..512] "
            "and nfe[cop_deductive,128..512] < nfe[selection_inference,128..512]",
            says="more right answers than a chain of thought and than forward and backward chaining, with fewer rows than "
            "scoring statements takes, and more than where statements are left at random",
            headline=True,
            setting="statements have one form, so that the map finds the proof before the model reads it (cop_path)",
        ),
        Claim(
            "valid[cop_deductive,128..512] > valid[self_consistency,128..512]",
            says="more valid proofs than a vote over proofs from the question as it stands, within as many rows",
        ),
        Claim(
            "valid[cop_deductive,128..512] > valid[cop_unpruned,128..512] "
            "and valid[cop_deductive,128..512] > valid[cop_unorganized,128..512]",
            says="both parts are needed, concise and organized",
        ),
        Claim(
            "valid[cop_deductive,128..512] > valid[cop_path,128..512]",
            says="more valid proofs than the map's branch alone, of which the model says no more than true or false",
        ),
        Claim(
            "accuracy[cop_deductive,128..512] > accuracy[chain_of_thought,128..512]",
            says="the same among six or eight rules that lead nowhere",
            task="deduce/dense",
        ),
        Claim(
            "accuracy[cop_deductive,256..512] > accuracy[chain_of_thought,256..512] "
            "and accuracy[cop_deductive,256..512] > accuracy[selection_inference,256..512]",
            says="and with one step more than the model has seen",
            task="deduce/deep",
        ),
    )
    prune, ordered, drawn, proof = "all", True, False, "written"
    variants = (
        Variant("cop_unpruned", says="all statements, those of the map first", prune="none", tasks=("deduce/chains",)),
        Variant("cop_all_beings", says="branches of the other being are kept", prune="dead", tasks=("deduce/chains",)),
        Variant(
            "cop_unorganized",
            says="the statements that are left in the order of the prompt",
            ordered=False,
            tasks=("deduce/chains",),
        ),
        Variant("cop_random", says="as many statements, drawn at random", drawn=True, tasks=("deduce/chains",)),
        Variant(
            "cop_path",
            says="the map's branch is the proof, and the model says true or false",
            proof="path",
            tasks=("deduce/chains",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One proof a question."""
        questions = [question_of(question) for question in batch["question"]]
        kept = ANSWER if self.proof == "path" else CHAIN
        rooms = [max(0, rung - kept)] * len(questions)
        ends, rest = side_by_side(session, [implications(question) for question in questions], rooms)
        left = [rung - room + spared for room, spared in zip(rooms, rest, strict=True)]
        maps = [self.pruned(q, grown(q, own)) if own else [] for q, own in zip(questions, ends, strict=True)]
        if self.proof == "path":
            steps = [proved(paths[0]) if paths else [] for paths in maps]
            said_so = verdicts(session, batch["question"], [told_proof(each) for each in steps])
            return [whole_proof(each, verdict) for each, verdict in zip(steps, said_so, strict=True)]
        contexts = [self.told(session, question, paths) for question, paths in zip(questions, maps, strict=True)]
        asked = [about(context, q.goal, "<proof>") for context, q in zip(contexts, questions, strict=True)]
        chains = Chains(session.networks["model"], [encode(prompt) for prompt in asked])
        return chains.write(limit=[min(rows, CHAIN) for rows in left])

    def pruned(self, question: Question, paths: Sequence[Path]) -> list[Path]:
        """The branches of the being that is asked about, or all that begin with a fact."""
        return [path for path in paths if self.prune == "dead" or path[0][0] == question.goal[0]]

    def told(self, session: Session, question: Question, paths: Sequence[Path]) -> list[Statement]:
        """The statements that the model reads, in their order."""
        whole = list(question.statements)
        kept = list(dict.fromkeys(statement for path in paths for statement in path))
        if self.drawn:
            order = torch.randperm(len(whole), generator=session.rng, device=session.device).tolist()
            kept = [whole[k] for k in order[: len(kept)]]
        if self.prune == "none":
            return [*kept, *(statement for statement in whole if statement not in kept)]
        if not self.ordered:
            kept = [statement for statement in whole if statement in kept]
        return kept or whole


def grown(question: Question, ends: Sequence[Statement | None]) -> list[Path]:
    """The branches of the mind map that begin with a fact, each from its leaf to the root, by what each rule is said to give."""
    edges = [(rule, end) for rule, end in zip(question.rules, ends, strict=True) if end is not None]

    def behind(word: str, above: Path, passed: frozenset[str]) -> list[Path]:
        found = [(fact, *above) for fact in question.facts if fact[2] == word and (fact[1] or not above)]
        if len(above) < LONGEST_PROOF:
            for rule, (_, sign, end) in edges:
                if end == word and (sign or not above) and rule[0] not in passed:
                    found += behind(rule[0], (rule, *above), passed | {rule[0]})
        return found

    word = question.goal[2]
    return behind(word, (), frozenset([word]))


def proved(path: Path) -> list[list[Statement]]:
    """A branch as the steps of a proof, up to where a rule that was misread does not follow."""
    fact, *rules = path
    steps = [[fact]]
    for rule in rules:
        new = follows(steps[-1][-1], rule)
        if new is None:
            break
        steps.append([rule, new])
    return steps
