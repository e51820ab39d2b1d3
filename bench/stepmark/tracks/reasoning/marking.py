"""What a text is worth on deduction, worked examples, analogies, procedures, programs and walks: by metric of the task, NaN
where a metric is of other questions only."""

from __future__ import annotations

from stepmark.task import Task

NONE = float("nan")
FEW = 6  # lines of a trace, half of the most that a model has seen


def deduced(task: Task, question: str, text: str) -> dict[str, float]:
    """Of a proof. It is misled where its first step off the proof is a valid one."""
    from stepmark.datasets import deduction

    asked = deduction.read(question)
    seen = deduction.check(asked, text)
    count, depth = max(1, len(seen.steps)), len(deduction.proof(asked)) - 1
    valid, dead = float(seen.valid), len(asked.statements) - 2 * (depth + 1)
    misled = next((fine for fine, straight in zip(seen.steps, seen.straight, strict=True) if not straight), False)
    return {
        "accuracy": float(seen.right),
        "answered": float(deduction.answer_of(text) is not None),
        "valid": valid,
        "steps": sum(seen.steps) / count,
        "straight": sum(seen.straight) / count,
        "misled": float(misled),
        "detoured": valid * misled,
        **{f"valid_depth{rules}": valid if depth == rules else NONE for rules in (1, 5)},
        **{f"valid_dead{statements}": valid if dead == statements else NONE for statements in (2, 4)},
    }


def shown(task: Task, question: str, text: str) -> dict[str, float]:
    """Of a text about signs. On wishes an answer is accurate that is right and has what is wanted, and nothing else besides."""
    from stepmark.datasets import demonstrations

    asked = demonstrations.read(question)
    who = demonstrations.people()[asked.name]
    seen = demonstrations.check(asked, text, who.readings)
    answered, right = float(demonstrations.answer_of(text) is not None), float(seen.right)
    if task.id == "shown/wishes":
        traits = demonstrations.traits_of(text)
        return {
            "accuracy": float(seen.right and traits == {who.wish}),
            "answered": answered,
            "right": right,
            "wished": float(who.wish in traits),
            "needless": float(len(traits - {who.wish})),
        }
    found = {"accuracy": right, "answered": answered, "valid": float(seen.valid), "lines": float(len(seen.steps))}
    if task.id == "shown/mixed":
        found["coarse"] = right if asked.signs[0] in demonstrations.FAMILIES[0] else NONE
    if task.id == "shown/told":
        count = len(asked.signs)
        found["easy"] = right if count <= 2 else NONE
        found["hard"] = right if count >= 5 else NONE
        found["bridging"] = demonstrations.shared(asked, text, who.readings)
    return found


def inferred(task: Task, question: str, text: str) -> dict[str, float]:
    """Of an answer to an analogy."""
    from stepmark.datasets import analogies

    asked, seen = analogies.read(question), analogies.check(question, text)
    right, depth = float(seen.right), len(analogies.rule_of(question))
    cells = {f"{kind}_{name}": (kind, count) for kind in analogies.KINDS for name, count in (("easy", 1), ("hard", 3))}
    return {
        "accuracy": right,
        "answered": float(analogies.answer_of(text) is not None),
        "fits": float(seen.fits),
        **{name: right if cell == (asked.kind, depth) else NONE for name, cell in cells.items()},
        "free": NONE if asked.options else right,
        "choice": right if asked.options else NONE,
    }


def carried_out(task: Task, question: str, text: str) -> dict[str, float]:
    """Of the states of a procedure: accuracy of the last one, valid where all are right, prefix the share that lead."""
    from stepmark.datasets import procedures

    right, said, gold = procedures.prefix(question, text)
    end = float(procedures.said(text)[-1:] == procedures.states(question)[-1:])
    share, ended = right / max(said, gold), text.split()[-1:] == ["end"]
    buckets = {"short": procedures.SHORT, "medium": procedures.MEDIUM, "long": procedures.LONG}
    return {
        "accuracy": end,
        "answered": float(ended),
        "valid": float(right == said == gold and ended),
        "prefix": share,
        **{f"accuracy_{name}": end if gold in steps else NONE for name, steps in buckets.items()},
        **{f"prefix_{name}": share if gold in steps else NONE for name, steps in buckets.items()},
    }


def traced(task: Task, question: str, text: str) -> dict[str, float]:
    """Of the trace of a program: accuracy of what is asked for, valid where every line is right too."""
    from stepmark.datasets import traces

    right, gold, whole = traces.check(question, text)
    source, _, name = question.partition(" ? ")
    answer = float(text.split(" ; ")[-1] == traces.solution(source, name, "<last>"))
    return {
        "accuracy": answer,
        "answered": float("ans " in text),
        "valid": float(whole),
        "prefix": right / gold,
        "valid_trained": float(whole) if gold in traces.TRAINED else NONE,
        "valid_longer": float(whole) if gold in traces.LONGER else NONE,
        "valid_few": float(whole) if gold <= FEW else NONE,
        "valid_many": float(whole) if gold > FEW and gold in traces.TRAINED else NONE,
    }


def walked(task: Task, question: str, text: str) -> dict[str, float]:
    """Of a walk."""
    from stepmark.datasets import navigation

    seen = navigation.check(question, text)
    return {
        "accuracy": float(seen.arrives),
        "shortest": float(seen.shortest),
        "valid": float(bool(seen.moves) and all(seen.moves)),
        "answered": float(seen.ends),
    }


MARKS = {
    "deduction": deduced,
    "demonstrations": shown,
    "analogies": inferred,
    "procedures": carried_out,
    "traces": traced,
    "navigation": walked,
}
