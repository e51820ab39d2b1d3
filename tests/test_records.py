"""Records: written whole or not at all, read as untrusted input, resumed after any kill."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rigs.records import whole
from stepmark.leaderboard import ledger
from stepmark.leaderboard.rows import rows_of

import stepmark
from stepmark import plugins, run
from stepmark import record as records
from stepmark import suite as matrix
from stepmark.meter import machine
from stepmark.passes import rounded
from stepmark.record import RecordError

BASE: dict[str, Any] = {
    "schema_version": 2,
    "suite": "0.1.0",
    "track": "image",
    "method": "euler",
    "task": "sampling/mixtures_flow",
    "rung": 4,
    "seed": 0,
    "tier": "smoke",
    "machine": "epyc-2c-00000000",
    "status": "ok",
    "counts": {"nfe": 4.0},
    "quality": {"fd": {"value": 1.0, "resamples": [1.0, 1.5]}},
    "command": "stepmark run",
    "created": "2026-01-01T00:00:00Z",
}


def line(**changes: Any) -> str:
    """A record's line with some fields changed; a value of `...` removes the field."""
    return json.dumps({k: v for k, v in (BASE | changes).items() if v is not ...})


def test_round_trip(tmp_path: Path) -> None:
    record = records.parse(line(), "here:1")
    path = records.path_of(tmp_path, record)
    records.append(path, record)
    records.append(path, record.model_copy(update={"rung": 8}))
    assert [r.rung for r in records.read(path)] == [4, 8]
    assert records.read_all(tmp_path)[0] == record
    assert path == tmp_path / "0.1.0" / "epyc-2c-00000000" / "image" / "euler.jsonl"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "not a JSON record"),
        ("[1]", "a record is an object"),
        (line(schema_version=3), "schema version '3'"),
        (line(schema_version=1, device='cpu"><script>'), "field device"),
        (line(schema_version=1, environment={"device": "<b>"}), "field device"),
        (line(schema_version=1, digests=["ab"]), "field digests"),
        (line(device="cuda:0"), "field device"),
        (line(checkpoint="../x"), "field checkpoint"),
        (line(environment="../../../etc/passwd"), "a digest has 16 hex digits"),
        (line(environment="0123456789abcdef"), "0123456789abcdef.json is not there"),
        (line(environment="x" * 3000), "a digest has 16 hex digits"),
        (line(schema_version=...), "schema version 'None'"),
        (line(method=...), "field method"),
        (line(method="../../etc/passwd"), "field method"),
        (line(machine="a/../../b"), "field machine"),
        (line(method="<script>alert(1)</script>"), "field method"),
        (line(surprise=1), "field surprise"),
        (line(status="great"), "field status"),
        (line(rung=-1), "field rung"),
        (line(counts={"nfe": "4; DROP"}), "field counts.nfe"),
        (line().replace("4.0", "NaN"), "NaN is not allowed"),
        (line().replace("4.0", "-Infinity"), "not allowed"),
        (line().replace("4.0", "1e999"), "field counts.nfe"),
        (line().replace('"rung": 4', '"rung": 4, "rung": 8'), "stands twice"),
        (line().replace('"nfe": 4.0', '"nfe": 4.0, "nfe": 8.0'), "stands twice"),
        (line().replace('"nfe": 4.0', '"nfe":4.0,"nfe" :8.0'), "stands twice"),
        (line().replace('"nfe": 4.0', '"nfe":4.0,"nfe"\t:8.0'), "stands twice"),
        (line().replace('"nfe": 4.0', '"nfe":4.0,"\\u006efe":8.0'), "stands twice"),
        (line(message="x" * 5000), "field message"),
        (line(quality={"fd": {"value": 1.0, "resamples": [0.0] * 5000}}), "field quality.fd.resamples"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [0] * 5000]}}), "field quality.fd.resamples"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [0.5]]}}), "differences are integers"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, ["1"]]}}), "differences are integers"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [2**63]]}}), "differences are integers"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [1], -5]}}), "a step is an integer"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [1], True]}}), "a step is an integer"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [3, 3], 0]}}), "0 stands behind one number"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [10**9], 0]}}), "at most 2000"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 5, [2**52], 2**52]}}), "times their step"),
        (line(quality={"fd": {"value": 1.0, "resamples": [-400, 5, [1]]}}), "digits lie between"),
        (line(quality={"fd": {"value": 1.0, "resamples": [2, 10**40, [1]]}}), "digits lie between"),
        (line(quality={"fd": {"value": 1.0, "resamples": [[2], 5, [1]]}}), "digits lie between"),
        (line().replace("[1.0, 1.5]", "[1,10,[0,5]]").replace('"fd"', '"nfe":{"value":1.0},"nfe"'), "stands twice"),
        ("[" * 100_000, "not a JSON record"),
        (line(message="x" * 3_000_000), "characters long"),
    ],
)
def test_a_bad_record_is_one_line_with_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "euler.jsonl"
    path.write_text(line() + "\n" + text + "\n")
    with pytest.raises(RecordError) as caught:
        list(records.read(path))
    assert words in str(caught.value)
    assert f"{path}:2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_bytes_that_are_no_text_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "euler.jsonl"
    path.write_bytes(line().encode() + b"\n\xff\xfe\n")
    with pytest.raises(RecordError, match=r"euler.jsonl:2: not UTF-8"):
        list(records.read(path))


