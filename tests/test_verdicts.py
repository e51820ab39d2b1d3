"""Verdicts from records: spans of rungs, trainings, arms, times that were taken in turns, and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rigs.records import few_seeds
from stepmark.leaderboard.groups import paired
from stepmark.leaderboard.rows import index, rows_of
from stepmark.leaderboard.verdicts import Arm, judge, spent, tally, unequal, verdicts

from stepmark import __version__, check, claims, plugins
from stepmark.claims import Span
from stepmark.literals import MethodInfo
from stepmark.method import Claim, Paper
from stepmark.record import Latency, Offline, Quality, Record

TASK = "sampling/mixtures_eps"
RUNGS = plugins.tasks()[TASK][1].rungs
ALONE = {"usable_cores": "2", "logical_cores": "2"}


def record(method: str, rung: int, value: float, seed: int = 0, **fields: Any) -> Record:
    shared = np.random.default_rng(seed).normal(0, 0.01, 100)
    full: dict[str, Any] = {
        "suite": __version__,
        "track": "image",
        "method": method,
        "task": TASK,
        "rung": rung,
        "seed": seed,
        "tier": "embedded",
        "machine": "test-cpu",
        "status": "ok",
        "quality": {"sliced_w2": Quality(value=value, resamples=[value * (1 + float(x)) for x in shared])},
        "offline": Offline(seconds=0.0, evaluations={}, state_mib=0.0, updates=0.0),
        "environment": ALONE,
        "command": "stepmark run",
        "created": "2031-01-02T03:04:05Z",
    }
    return Record(**(full | fields))


def info(*stated: Claim) -> MethodInfo:
    return MethodInfo("fast", "image", Path("fast.py"), "Fast", "", None, (TASK,), ("base",), stated)


def verdict(records: Sequence[Record], claim: str, **fields: Any) -> claims.Verdict:
    found = index(rows_of(records, plugins.tasks()))
    stated = Claim(claim, says="a claim", **fields)
    return judge(stated, info(stated), next(iter(found))[0], found)


def ladder(method: str, values: Sequence[float], seeds: Sequence[int] = (0, 1, 2), **fields: Any) -> list[Record]:
    return [record(method, r, v, s, **fields) for r, v in zip(RUNGS, values, strict=False) for s in seeds]


def test_a_span_holds_where_it_holds_at_each_rung() -> None:
    better, worse = [1.0, 0.8, 0.6, 0.4], [2.0, 1.8, 1.6, 1.4]
    records = [*ladder("fast", better), *ladder("base", worse)]
    found = verdict(records, "sliced_w2[fast,*] < sliced_w2[base,*]")
    assert found.state == "reproduced"
    assert found.notes[0] == f"*: at each of the rungs {', '.join(map(str, RUNGS[:4]))}"
    records = [*ladder("fast", [*better[:3], 9.0]), *ladder("base", worse)]
    assert verdict(records, "sliced_w2[fast,*] < sliced_w2[base,*]").state == "not reproduced", "one rung is enough"
    claim = f"sliced_w2[fast,{RUNGS[0]}..{RUNGS[2]}] < sliced_w2[base,{RUNGS[0]}..{RUNGS[2]}]"
    assert verdict(records, claim).state == "reproduced", "which lies outside this span"
    assert verdict(records, f"sliced_w2[fast,{RUNGS[0]}..{RUNGS[4]}] < 99").state == "not run", "a rung has no record"
    assert verdict(records[:3], "sliced_w2[fast,*] < sliced_w2[base,*]").state == "not run", "no rung in common"
    mixed = f"sliced_w2[fast,*] < sliced_w2[base,{RUNGS[0]}]"
    assert verdict([*ladder("fast", better), *ladder("base", worse)], mixed).state == "reproduced"


@pytest.mark.parametrize(
    ("made", "claim", "said"),
    [
        (  # a span whose rungs are partly there: only those that are not, of whom
            [*ladder("fast", [1.0, 1.0]), *ladder("base", [2.0])],
            "sliced_w2[fast,1..4] < sliced_w2[base,1..4]",
            "fast has no record at rung 4; base has no record at rungs 2, 4; what is missing is run by: "
            f"stepmark run --method fast --method base --task {TASK} --rung 2 --rung 4",
        ),
        (
            [*ladder("fast", [1.0]), *ladder("base", [2.0], seeds=(1,))],
            "sliced_w2[fast,1] < sliced_w2[base,1]",
            "base has 1 of 3 seeds, without 0, 2 at rung 1; what is missing is run by: "
            f"stepmark run --method base --task {TASK} --rung 1",
        ),
        (
            ladder("fast", [1.0, 1.0]),
            "sliced_w2[fast,*] < sliced_w2[base,*]",
            "no rung at which all were measured: fast has no record at rungs 4, 8, 16, 32, 64; base has no record at "
            "rungs 1, 2, 4, 8, 16, 32, 64; what is missing is run by: stepmark run --method fast --method base "
            f"--task {TASK} --rung 1 --rung 2 --rung 4 --rung 8 --rung 16 --rung 32 --rung 64",
        ),
        (
            [*ladder("fast", [1.0]), record("base", 2, 1.0, status="flagged", flags=["threads"], device="cpu")],
            "sliced_w2[fast,1..2] < sliced_w2[base,1..2]",
            "fast has no record at rung 2; base has no record at rung 1; base at rung 2 is flagged: threads; what is "
            f"missing is run by: stepmark run --method fast --method base --task {TASK} --rung 1 --rung 2",
        ),
        (
            [record("fast", 1, 1.0, device="cuda", tier="smoke")],
            "sliced_w2[base,1] < 2",
            "base has no record at rung 1; what is missing is run by: "
            f"stepmark run --method base --task {TASK} --rung 1 --tier smoke --device cuda",
        ),
        (
            [*ladder("fast", [1.0]), record("base", 1, 1.0, status="flagged", flags=["threads"])],
            "sliced_w2[fast,1] < sliced_w2[base,1]",
            "sliced_w2[base,1]: flagged: threads",
        ),
        (
            ladder("fast", [1.0]),
            "sliced_w2[fast,5..7] < 2",
            f"no rung of {TASK} lies in 5..7: it has 1, 2, 4, 8, 16, 32, 64",
        ),
    ],
    ids=["rungs", "seeds", "nothing shared", "flagged beside", "elsewhere", "flagged alone", "off the ladder"],
)
def test_not_run_says_what_is_missing_and_what_runs_it(made: list[Record], claim: str, said: str) -> None:
    assert verdict(made, claim).text == f"not run: {said}"


def test_a_span_without_a_measured_rung_says_why() -> None:
    made = [record(name, r, 1.0, status="failed", message="no memory") for name in ("fast", "base") for r in RUNGS]
    text = verdict(made, "sliced_w2[fast,*] < sliced_w2[base,*]").text
    assert "no rung at which all were measured: fast at rung 1 is failed: no memory; " in text and "run by" not in text


def test_the_language_of_spans() -> None:
    check_ = claims.parse("fd[a, *] <= 1.1 * fd[b,*] and flops[a,16] < 3")
    assert check_.spans == (Span(),) and str(check_.references()[0]) == "fd[a,*]"
    assert claims.parse("fd[a,4 .. 16] < 1").spans == (Span(4, 16),) and str(Span(4, 16)) == "4..16"
    two = claims.parse("fd[a,*] < 1 and fd[b,4..8] < fd[a,2]")
    at = two.at({Span(): [2, 4], Span(4, 8): [8]})
    assert [str(r) for r in at.references()] == ["fd[a,2]", "fd[a,4]", "fd[b,8]"], "each comparison has its own span"
    assert [str(r) for r in check_.at({Span(): [4, 8]}).references()] == [
        "fd[a,4]",
        "fd[a,8]",
        "fd[b,4]",
        "fd[b,8]",
        "flops[a,16]",
    ]
    for wrong, says in (
        ("fd[a,8..4] < 1", "is empty"),
        ("fd[a,*] < fd[b,4..8]", "make them one"),
        ("fd[a,4:8] < 1", "4..16"),
        ("fd[a,:] < 1", "4..16"),
        ("fd[*,4] < 1", "does not parse"),
        ("fd[a,4...8] < 1", "does not parse"),
    ):
        with pytest.raises(claims.ClaimError, match=says.replace(".", r"\.")):
            claims.parse(wrong)
    with pytest.raises(ValueError, match="say which they are"):
        claims.verdict("fd[a,*] < 1", lambda *_: [[0.0]])


def trained(seed: int | None, updates: float = 100.0) -> dict[str, Any]:
    return {"offline": Offline(seconds=9.0, evaluations={"teacher": 50.0}, state_mib=1.0, seed=seed, updates=updates)}


def test_a_single_training_is_never_more_than_inconclusive() -> None:
    base = ladder("base", [2.0])
    claim = f"sliced_w2[fast,{RUNGS[0]}] < sliced_w2[base,{RUNGS[0]}]"
    one = [record("fast", RUNGS[0], 1.0, s, **trained(0)) for s in (0, 1, 2)]
    found = verdict([*one, *base], claim)
    assert found.state == "inconclusive" and "one training of fast" in found.notes
    stated = Claim(claim, says="a claim")
    assert any("one training of fast: trainings = 3" in said for said in check.weak(stated, found))
    three = [record("fast", RUNGS[0], 1.0, s, **trained(s)) for s in (0, 1, 2)]
    assert verdict([*three, *base], claim).state == "reproduced"
    one_bad = [record("fast", RUNGS[0], 1.0 if s else 3.0, s, **trained(s)) for s in (0, 1, 2)]
    assert verdict([*one_bad, *base], claim).state == "inconclusive", "draws go over trainings"
    searched = [record("fast", RUNGS[0], 1.0, s, **trained(None, 0.0)) for s in (0, 1, 2)]
    assert verdict([*searched, *base], claim).state == "reproduced", "what draws nothing has no other training"
    old = {"offline": Offline(seconds=9.0, evaluations={}, state_mib=1.0)}  # of before trainings had seeds
    before = [record("fast", RUNGS[0], 1.0, s, **old) for s in (0, 1, 2)]
    assert verdict([*before, *base], claim).state == "inconclusive"


def test_a_method_is_trained_more_often_than_its_task_has_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further trainings are held against the same items of whoever needs none, in verdicts as in groups."""
    known = plugins.tasks()
    single = {TASK: (known[TASK][0], replace(known[TASK][1], seeds=1))}
    monkeypatch.setattr(plugins, "tasks", lambda: single)
    rung = RUNGS[0]
    claim = f"sliced_w2[fast,{rung}] < sliced_w2[base,{rung}]"
    base = [record("base", rung, 2.0)]
    (alone,) = rows_of(base, single)
    assert (alone.seeds, alone.of(2).seed) == (1, 0)
    thrice = [replace(info(), id="fast", trainings=3), replace(info(), id="other", trainings=3)]
    monkeypatch.setattr(plugins, "methods", lambda: {each.id: each for each in thrice})
    three = [record("fast", rung, 1.0, s, **trained(s)) for s in range(3)]
    found = verdict([*three, *base], claim)
    assert found.state == "reproduced" and not [note for note in found.notes if "one training" in note]
    spread = [record("fast", rung, 1.0 if s else 3.0, s, **trained(s)) for s in range(3)]
    assert verdict([*spread, *base], claim).state == "inconclusive", "the second and third training count"
    assert "1 of 3 seeds" in verdict(three[:1] + base, claim).text
    other = [record("other", rung, 2.0, 0, **trained(0))]
    assert "1 of 3 seeds" in verdict([*three, *other], claim.replace("base", "other")).text
    rows = rows_of([*three, *base], single)
    ((test, _),) = [found for found in paired([(rows[0], rows[1])], "sliced_w2") if found]
    assert test.difference == pytest.approx(rows[0].quality["sliced_w2"].value - rows[1].quality["sliced_w2"].value)


