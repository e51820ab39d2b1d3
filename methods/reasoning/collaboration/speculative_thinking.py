"""Speculative thinking: the large model takes over where the small one begins to reflect (Yang et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, STOP, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.sharing import follow, share
from stepmark.tracks.reasoning.solving import prompts

# Cues: a check is begun, a step is taken back, a check has passed or a result is told.
VERIFY, NEGATIVE, POSITIVE = (frozenset(encode(words)) for words in ("wait", "no", "yes so"))
TAKEOVER, LONGER = 12, 24  # tokens of a takeover, and of one that goes on because it checks
PATIENCE, MORE_PATIENCE, MOST_PATIENCE = 3, 1, 6  # reflections before the text is recapitulated
RECAP, MORE_RECAP, MOST_RECAP = 24, 5, 40  # tokens of a recapitulation
RECAP_WORDS = encode("wait")
MOST = 300  # tokens of a text
TEMPERATURE, TOP_P = 0.6, 0.95


def tone(piece: Sequence[int]) -> int:
    """1: the piece affirms, -1: it reflects (also where it does both as often), 0: neither."""
    against = sum(token in NEGATIVE or token in VERIFY for token in piece)
    affirmed = sum(token in POSITIVE for token in piece)
    return 1 if affirmed > against else -1 if against else 0


class SpeculativeThinking(Method):
    """Speculative thinking: a small model thinks, and a large one takes the pen at the places where it begins to reflect.

    The small model writes in the format <think>, sentence by sentence. What it writes behind a full stop (the paper: behind
    an empty line) is looked at for cues, and forgotten where there is one:

        affirmation and reflection: with `yes`, `so`, `no` or `wait` in it, the large model writes n1 tokens instead;
        verification: where these hold `wait`, by which a check begins, it goes on for n2 tokens;
        too much reflection: after c takeovers in which the large model itself reflects, the next full stop is followed by
        the words that begin a check and by n3 tokens of the large model; c and n3 then grow.

    After that the small model goes on. The large model reads what was written with its first token and keeps it read.

    `thinking_small` and `thinking_large` are either model alone, in the same format. `thinking_shuffled` takes over in as
    many texts of a round, which are drawn among those at a full stop: large tokens as many, places by chance.

    A rung bounds all tokens of both models over the batch, those forgotten too. It sets nothing else: a text that has ended
    leaves the rest.

    Differs from the paper: of its cue words this language has four, and `wait` is both a reflection and a check (the code's
    `verify`, `check`). n1 = 12, n2 = 24, n3 = 24 to 40 in steps of 5 and c = 3 to 6, for texts of some 60 tokens; in the
    authors' code 20, 125, 125 to 200 in steps of 25 and 15 to 30 in steps of 5, for thousands. The paper calls the words
    after too much reflection a prompt to conclude, its code writes that the steps are to be checked: so it is here. The code
    looks at the next n1 tokens of the small model and throws them away in any case; here a sentence without a cue stays,
    which is the same in distribution, and the look ends with the sentence.

    What limits it here: every sentence that checks something, right or wrong, is a cue, so that a text has few that are none
    once the result is told.
    """

    paper = Paper(
        id="speculative_thinking",
        title="Speculative Thinking: Enhancing Small-Model Reasoning with Large Model Guidance at Inference Time",
        authors="Wang Yang, Xiang Yue, Vipin Chaudhary, Xiaotian Han",
        year=2025,
        arxiv="2504.12329",
        code="uservan/speculative_thinking",
    )
    tasks = ("solve/sizes",)
    baselines = ("thinking_small", "thinking_large", "thinking_shuffled")
    claims = (
        Claim(
            "accuracy[speculative_thinking,128..512] > accuracy[thinking_small,128..512] "
            "and written[speculative_thinking,128..512] < written[thinking_small,128..512]",
            says="more answers are right than by the small model alone, in shorter texts (the paper: 89.4 for 83.2 %, 15.7 % "
            "fewer tokens)",
            headline=True,
        ),
        Claim(
            "large_evaluations[speculative_thinking,128..512] <= 0.3 * written[speculative_thinking,128..512]",
            says="at most three tokens in ten are the large model's",
            setting="a text has some 60 tokens, half of them checks; in the paper it has thousands",
        ),
        Claim(
            "large_evaluations[speculative_thinking,128..512] + 0.08 * small_evaluations[speculative_thinking,128..512] "
            "<= 0.67 * large_evaluations[thinking_large,128..512]",
            says="two thirds of the calls one after the other that the large model alone takes or fewer, those of the small "
            "model by their size (0.08 of a large one)",
        ),
        Claim(
            "accuracy[speculative_thinking,128..512] > accuracy[thinking_shuffled,128..512]",
            says="it matters where the large model writes, not only how much",
        ),
    )

    guided, writer, shuffled = True, "small", False
    variants = (
        Variant("thinking_small", says="the small model alone", guided=False, baselines=("thinking_large",)),
        Variant(
            "thinking_large", says="the large model alone", guided=False, writer="large", baselines=("thinking_small",)
        ),
        Variant("thinking_shuffled", says="as many takeovers, at full stops drawn by chance", shuffled=True),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question."""
        asked = prompts(batch, "<think>")
        if not self.guided:
            alone = Chains(session.networks[self.writer], asked)
            write(session, alone, list(range(len(asked))), MOST)
            return [alone.written(i) or [EOS] for i in range(len(asked))]
        small, large = (Chains(session.networks[role], asked) for role in ("small", "large"))
        reflected, patience, recap = [0] * len(asked), [PATIENCE] * len(asked), [RECAP] * len(asked)
        while True:
            going = [i for i in range(len(asked)) if not large.ended(i) and len(large.written(i)) < MOST]
            if not going or share(session, len(going)) < 1:
                return [large.written(i) or [EOS] for i in range(len(asked))]
            at_stop = [i for i in going if large.texts[i][-1] == STOP]
            tired = [i for i in at_stop if reflected[i] >= patience[i]]
            others = [i for i in going if i not in tired]
            for i in others:
                follow(small, i, large.written(i))
            drafts = dict(zip(others, write(session, small, others, TAKEOVER, (STOP,)), strict=True))
            taken = self.cued(session, {i: drafts[i] for i in others if i in at_stop})
            for i in others:
                if i not in taken:
                    large.put(i, drafts[i])
            checked = []
            for i, piece in zip(taken, write(session, large, taken, TAKEOVER), strict=True):
                reflected[i] += tone(piece) < 0
                if VERIFY & set(piece):
                    checked.append(i)
            write(session, large, checked, LONGER)
            for i in tired:
                large.put(i, RECAP_WORDS)
            write(session, large, tired, [recap[i] for i in tired])
            for i in tired:
                reflected[i] = 0
                patience[i] = min(patience[i] + MORE_PATIENCE, MOST_PATIENCE)
                recap[i] = min(recap[i] + MORE_RECAP, MOST_RECAP)

    def cued(self, session: Session, drafts: Mapping[int, Sequence[int]]) -> list[int]:
        """Those of the texts that the large model takes over, by what the small one would write in each."""
        found = [i for i, draft in drafts.items() if tone(draft)]
        if not self.shuffled:
            return found
        order = torch.randperm(len(drafts), generator=session.rng, device=session.device).tolist()
        return [list(drafts)[k] for k in order[: len(found)]]


def write(
    session: Session, chains: Chains, chosen: list[int], most: int | Sequence[int], stop: tuple[int, ...] = ()
) -> list[list[int]]:
    """The new tokens of the chosen texts, at most so many each and no more than are left for them."""
    each = share(session, len(chosen))
    limits = [most] * len(chosen) if isinstance(most, int) else most
    return chains.write(
        chosen,
        stop=stop,
        limit=[min(limit, each) for limit in limits],
        temperature=TEMPERATURE,
        top_p=TOP_P,
        generator=session.rng,
    )
