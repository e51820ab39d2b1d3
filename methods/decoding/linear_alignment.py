"""Linear alignment: a closed-form step towards a preference in every token's logits (Gao et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import draw
from stepmark.tracks.decoding.texts import nucleus


def aligned(wished: Tensor, plain: Tensor, ratio: float, mass: float) -> Tensor:
    """The distribution [V] to draw from, given logits [V] with the principle in the prompt and without it."""
    known = nucleus(wished.softmax(-1), mass)
    p = (wished + ratio * (wished - plain)).softmax(-1) * (known > 0)
    return p / p.sum() if p.sum() > 0 else known / known.sum()


class LinearAlignment(Method):
    """Linear alignment: follow the difference that the principle makes, without training.

    To first order, the policy that raises the value of a preference most within a trust region is the old one moved
    along the gradient of that value; its closed form adds a multiple of the gradient to the logits (section 3.2). The
    direction is estimated by self-contrast (section 3.3): the same model reads the text after a prompt with the
    principle and after one without,

        logits = (1 + r) logits_with - r logits_without

    and tokens are drawn from their softmax within the nucleus of the policy with the principle, so that the step stays
    where that policy is fluent. r = 2 and a nucleus of 0.8, as in the official demonstration (its scripts take 3 and 5).
    Two passes per token, each with a cache of its own. Where nothing of the nucleus is left in floating point, it is drawn
    from as it is.

    Its control `context_aware` is the same contrast as context-aware decoding sets it (Shi et al., 2023): r = 0.5, without
    a nucleus. The wish is not what the likeliest text follows, so that the dumb controls, `wish_greedy` and `beam_search`,
    do not follow it either.

    Differs from the paper: the principle is a wish for a colour, to which the model was trained to give way weakly, so
    that how far a text follows it is counted instead of judged; temperature 1, not 0.5 or 0.7; tokens are drawn, where the
    official scripts take the likeliest. `linear_alignment_greedy` does as they do, against greedy decoding of the wish. Tuned
    policies (PPO, DPO) and the best of several texts by a reward, which the paper compares with too, are left out.
    Perplexity is that of a text whose colours are all equally likely: it tells whether the grammar is kept.

    The claims compare whole texts: they stand at 192 forwards. At 96 a text of two forwards a token is cut after 48 words, and
    a share of the events told so far would set beginnings beside whole texts.

    What came out: nearly every event follows the wish, where prompting follows it in less than half and the likeliest
    texts in about one of eight, and the stories stay right.
    """

    paper = Paper(
        id="linear_alignment",
        title="Linear Alignment: A Closed-form Solution for Aligning Human Preferences without Tuning and Feedback",
        authors="Songyang Gao, Qiming Ge, Wei Shen, Shihan Dou, Junjie Ye, Xiao Wang, Rui Zheng, Yicheng Zou, "
        "Zhi Chen, Hang Yan, Qi Zhang, Dahua Lin",
        year=2024,
        arxiv="2401.11458",
        code="Wizardcoast/Linear_Alignment",
    )
    tasks = ("preference/colours",)
    baselines = ("wish_prompting", "wish_greedy", "beam_search", "context_aware")
    claims = (
        Claim(
            "compliance[linear_alignment,192] >= compliance[wish_prompting,192] + 0.1 "
            "and perplexity[linear_alignment,192] <= 1.2 * perplexity[wish_prompting,192] "
            "and accuracy[linear_alignment,192] >= accuracy[wish_prompting,192] - 0.05",
            says="the preference is followed in a tenth more of the events than by prompting, as fluently, and stories stay "
            "right",
            headline=True,
        ),
        Claim(
            "compliance[linear_alignment,192] > compliance[wish_greedy,192] "
            "and compliance[linear_alignment,192] > compliance[beam_search,192]",
            says="and more than by writing what is likeliest after the prompt with the wish",
        ),
        Claim(
            "compliance[linear_alignment,192] > compliance[context_aware,192] "
            "and accuracy[linear_alignment,192] >= accuracy[context_aware,192] - 0.05",
            says="and more than by a contrast at a quarter of the strength without a nucleus, in as many forwards",
        ),
        Claim(
            "compliance[linear_alignment_greedy,192] >= compliance[wish_greedy,192] + 0.1 "
            "and accuracy[linear_alignment_greedy,192] >= accuracy[wish_greedy,192] - 0.05",
            says="as in the official scripts, which draw nothing: the likeliest word after the step against the likeliest "
            "before it",
        ),
    )

    ratio, mass = 2.0, 0.8  # r, and the nucleus
    greedy = False  # take the likeliest word instead of a drawn one
    variants = (
        Variant(
            "linear_alignment_greedy",
            says="the likeliest word of the aligned distribution instead of a drawn one",
            greedy=True,
            baselines=("wish_greedy",),
        ),
        Variant(
            "context_aware",
            says="context-aware decoding: the contrast at r = 0.5, without a nucleus",
            ratio=0.5,
            mass=1.0,
            baselines=("wish_prompting",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        outputs = []
        for prompt, plain, room, temperature in zip(
            batch["prompt"], batch["plain"], batch["max_new_tokens"], batch["temperature"], strict=True
        ):
            pair = [Decoder(session.networks["target"], len(start) + room) for start in (prompt, plain)]
            written: list[int] = []
            new: tuple[list[int], list[int]] = (prompt, plain)
            while True:
                wished, without = (
                    target.forward(ids, last=1)[0] / temperature for target, ids in zip(pair, new, strict=True)
                )
                p = aligned(wished, without, self.ratio, self.mass)
                u = float(torch.rand((), generator=session.rng, device=pair[0].device))
                written.append(int(p.argmax()) if self.greedy else draw(p, u))
                spent = sum(target.spent for target in pair)
                if written[-1] == pair[0].eos or len(written) == room or spent + 2 > rung:
                    break
                new = written[-1:], written[-1:]
            outputs.append(written)
        return outputs
