"""ProcBench: procedures whose every step is told, graded state by state (Fujisawa et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.carrying import END, NEXT, onward, told
from stepmark.tracks.reasoning.solving import left, prompts

MOST = 1_100  # tokens of a text, more than 25 states of 40 letters have
CALLS = 30  # steps that are asked for one by one, five more than any procedure has
STATE = 48  # tokens of a state, more than any has


class ProcBench(Method):
    """ProcBench: the whole procedure is told, so that nothing is left to find or to know; all intermediate states are
    asked for.

    With the gold states g_1 .. g_T and those of a text, s_1 .. s_S (section 3):

        PML = number of leading states that agree        PA = PML / max(T, S)
        SM  = 1 if PA = 1                                FM = 1 if s_S = g_T

    which the track records as `prefix` (PA), `valid` (SM, the text ended too) and `accuracy` (FM), all and by length:
    short (2 to 6 steps), medium (7 to 16), long (17 to 25). The method is one greedy text with all states.
    `procbench_direct` asks for the last state at once. `procbench_steps` asks for one step a call: the state stands in
    the place of the start and what is done of the procedure is left out, until the model says that nothing is left to
    do; counting has no such state and is done in one text. It writes no more tokens than one text, whatever it reads
    again. States have up to 40 letters, so that rungs below 1024 cut texts that would have been right, and the claims
    are at 1024, which holds them all.

    Differs from the paper: eight kinds of tasks like those among its 23, over letters and digits, in the words of this
    track: sorting moves a letter where the paper swaps two, a running sum keeps its last digit. What is to be done is
    a word that the model was trained on, not an instruction. A text is the states themselves, where the paper has a
    second model bring free text into a list of states. Asking for one step a call, and at once, are not the paper's: it
    asks each model once, for all states.

    What limits it here: the models were trained on up to 10 steps of these procedures. Beyond them what falls may be
    the length as such. A share of leading states also falls where each step is as sure as the one before, since one
    slip ends it sooner in a long procedure. Procedures of which some is done were
    in training too, as long as any here, with ten steps left at most, so that one step a call is nothing new.
    """

    paper = Paper(
        id="procbench",
        title="ProcBench: Benchmark for Multi-Step Reasoning and Following Procedure",
        authors="Ippei Fujisawa, Sensho Nobe, Hiroki Seto, Rina Onda, Yoshiaki Uchida, Hiroki Ikoma, Pei-Chun Chien, "
        "Ryota Kanai",
        year=2024,
        arxiv="2410.03117",
        code="ifujisawa/proc-bench",
    )
    tasks = ("carry/procedures",)
    baselines = ("procbench_direct", "procbench_steps")
    claims = (
        Claim(
            "prefix_short[procbench,1024] > prefix_medium[procbench,1024] > prefix_long[procbench,1024]",
            says="the more steps a procedure has, the smaller the share of them up to the first slip, though each is told",
            headline=True,
            setting="trained on these procedures up to 10 steps; the paper's models were trained on none",
        ),
        Claim(
            "accuracy_short[procbench,1024] > accuracy_medium[procbench,1024] > accuracy_long[procbench,1024]",
            says="and the fewer last states are right",
            setting="trained on these procedures up to 10 steps; the paper's models were trained on none",
        ),
        Claim(
            "accuracy_long[procbench_steps,1024] > accuracy_long[procbench_direct,1024] "
            "and accuracy_medium[procbench_steps,1024] > accuracy_medium[procbench_direct,1024]",
            says="step by step, a call for each, more last states are right than at once",
        ),
        Claim(
            "prefix_medium[procbench_steps,1024] > prefix_medium[procbench,1024]",
            says="one step a call keeps to a procedure over more of it than one text does",
        ),
    )
    form, calls = "<states>", "one"
    variants = (
        Variant("procbench_direct", says="the last state at once", form="<last>"),
        Variant("procbench_steps", says="one step a call", calls="each"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The states of each procedure, or the last one."""
        if self.calls != "one":
            return self.step_by_step(session, batch, rung)
        chains = Chains(session.networks["model"], prompts(batch, self.form))
        chains.write(limit=min(left(session, batch), MOST))
        return [chains.written(i) for i in range(len(chains))]

    def step_by_step(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One state a call, of all procedures side by side; of those that cannot go on from a state one text."""
        asked = [decode(question) for question in batch["question"]]
        states: list[list[str]] = [[] for _ in asked]
        room, ended = [rung] * len(asked), [False] * len(asked)
        whole = [i for i, each in enumerate(asked) if onward(each, "") is None]
        chains = Chains(session.networks["model"], [encode(f"{asked[i]} {self.form}") for i in whole])
        chains.write(limit=min(rung, MOST))
        texts = {i: chains.written(k) for k, i in enumerate(whole)}
        going = [i for i in range(len(asked)) if i not in texts]
        for _ in range(CALLS):
            going = [i for i in going if room[i] > 0]
            chains = Chains(session.networks["model"], [encode(f"{asked[i]} {self.form}") for i in going])
            new = chains.write(stop=(NEXT,), limit=[min(STATE, room[i]) for i in going])
            still = []
            for i, words in zip(going, new, strict=True):
                room[i] -= len(words)
                state = decode([word for word in words if word != NEXT])
                ended[i] = state == END
                if not state or ended[i] or words[-1] not in (NEXT, EOS):
                    continue  # the model says that nothing is left to do, or nothing that could be gone on from
                states[i].append(state)
                following = onward(asked[i], state)
                if following is not None:
                    asked[i] = following
                    still.append(i)
            going = still
        return [texts[i] if i in texts else told(states[i], ended[i]) for i in range(len(asked))]