def test_a_record_in_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.1.0" / "other-machine" / "image" / "euler.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(line() + "\n")
    with pytest.raises(RecordError, match="belongs in"):
        records.read_all(tmp_path)


@pytest.mark.parametrize("cut", [1, 10, 200, 300])
def test_a_torn_last_line_is_cut_off_before_the_next_append(tmp_path: Path, cut: int) -> None:
    record = records.parse(line(), "here:1")
    path = tmp_path / "euler.jsonl"
    records.append(path, record)
    records.append(path, record.model_copy(update={"rung": 8}))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [r.rung for r in records.read(path)] == ([4, 8] if cut == 1 else [4])
    records.append(path, record.model_copy(update={"rung": 16 if cut == 1 else 8}))
    if cut == 1:  # nothing but its end was torn off: it is kept, and the next begins a line of its own
        assert [r.rung for r in records.read(path)] == [4, 8, 16]
        assert path.read_bytes().startswith(whole)
    else:
        assert path.read_bytes() == whole


def test_a_line_torn_inside_a_letter_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "euler.jsonl"
    path.write_bytes(line().encode() + b"\n" + '{"message":"é'.encode()[:-1])
    assert [r.rung for r in records.read(path)] == [4]


def test_a_whole_last_line_that_is_no_record_is_not_swallowed(tmp_path: Path) -> None:
    path = tmp_path / "euler.jsonl"
    path.write_text(line() + "\n" + line(schema_version=3))
    with pytest.raises(RecordError, match="schema version '3'"):
        list(records.read(path))


# schema 2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1.5059, 1.47797, 1.48998],
        [0.854167, 0.9375, 1.0],
        [0.0, 0.0],
        [-1e-7, 2.5e-11, 3.0],
        [123456.0, 123457.5],
        [1e15, 1e-3],
        [1 / 3, 2 / 3],  # no number of digits gives these: they stay as they are
        [1e300, 5e-324],
        [0.75] * 100,
        [-2.0],
        [k / 200 for k in (161, 163, 158, 163, 170)],
        [1, 10, 3, 7],
        [1, 10, 3],  # three integers are no packed form, and must not be taken for one
        [7.25],
        [],
    ],
)
def test_resamples_come_back_to_the_bit(values: list[float]) -> None:
    record = records.parse(line(quality={"fd": {"value": 1.0, "resamples": values}}), "here:1")
    again = records.parse(records.line_of(record), "here:1")
    assert [x.hex() for x in again.quality["fd"].resamples] == [float(x).hex() for x in values]


def test_shares_are_counted_in_items_and_what_is_all_the_same_is_said_once() -> None:
    assert records.short([k / 200 for k in (161, 163, 158)]) == [3, 805, [0, 2, -3], 5]
    assert records.short([0.75] * 100) == [2, 75, [100], 0]
    assert records.short([0.25, 0.26, 0.28]) == [2, 26, [-1, 0, 2]]


