"""What methods share that put worked examples before a question: examples, people's own questions, what a model writes
of them, clusters of questions.

What stands before the questions about a person is mostly the same for all of them and comes from `prepare`: `kept`
makes tensors of it, `prompts` puts it in front. Where each question has examples chosen for it, `shelved` keeps them
all and `picked` puts the chosen ones in front. The row that reads a prompt gives the first token, however much stands
in it. What stands below *bounds* is known to nobody who has not seen all; a method that asks for it has to say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, PAD, STOP, Reasoner, decode, encode
from stepmark.datasets import demonstrations
from stepmark.datasets.demonstrations import listed as listed
from stepmark.datasets.demonstrations import misworked as misworked
from stepmark.datasets.demonstrations import rules_of as rules_of
from stepmark.session import Session
from stepmark.task import Task
from stepmark.tracks.reasoning.solving import CHAIN, left, write_chains

SIDE = 64  # texts that are written side by side
MOST = 2 * CHAIN  # most tokens of a text
LONGEST_QUESTION, MOST_SENTENCES = 60, 5  # of what Auto-CoT shows
# By task the kind of people's own questions, else mixed.
OWN = {"shown/bare": "bare", "shown/told": "told", "shown/wishes": "told"}


class Shown(NamedTuple):
    """A worked example: a question, the word that asks for the text, the text, and what is said of it beforehand, if
    anything."""

    question: str
    form: str
    text: str
    mark: str = ""


class Worked(NamedTuple):
    """An own question as the model works it, its place among all, and whether it passes the filters of
    `presentable`."""

    shown: Shown
    point: Tensor
    fine: bool


def together(examples: Sequence[Shown]) -> list[int]:
    """Token ids of examples one after the other, each closed by ``|``."""
    return [token for each in examples for token in encode(f"{each.question} {each.form} {each.mark} {each.text} |")]


def owned(train: Mapping[str, Any], task: Task) -> dict[str, list[int]]:
    """Rows of the train split by person, of the kind of questions that the task asks."""
    kind, found = OWN.get(task.id, "mixed"), dict[str, list[int]]()
    for row, (name, pool) in enumerate(zip(train["name"], train["pool"], strict=True)):
        if pool == kind:
            found.setdefault(name, []).append(row)
    return found


def stacked(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids as a tensor int64 [N, L], padded, L at least 1."""
    longest = max([1, *map(len, rows)])
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], dtype=torch.long)


def unstacked(rows: Tensor) -> list[list[int]]:
    """The rows of `stacked` without what pads them."""
    return [[token for token in row if token != PAD] for row in rows.tolist()]


