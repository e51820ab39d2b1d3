"""ThinkLess: the terminator of the thought is put in early, and a cue brings the answer into its form (Li et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.backbones.reasoners import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.stopping import ANSWER, Thoughts


class ThinklessTerminator(Method):
    """ThinkLess: a thought is ended after a fixed number of tokens, whatever stands there, and the answer is asked for.

    The paper finds that answer tokens look at the terminator of a thought rather than at its steps, and that the states of
    terminators put in at different places, one every 16 tokens, are much alike: what the answer needs is there early. So
    `position` tokens are thought, then ``</think>`` is put in. An answer behind a thought that was cut loses its form; a
    short instruction behind the terminator, which a model follows without training, brings it back. Here this cue is the
    word ``ans``. Nothing is trained and nothing calibrated. A thought that ends by itself before that answers by itself.

    The rung caps the position: four rows of it are kept for the answer. Thoughts are sampled at temperature 0.6, answers are
    greedy, in every arm.

    Its controls: `full_thinking`, the paper's baseline, thinks until it ends or the rung does, and is cut there;
    `forced_thinking` ends its thought where the rung does, the same mechanism without a position of its own.
    `thinkless_0` puts the terminator in before anything is thought; `thinkless_random` at a place that is drawn anew for
    each text, from none to twice as many tokens; `hard_truncation` stops at the length of ThinkLess's texts without a
    terminator or a cue. `chain_of_thought` is the same model asked for its steps without checking them again: whoever wants
    few tokens may ask for that.

    Differs from the paper: there is no official code, and the text at hand does not say how the position is chosen. It is
    32, two of the segments of 16 tokens after which the paper compares terminators. The cue is one word of a format that
    the model was trained on, not an instruction: it writes that word behind every terminator by itself, so that there is
    no form to bring back, and what the instruction is worth is not asked.

    What limits it here: these models cannot work out in the answer what the thought has not reached, and a thought about more
    than three steps has not reached its answer after 32 tokens.
    """

    paper = Paper(
        id="thinkless_terminator",
        title="ThinkLess: A Training-Free Inference-Efficient Method for Reducing Reasoning Redundancy",
        authors="Gengyang Li, Yifeng Gao, Yuming Li, Yunfang Wu",
        year=2025,
        arxiv="2505.15684",
    )
    tasks = ("solve/problems",)
    baselines = ("full_thinking", "forced_thinking", "hard_truncation", "chain_of_thought")
    claims = (
        Claim(
            "accuracy[thinkless_terminator,*] >= accuracy[full_thinking,*] - 0.03 "
            "and nfe[thinkless_terminator,128..512] <= 0.6 * nfe[full_thinking,128..512] "
            "and accuracy[thinkless_terminator,*] > accuracy[thinkless_0,*]",
            says="as many answers are right as with whole thoughts, less three in a hundred, with 60 % of the tokens; and more "
            "than where nothing is thought",
            headline=True,
            setting="thoughts of sixty tokens, ended after 32: the paper's rule for the place is not known",
        ),
        Claim(
            "accuracy[thinkless_terminator,*] > accuracy[hard_truncation,*] "
            "and answered[thinkless_terminator,*] > answered[hard_truncation,*]",
            says="at one length terminator and cue give more right answers, and more that can be read, than a cut",
        ),
        Claim(
            "accuracy[thinkless_terminator,64..512] > accuracy[thinkless_random,64..512] "
            "and accuracy[thinkless_terminator,64..512] >= accuracy[chain_of_thought,64..512] - 0.03",
            says="and more than where the place is random, and no fewer than where steps are asked for unchecked",
        ),
    )
    position = 32  # tokens that are thought at most
    cue = "</think> ans"  # what is put in then; "": nothing, and the thought is left as it stands
    random = False  # whether the place is drawn, from none to twice as many tokens
    variants = (
        Variant("thinkless_0", says="the terminator at once", position=0),
        Variant("thinkless_random", says="the terminator at a random place", random=True),
        Variant(
            "hard_truncation",
            says="cut at the length of ThinkLess's texts, without terminator or cue",
            position=36,
            cue="",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Texts with thoughts of at most `position` tokens."""
        reserve = ANSWER if self.cue else 0
        thoughts = Thoughts(session.networks["model"], batch["question"], rung, reserve)
        if not self.random:
            thoughts.write(thoughts.thinking(), session.rng, most=self.position, sentence=False)
            return thoughts.finish(encode(self.cue) if self.cue else None)
        count = len(batch["question"])
        places = torch.randint(2 * self.position + 1, (count,), generator=session.rng, device=session.device).tolist()
        while going := [i for i in thoughts.thinking() if len(thoughts.written(i)) < places[i]]:
            thoughts.write(going, session.rng, limit=1)
        return thoughts.finish(encode(self.cue))