def test_six_significant_digits_come_back_to_the_bit_whatever_their_size() -> None:
    rng = random.Random(0)
    for _ in range(300):
        middle, spread = 10 ** rng.uniform(-9, 9), 10 ** rng.uniform(-4, 0)
        values = [float(f"{middle * (1 + spread * rng.gauss(0, 1)):.6g}") for _ in range(100)]
        assert isinstance(records.short(values)[2], list)
        record = records.parse(line(quality={"fd": {"value": 1.0, "resamples": values}}), "here:1")
        assert list(records.parse(records.line_of(record), "here:1").quality["fd"].resamples) == values


def test_resamples_are_as_fine_as_a_hundredth_of_their_range_and_short() -> None:
    rng = random.Random(1)
    for _ in range(100):
        middle, spread = 10 ** rng.uniform(-6, 6), 10 ** rng.uniform(-6, 0)
        values = [middle * (1 + spread * rng.gauss(0, 1)) for _ in range(100)]
        written = rounded(values)
        wide = max(values) - min(values)
        assert max(abs(a - b) for a, b in zip(values, written, strict=True)) <= wide / 200 * 1.000001
        assert all(abs(n) <= 1_000 for n in records.short(written)[2])
    assert rounded([1 / 3] * 3) == [0.333333] * 3 and rounded([]) == []
    assert rounded([0.345, 0.35, 0.355]) == [0.345, 0.35, 0.355]


def test_the_fast_parser_reads_what_append_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = {"seconds": 1.0, "evaluations": {}, "state_mib": 0.0, "seed": 2}
    full = records.parse(
        line(
            handles={"net": {"calls": 1.0}}, offline=offline, digests={"method": "ab" * 8}, reasons={"energy": "none"},
            environment={"cpu": "a", "lock": "b"}, latency={"items": 1, "median_ms": 1.0, "iqr_ms": 0.0, "p95_ms": 1.0,
                                                            "samples_ms": [1.0, 2.0]},
        ),
        "here:1",
    )  # fmt: skip
    path = records.path_of(tmp_path, full)
    records.append(path, full)
    monkeypatch.setattr(records, "_closely", lambda *_: pytest.fail("took the slow way"))
    assert next(records.read(path)) == full
    text = path.read_text()
    assert "null" not in text and "{}" not in text and '"cpu":"a"' not in text


def test_an_environment_is_a_file_of_its_own_and_shared(tmp_path: Path) -> None:
    one = records.parse(line(environment={"cpu": "a", "torch": "2"}), "here:1")
    path = records.path_of(tmp_path, one)
    for rung, environment in ((2, one.environment), (4, one.environment), (8, {"cpu": "a", "torch": "3"})):
        records.append(path, one.model_copy(update={"rung": rung, "environment": environment}))
    kept = sorted((tmp_path / "0.1.0" / one.machine / "environments").iterdir())
    assert len(kept) == 2
    first, second, third = records.read(path)
    assert first.environment is second.environment  # a hundred thousand records hold it once
    assert (first.environment["torch"], third.environment["torch"]) == ("2", "3")
    digest = records.environment_digest(third.environment)
    file = path.parent.parent / "environments" / f"{digest}.json"
    file.write_text(file.read_text().replace('"3"', '"4"'))
    records.environment_of.cache_clear()
    with pytest.raises(RecordError, match=rf"euler.jsonl:3: .*{digest}.json has been changed"):
        list(records.read(path))
    file.unlink()
    with pytest.raises(RecordError, match=rf"euler.jsonl:3: .*{digest}.json is not there"):
        list(records.read(path))


def test_a_line_of_schema_1_is_read(tmp_path: Path) -> None:
    old = line(
        schema_version=1, environment={"device": "cuda", "cpu": "a"}, digests={"method": "ab" * 32}, message=None,
        outputs="cd" * 32,
    )  # fmt: skip
    path = tmp_path / "0.1.0" / "epyc-2c-00000000" / "image" / "euler.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(old + "\n")
    (found,) = records.read_all(tmp_path)
    assert (found.device, found.checkpoint, found.schema_version) == ("cuda", "", 2)
    assert found.environment == {"cpu": "a"}
    assert found.digests == {"method": "ab" * 8}
    assert found.outputs == "cd" * 32
    a, b = (
        records.parse(line(schema_version=1, task="checkpoint/unet", digests={"backbone_teacher": d * 32}), "here:1")
        for d in ("ab", "cd")
    )
    assert a.checkpoint != b.checkpoint
    assert a.key != b.key


