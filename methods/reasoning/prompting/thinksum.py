"""ThinkSum: likelihoods of short associations, read side by side, and summed outside the model (Ozturkler et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import KINDS, VALUES, ended, question_of, recalled, told_facts
from stepmark.tracks.reasoning.populations import drawn

ALIKE = ("trade", "pet", "born", "home")  # by what members of a set may be alike


class ThinkSum(Method):
    """ThinkSum: Think asks the model for nothing but single associations, Sum reasons over them by probability.

    Think: of every member m of the set and every relation r by which a set may be alike, one short phrase, "alma trade", and
    the probabilities of all values behind it, p(v | m, r). No member sees another, so that their order cannot matter.

    Sum: the shared relation and the shared value are latent variables. Member i is the odd one with weight

        w(i) = sum over r, v of (1 - p(v | i, r)) * product over j != i of p(v | j, r)

    a product, as all others have the value; a contrast, as i has not; a mixture over what it may be. The greatest weight is
    the answer, told with the likeliest values of the relation that has the greatest share in it.

    A phrase costs a row: 4 times the size of the set, 20 to 32. A rung with less room takes the first relations of `ALIKE`, at
    16 two or three of them.

    Its controls: `thinksum_hard` keeps of each phrase the likeliest value alone and counts, outside as well: what is left of
    the method without likelihoods. `thinksum_any` asks by one relation, drawn at random. Both orders of a set have one answer
    here whatever the model says, so that `agree` is of the baselines.

    Differs from the paper: no code is published, and this follows its two stages and its operations (product, mixture, contrast),
    not its prompts. For odd one out it has another call of the model list in what the things of a set may differ; here the
    task gives the relations. That a product over the others and a contrast with the odd one stand inside of a mixture over
    relations and values follows from one odd member and one shared value, all equally likely beforehand.

    What limits it here: that sets are alike by one of four relations is told to this method, and learned by the model from
    its examples in the formats <dir> and <cot>. Every association is one fact of one word.
    """

    paper = Paper(
        id="thinksum",
        title="ThinkSum: Probabilistic reasoning over sets using large language models",
        authors="Batu Ozturkler, Nikolay Malkin, Zhen Wang, Nebojsa Jojic",
        year=2022,
        arxiv="2210.01293",
    )
    tasks = ("know/odd",)
    baselines = ("direct_answer", "chain_of_thought", "short_vote", "thinksum_hard", "thinksum_any")
    claims = (
        Claim(
            "accuracy[thinksum,64..256] > accuracy[direct_answer,64..256] "
            "and accuracy[thinksum,64..256] > accuracy[chain_of_thought,64..256] "
            "and accuracy[thinksum,64..256] > accuracy[short_vote,64..256] "
            "and accuracy[thinksum,64..256] > accuracy[thinksum_any,64..256]",
            says="more odd ones found than at once, by a chain of thought, by a vote of chains within as many rows, or by any "
            "one relation",
            headline=True,
        ),
        Claim(
            "large[thinksum,64..256] > large[direct_answer,64..256] "
            "and large[thinksum,64..256] > large[chain_of_thought,64..256]",
            says="also in sets of 7 and 8, larger than any that the model has seen",
        ),
        Claim(
            "accuracy[thinksum,64..256] > accuracy[thinksum_hard,64..256]",
            says="likelihoods are worth more than the likeliest values, counted outside as well",
        ),
    )
    relations, hard = "all", False
    variants = (
        Variant("thinksum_hard", says="of each phrase the likeliest value alone, counted", hard=True),
        Variant("thinksum_any", says="by one relation, drawn at random", relations="any"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The odd one of each set, with the values of the relation that shows it."""
        sets = [question_of(ids).others for ids in batch["question"]]
        chosen = [self.asked_by(session, len(members), rung) for members in sets]
        tables = self.think(session, sets, chosen)
        answers = []
        for members, relations, own in zip(sets, chosen, tables, strict=True):
            weights = torch.stack([weighed(table, self.hard) for table in own])  # [relations, members]
            total = weights.amax(0) if self.hard else weights.logsumexp(0)
            odd = int(total.argmax())
            k = int(weights[:, odd].argmax())
            values = [KINDS[VALUES[relations[k]]][v] for v in own[k].argmax(-1).tolist()]
            facts = [(who, relations[k], value) for who, value in zip(members, values, strict=True)]
            answers.append(ended(f"{told_facts(facts)} ans {members[odd]}"))
        return answers

    def asked_by(self, session: Session, size: int, rung: int) -> list[str]:
        """The relations that a set of a size is asked by."""
        if self.relations == "any":
            return [ALIKE[drawn(session, [1.0] * len(ALIKE), 1)[0]]]
        return list(ALIKE[: rung // size])

    @staticmethod
    def think(session: Session, sets: Sequence[Sequence[str]], chosen: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        """Of each set and each relation probabilities [members, values]: a row for each member, a call for each relation."""
        found: list[list[Tensor]] = [[] for _ in sets]
        for relation in ALIKE:
            mine = [i for i, relations in enumerate(chosen) if relation in relations]
            if not mine:
                continue
            table = recalled(session, [(who, relation) for i in mine for who in sets[i]], KINDS[VALUES[relation]])
            for i, own in zip(mine, table.split([len(sets[i]) for i in mine]), strict=True):
                found[i].append(own)
        return found


def weighed(table: Tensor, hard: bool) -> Tensor:
    """log of each member's weight as the odd one [M], from probabilities [M, V]; hard: how many members are as they should be,
    the others alike and this one not, by their likeliest values."""
    if hard:
        have = F.one_hot(table.argmax(-1), table.shape[1])
        return (have.sum(0) - have + 1 - have).amax(-1).float()
    known = table.double().clamp(1e-30, 1 - 1e-12)
    return (known.log().sum(0) - known.log() + (-known).log1p()).logsumexp(-1)
