"""Auto-CoT: questions from clusters, worked by the model itself, are the worked examples (Zhang et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import (
    embedded,
    greedy,
    kept,
    picked,
    prompts,
    representatives,
    self_shown,
    shelved,
    together,
)

SHOTS = 8
FORM = "<cot>"  # in the place of "Let's think step by step"


class AutoCoT(Method):
    """Auto-CoT: worked examples without anybody's work, from questions that have no answers yet.

        1. Question clustering: all questions are embedded and fall into k clusters by k-means, k the number of
           examples.
        2. Demonstration sampling: in each cluster, from its centre outwards, the first question that passes the filters
           stands for it, with the text that the model writes of it with nothing before (zero-shot chain of thought).
        3. The k questions with their texts stand before every question that is asked.

    The filters know no answers: a question of at most 60 tokens; a text of at most 5 sentences that has ended, with an
    answer to which its last sentence leads. Clusters are there for diversity: where a model errs on questions of a
    kind, these lie in a cluster or two, and no more than so many of the examples are wrong.

    Each person has 64 questions of their own and k = 8; all of it happens in `prepare`. Texts fit into 64 tokens, which
    is where the claims are.

    Its controls show as many of the model's own texts: `auto_cot_random` draws anew for each question (Random-Q-CoT),
    so that it is a mean over hundreds of draws, and `auto_cot_similar` takes the own questions that are most similar to
    the one asked, the most similar first (Retrieval-Q-CoT), for a row more. `few_shot` shows right texts that were
    written for it (Manual-CoT), as many, and `chain_of_thought` nothing.

    Differs from the paper: the model's own mean final states are the embedding, the paper's is Sentence-BERT. Questions
    of one person are clustered, since what their signs mean is another matter with everyone; the paper clusters those
    of a task. A sentence is what the paper calls a step and tells by its line; its answer has to stand in the last
    sentence, or among the last ten words, here it is the last word before the answer. The controls show what passes the
    same filters, so that all differ in the choice alone; the paper's are not filtered.

    What limits it here: a worked example tells what signs mean, not only how to reason. A neighbour of a question has
    its signs and may tell them, right where the neighbour tells them too; an own text about a sign that no question
    tells is a guess. So similarity has more to win here than in the paper, and right texts tell more than own ones can.
    """

    paper = Paper(
        id="auto_cot",
        title="Automatic Chain of Thought Prompting in Large Language Models",
        authors="Zhuosheng Zhang, Aston Zhang, Mu Li, Alex Smola",
        year=2022,
        arxiv="2210.03493",
        code="amazon-research/auto-cot",
    )
    tasks = ("shown/mixed", "shown/deep")
    baselines = ("chain_of_thought", "few_shot", "auto_cot_random", "auto_cot_similar")
    claims = (
        Claim(
            "accuracy[auto_cot,64] >= accuracy[few_shot,64] - 0.03 "
            "and accuracy[auto_cot,64] > accuracy[chain_of_thought,64]",
            says="as accurate as with examples that people have worked, and more so than without examples",
            headline=True,
            setting="examples that people have worked tell here what signs mean, which the model cannot find out by "
            "itself; the paper's questions hold all that they need",
        ),
        Claim(
            "accuracy[auto_cot,64] >= accuracy[auto_cot_random,64]",
            says="clusters are no worse a choice than chance",
        ),
        Claim(
            "accuracy[auto_cot,64] > accuracy[auto_cot_similar,64]",
            says="diverse examples are better than similar ones, which are wrong together",
            setting="similar questions have the signs of the one asked, so that their texts tell what it needs",
        ),
        Claim(
            "coarse[auto_cot,64] > coarse[auto_cot_similar,64]",
            says="so they are where the model works several signs in a step and errs most",
            setting="similar questions have the signs of the one asked, so that their texts tell what it needs",
        ),
        Claim(
            "accuracy[auto_cot,64] > accuracy[chain_of_thought,64]",
            says="of use with more signs than the model has seen",
            task="shown/deep",
        ),
    )
    choice = "clusters"
    trainings = 3
    variants = (
        Variant(
            "auto_cot_random",
            says="own texts about other random questions each time",
            choice="random",
            tasks=("shown/mixed",),
        ),
        Variant(
            "auto_cot_similar",
            says="own texts about the most similar questions",
            choice="similar",
            tasks=("shown/mixed",),
        ),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person, or all that may, with its place."""
        most = session.scale(64, 8)
        if self.choice == "clusters":
            found = representatives(session, most, FORM, SHOTS)
            return kept({name: together(shown) for name, shown in found.items()})
        fine = {name: [each for each in own if each.fine] for name, own in self_shown(session, most, FORM).items()}
        shelf = shelved({name: [together([each.shown]) for each in own] for name, own in fine.items()})
        points = [each.point for own in fine.values() for each in own]
        return {**shelf, "point": torch.stack(points) if points else torch.zeros(0, 1)}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        if self.choice == "clusters":
            return greedy(session, batch, prompts(session.state, batch, FORM))

        def drawn(_: int, own: list[int]) -> list[int]:
            order = torch.randperm(len(own), generator=session.rng, device=session.device)
            return [own[k] for k in order[:SHOTS].tolist()]

        def nearest(i: int, own: list[int]) -> list[int]:
            if not own:  # none of them passes the filters
                return own
            order = (session.state["point"][own] @ asked[i]).argsort(descending=True, stable=True)
            return [own[k] for k in order[:SHOTS].tolist()]

        if self.choice == "random":
            return greedy(session, batch, picked(session.state, batch, FORM, drawn))
        asked = embedded(session.networks["model"], batch["question"])
        return greedy(session, batch, picked(session.state, batch, FORM, nearest))