def test_devices_and_checkpoints_are_cells_of_their_own(tmp_path: Path) -> None:
    cpu = records.parse(line(), "here:1")
    others = [{"device": "cuda"}, {"checkpoint": "ab" * 8}, {"checkpoint": "cd" * 8}]
    for each in (cpu, *(cpu.model_copy(update=change) for change in others)):
        records.append(records.path_of(tmp_path, cpu), each)
    assert len(records.read_all(tmp_path)) == len(records.keys(records.path_of(tmp_path, cpu))) == 4
    rows = rows_of(records.read_all(tmp_path), plugins.tasks())  # whether they belong to the suite or not
    assert len({row.place for row in rows}) == len({str(row.place) for row in rows}) == 4


def test_a_processor_record_does_not_hide_the_run_on_another_device_nor_an_untimed_one_the_timed(
    tmp_path: Path,
) -> None:
    cell = run.Cell("euler", "sampling/mixtures_flow", 2, 0, "smoke")
    info, task = plugins.methods()["euler"], plugins.tasks()[cell.task][1]
    made = records.parse(
        line(
            rung=2, machine=machine.machine_id(), suite=stepmark.__version__, digests=run.digests(info, task),
            reasons={"latency": records.UNTIMED},
        ),
        "here:1",
    )  # fmt: skip
    records.append(records.path_of(tmp_path, made), made)
    assert matrix.pending([cell], tmp_path) == []
    assert matrix.pending([cell], tmp_path, "cuda:1") == [cell]
    assert matrix.pending([cell], tmp_path, "cpu", timing=True) == [cell]
    records.append(records.path_of(tmp_path, made), made.model_copy(update={"reasons": {"latency": "too short"}}))
    assert matrix.pending([cell], tmp_path, "cpu", timing=True) == []
    records.append(records.path_of(tmp_path, made), made.model_copy(update={"device": "cuda"}))
    assert matrix.pending([cell], tmp_path, "cuda:1") == []


def test_what_another_machine_has_may_be_left_to_it(tmp_path: Path) -> None:
    cells = [run.Cell("euler", "sampling/mixtures_flow", 2, seed, "smoke") for seed in (0, 1)]
    info, task = plugins.methods()["euler"], plugins.tasks()[cells[0].task][1]
    theirs = records.parse(
        line(rung=2, machine="elsewhere-cpu", suite=stepmark.__version__, digests=run.digests(info, task)), "here:1"
    )
    records.append(records.path_of(tmp_path, theirs), theirs)
    options = matrix.Options(tmp_path, timing=False)
    assert matrix.todo(cells, options) == cells
    options.lacking = True
    assert matrix.todo(cells, options) == cells[1:]
    options.device = "cpu"
    records.append(
        records.path_of(tmp_path, theirs), theirs.model_copy(update={"digests": {"method": "0" * 16}, "seed": 1})
    )
    assert matrix.todo(cells, options) == cells[1:], "that one is of other sources"


def test_the_newest_counts_wherever_it_stands(tmp_path: Path) -> None:
    early = whole(records.parse(line(), "here:1"))
    late = early.model_copy(update={"created": "2026-01-02T00:00:00Z", "commit": "abcdef1"})
    path = records.path_of(tmp_path, early)
    for each in (late, early, early, late):
        records.append(path, each)
    assert records.read_all(tmp_path) == [late]
    assert records.keys(path) == {late.key: late}
    made = ledger.read(tmp_path, "smoke")
    assert [r.commit for r in made.records] == ["abcdef1"]
    assert made.files[early.track, early.method] == 2  # a line that a merge left twice is one record


