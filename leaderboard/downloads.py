"""The records as files to take along: a CSV, a Parquet and a JSON per track, put together from a part per method.

CSV and Parquet are the same table, the latter with types and a sixth of the size.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stepmark.leaderboard.trust import Intervals

from stepmark import plugins
from stepmark.record import LONGEST_LINE, Record

csv.field_size_limit(LONGEST_LINE)  # what a record may hold, a cell may hold

FIELDS = (
    "id", "suite", "machine", "device", "checkpoint", "tier", "track", "method", "base", "task", "rung", "seed", "status",
    "message", "flags", "latency_items", "latency_median_ms", "latency_iqr_ms", "latency_p95_ms", "latency_cuda_ms",
    "baseline", "baseline_median_ms", "speedup", "speedup_low", "speedup_high", "memory_peak_mib", "memory_how",
    "memory_state_mib", "energy_joules", "energy_idle_watts", "energy_window_s", "energy_sensor", "offline_seconds",
    "offline_state_mib", "offline_seed", "commit", "created", "command", "left_out",
)  # fmt: skip
LATENCY = ("items", "median_ms", "iqr_ms", "p95_ms", "cuda_ms", "baseline", "baseline_median_ms", "speedup",
           "speedup_low", "speedup_high")  # fmt: skip
MEMORY = ("peak_mib", "how", "state_mib")
ENERGY = ("joules", "idle_watts", "window_s", "sensor")
OFFLINE = ("seconds", "state_mib", "seed")
INTEGERS = ("rung", "seed", "offline_seed")
TEXTS = (
    "id", "suite", "machine", "device", "checkpoint", "tier", "track", "method", "base", "task", "status", "message", "flags",
    "baseline", "memory_how", "energy_sensor", "commit", "created", "command", "left_out",
)  # fmt: skip


class File(NamedTuple):
    """A track's downloads: how many records, bytes of the CSV, of the Parquet and of the JSON (0: not written)."""

    track: str
    records: int
    csv: int
    parquet: int
    json: int


def _fixed(name: str, r: Record, why: str) -> list[object]:
    """The values of `FIELDS`, null as None."""
    found: list[object] = [name, r.suite, r.machine, r.device, r.checkpoint or None, r.tier, r.track, r.method]
    info = plugins.methods().get(r.method)
    found.append(info.base if info is not None else None)
    found += [r.task, r.rung, r.seed, r.status]
    found += [r.message, "; ".join(r.flags)]
    for part, names in ((r.latency, LATENCY), (r.memory, MEMORY), (r.energy, ENERGY), (r.offline, OFFLINE)):
        found += [getattr(part, each) for each in names] if part else [None] * len(names)
    return [*found, r.commit, r.created, r.command, why or None]


