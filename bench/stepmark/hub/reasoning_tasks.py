"""The task that is made from a folder with a language model and `--reasoning`: questions of the reasoning track, in English."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stepmark.hub.choice import PREFIX, Choice, Made, Part
from stepmark.hub.prompts import has_tokenizer
from stepmark.hub.text_tasks import longest
from stepmark.task import DTYPES, Task, load_split, scored_as

if TYPE_CHECKING:
    from stepmark.hub.spoken import Speech

RUNGS, ITEMS = (64, 256), 16
SIDE = 4  # questions of a call: each may have dozens of texts, which are kept side by side
TEXTS = 400  # tokens of a text at most
# By language: how the ids begin of tasks of Stepmark's own whose methods apply, and what is said of it.
FAMILIES = {
    "problems": (("solve/problems",), "Arithmetic word problems of 2 to 5 steps"),
    "countdown": (("solve/countdown", "solve/game24"), "Countdown with three and four numbers"),
    "deduction": (("deduce/",), "True or false by 1 to 5 rules of the prompt"),
}
ABSENT = {
    **dict.fromkeys(
        ("process", "outcome"), "needs a verifier that was trained on texts, and a checkpoint folder brings none"
    ),
    **dict.fromkeys(("small", "large"), "needs a second size of the model, and one checkpoint is one"),
}


def made_from(choice: Choice, part: Part) -> Made:
    """The task of reasoning with a language model.

    Raises:
        ValueError: it cannot be measured, or not as it was chosen. One line that names the mend.
    """
    others = {"--draft": choice.draft, "--prompts": choice.prompts, "--chat": choice.chat,
              "--temperature": choice.temperature, "--new-tokens": choice.new_tokens}  # fmt: skip
    for option, value in others.items():
        if value:
            raise ValueError(f"{option} is for decoding: --reasoning has questions and texts of its own; leave one out")
    if choice.guidance != 1:
        raise ValueError(f"--guidance is for images; {part.kind} writes text")
    if not has_tokenizer(part.folder):
        raise ValueError(f"{part.folder} has no tokenizer.json to read --reasoning {choice.reasoning} with; add it")
    family, summary = FAMILIES[str(choice.reasoning)]
    items, rungs = choice.items or ITEMS, choice.rungs or RUNGS
    short = f" in {choice.dtype}" if choice.dtype != DTYPES[0] else ""
    task = Task(
        id=choice.id,
        version=1,
        summary=f"{summary} by {part.kind} in {Path(choice.folder).name}{short}, {items} questions in English",
        dataset="checkpoint",
        backbones={"model": f"{PREFIX}target"},
        reference="model",
        bounded=("model",),
        rungs=rungs,
        n=items,
        batch=SIDE,
        probe=1,
        seeds=1,
        smoke_n=min(items, 2),
        smoke_rungs=rungs[:1],
        module="stepmark.hub.reasoning",
        follows=str(choice.reasoning),
        absent=ABSENT,
        **scored_as("reasoning", choice.id),
    )
    return Made(choice, "reasoning", task, {"target": part}, {}, "text", family)


def fit(made: Made, speech: Speech) -> None:
    """Raise ValueError where questions, worked examples and texts are more than the model sees at once."""
    from stepmark.backbones.reasoners import encode
    from stepmark.hub.english import FORMS

    asked = max((encode(question) for question in load_split(speech.language, "test")["question"]), key=len)
    prompt = max(len(speech.prompt((*asked, *encode(form)))) for form in FORMS[speech.language])
    room, seen = min(max(made.task.rungs), TEXTS), longest(made.parts["target"])
    if prompt + room > seen:
        raise ValueError(
            f"{made.parts['target']}: {prompt} tokens of worked examples and a question, and {room} new ones, are more than "
            f"the {seen} that it sees at once; take a model of a longer context, or a lesser --rung"
        )
