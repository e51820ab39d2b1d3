"""COP: the statements that matter, in the order of reasoning, and one proof behind them (Liu, Yan et al., 2023)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.deducing import (
    LONGEST_PROOF,
    Ask,
    Question,
    Statement,
    about,
    follows,
    listed,
    question_of,
    side_by_side,
    told_proof,
    verdicts,
    whole_proof,
)
from stepmark.tracks.reasoning.solving import CHAIN

LISTED = 13  # words of four rules and "done"
Path = tuple[Statement, ...]  # a fact, then rules up to the word that is asked for


class CopDeductive(Method):
    """COP: concise and organized perception. A mind map is grown from the question, pruned, and told in its order.

    1. Concept maps: every rule is an edge from the word that it begins with to the one that it ends in; every fact marks a
       word for a being. The model reads the edges off: for each word of the map it is asked, in the format <rules>, which
       rules end there.
    2. Mind map: from the word that is asked for backward, all edges that end in it, whatever their sign; then those that end in
       where these begin, where they affirm it; and so on, to a depth of 8, until a fact is met. Branches that meet none are
       cut off, and so are those whose fact is about another being.
    3. Each branch that is left is told from its leaf to the root, the fact first, and behind it the question. One greedy
       proof is written from these statements alone.

    A proof by d rules and its answer takes 7d + 7 words, for which `CHAIN` rows are kept; a word of the map takes four rows
    and a few. So at 64 and below the model has the question as it stands, as where nothing is left of the map; at 128 a
    chain of four rules is read off.

    Differs from the paper: no code was found, and this follows its description. There the model lists all edges in a call or
    two; here a list of a whole prompt would be longer than the rung, and each word of the map is a call of its own.

    Its bound: `cop_parsed` has a parser read the edges, which the paper allows too. Here the search that grows the map then
    solves the question by itself: one branch is left, and that is the proof. `cop_path` takes that branch for the proof, and
    the model says no more than true or false behind it. Neither is the method; what they can do the map alone has done.

    Its ablations: `cop_unpruned` tells the other statements behind the map, in the order of the prompt; `cop_all_beings`
    keeps the branches of the other being; `cop_unorganized` tells the statements that are left in the order of the prompt.
    Its control: `cop_random` tells as many statements as the parser's map has, drawn at random.

    What limits it here: what a concise and ordered text does for a model can be seen only where the model reads rules off
    well; a rule that is missed cuts the way.
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
            "accuracy[cop_parsed,64..512] > accuracy[chain_of_thought,64..512]",
            says="the same where a parser reads the edges, and the search alone has solved the question",
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
    edges, prune, ordered, proof = "asked", "all", True, "written"
    variants = (
        Variant("cop_parsed", says="a parser reads the rules: a bound", edges="parsed", tasks=("deduce/chains",)),
        Variant("cop_unpruned", says="all statements, those of the map first", prune="none", tasks=("deduce/chains",)),
        Variant("cop_all_beings", says="branches of the other being are kept", prune="dead", tasks=("deduce/chains",)),
        Variant(
            "cop_unorganized",
            says="the statements that are left in the order of the prompt",
            ordered=False,
            tasks=("deduce/chains",),
        ),
        Variant("cop_random", says="as many statements, drawn at random", edges="random", tasks=("deduce/chains",)),
        Variant(
            "cop_path",
            says="the parser's branch is the proof, and the model says true or false",
            edges="parsed",
            proof="path",
            tasks=("deduce/chains",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One proof a question."""
        questions = [question_of(question) for question in batch["question"]]
        rules: list[list[Statement]] = [[] if self.edges == "asked" else question.rules for question in questions]
        left = [rung] * len(questions)
        if self.edges == "asked":
            rooms = [max(0, rung - CHAIN)] * len(questions)
            _, rest = side_by_side(session, [read_off(*pair) for pair in zip(questions, rules, strict=True)], rooms)
            left = [rung - room + spared for room, spared in zip(rooms, rest, strict=True)]
        maps = [self.pruned(question, grown(question, own)) for question, own in zip(questions, rules, strict=True)]
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
        if self.edges == "random":
            order = torch.randperm(len(whole), generator=session.rng, device=session.device).tolist()
            kept = [whole[k] for k in order[: len(kept)]]
        if self.prune == "none":
            return [*kept, *(statement for statement in whole if statement not in kept)]
        if not self.ordered:
            kept = [statement for statement in whole if statement in kept]
        return kept or whole


def grown(question: Question, rules: Sequence[Statement]) -> list[Path]:
    """The branches of the mind map that begin with a fact, each from its leaf to the root."""

    def behind(word: str, above: Path) -> list[Path]:
        ends = [fact for fact in question.facts if fact[2] == word and (fact[1] or not above)]
        found = [(fact, *above) for fact in ends]
        if len(above) < LONGEST_PROOF:
            passed = {rule[2] for rule in above}
            for rule in rules:
                if rule[2] == word and (rule[1] or not above) and rule[0] not in passed | {word}:
                    found += behind(rule[0], (rule, *above))
        return found

    return behind(question.goal[2], ())


def proved(path: Path) -> list[list[Statement]]:
    """A branch as the steps of a proof."""
    fact, *rules = path
    steps = [[fact]]
    for rule in rules:
        new = follows(steps[-1][-1], rule)
        assert new is not None  # a branch has no gap
        steps.append([rule, new])
    return steps


def read_off(question: Question, rules: list[Statement]) -> Generator[Ask, str, None]:
    """Add the rules that the model names for each word of the mind map, from the word asked for back to the facts."""
    words = [question.goal[2]]
    met = {fact[2] for fact in question.facts}
    for word in words:
        if word in met:
            continue
        goal = (question.goal[0], True, word)
        reply = yield Ask(about(question.statements, goal, "<rules>"), LISTED, ("done",))
        for rule in listed(reply, question.rules):
            if rule not in rules:
                rules.append(rule)
            if rule[0] not in words:
                words.append(rule[0])
