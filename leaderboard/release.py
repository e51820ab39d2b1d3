"""Releases: a suite version frozen, with one digest over all of it, and kept at a permanent address.

`leaderboard/results/<version>/release/` holds `data.tar.xz` (requirements.lock, the catalogue: what goes on to change),
`site.tar.xz` (the pages as they were) and `manifest.json` with the sha256 of every file in them, and of the records and
samples of the version, which lie beside it and are not kept twice. Archives are deterministic: sorted names, no times,
no owners. The site unpacks old versions below versions/<version>/.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from stepmark.leaderboard.rows import version_key

from stepmark import __version__, plugins
from stepmark.record import read_all

ARCHIVES = ("data.tar.xz", "site.tar.xz")
RECORDS = "records"  # the files beside a release, in its manifest
Sha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Line = Annotated[str, StringConstraints(max_length=2000)]


class Manifest(BaseModel):
    """What a release holds. `files` maps archive -> name inside -> sha256, and "records" -> name below the version's
    folder -> sha256; `digest` is over all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    suite: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,31}$")]
    released: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    commit: Line | None
    records: Annotated[int, Field(ge=1)]
    machines: list[Line]
    forced: list[Line]
    archives: dict[Literal["data.tar.xz", "site.tar.xz"], Sha]
    files: dict[Literal["records", "data.tar.xz", "site.tar.xz"], dict[Line, Sha]]
    digest: Sha


