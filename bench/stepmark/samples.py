"""Samples: what a reader can look at. The first outputs of a cell's quality pass, small, in a file beside the records.

`leaderboard/results/<suite>/<machine>/samples/<track>/<method>.jsonl` holds a line per sample, one of each (task, rung,
tier, device), all of seed 0: pictures as one PNG strip, texts with their prompts, points as numbers. Which kind is told by
the outputs themselves. Like records they are read as untrusted input, written whole or not at all, and merge line by
line: of two of one cell the newer counts. Files of before, one JSON object `<method>.json`, are read as well.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from stepmark import locks
from stepmark.disk import RecordError, bytes_of, replace_whole
from stepmark.record import Device, Digest, Figure, MachineId, Name, Record, TaskId, lines

if TYPE_CHECKING:
    from stepmark.remote import Worker

IMAGES, TEXTS, POINTS = 10, 2, 100  # how many items of a cell are kept
LONGEST_FILE = 5_000_000
FILE = re.compile(r"[a-z0-9][a-z0-9_]{0,63}\.jsonl?")
SOON = 1.0  # seconds of preparing that nobody needs to be asked about
Version = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+-]{1,32}$")]
Created = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Text = Annotated[str, StringConstraints(max_length=5000)]
Mark = Literal["kept", "rejected", "own"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Pictures(_Strict):
    """Images side by side, first item left, as one PNG in base64."""

    kind: Literal["pictures"] = "pictures"
    count: Annotated[int, Field(ge=1, le=100)]
    height: Annotated[int, Field(ge=1, le=512)]
    width: Annotated[int, Field(ge=1, le=512)]
    png: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+=*$", max_length=1_000_000)]

    def pixels(self) -> NDArray[np.uint8]:
        """The strip as [height, count x width] or, in colour, [height, count x width, 3].

        Raises:
            ValueError: no PNG, or not of this size.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            image = Image.open(io.BytesIO(base64.b64decode(self.png, validate=True)), formats=["PNG"])
            if image.size != (self.count * self.width, self.height) or image.mode not in {"L", "RGB"}:
                raise ValueError(f"a picture is {image.mode} of {image.size}")
            return np.asarray(image)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"a picture cannot be read: {error}") from None


class Texts(_Strict):
    """Prompts and what was written after them. Untrusted text.

    marks: of methods that draft, for each pair the pieces of its text in order: drafted and kept, drafted and rejected
    (not part of the text), or the target's own.
    """

    kind: Literal["texts"] = "texts"
    pairs: Annotated[list[tuple[Text, Text]], Field(max_length=20)]
    marks: Annotated[list[Annotated[list[tuple[Text, Mark]], Field(max_length=1000)]], Field(max_length=20)] = []


class Points(_Strict):
    """Points of the plane and the class that each was asked for."""

    kind: Literal["points"] = "points"
    points: Annotated[list[tuple[Figure, Figure]], Field(max_length=1000)]
    classes: Annotated[list[Annotated[int, Field(ge=0, le=100)]], Field(max_length=1000)]


Shown = Pictures | Texts | Points
SHOWN: TypeAdapter[Shown] = TypeAdapter(Annotated[Shown, Field(discriminator="kind")])


class Sample(_Strict):
    """What one cell of seed 0 gave. `source` is `source_of` the record's digests."""

    task: TaskId
    rung: Annotated[int, Field(ge=0, le=10**12)]
    tier: Literal["smoke", "embedded", "hub"]
    device: Device = "cpu"
    source: Digest
    created: Created | None = None
    shown: Annotated[Shown, Field(discriminator="kind")]

    @property
    def key(self) -> tuple[str, int, str, str]:
        """(task, rung, tier, device)."""
        return (self.task, self.rung, self.tier, self.device)


class SampleLine(Sample):
    """A sample with its place: a line of a file."""

    schema_version: Literal[2] = 2
    suite: Version
    machine: MachineId
    track: Name
    method: Name


