"""`stepmark migrate`: records of schema 1 as records of schema 2, and records of the last suite version in the next.

Whole files or not at all. The figures stay the same to the last bit. Versions that are released stay as they are, since a
release is its files: their records are read in the old schema for good.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stepmark
from stepmark import admission, samples
from stepmark import record as records


@dataclass
class Summary:
    """What was done: files and records rewritten, bytes of these files before, and after with their environments."""

    files: int = 0
    records: int = 0
    before: int = 0
    after: int = 0
    samples: int = 0
    released: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = f"{self.before / 1e6:.2f} MB before, {self.after / 1e6:.2f} MB after"
        said = f"{self.files} files with {self.records} records: {sizes}"
        said += f"; {self.samples} files of samples follow them" if self.samples else ""
        left = f"; left as released: {', '.join(self.released)}" if self.released else ""
        alone = f"{self.samples} files of samples rewritten" if self.samples else "nothing to migrate"
        return (said if self.files else alone) + left


def migrate(results: Path) -> Summary:
    """Rewrite what is of schema 1 below a results folder; a second call finds nothing to do. Not while a suite runs.

    Raises:
        RecordError: a record cannot be read; its file and those after it are left as they are.
    """
    found = Summary()
    folders: set[Path] = set()
    for path in records.files(results):
        lines = [line for line in records.bytes_of(path, records.LONGEST_FILE).split(b"\n") if line.strip()]
        if all(line.startswith(b'{"schema_version":2,') for line in lines):
            continue
        if _released(results, path):
            found.released = tuple(sorted({*found.released, path.relative_to(results).parts[0]}))
            continue
        before, made = path.stat().st_size, list(records.read(path))
        for each in made:
            if each.environment:
                records.keep_environment(records.environments(path), each.environment)
        # Before their records, so that after a stop in between the next call does the rest.
        beside = path.parent.parent / "samples" / path.parent.name / path.name
        found.samples += sum(_follow(each, lines) for each in (beside.with_suffix(".json"), beside))
        records.replace_whole(path, "".join(f"{records.line_of(each)}\n" for each in made))
        found.files += 1
        found.records += len(made)
        found.before += before
        found.after += path.stat().st_size
        folders.add(records.environments(path))
    for path in samples.files(results):  # one object a method, which two branches cannot both add to
        if path.suffix == ".json" and not _released(results, path):
            after = path.with_suffix(".jsonl")
            samples.write(after, samples.read(path).model_copy(update={"samples": samples.gathered(after)}))
            found.samples += 1
    for folder in folders:
        found.after += sum(path.stat().st_size for path in folder.glob("*.json"))
        (folder.parent / "machine.json").unlink(missing_ok=True)  # the environments say all of it
    return found


def carry(results: Path) -> tuple[int, int]:
    """Take the records of earlier suite versions whose sources are still those of this checkout into the current one.

    What a record hangs on is in its digests; where they are those of today, running the cell again would give the same
    figures, and only the number of the suite has changed. Everything else stays as it was written, the commit and the date
    too, and the earlier version keeps its own. A cell that has a record of the current version is left alone, and so are
    records that the board does not take in, and failed ones, which are to be tried again.

    Returns: how many records were carried, and how many of earlier versions were not.
    """
    from stepmark.verify import is_current

    taken, _ = admission.read(results)
    there = {(r.machine, *r.key) for r in taken if r.suite == stepmark.__version__}
    newest: dict[tuple[Any, ...], records.Record] = {}
    for r in sorted(taken, key=lambda r: records.version_key(r.suite)):
        if r.suite != stepmark.__version__ and r.tier != "smoke":
            newest[(r.machine, *r.key)] = r
    carried: dict[Path, list[records.Record]] = {}
    for key, r in newest.items():
        if key not in there and r.status != "failed" and not r.checkpoint and is_current(r):
            again = r.model_copy(update={"suite": stepmark.__version__})
            carried.setdefault(records.path_of(results, again), []).append(again)
    for path, those in carried.items():
        for each in those:
            records.append(path, each)
    done = sum(map(len, carried.values()))
    return done, len(newest) - done


def _released(results: Path, path: Path) -> bool:
    """Whether a file is of a version that is released."""
    return (results / path.relative_to(results).parts[0] / "release" / "manifest.json").exists()


def _follow(path: Path, lines: Sequence[bytes]) -> bool:
    """Let a method's samples name the digests of its records as these are from now on; whether any had to change."""
    if not path.exists():
        return False
    now: dict[str, str] = {}
    for line in lines:
        try:
            digests: dict[str, str] = json.loads(line).get("digests", {})
        except ValueError:  # the torn last line
            continue
        kept = {name: digest[: records.DIGITS] for name, digest in digests.items()}
        now[samples.source_of(digests)] = samples.source_of(kept)
    file = samples.read(path)
    moved = [each.model_copy(update={"source": now.get(each.source, each.source)}) for each in file.samples]
    if moved == file.samples:
        return False
    samples.write(path.with_suffix(".jsonl"), file.model_copy(update={"samples": moved}))
    return True
