"""From a choice to its task: whatever differs from a task of Stepmark's own is said in the fields of `Task`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stepmark.hub import digests, image_tasks, reasoning_tasks, text_tasks
from stepmark.hub.choice import Choice, Made
from stepmark.hub.folders import IMAGE_CLASSES, network_in

ABSENT = {
    "draft": "needs a draft model: give one with --draft FOLDER",
    "*": "needs a network that a checkpoint folder does not bring",
}
UNTRAINED = "needs training data, and a checkpoint folder brings none"


def made_from(choice: Choice) -> Made:
    """What is made of a choice, from configurations and digests alone.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be used. One line that names the mend.
    """
    folder = Path(choice.folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--backbone {folder} is no folder; download the checkpoint first, Stepmark itself asks no network"
        )
    part = network_in(folder)
    if choice.reasoning and part.kind in IMAGE_CLASSES:
        raise ValueError(f"--reasoning is for language models; {part.kind} makes images")
    texts = reasoning_tasks if choice.reasoning else text_tasks
    made = (image_tasks if part.kind in IMAGE_CLASSES else texts).made_from(choice, part)
    task = replace(
        made.task,
        words=choice.words,
        checkpoint=digests.of_checkpoint(made),
        origin=made.task.summary,
        absent=ABSENT | made.task.absent,
        untrained=UNTRAINED,
        shown=made.track == "decoding",  # latents are not to look at
    )
    return replace(made, task=task)