class SampleFile(_Strict):
    """All samples of a method on a machine; as JSON the files of before."""

    schema_version: Literal[1] = 1
    suite: Version
    machine: MachineId
    track: Name
    method: Name
    samples: list[Sample]


def source_of(digests: Mapping[str, str]) -> str:
    """One digest over those of a record: a sample belongs to the records of the same sources."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()[:32]


# making -----------------------------------------------------------------------------------------


def _decoder(track: Any) -> Callable[[list[int]], str]:
    """What makes texts of token ids: the track's own `text_of` where it has another vocabulary."""
    from stepmark.backbones.lm import decode

    return getattr(track, "text_of", decode)


def of_outputs(inputs: Mapping[str, Any], outputs: Any, track: Any = None) -> Shown | None:
    """The first items of a quality pass; None where there is nothing to look at. `track`: the module of the task."""
    noise, prompts = inputs.get("noise"), inputs.get("prompt")
    if prompts is not None and isinstance(outputs, list):
        decode, most = _decoder(track), getattr(track, "TEXTS_KEPT", TEXTS)
        texts = [found[0] if isinstance(found[0], list) else found for found in outputs]  # of several, the first
        pairs = [(decode(list(prompt)), decode(list(ids))) for prompt, ids in zip(prompts, texts, strict=True)]
        return Texts(pairs=[(prompt[:5000], text[:5000]) for prompt, text in pairs[:most]])
    if noise is None or getattr(outputs, "shape", None) != noise.shape:
        return None
    if outputs.ndim == 4 and outputs.shape[1] in {1, 3}:
        return _pictures(outputs[:IMAGES].detach().float().cpu().numpy())
    if outputs.ndim == 4 and outputs.shape[1] == 4:  # colour, and depth below it
        pairs = outputs[:IMAGES].detach().float().cpu().numpy()
        return _pictures(np.concatenate([pairs[:, :3], pairs[:, 3:].repeat(3, 1)], 2))
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        points = outputs[:POINTS].detach().double().cpu().tolist()
        classes = inputs["condition"][:POINTS].cpu().tolist() if "condition" in inputs else [0] * len(points)
        return Points(points=[(round(x, 3), round(y, 3)) for x, y in points], classes=classes)
    return None


def marked(shown: Shown | None, worker: Worker, inputs: Mapping[str, Any], rung: int, seed: int) -> Shown | None:
    """Texts with their drafts marked, where the method drafts: its first items are decoded once more and listened to."""
    from stepmark.cell import cut

    if not isinstance(shown, Texts):
        return shown
    decode = _decoder(worker.track)
    marks: list[list[tuple[str, Mark]]] = []
    for i, (_, text) in enumerate(shown.pairs[:TEXTS]):
        heard = worker.drafts(cut(inputs, i, i + 1), rung, seed)
        if heard is None:
            return shown
        written, steps = heard
        if decode(written)[:5000] != text or not any(draft for draft, _ in steps):
            return shown  # another text, where the random stream is shared by a batch; or nothing is drafted
        marks.append([(words, mark) for mark, ids in _pieces(steps, len(written)) if (words := decode(ids))])
    return shown.model_copy(update={"marks": marks})


def _pieces(steps: Sequence[tuple[list[int], list[int]]], length: int) -> Iterator[tuple[Mark, list[int]]]:
    """The steps of a text of so many tokens as pieces of it, in order. A step in which the text ends may have checked
    drafts beyond the end: what follows it is no part of the text and nothing that was judged in it."""
    for draft, new in steps:
        kept, own = new[:-1][:length], new[-1:]
        yield "kept", kept
        if len(new) > length:
            return
        yield "rejected", draft[len(kept) :]
        yield "own", own
        length -= len(new)


def _pictures(images: NDArray[np.floating[Any]]) -> Pictures:
    """[n, channels, height, width] in [-1, 1] as a strip."""
    from PIL import Image

    count, channels, height, width = images.shape
    bytes_ = np.clip((images + 1) * 127.5, 0, 255).round().astype(np.uint8)
    strip = bytes_.transpose(2, 0, 3, 1).reshape(height, count * width, channels)
    stream = io.BytesIO()
    Image.fromarray(strip[:, :, 0] if channels == 1 else strip).save(stream, "PNG", optimize=True)
    return Pictures(count=count, height=height, width=width, png=base64.b64encode(stream.getvalue()).decode())


