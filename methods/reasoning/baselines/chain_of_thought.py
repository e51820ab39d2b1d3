"""Chain of thought: the steps in words, then the answer, at the likeliest token each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import left, prompts


class ChainOfThought(Method):
    """One greedy text a question in a format of its own (Wei et al. 2022): `form`.

    `direct_answer` asks for the answer at once, `prose_cot` for steps in sentences, `long_thinking` for steps that are
    checked again; `proof_cot` and `direct_verdict` are the same for deduction, `know_cot`, `know_direct`, `know_exclude` and
    `know_verify` for what is known by heart; `small_alone` and `large_alone` let another size of the model write. What a
    rung holds beyond the end of a text is left.
    """

    tasks = ("solve/problems", "solve/problems_deep", "solve/countdown", "solve/game24")
    form, role = "<cot>", "model"
    variants = (
        Variant(
            "direct_answer", says="the answer at once", form="<dir>", tasks=("solve/problems", "solve/problems_deep")
        ),
        Variant(
            "prose_cot", says="the steps in sentences", form="<prose>", tasks=("solve/problems", "solve/problems_deep")
        ),
        Variant(
            "long_thinking",
            says="steps that are checked again",
            form="<think>",
            tasks=("solve/problems", "solve/problems_deep"),
        ),
        Variant(
            "proof_cot",
            says="a proof, then the answer",
            form="<proof>",
            tasks=("deduce/chains", "deduce/dense", "deduce/deep"),
        ),
        Variant(
            "direct_verdict",
            says="true or false at once",
            form="<dir>",
            tasks=("deduce/chains", "deduce/dense", "deduce/deep"),
        ),
        Variant(
            "know_cot",
            says="facts, then the answer",
            tasks=(
                "know/hops",
                "know/could",
                "know/years",
                "know/claims",
                "know/odd",
                "know/options",
                "know/make",
            ),
        ),
        Variant(
            "know_direct",
            says="the answer at once, of what is known by heart",
            form="<dir>",
            tasks=(
                "know/hops",
                "know/could",
                "know/years",
                "know/claims",
                "know/odd",
                "know/options",
                "know/make",
            ),
        ),
        Variant(
            "know_exclude", says="what each option has to do with a law", form="<exclude>", tasks=("know/options",)
        ),
        Variant("know_verify", says="a chain judged step by step in one text", form="<verify>", tasks=("know/chains",)),
        Variant("walk_cot", says="a walk, move by move", tasks=("navigate/paths", "navigate/deep")),
        Variant("small_alone", says="the small model alone", role="small"),
        Variant("large_alone", says="the large model alone", role="large"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Greedy texts of at most `rung` tokens."""
        chains = Chains(session.networks[self.role], prompts(batch, self.form))
        chains.write(limit=min(left(session, batch), 300))
        return [chains.written(i) for i in range(len(chains))]