def test_another_setting_is_set_apart() -> None:
    records = [*ladder("fast", [3.0]), *ladder("base", [2.0])]
    claim = f"sliced_w2[fast,{RUNGS[0]}] < sliced_w2[base,{RUNGS[0]}]"
    assert verdict(records, claim).state == "not reproduced"
    found = verdict(records, claim, setting="texts of 64 words")
    assert found.state == "setting differs" and found.text.startswith("setting differs")
    assert "not the paper's setting: texts of 64 words" in found.notes
    assert verdict([*ladder("fast", [1.0]), *ladder("base", [2.0])], claim, setting="x").state == "reproduced"


def test_unequal_arms_are_said() -> None:
    arms = [Arm("fast", 100.0, 1000.0, 60.0, 3), Arm("base", 90.0, 300.0, 59.0, 3), Arm("ddim", 0.0, 0.0, 0.0, 0)]
    assert unequal(arms) == ["unequal arms: fast 1,000 offline updates, base 300 offline updates"]
    assert spent(arms) == ["offline: fast 100 evaluations, 1,000 updates, 60 s; base 90 evaluations, 300 updates, 59 s"]
    even = [Arm("fast", 100.0, 1000.0, 60.0, 3), Arm("base", 81.0, 801.0, 50.0, 3)]
    assert unequal(even) == []
    assert len(spent(even)) == 1  # what equal arms cost is said as well
    assert spent(arms[2:]) == []


