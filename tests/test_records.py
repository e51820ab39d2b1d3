"""Records: written whole or not at all, read as untrusted input, resumed after any kill."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stepmark import record as records
from stepmark.record import RecordError

BASE: dict[str, Any] = {
    "schema_version": 1,
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
        (line(schema_version=2), "schema version '2'"),
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


@pytest.mark.parametrize("cut", [1, 10, 200, 400])
def test_a_torn_last_line_is_cut_off_before_the_next_append(tmp_path: Path, cut: int) -> None:
    record = records.parse(line(), "here:1")
    path = tmp_path / "euler.jsonl"
    records.append(path, record)
    records.append(path, record.model_copy(update={"rung": 8}))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [r.rung for r in records.read(path)] == [4]
    records.append(path, record.model_copy(update={"rung": 8}))
    assert path.read_bytes() == whole


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