# files ------------------------------------------------------------------------------------------


def path_of(root: Path, suite: str, machine: str, track: str, method: str) -> Path:
    """Where the samples of a method lie below a results folder."""
    return root / suite / machine / "samples" / track / f"{method}.jsonl"


def read(path: Path) -> SampleFile:
    """The samples of one file, the newest of each cell.

    Raises:
        RecordError: not readable, wild values, pictures that are none, or a file in another's place.
    """
    content, where = bytes_of(path, LONGEST_FILE), str(path)
    try:
        if path.suffix == ".json":
            found = SampleFile.model_validate_json(content, strict=True)
        else:
            suite, machine, _, track, _ = path.parts[-5:]
            place = {"suite": suite, "machine": machine, "track": track, "method": path.stem}
            samples: list[Sample] = []
            for number, line in lines(content.decode("utf-8")):
                where = f"{path}:{number}"
                made = SampleLine.model_validate_json(line, strict=True)
                if made.model_dump(include=set(place)) != place:
                    raise ValueError(f"holds a sample of {made.method} on {made.machine}, which belongs elsewhere")
                samples.append(Sample(**{name: getattr(made, name) for name in Sample.model_fields}))
            found = SampleFile(suite=suite, machine=machine, track=track, method=path.stem, samples=_newest(samples))
        for sample in found.samples:
            if isinstance(sample.shown, Pictures):
                sample.shown.pixels()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RecordError(f"{where}: field {'.'.join(map(str, first['loc']))[:80]}: {first['msg']}") from None
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from None
    if (
        path_of(Path(), found.suite, found.machine, found.track, found.method).with_suffix("").parts
        != (path.with_suffix("").parts[-5:])
    ):
        raise RecordError(f"{path}: holds samples of {found.method} on {found.machine}, which belong elsewhere")
    return found


def _newest(found: Iterable[Sample]) -> list[Sample]:
    """The newest of each cell, of equally new ones the last, in order."""
    have: dict[tuple[str, int, str, str], Sample] = {}
    for sample in found:
        other = have.get(sample.key)
        if other is None or (sample.created or "") >= (other.created or ""):
            have[sample.key] = sample
    return [have[key] for key in sorted(have)]


def read_all(root: Path) -> list[SampleFile]:
    """Every sample file below a results folder."""
    return [read(path) for path in files(root)]


def files(root: Path) -> list[Path]:
    """The sample files below a results folder, without what has no method's name; those of before come first.

    Raises:
        RecordError: a folder on the way is a link.
    """
    found = [path for path in root.glob("*/*/samples/*/*.json*") if FILE.fullmatch(path.name)]
    for folder in {folder for path in found for folder in list(path.parents)[:4]}:
        if folder != root and folder.is_symlink():
            raise RecordError(f"{folder} is a link, and samples are read from files only; remove it")
    return sorted(found)


def gathered(path: Path) -> list[Sample]:
    """The newest samples of a method, from its file and from that of before."""
    both = [each for each in (path.with_suffix(".json"), path) if each.exists()]
    return _newest(sample for each in both for sample in read(each).samples)


def write(path: Path, file: SampleFile) -> None:
    """Whole or not at all, in the place of a file of before."""
    replace_whole(path, "".join(f"{_line(file, sample)}\n" for sample in file.samples))
    path.with_suffix(".json").unlink(missing_ok=True)