def _plain(value: object) -> object:
    """A spreadsheet runs text that begins like a formula: such text gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"} else value


def write_part(
    folder: Path,
    key: tuple[str, str],
    records: Sequence[Record],
    texts: Sequence[str],
    names: Sequence[str],
    within: Sequence[Intervals],
    reasons: Sequence[str],
) -> None:
    """All records of a method: as lines of JSON (`texts`), and as lines of CSV whose heading names this method's own
    figures. `names` are their ids, `within` the 95 % intervals of their metrics, `reasons` why the board leaves some out
    (""): of these the CSV has no figures of their own naming.
    """
    order = sorted(
        range(len(records)),
        key=lambda i: (r := records[i]) and (r.suite, r.machine, r.task, r.seed, r.rung, r.created),
    )
    path = _part(folder, key)
    with path.with_suffix(".json").open("w", encoding="utf-8") as stream:
        stream.writelines(f"{texts[i]}\n" for i in order)
    taken = [r for r, why in zip(records, reasons, strict=True) if not why]
    metrics = sorted({name for r in taken for name in r.quality})
    counts = sorted({name for r in taken for name in r.counts})
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            [*FIELDS, *(f"{m}{end}" for m in metrics for end in ("", "_low", "_high")), *(f"count_{c}" for c in counts)]
        )
        for i in order:
            r = records[i]
            line = [_plain(value) for value in _fixed(names[i], r, reasons[i])]
            for m in metrics:
                quality = r.quality.get(m)
                line += [None, None, None] if quality is None else [quality.value, *within[i].get(m, (None, None))]
            line += [r.counts.get(c) for c in counts]
            writer.writerow(line)


def _part(folder: Path, key: tuple[str, str]) -> Path:
    return folder / f"{key[0]}.{key[1]}.part"


def merge(folder: Path, parts: Mapping[tuple[str, str], int], out: Path, table_only: bool = False) -> list[File]:
    """A CSV, a Parquet and a JSON per track from the parts below `folder`, in the order of the methods; one column per figure,
    metrics with their 95 % interval, null as an empty cell. `table_only`: the CSV alone.
    """
    found = []
    for track in sorted({track for track, _ in parts}):
        paths = [_part(folder, key) for key in sorted(parts) if key[0] == track and parts[key]]
        made = out / track
        _merge_csv([path.with_suffix(".csv") for path in paths], made.with_suffix(".csv"))
        if not table_only:
            _to_parquet(made.with_suffix(".csv"), made.with_suffix(".parquet"))
            _merge_json([path.with_suffix(".json") for path in paths], made.with_suffix(".json"))
        written = [made.with_suffix(end) for end in (".csv", ".parquet", ".json")]
        sizes = [path.stat().st_size if path.exists() else 0 for path in written]
        found.append(File(track, sum(n for key, n in parts.items() if key[0] == track), *sizes))
    return found


def _merge_csv(paths: Sequence[Path], out: Path) -> None:
    heads = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as stream:
            heads.append(next(csv.reader(stream))[len(FIELDS) :])
    own = {name for head in heads for name in head}
    # A metric before its two ends, then the counts, each by name.
    metrics = sorted(name for name in own if f"{name}_low" in own and f"{name}_high" in own)
    ends = [f"{m}{end}" for m in metrics for end in ("", "_low", "_high")]
    columns = [*ends, *sorted(own.difference(ends))]
    with out.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*FIELDS, *columns])
        for path, head in zip(paths, heads, strict=True):
            place = {name: i for i, name in enumerate(head)}
            where = [place.get(name, len(head)) for name in columns]  # what is not there is the empty cell at the end
            with path.open(encoding="utf-8", newline="") as part:
                lines: Iterable[list[str]] = csv.reader(part)
                next(iter(lines))
                for line in lines:
                    own_figures = [*line[len(FIELDS) :], ""]
                    writer.writerow([*line[: len(FIELDS)], *(own_figures[i] for i in where)])


def _to_parquet(table: Path, out: Path) -> None:
    """The table of a CSV with types: texts, whole numbers, and floating-point numbers for all other figures."""
    import pyarrow
    from pyarrow import csv as tables
    from pyarrow import parquet

    with table.open(encoding="utf-8", newline="") as stream:
        names = next(csv.reader(stream))
    kinds = dict.fromkeys(names, pyarrow.float64()) | dict.fromkeys(INTEGERS, pyarrow.int64())
    kinds |= dict.fromkeys(TEXTS, pyarrow.string())
    reading = tables.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=True)
    lines = tables.ParseOptions(newlines_in_values=True)
    longest = tables.ReadOptions(block_size=4 * LONGEST_LINE)  # a line has to fit in
    read = tables.read_csv(table, read_options=longest, parse_options=lines, convert_options=reading)
    parquet.write_table(read, out, compression="zstd")


def _merge_json(paths: Sequence[Path], out: Path) -> None:
    with out.open("w", encoding="utf-8") as stream:
        between = "[\n"
        for path in paths:
            with path.open(encoding="utf-8") as part:
                for line in part:
                    stream.write(between + line[:-1])
                    between = ",\n"
        stream.write("\n]\n" if between != "[\n" else "[]\n")