def timed(method_ms: float, base_ms: float, **fields: Any) -> Latency:
    def rounds(ms: float) -> list[float]:
        return [ms * (1 + 0.001 * i) for i in range(9)]

    return Latency(
        items=1, median_ms=method_ms, iqr_ms=0.1, p95_ms=method_ms, samples_ms=rounds(method_ms), baseline="base",
        baseline_median_ms=base_ms, baseline_samples_ms=rounds(base_ms), beside={"other": rounds(2 * base_ms)}, **fields,
    )  # fmt: skip


def test_times_are_judged_in_turns_and_on_a_device_that_was_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    few_seeds(monkeypatch, 1)
    r = RUNGS[0]
    mine = record("fast", r, 1.0, latency=timed(1.0, 2.0))
    # The baseline's own record was taken on a slow day: only the rounds taken in turns count.
    base = record("base", r, 1.0, latency=timed(0.5, 1.0))
    others = [record(name, r, 1.0) for name in ("other", "stranger")]
    records = [mine, base, *others]
    assert verdict(records, f"latency_ms[fast,{r}] <= 0.6 * latency_ms[base,{r}]").state == "reproduced"
    assert verdict(records, f"latency_ms[fast,{r}] <= 0.3 * latency_ms[other,{r}]").state == "reproduced"
    assert verdict(records, f"speedup[fast,{r}] > 1.9").state == "reproduced"
    found = verdict(records, f"latency_ms[fast,{r}] < latency_ms[stranger,{r}]")
    assert found.state == "not run" and "not taken in turns" in found.text
    crowded = record("fast", r, 1.0, latency=timed(1.0, 2.0), environment=ALONE | {"usable_cores": "1"})
    found = verdict([crowded, base], f"latency_ms[fast,{r}] < latency_ms[base,{r}]")
    assert found.state == "not run" and "1 of 2 cores" in found.text
    # Where only quality was measured, the command that takes the times is named.
    found = verdict([record("fast", r, 1.0), base], f"latency_ms[fast,{r}] < latency_ms[base,{r}]")
    assert found.state == "not run" and f"stepmark run --method fast --task {TASK} --rung {r}" in found.text