def digest_of(files: Mapping[str, Mapping[str, str]]) -> str:
    """One sha256 over archive, name and sha256 of every file, in order."""
    lines = [f"{sha}  {archive}:{name}\n" for archive in sorted(files) for name, sha in sorted(files[archive].items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# freezing ---------------------------------------------------------------------------------------


def freeze(results: Path, force: bool = False, root: Path | None = None) -> Manifest:
    """Release the current suite version from the records below `results`: whole or not at all.

    `root`: the checkout (default: the one this runs from).

    Raises:
        ValueError: no checkout, no records, released already; and, without `force`, stale records or a changed tree.
    """
    from stepmark.leaderboard import site

    root = root or plugins.checkout()
    if root is None:
        raise ValueError("a release is made from a checkout: clone the repository and run stepmark release there")
    folder = results / __version__ / "release"
    if folder.exists():
        raise ValueError(f"{__version__} is released already ({folder}); raise the version for new records")
    records = [r for r in read_all(results) if r.suite == __version__ and r.tier != "smoke"]
    if not records:
        raise ValueError(f"no records of suite version {__version__} below {results}")
    reasons = objections(results, root)
    if reasons and not force:
        raise ValueError(f"{'; '.join(reasons)}. Mend it, or give --force to have it said in the manifest")
    data = dict(_data(root))
    with tempfile.TemporaryDirectory() as temporary:
        home = site.build(results, Path(temporary) / "site", snapshot=__version__)
        pages = {
            path.relative_to(home.parent).as_posix(): path.read_bytes()
            for path in home.parent.rglob("*")
            if path.is_file() and path.name != site.MARKER and not _needless(path.relative_to(home.parent))
        }
    packed = {"data.tar.xz": pack(data), "site.tar.xz": pack(pages)}
    files = {
        RECORDS: _records(results / __version__),
        "data.tar.xz": {name: _sha(content) for name, content in data.items()},
        "site.tar.xz": {name: _sha(content) for name, content in pages.items()},
    }
    manifest = Manifest.model_validate(
        {
            "suite": __version__,
            "released": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": _git(root, "rev-parse", "HEAD"),
            "records": len(records),
            "machines": sorted({r.machine for r in records}),
            "forced": reasons,
            "archives": {name: _sha(content) for name, content in packed.items()},
            "files": files,
            "digest": digest_of(files),
        }
    )
    making = folder.with_name(f".release-{os.getpid()}")
    making.mkdir(parents=True)
    try:
        for name, content in packed.items():
            (making / name).write_bytes(content)
        (making / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        making.rename(folder)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return manifest


def objections(results: Path, root: Path) -> list[str]:
    """Why the current version should not be released as it stands."""
    found = []
    status = _git(root, "status", "--porcelain")
    if status is None:
        found.append("the checkout is no git repository, so no commit can be named")
    elif status:
        found.append(f"the tree differs from its commit in {len(status.splitlines())} files")
    methods, tasks = plugins.methods(), plugins.tasks()
    now: dict[tuple[str, str], dict[str, str]] = {}
    old = set()
    for r in read_all(results):
        pair = (r.method, r.task)
        if r.suite != __version__ or r.tier == "smoke":
            continue
        if r.method in methods and r.checkpoint:  # what else its figures hang on is with whoever has the folder
            if r.digests.get("method") != plugins.method_digest(methods[r.method])[: plugins.DIGITS]:
                old.add(pair)
            continue
        if r.method not in methods or r.task not in tasks:
            old.add(pair)
            continue
        if pair not in now:
            now[pair] = plugins.source_digests(methods[r.method], tasks[r.task][1])
        if any(r.digests.get(name) != digest for name, digest in now[pair].items()):
            old.add(pair)
    if old:
        pairs = ", ".join(f"{method} on {task}" for method, task in sorted(old)[:5])
        found.append(f"records of older sources: {pairs}" + (f" and {len(old) - 5} more" if len(old) > 5 else ""))
    return found


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _data(root: Path) -> Iterable[tuple[str, bytes]]:
    """(name, content) of what goes on to change in the tree, and is frozen beside the pages."""
    leaderboard = Path(__file__).parent
    yield "requirements.lock", (root / "requirements.lock").read_bytes()
    for name in ("catalogue.jsonl", "taxonomy.json", "surveys.json", "disputes.jsonl"):
        if (leaderboard / name).exists():
            yield name, (leaderboard / name).read_bytes()


def _records(folder: Path) -> dict[str, str]:
    """Name below a version's folder -> sha256 of its records, environments and samples. What an editor or a file system
    left there is not of the release."""
    named = ((path, path.relative_to(folder)) for path in sorted(folder.rglob("*.json*")) if path.is_file())
    return {
        inside.as_posix(): _sha(path.read_bytes())
        for path, inside in named
        if inside.parts[0] != "release" and not any(part.startswith(".") for part in inside.parts)
    }


def _needless(inside: Path) -> bool:
    """Sources of minified files, and searching in other languages than English: no page reads them, and a release is
    kept in the tree for good, so that its bytes count."""
    return inside.suffix == ".map" or inside.as_posix().startswith("assets/javascripts/lunr/")


def pack(files: Mapping[str, bytes]) -> bytes:
    """A .tar.xz that hangs on names and contents alone."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(files[name]), 0o644
            archive.addfile(member, io.BytesIO(files[name]))
    return lzma.compress(stream.getvalue(), preset=8)


# reading ----------------------------------------------------------------------------------------


def read(folder: Path) -> Manifest:
    """The manifest of a release folder.

    Raises:
        ValueError: not a manifest, or one of another version.
    """
    path = folder / "manifest.json"
    try:
        found = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{path}: field {'.'.join(map(str, first['loc']))[:80]}: {first['msg']}") from None
    if found.suite != folder.parent.name:
        raise ValueError(f"{path}: is of version {found.suite}, but lies below {folder.parent.name}")
    return found


def releases(results: Path) -> list[tuple[Path, Manifest]]:
    """Every release below a results folder, oldest first."""
    found = [(path.parent, read(path.parent)) for path in results.glob("*/release/manifest.json")]
    return sorted(found, key=lambda pair: (version_key(pair[1].suite), pair[1].suite))


def unpack_sites(results: Path, out: Path) -> list[str]:
    """The pages of every release below out/versions/<version>/; the versions.

    Raises:
        ValueError: an archive is not the one that its manifest names.
    """
    done = []
    for folder, manifest in releases(results):
        content = (folder / "site.tar.xz").read_bytes()
        if _sha(content) != manifest.archives["site.tar.xz"]:
            raise ValueError(f"{folder / 'site.tar.xz'}: is not the archive of the manifest; restore it")
        target = out / "versions" / manifest.suite
        for name, page in contents(content).items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(page)
        done.append(manifest.suite)
    return done


def contents(archive: bytes) -> dict[str, bytes]:
    """Name -> content of an archive made by `pack`.

    Raises:
        ValueError: a member that is no plain file inside the folder.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:xz") as opened:
        for member in opened:
            name = PurePosixPath(member.name)
            if not member.isfile() or name.is_absolute() or ".." in name.parts or "\\" in member.name:
                raise ValueError(f"an archive holds {member.name!r}, which is no plain file inside it")
            stream = opened.extractfile(member)
            assert stream is not None
            found[member.name] = stream.read()
    return found


def check_all(results: Path) -> list[str]:
    """What disagrees between releases, their manifests and the records that lie beside them; [] when all is well.

    Machines that the release has none of may come later, as `stepmark verify --keep` writes them: they change nothing in it.
    """
    faults = []
    for folder, manifest in releases(results):
        files: dict[str, dict[str, str]] = {}
        for name in ARCHIVES:
            path = folder / name
            content = path.read_bytes() if path.exists() else b""
            if _sha(content) != manifest.archives.get(name):  # type: ignore[call-overload]
                faults.append(f"{path}: is not the archive of the manifest")
                continue
            files[name] = {inside: _sha(each) for inside, each in contents(content).items()}
        if len(files) < len(ARCHIVES):
            continue
        if {RECORDS: manifest.files.get("records", {}), **files} != manifest.files or digest_of(
            manifest.files
        ) != manifest.digest:
            faults.append(f"{folder / 'manifest.json'}: does not name the files that the archives hold")
        frozen, now = manifest.files.get("records", {}), _records(folder.parent)
        now = {name: sha for name, sha in now.items() if name in frozen or name.split("/")[0] in manifest.machines}
        changed = sorted(n for n in {*frozen, *now} if frozen.get(n) != now.get(n))
        if changed:
            faults.append(f"{folder.parent}: differs from its release in {', '.join(changed[:5])}")
    return faults


def summary(results: Path) -> list[tuple[str, str, str]]:
    """(version, day, digest) of every release, oldest first."""
    return [(manifest.suite, manifest.released[:10], manifest.digest) for _, manifest in releases(results)]


def index(results: Path) -> str:
    """The releases as JSON, for those who link to them."""
    found = [{"suite": s, "released": d, "digest": g, "site": f"versions/{s}/"} for s, d, g in summary(results)]
    return json.dumps(found, indent=1) + "\n"