def test_what_a_file_system_leaves_beside_records_is_not_read(tmp_path: Path) -> None:
    record = whole(records.parse(line(environment={"cpu": "a"}), "here:1"))
    path = records.path_of(tmp_path, record)
    records.append(path, record)
    for stray in (path.with_name("._euler.jsonl"), tmp_path / ".trash" / "a.jsonl", tmp_path / ".DS" / "x.jsonl"):
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"\x00\xffMac OS X\n")
    assert records.read_all(tmp_path) == [record]
    assert len(ledger.read(tmp_path, "smoke").records) == 1


def test_two_branches_that_add_records_merge_without_a_conflict(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    shutil.copy(Path(__file__).parent.parent / ".gitattributes", tmp_path)
    root = tmp_path / "leaderboard" / "results"
    first = records.parse(line(environment={"cpu": "a"}), "here:1")
    path = records.path_of(root, first)
    git("init", "-b", "main")
    records.append(path, first)
    git("add", "-A")
    git("commit", "-m", "one")
    for branch, rungs in (("left", (8, 16)), ("right", (16, 32))):  # both measured one cell
        git("checkout", "-b", branch, "main")
        for rung in rungs:
            more = {"rung": rung, "environment": {"cpu": "a", "torch": branch}}
            records.append(path, first.model_copy(update=more | {"created": f"2026-01-0{len(branch) - 2}T00:00:00Z"}))
        git("add", "-A")
        git("commit", "-m", branch)
    git("merge", "left")
    found = {r.rung: r for r in records.read_all(root)}
    assert sorted(found) == [4, 8, 16, 32]
    assert found[16].environment["torch"] == "right"  # the newer of the two


COMPARED = {"counts", "quality", "outputs", "flags", "status", "handles", "digests"}


def suite(results: Path, cache: Path) -> subprocess.Popen[bytes]:
    """A small suite in a process of its own."""
    code = (
        "from pathlib import Path; import sys; from stepmark import suite; "
        "s = suite.Selection(tier='smoke', methods=('euler', 'heun', 'importance_sampling'), "
        "tasks=('sampling/mixtures_flow', 'posterior/gaussian_n1')); "
        "o = suite.Options(results=Path(sys.argv[1]), timing=False, announce=lambda t: None); "
        "print('go', flush=True); [print(r.rung, flush=True) for r in suite.walk(s, o)]"
    )
    import os

    environment = {**os.environ, "STEPMARK_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [sys.executable, "-c", code, str(results)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def content(results: Path) -> dict[Any, Any]:
    """What must be equal between two runs: everything but times."""
    return {r.key: r.model_dump(include=COMPARED) for r in records.read_all(results)}


KILLER = """
import os, sys, threading, time
from pathlib import Path
from stepmark import record, suite
from stepmark.run import measure
results, delay = Path(sys.argv[1]), float(sys.argv[2])
real = os.write
def torn(handle, data):  # die in the middle of a line, which no timer would hit by chance
    if delay < 0 and len(data) > 500:
        real(handle, data[: int(len(data) * -delay)])
        os.kill(os.getpid(), 9)
    return real(handle, data)
os.write = torn
if delay >= 0:
    threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), 9)), daemon=True).start()
s = suite.Selection(tier='smoke', methods=('euler', 'heun'), tasks=('sampling/mixtures_flow',), rungs=(2, 4))
o = suite.Options(results=results, timing=False, announce=lambda t: None)
list(suite.walk(s, o))
"""


def test_killed_at_twenty_moments_the_suite_resumes_and_ends_with_the_same_records(tmp_path: Path) -> None:
    # One warm process forks the victims, so that twenty kills cost seconds and not twenty imports of torch.
    import os

    whole, broken, cache = tmp_path / "whole", tmp_path / "broken", tmp_path / "cache"
    program = f"""
import os, random, signal, sys
os.environ["STEPMARK_CACHE"] = {str(cache)!r}
import torch
torch.set_num_threads(1)
from stepmark import backbones, suite
import stepmark.tracks.image
backbones.recipes()  # imported once here instead of in every victim
def walk(results, delay):
    pid = os.fork()
    if pid == 0:
        sys.argv = ["victim", results, str(delay)]
        try:
            exec({KILLER!r}, {{}})
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]
assert walk({str(whole)!r}, 600) == 0
rng = random.Random(0)
kills = 0
for i in range(40):
    delay = -rng.uniform(0.01, 0.99) if i % 3 == 0 else rng.uniform(0.0, 0.4)
    status = walk({str(broken)!r}, delay)
    kills += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if kills >= 22:
        break
    if status == 0:  # it came to the end: begin anew, so that the next kills meet a suite at work
        import shutil
        shutil.rmtree({str(broken)!r})
walk({str(broken)!r}, 600)
print("kills", kills)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 20, done.stdout
    assert content(broken) == content(whole)
    assert len(content(whole)) == 4


def test_a_killed_process_is_resumed_by_the_next(tmp_path: Path) -> None:
    results, cache = tmp_path / "results", tmp_path / "cache"
    first = suite(results, cache)
    assert first.stdout is not None
    seen = [first.stdout.readline() for _ in range(3)]  # "go" and two records
    time.sleep(random.Random(1).random())
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert seen[0] == b"go\n", first.stderr and first.stderr.read().decode()[-2000:]
    before = len(content(results))
    assert before >= 2
    second = suite(results, cache)
    out, error = second.communicate(timeout=300)
    assert second.returncode == 0, error.decode()[-2000:]
    assert len(content(results)) == before + len(out.split()) - 1


def test_a_file_is_read_by_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = records.parse(line(environment={"cpu": "a"}), "here:1")
    path = records.path_of(tmp_path, record)
    records.append(path, record)
    monkeypatch.chdir(path.parent)
    assert list(records.read(Path("euler.jsonl"))) == [record]


@pytest.mark.parametrize("quality", [{"fd": {"value": 1.0, "resamples": [1.0, 1.5]}}, {"fd": {"value": 1.0}}])
def test_no_key_stands_twice_however_much_is_left_out(quality: dict[str, Any]) -> None:
    """The quick reader counts keys: what a record leaves out must not make room for a second of another."""
    packed = json.dumps(json.loads(line(quality=quality)), separators=(",", ":"))
    twice = packed.replace('"status":"ok"', '"status":"failed","status":"ok"')
    assert twice != packed
    assert records.parse(packed, "here:1").status == "ok"
    with pytest.raises(RecordError, match="twice"):
        records.parse(twice, "here:1")


@pytest.mark.parametrize("created", ["9999-99-99T99:99:99Z", "2026-02-30T00:00:00Z", "9998-01-01T00:00:00Z"])
def test_a_date_that_cannot_be_is_refused(created: str) -> None:
    """Of two records of a cell the later one counts: a date of the far future would count for ever."""
    with pytest.raises(RecordError, match="created"):
        records.parse(line(created=created), "here:1")


def test_the_commit_of_a_record_holds_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    def clean(path: Path) -> bool:
        run.commit.cache_clear()
        found = run.commit(path)
        assert found is not None
        return not found.endswith("-dirty")

    monkeypatch.setattr(plugins, "checkout", lambda: tmp_path)
    plugin, other = tmp_path / "methods" / "image" / "mine.py", tmp_path / "methods" / "image" / "other.py"
    harness = tmp_path / "bench" / "stepmark" / "meter.py"
    for path in (plugin, other, harness):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    git("init", "-b", "main")
    git("add", str(other), str(harness))
    git("commit", "-m", "one")
    assert clean(other)  # though somebody begins another plugin beside it
    assert not clean(plugin)
    assert not clean(tmp_path.parent / "elsewhere.py")
    git("add", str(plugin))
    assert not clean(plugin)  # staged is not committed
    git("commit", "-m", "two")
    assert clean(plugin)
    (tmp_path / "leaderboard" / "results").mkdir(parents=True)
    (tmp_path / "leaderboard" / "results" / "new.jsonl").write_text("{}\n")
    assert clean(plugin)
    plugin.write_text("x = 2\n")
    git("update-index", "--assume-unchanged", str(plugin))
    assert not clean(plugin)
    git("update-index", "--no-assume-unchanged", str(plugin))
    git("checkout", "--", str(plugin))
    assert clean(plugin)
    (harness.parent / "helper.py").write_text("y = 1\n")
    assert not clean(plugin)
    run.commit.cache_clear()
