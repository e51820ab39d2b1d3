"""Vocabulary expansion with averaged embeddings, on few texts (Yamaguchi, Villavicencio and Aletras 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.vocab import NEW_TOKENS, Tokens, expand_and_adapt, expanded, write_spelled


class VocabExpansionLowres(Method):
    """100 tokens of the new language, each starting as the mean of the pieces that the old tokenizer makes of it.

    An auxiliary byte-pair tokenizer is learnt from the few texts of the language; its first 100 merges are appended to
    the vocabulary and to the merge rules of the old one (section 3 of the paper). The embedding of a new token is the
    average of the embeddings of the tokens that the old tokenizer splits it in ("Mean", the simplest of the paper's
    heuristics), as input and as output, which the target ties. Then causal language modelling goes on with the 2560
    texts of the train split, the head and the embeddings included. A text takes fewer tokens, so fewer forwards.

    Differs from the paper: all weights of the four layers are adapted, where the paper has low-rank updates of a large
    model, in one pass over the texts with Muon. Every word is in letters in the old tokenizer, as scripts are that
    it falls back to bytes for, and the language is a cipher of the model's own. Whether an answer is right, and how many
    letters of it, takes the place of the paper's tasks and of bits per character.
    """

    paper = Paper(
        id="vocab_expansion_lowres",
        title="Vocabulary Expansion for Low-resource Cross-lingual Transfer",
        authors="Atsuki Yamaguchi, Aline Villavicencio, Nikolaos Aletras",
        year=2024,
        arxiv="2406.11477",
        code="gucci-j/lowres-cve",
    )
    tasks = ("bilingual/stories",)
    baselines = ("source_vocabulary", "random_expansion", "focus_expansion")
    claims = (
        Claim(
            "nfe[vocab_expansion_lowres,72] <= 0.7 * nfe[source_vocabulary,72]",
            says="at most 0.7 of the inference steps of the source tokenizer",
        ),
        Claim(
            "accuracy[vocab_expansion_lowres,72] >= accuracy[source_vocabulary,72] - 0.05",
            says="answers are as often right as with the source tokenizer, adapted on the same texts",
        ),
        Claim(
            "right_letters[vocab_expansion_lowres,72] >= right_letters[random_expansion,72]",
            says="not worse than with random initial embeddings",
        ),
        Claim(
            "right_letters[vocab_expansion_lowres,72] >= right_letters[focus_expansion,72]",
            says="not worse than with initial embeddings from similarities of auxiliary ones",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with more rows in its embeddings."""
        return {"student": expanded(session.clone("target"), NEW_TOKENS)}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, average, adapt."""

        def rows(tokens: Tokens, old: Tensor, texts: list[list[int]]) -> Tensor:
            return torch.stack([old[list(letters)].mean(0) for letters in tokens.letters.values()])

        return expand_and_adapt(session, rows)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        student, merges = session.networks["student"], session.state["merges"].tolist()
        size = len(student.get_parameter("model.embed_tokens.weight")) - NEW_TOKENS
        return write_spelled(student, Tokens(merges, size), batch, rung)
