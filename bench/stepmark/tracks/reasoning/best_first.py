"""Best-first search over the steps of chains of thought, guided by a verifier, for all questions of a batch side by side.

A node is a chain up to the end of one of its steps. The search takes the node of least cost, samples some next steps of it,
has them judged, and goes on with the node that now costs least, which may lie on another branch. What a node costs is the
paper's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.session import Session
from stepmark.tracks.reasoning import oracles
from stepmark.tracks.reasoning.solving import CHAIN, STEP, judged, prompts, write_step

LONGEST = 2 * CHAIN  # tokens after which a chain is not branched any more
FRONTIER = 16  # nodes of a question that are kept, those of least cost
TEMPERATURE = 0.7


@dataclass
class Node:
    """A chain up to the end of one of its steps.

    Attributes:
        text: what was written, without the prompt.
        copies: how often its last step was drawn from its parent.
        worth: what the verifier says of it, 0 to 1. Nothing stands in the question alone: 0. A chain that has ended keeps
            what it was worth before its answer.
        carried, cost: what the rule sums up on the way, and what it chooses by.
    """

    text: list[int]
    copies: int = 1
    worth: float = 0.0
    carried: float = 0.0
    cost: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether it ends with the end-of-sequence token."""
        return self.text[-1:] == [EOS]


Rule = Callable[[Node, list[Node]], None]  # (parent, its children): sets `carried` and `cost` of the children


def search(
    session: Session,
    batch: Mapping[str, Any],
    rung: int,
    spread: int,
    rule: Rule,
    judge: str,
) -> list[list[int]]:
    """The first finished chain of each question that is the node of least cost.

    A question may spend `rung` rows, whatever others leave. Each expansion draws `spread` next steps; equal ones are one
    node. A chain is read anew when it is written on: that is a row, as its last token would be. Where so many branches do
    not fit any more, beside what is kept for writing one chain to its end, there are fewer. Where not even two fit, the best
    finished chain is returned, or, if there is none, the best node is written to its end.

    Args:
        judge: "process": the verifier; "coin": random numbers; "exact": whether all steps are right, worked out from the
            question (a bound).
    """
    model, asked = session.networks["model"], prompts(batch, "<cot>")
    frontiers = [[Node([])] for _ in asked]
    spent, searching = [0] * len(asked), list(range(len(asked)))
    while True:
        jobs: list[tuple[int, Node, int]] = []
        for question in searching:
            best = min(frontiers[question], key=_order)
            width = min(spread, (rung - spent[question] - max(STEP, CHAIN - len(best.text))) // STEP)
            if best.ended or len(best.text) >= LONGEST or width < 2:
                finished = [node for node in frontiers[question] if node.ended]
                frontiers[question] = [min(finished, key=_order, default=best)]
            else:
                frontiers[question].remove(best)
                jobs.append((question, best, width))
        searching = [question for question, _, _ in jobs]
        if not jobs:
            break
        parents = Chains(model, [[*asked[question], *node.text] for question, node, _ in jobs])
        chains = parents.take([i for i, (_, _, width) in enumerate(jobs) for _ in range(width)])
        written = iter(write_step(chains, None, session, TEMPERATURE))
        families = []
        for question, parent, width in jobs:
            steps = [next(written) for _ in range(width)]
            spent[question] += 1 + sum(len(step) - 1 for step in steps)  # the parent's row gives all first tokens
            families.append(_children(parent, steps))
        _judge(
            session,
            [(asked[job[0]], node) for job, family in zip(jobs, families, strict=True) for node in family],
            judge,
        )
        for (question, parent, _), family in zip(jobs, families, strict=True):
            rule(parent, family)
            frontiers[question] = sorted([*family, *frontiers[question]], key=_order)[:FRONTIER]
    last = [nodes[0].text for nodes in frontiers]
    chains = Chains(model, [[*prompt, *text] for prompt, text in zip(asked, last, strict=True)])
    rest = [max(0, min(CHAIN, rung - rows)) for rows in spent]
    new = chains.write(limit=rest, temperature=TEMPERATURE, generator=session.rng)
    return [[*text, *more] or [EOS] for text, more in zip(last, new, strict=True)]


def _order(node: Node) -> tuple[float, bool, int]:
    """The least cost; of equal ones a finished chain, then the longest."""
    return node.cost, not node.ended, -len(node.text)


def _children(parent: Node, steps: Sequence[Sequence[int]]) -> list[Node]:
    """The different chains among those that go on with these steps."""
    found: dict[tuple[int, ...], Node] = {}
    for step in steps:
        if tuple(step) in found:
            found[tuple(step)].copies += 1
        else:
            found[tuple(step)] = Node([*parent.text, *step], worth=parent.worth)
    return list(found.values())


def _judge(session: Session, nodes: Sequence[tuple[list[int], Node]], judge: str) -> None:
    """Set what new nodes (prompt, node) are worth."""
    going = [(prompt, node) for prompt, node in nodes if not node.ended]
    if judge == "exact":
        for prompt, node in nodes:
            node.worth = float(oracles.sound(prompt[:-1], node.text, node.ended))
    elif judge == "coin":
        drawn = torch.rand(len(going), generator=session.rng, device=session.device).tolist()
        for (_, node), worth in zip(going, drawn, strict=True):
            node.worth = worth
    elif going:
        said = judged(session.networks["process"], [[*prompt, *node.text] for prompt, node in going])
        for (_, node), worth in zip(going, said, strict=True):
            node.worth = worth