def keep(root: Path, record: Record, shown: Shown) -> Path:
    """Put a cell's sample into its method's file, in place of an older one: whole or not at all."""
    path = path_of(root, record.suite, record.machine, record.track, record.method)
    path.parent.mkdir(parents=True, exist_ok=True)
    source = source_of(record.digests)
    sample = Sample(
        task=record.task, rung=record.rung, tier=record.tier, device=record.device, source=source, shown=shown,
        created=record.created,
    )  # fmt: skip
    handle = os.open(path.parent, os.O_RDONLY)  # the folder is the lock: the file itself is replaced
    try:
        with locks.briefly(handle, path):
            others = [each for each in gathered(path) if each.key != sample.key]
            made = SampleFile(
                suite=record.suite,
                machine=record.machine,
                track=record.track,
                method=record.method,
                samples=_newest([*others, sample]),
            )
            write(path, made)
    finally:
        os.close(handle)
    return path


def _line(file: SampleFile, sample: Sample) -> str:
    """A sample with its place, without what leaving it out says: the processor, a date that is not known."""
    place = {"schema_version": 2} | {name: getattr(file, name) for name in ("suite", "machine", "track", "method")}
    left = {"device"} if sample.device == "cpu" else set()
    fields = sample.model_dump(exclude=left | (set() if sample.created else {"created"}))
    return json.dumps(place | fields, ensure_ascii=False)


# afresh -----------------------------------------------------------------------------------------


def lacking(records: Sequence[Record], root: Path) -> list[Record]:
    """Records of seed 0 with figures whose sample is not there, or comes from other sources."""
    have: dict[tuple[Any, ...], str] = {}
    for file in read_all(root):
        have |= {(file.suite, file.machine, file.method, *each.key): each.source for each in file.samples}
    found = []
    for r in records:
        if r.seed == 0 and r.status in {"ok", "flagged"}:
            key = (r.suite, r.machine, r.method, r.task, r.rung, r.tier, r.device)
            if have.get(key) != source_of(r.digests):
                found.append(r)
    return found


def remake(record: Record, device: str = "cpu", prepare: bool = False) -> Shown | str:
    """The sample of a recorded cell from its first batch, the same bits as in the quality pass; or why there is none.

    The random stream of a batch hangs on seed and index alone, so that the batches after the first need not run.
    """
    import torch

    from stepmark import cell, plugins, prepared
    from stepmark.judge import Judge
    from stepmark.remote import ready
    from stepmark.runner import prepared_path

    info = plugins.methods().get(record.method)
    if info is None or record.task not in plugins.tasks():
        return "its method or task is not in this checkout"
    task = plugins.tasks()[record.task][1]
    if cell.digests(info, task) != record.digests:
        return "its sources have changed since the record was written"
    path = prepared_path(info.id, task, record.digests, record.tier, torch.device(device))
    long = record.offline is not None and record.offline.seconds > SOON
    if long and not prepare and prepared.find(path, record.seed) is None:
        return "its prepared state is not in the cache (give --prepare to make it)"
    torch.set_num_threads(1)
    judge = Judge(record.task, device)
    worker = ready(info, record.task, record.tier, device, record.seed).worker()
    try:
        inputs = cell.cut(judge.inputs(task.items(record.tier), record.seed), 0, task.batch)
        outputs = worker.run(inputs, record.rung, record.seed).outputs
        judge.check(inputs, outputs)
        shown = of_outputs(inputs, outputs, judge.track)
        return marked(shown, worker, inputs, record.rung, record.seed) or "there is nothing to look at"
    finally:
        worker.close()


def refresh(
    records: Sequence[Record], root: Path, device: str, prepare: bool, announce: Callable[[str], None]
) -> tuple[int, int]:
    """Make the samples that lack; (how many were made, how many could not)."""
    made = 0
    todo = lacking(records, root)
    for r in todo:
        try:
            shown = remake(r, device, prepare)
        except Exception as error:  # a plugin's own fault: the others go on
            shown = f"{type(error).__name__}: {error}"
        where = f"{r.method} on {r.task}, rung {r.rung}"
        if isinstance(shown, str):
            announce(f"{where}: no sample, {shown}")
        else:
            keep(root, r, shown)
            made += 1
            announce(f"{where}: {shown.kind}")
    return made, len(todo) - made
