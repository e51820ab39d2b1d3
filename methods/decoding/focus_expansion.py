"""Vocabulary expansion in the way of FOCUS (Dobler and de Melo, EMNLP 2023): embeddings by similarity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.vocab import NEW_TOKENS, Tokens, expand_and_adapt, expanded, write_spelled

WINDOW, WIDTH = 5, 24  # reach of a co-occurrence in tokens, and channels of the auxiliary embeddings


class FocusExpansion(Method):
    """The tokens and the adaptation of `vocab_expansion_lowres`; new embeddings are sparse sums of old ones.

    Auxiliary embeddings of all tokens are learnt from the texts of the new language alone. A new token is the sum of the
    embeddings of those old tokens that the texts also have, weighted by the sparsemax of the cosine similarities between
    its auxiliary embedding and theirs.

    Differs from FOCUS: for fastText stands a factorisation of the positive pointwise mutual information of tokens within
    5 places, which so few texts are enough for.
    """

    tasks = ("bilingual/stories",)
    baselines = ("source_vocabulary",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with more rows in its embeddings."""
        return {"student": expanded(session.clone("target"), NEW_TOKENS)}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, compare, adapt."""

        def rows(tokens: Tokens, old: Tensor, texts: list[list[int]]) -> Tensor:
            counts = cooccurrences(texts, tokens.size + NEW_TOKENS)
            auxiliary = F.normalize(embeddings_from(counts), dim=1)
            shared = counts[: tokens.size].sum(1).nonzero()[:, 0]
            weights = sparsemax(auxiliary[tokens.size :] @ auxiliary[shared].t())
            return weights.to(old) @ old[shared.to(old.device)]

        return expand_and_adapt(session, rows)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        student, merges = session.networks["student"], session.state["merges"].tolist()
        size = len(student.get_parameter("model.embed_tokens.weight")) - NEW_TOKENS
        return write_spelled(student, Tokens(merges, size), batch, rung)


def cooccurrences(texts: list[list[int]], size: int) -> Tensor:
    """How often two tokens stand at most `WINDOW` places apart: float64 [size, size], symmetric."""
    counts = torch.zeros(size * size, dtype=torch.float64)
    for text in texts:
        ids = torch.tensor(text)
        for gap in range(1, min(WINDOW, len(ids) - 1) + 1):
            counts += torch.bincount(ids[:-gap] * size + ids[gap:], minlength=size * size)
    square = counts.view(size, size)
    return square + square.t()


def embeddings_from(counts: Tensor) -> Tensor:
    """Embeddings [size, WIDTH] whose products approximate the positive pointwise mutual information."""
    total, each = counts.sum(), counts.sum(1, keepdim=True).clamp(min=1)
    information = (counts * total / (each * each.t())).clamp(min=1).log()
    left, strengths, _ = torch.linalg.svd(information)
    return left[:, :WIDTH] * strengths[:WIDTH].sqrt()


def sparsemax(scores: Tensor) -> Tensor:
    """The nearest point of the simplex to each row of scores [N, K] (Martins and Astudillo 2016, algorithm 1)."""
    ordered = scores.sort(dim=1, descending=True).values
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    above = ordered.cumsum(1) - 1
    support = (ordered * ranks > above).sum(1, keepdim=True)
    return (scores - above.gather(1, support - 1) / support).clamp(min=0)