def kept(before: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """What stands before the questions about each person, as tensors: {"name": int64 [P], "before": int64 [P, L],
    padded}."""
    names = [encode(name)[0] for name in before]
    return {"name": torch.tensor(names), "before": stacked(list(before.values()))}


def standing(state: Mapping[str, Tensor]) -> dict[int, list[int]]:
    """By a person's token, what `kept` has kept."""
    return dict(zip(state["name"].tolist(), unstacked(state["before"]), strict=True))


def prompts(state: Mapping[str, Tensor], batch: Mapping[str, Any], form: str) -> list[list[int]]:
    """The questions, each behind what stands before those about its person, with the word that chooses a format."""
    before, word = standing(state), encode(form)
    return [[*before.get(question[0], []), *question, *word] for question in batch["question"]]


def shelved(examples: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Tensor]:
    """Examples by person, among which `run` chooses, as tensors: {"owner": int64 [N], "example": int64 [N, L], padded},
    in their order."""
    rows = [example for own in examples.values() for example in own]
    owners = [encode(name)[0] for name, own in examples.items() for _ in own]
    return {"owner": torch.tensor(owners), "example": stacked(rows)}


def picked(
    state: Mapping[str, Tensor], batch: Mapping[str, Any], form: str, choose: Callable[[int, list[int]], Sequence[int]]
) -> list[list[int]]:
    """The questions, each behind the examples chosen for it, with the word that chooses a format. `choose`: (number of
    the question, numbers of the examples of its person) -> some of these, in the order in which they stand."""
    word, shelf, own = encode(form), unstacked(state["example"]), dict[int, list[int]]()
    for number, owner in enumerate(state["owner"].tolist()):
        own.setdefault(owner, []).append(number)
    return [
        [*(token for k in choose(i, own.get(question[0], [])) for token in shelf[k]), *question, *word]
        for i, question in enumerate(batch["question"])
    ]


def greedy(session: Session, batch: Mapping[str, Any], asked: Sequence[Sequence[int]]) -> list[list[int]]:
    """One text behind each prompt, at the likeliest token each; what a rung holds beyond its end is left."""
    chains = Chains(session.networks["model"], asked)
    chains.write(limit=min(left(session, batch), MOST))
    return [chains.written(i) for i in range(len(chains))]


def sampled(
    session: Session, batch: Mapping[str, Any], asked: Sequence[Sequence[int]], temperature: float
) -> list[list[list[int]]]:
    """Texts behind each prompt, a further one for all of them while each may still have `CHAIN` tokens; the first may
    be cut."""
    first = Chains(session.networks["model"], asked)
    first.read()  # the prompts are read once for all texts
    found: list[list[list[int]]] = [[] for _ in asked]
    while not found[0] or left(session, batch) >= CHAIN:
        chains = first.take(range(len(asked)))
        write_chains(session, chains, min(CHAIN, left(session, batch) + 1), temperature)
        for i, texts in enumerate(found):
            texts.append(chains.written(i))
    return found


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
    """k-means (Lloyd) of points [N, D] from centres that are drawn far apart (k-means++): at most `count` clusters,
    none of them empty, of each the numbers of its points from its centre outwards."""
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


# -- what a model makes of people's own questions -------------------------------------------------------------------


def sentences(text: Sequence[int]) -> int:
    """Full stops of a text: its steps, and what is said between them."""
    return list(text).count(STOP)


def self_worked(session: Session, most: int, form: str) -> dict[str, Tensor]:
    """At most so many of each person's own questions, worked by the model with nothing before them, at the likeliest
    token each (zero-shot chain of thought): {"row": int64 [N], numbers in the train split, "text": int64 [N, L],
    padded, "point": [N, D], the question's place among all}. For `session.once`."""
    train, model = session.train, session.networks["model"]
    rows = [row for own in owned(train, session.task).values() for row in own[:most]]
    questions, word = [encode(train["question"][row]) for row in rows], encode(form)
    texts = written(model, [[*question, *word] for question in questions], MOST)
    points = embedded(model, questions)
    return {"row": torch.tensor(rows), "text": stacked(texts), "point": points}


def presentable(question: Sequence[int], text: Sequence[int]) -> bool:
    """The filters of Auto-CoT: a question of at most 60 tokens, a text of at most 5 sentences that has ended, with an
    answer to which its last sentence leads. Whether it is right nobody asks."""
    steps, there, answer = decode(text).rpartition("ans ")
    fine = len(question) <= LONGEST_QUESTION and 1 <= sentences(text) <= MOST_SENTENCES and text[-1] == EOS
    return fine and bool(there) and len(answer.split()) == 1 and answer in steps.split(".")[-2].split()[-1:]


def self_shown(session: Session, most: int, form: str) -> dict[str, list[Worked]]:
    """Each person's own questions as the model works them, at most so many."""
    train, found = session.train, dict[str, list[Worked]]()
    worked = session.once(self_worked, most, form)
    for row, text, point in zip(worked["row"].tolist(), unstacked(worked["text"]), worked["point"], strict=True):
        question = train["question"][row]
        shown = Shown(question, form, decode(text))
        found.setdefault(train["name"][row], []).append(Worked(shown, point, presentable(encode(question), text)))
    return found


def representatives(session: Session, most: int, form: str, count: int) -> dict[str, list[Shown]]:
    """By person, what Auto-CoT shows: own questions fall into `count` clusters, and of each the first from its centre
    outwards that passes the filters stands for it, with the model's own text; a cluster of which none passes has
    none."""
    found = {}
    for name, own in self_shown(session, most, form).items():
        groups = clusters(torch.stack([each.point for each in own]), count, session.rng)
        found[name] = [own[first].shown for group in groups for first in [i for i in group if own[i].fine][:1]]
    return found


def signs_of(question: str) -> tuple[str, ...]:
    """The signs that a digit goes through."""
    return demonstrations.read(question).signs


# -- bounds ----------------------------------------------------------------------------------------------------------


def restarted(question: str, start: int) -> str:
    """A question worked step by step, rightly, from another digit than it asks about."""
    asked = replace(demonstrations.read(question), start=start)
    return demonstrations.solution(asked, demonstrations.people()[asked.name].readings, "single")


def true_rules(name: str) -> list[tuple[str, str]]:
    """How somebody reads each sign."""
    readings = demonstrations.people()[name].readings
    return [(sign, demonstrations.READINGS[reading]) for sign, reading in readings.items()]


def wish_of(name: str) -> str:
    """What somebody wants of an answer."""
    return demonstrations.people()[name].wish