def test_the_verdict_is_that_of_the_machine_which_can_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    few_seeds(monkeypatch, 1)
    r, more = RUNGS[:2]
    here = [record("fast", r, 1.0, latency=timed(1.0, 2.0)), record("base", r, 1.0)]
    there = [record(name, rung, 1.0, machine="other-cpu") for name in ("fast", "base") for rung in (r, more)]
    found = rows_of([*here, *there], plugins.tasks())
    stated = info(Claim(f"latency_ms[fast,{r}] < latency_ms[base,{r}]", says="sooner"))
    ((_, by),) = verdicts(stated, found)
    assert [(place.machine, each.state) for place, each in by.items()] == [
        ("test-cpu", "reproduced"), ("other-cpu", "not run"),
    ]  # fmt: skip
    assert tally(verdicts(stated, found)) == {"reproduced": 1}


def test_check_wants_a_headline_and_warns_of_weak_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper("nowhere", "A title", "Somebody", 2030)  # whether or not the catalogue holds it

    def of(*stated: Claim, unclaimed: str = "") -> list[str]:
        made = MethodInfo(
            "fast", "image", Path(__file__), "Fast", "a\nb\nc", paper, (TASK,), (), stated, unclaimed=unclaimed
        )
        return list(check.headline(made))

    plain = Claim(f"sliced_w2[fast,{RUNGS[0]}] < 1", says="small")
    assert of(plain) and "headline=True" in of(plain)[0]
    assert of(Claim(plain.check, says="small", headline=True)) == []
    assert of(plain, unclaimed="a survey") == []
    assert "one rung" in " ".join(check.narrow(info(plain)))
    assert list(check.narrow(info(Claim("sliced_w2[fast,*] < 1", says="small")))) == []
    (said,) = check.narrow(info(Claim(f"sliced_w2[fast,*] < 1 and nfe[fast,{RUNGS[1]}] < 9", says="small")))
    assert f"at one rung, {RUNGS[1]}, of" in said  # beside a comparison over all
    trivial = claims.Verdict("reproduced", 1.0, True, {}, 0, "")
    values = {f"sliced_w2[fast,{RUNGS[0]}]": 0.1, f"sliced_w2[base,{RUNGS[0]}]": 0.9}
    claim = Claim(f"sliced_w2[fast,{RUNGS[0]}] < sliced_w2[base,{RUNGS[0]}]", says="")
    from dataclasses import replace

    assert "factor of five" in " ".join(check.weak(claim, replace(trivial, values=values)))
    assert "cannot tell" in " ".join(check.weak(claim, replace(trivial, state="inconclusive", fraction=0.6)))
    assert list(check.weak(claim, replace(trivial, values=dict.fromkeys(values, 0.5)))) == []
    spanned = {f"sliced_w2[{name},{rung}]": v for rung in RUNGS[:2] for name, v in (("fast", 0.1), ("base", 0.9))}
    assert "factor of five" in " ".join(check.weak(claim, replace(trivial, values=spanned)))
    near = spanned | {f"sliced_w2[fast,{RUNGS[1]}]": 0.8}  # at one rung of the two it is close
    assert list(check.weak(claim, replace(trivial, values=near))) == []
    assert list(check.weak(claim, replace(trivial, values=spanned | {f"sliced_w2[other,{RUNGS[0]}]": 0.1}))) == []
