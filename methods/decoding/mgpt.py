"""mGPT: which tokens a multilingual language model should have (Shliazhko et al., TACL 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.tokens import LanguageModel, Scheme, learn, read


class Mgpt(Method):
    """Plain byte-level byte-pair encoding over all languages, and zero- and few-shot answers by likelihood.

    The paper trains five equal small models that differ in their tokens alone and takes the strategy of the lowest
    perplexity for its large ones: the default, this one. Its perplexity is per character,
    exp(-1/|c| sum_i log p(x_i | x_<i)) with |c| characters, since the number of tokens hangs on the strategy; bits per
    character are its binary logarithm. A question is answered as in the paper's evaluation: each label completes the
    text, the completion with the lowest sum of token losses is the answer, and demonstrations stand before it, as many
    whole lines as the budget of tokens holds. What the lines have in common runs once, which changes no likelihood.

    Every strategy gets as many training steps of as many tokens, so that longer tokens see more text, as in the paper.

    Differs from the paper: four languages that are ciphers of one grammar for 61 natural ones; 1023 tokens for 100,000; a
    model of width 64 and 4 layers with dense attention and rotary positions; the scores of its cross-lingual tasks have
    no counterpart here but the labels.
    """

    paper = Paper(
        id="mgpt",
        title="mGPT: Few-Shot Learners Go Multilingual",
        authors="Oleh Shliazhko, Alena Fenogenova, Maria Tikhonova, Vladislav Mikhailov, Anastasia Kozlova, "
        "Tatiana Shavrina",
        year=2022,
        arxiv="2204.07580",
        code="ai-forever/mgpt",
    )
    tasks = ("tokenisation/dialects",)
    baselines = ("char_tokens", "case_tokens", "arithmetic_tokens", "combined_tokens")
    claims = (
        Claim("tokens[mgpt,320] < tokens[char_tokens,320]", says="a line takes fewer steps than characters"),
        Claim(
            "nfe[mgpt,320] < nfe[char_tokens,320]",
            says="the same demonstrations, texts and labels take fewer evaluations than in characters",
        ),
        Claim(
            "bits_per_character[mgpt,320] <= 1.02 * min(bits_per_character[case_tokens,320], "
            "bits_per_character[arithmetic_tokens,320], bits_per_character[combined_tokens,320])",
            says="no strategy with markers or single digits has a perplexity lower by more than a fiftieth of its bits",
        ),
        Claim(
            "bits_per_character[mgpt,320] < min(bits_per_character[case_tokens,320], "
            "bits_per_character[arithmetic_tokens,320], bits_per_character[combined_tokens,320], "
            "bits_per_character[char_tokens,320])",
            says="the lowest perplexity of the five strategies",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The model, of one size whatever the tokens."""
        return {"lm": LanguageModel()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, then the model on them."""
        return learn(session, Scheme())

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> dict[str, Tensor]:
        """Log-likelihoods of the lines and their numbers of tokens."""
        return read(session, batch, rung)
