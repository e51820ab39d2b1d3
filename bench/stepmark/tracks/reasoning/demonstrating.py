"""What methods share that put worked examples before a question: examples, people's own questions, what a model writes of
them, clusters of questions.

What stands before the questions about a person is the same for all of them and comes from `prepare`: `kept` makes tensors of it,
`prompts` puts it in front. The row that reads a prompt gives the first token, however much stands in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import PAD, Reasoner, encode
from stepmark.task import Task

SIDE = 64  # texts that are written side by side
OWN = {
    "shown/bare": "bare",
    "shown/told": "told",
    "shown/wishes": "told",
}  # kind of a person's own questions, else mixed


class Shown(NamedTuple):
    """A worked example: a question, the word that asks for the text, the text, and what is said of it, if anything."""

    question: str
    form: str
    text: str
    mark: str = ""


def together(examples: Sequence[Shown]) -> list[int]:
    """Token ids of examples one after the other, each closed by ``|``."""
    return [token for each in examples for token in encode(f"{' '.join(each)} |")]


def owned(train: Mapping[str, Any], task: Task) -> dict[str, list[int]]:
    """Rows of the train split by person, of the kind of questions that the task asks."""
    kind, found = OWN.get(task.id, "mixed"), dict[str, list[int]]()
    for row, (name, pool) in enumerate(zip(train["name"], train["pool"], strict=True)):
        if pool == kind:
            found.setdefault(name, []).append(row)
    return found


def kept(before: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """What stands before the questions about each person, as tensors: {"name": int64 [P], "before": int64 [P, L], padded}."""
    longest = max(1, *map(len, before.values()))
    rows = [[*ids, *[PAD] * (longest - len(ids))] for ids in before.values()]
    names = [encode(name)[0] for name in before]
    return {"name": torch.tensor(names), "before": torch.tensor(rows)}


def standing(state: Mapping[str, Tensor]) -> dict[int, list[int]]:
    """By a person's token, what `kept` has kept."""
    rows = [[token for token in row if token != PAD] for row in state["before"].tolist()]
    return dict(zip(state["name"].tolist(), rows, strict=True))


def prompts(state: Mapping[str, Tensor], batch: Mapping[str, Any], form: str) -> list[list[int]]:
    """The questions, each behind what stands before those about its person, with the word that chooses a format."""
    before, word = standing(state), encode(form)
    return [[*before.get(question[0], []), *question, *word] for question in batch["question"]]


def written(
    model: Reasoner,
    asked: Sequence[Sequence[int]],
    limit: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """What a model writes behind prompts, `SIDE` of them at a time."""
    found = []
    for start in range(0, len(asked), SIDE):
        chains = Chains(model, asked[start : start + SIDE])
        chains.write(limit=limit, temperature=temperature, generator=generator)
        found += [chains.written(i) for i in range(len(chains))]
    return found


def embedded(model: Reasoner, texts: Sequence[Sequence[int]]) -> Tensor:
    """Means over the tokens of a model's final states, of length 1: [N, D], a row of a call for each text."""
    found = []
    for start in range(0, len(texts), SIDE):
        part = texts[start : start + SIDE]
        longest = max(map(len, part))
        ids = torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in part], device=model.device)
        there = torch.tensor([[float(k < len(text)) for k in range(longest)] for text in part], device=model.device)
        states = model(ids, states=True)
        found.append((states * there[..., None]).sum(1) / there.sum(1, keepdim=True))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def clusters(points: Tensor, count: int, generator: torch.Generator, rounds: int = 50) -> list[list[int]]:
    """k-means (Lloyd) of points [N, D] from centres that are drawn far apart (k-means++): at most `count` clusters, none of
    them empty, of each the numbers of its points from its centre outwards."""
    centres = points[torch.randint(len(points), (1,), generator=generator, device=points.device)]
    while len(centres) < min(count, len(points)):
        far = torch.cdist(points, centres).amin(1) ** 2
        if not bool((far > 0).any()):  # all points are among them
            break
        drawn = torch.multinomial(far, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
    for _ in range(rounds):
        of = torch.cdist(points, centres).argmin(1)
        moved = torch.stack(
            [points[of == k].mean(0) if bool((of == k).any()) else centres[k] for k in range(len(centres))]
        )
        if torch.allclose(moved, centres):
            break
        centres = moved
    distances = torch.cdist(points, centres)
    of = distances.argmin(1).tolist()
    return [
        sorted(own, key=lambda i: float(distances[i, k]))
        for k in range(len(centres))
        if (own := [i for i, cluster in enumerate(of) if cluster == k])
    ]
