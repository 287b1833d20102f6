"""Builds the raw tier: every stored picture decoded once, a file for each shard, the manifest last."""

import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import UserError, records, storage, tier
from pipeline.cli import printable
from pipeline.files import (
    TAR_BLOCK,
    HashingFile,
    full_disk_explained,
    locked,
    require_writable,
    sweep,
    write_aside,
    write_bytes_aside,
)
from pipeline.image import codec_versions
from pipeline.manifest import DatasetError, Manifest, canonical_json, mending
from pipeline.offline import executors
from pipeline.tier import DIGEST, FILE_NAME, Tier, TierFile, file_of
from pipeline.typed import Sha256, from_json
from pipeline.volumes import naming, open_regular

WORK_FOLDER = ".build"  # in the tier's folder: a note of each file that is finished, NAME.json


@dataclass(frozen=True)
class Finished:
    """A file of the tier that is on disk, and what it was made with."""

    file: TierFile
    codec: Sha256


class FileTask(NamedTuple):
    """A file to write, a function of its shard and the codec alone."""

    path: Path
    shard: Path
    samples: np.ndarray  # (n,) of manifest.SAMPLE
    shard_sha256: str
    kind: str
    size: int  # pixels of a side of the pictures
    remedy: str  # where a picture is damaged
    listed: TierFile | None = None  # in tier.json: the file stays as it is if it has these bytes

    @property
    def bytes(self) -> int:
        return len(self.samples) * (records.record_bytes(self.kind, self.size) + DIGEST.itemsize)


def build(
    dataset: Manifest,
    kind: str,
    workers: int,
    progress: Callable[[int, int], None],
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Tier, int]:
    """Make the raw tier of a local data set, or go on where an earlier run stopped; mend the files that changed.

    The bytes are a function of the shards and the codec alone. `progress` is called with the files that are there, and
    how many there are to be; `tell` with the reason why a finished tier is made anew. Returns the tier, and how many
    files were written.
    Raises UserError: no such tier can be made, another process makes it, no room; a stored picture is damaged.
    """
    root, codec = _folder(dataset, kind), records.fingerprint(kind)
    require_writable(root)
    with _reserved(root):
        tasks = list(tasks_of(dataset, kind, root))
        before, outdated = _finished_tier(dataset, kind, codec)
        whole = before is not None and not outdated
        known = dict(before.files) if before and whole else dict(_noted(root, tasks, codec))
        there = {task.path.name: known[task.path.name] for task in tasks if _has_size(task, known)}
        stale = [path for path in root.glob(f"*{tier.SUFFIX}") if path.name not in there and path.is_file()]
        needed = sum(task.bytes for task in tasks if task.path.name not in there)
        require_writable(root, needed - sum(path.stat().st_size for path in stale))
        if outdated:
            tell(f"{outdated}; the tier is made anew")
            (root / FILE_NAME).unlink()
        for path in stale:
            path.unlink()
        finished, written = {} if whole else there, 0
        work = [task._replace(listed=there.get(task.path.name)) for task in tasks if task.path.name not in finished]
        progress(len(finished), len(tasks))
        for name, file, changed in executors.run(write_file, work, min(workers, len(work))):
            finished[name] = file
            written += changed
            progress(len(finished), len(tasks))
        if before is None or not whole or before.files != finished:
            before = Tier(root, kind, dataset.recipe.size, codec, codec_versions(), finished)
            write_bytes_aside(root / FILE_NAME, before.to_json())
        shutil.rmtree(root / WORK_FOLDER, ignore_errors=True)
        return before, written


@contextmanager
def _reserved(root: Path) -> Iterator[None]:
    """Lock the tier's folder. However the block ends, nothing half-written stays; a full disk is a UserError."""
    root.mkdir(exist_ok=True)
    with locked(root, "another process makes this tier; wait for it, or stop it"):
        try:
            with full_disk_explained(root):
                _sweep(root)
                yield
        finally:
            _sweep(root)


def _sweep(root: Path) -> None:
    sweep(root)
    sweep(root / WORK_FOLDER)


def write_file(task: FileTask) -> tuple[str, TierFile, bool]:
    """Decode the pictures of a shard into a file of the tier, unless it has the bytes that tier.json lists.

    Returns the file's name, its record, and whether it was written. Raises DatasetError: a picture is damaged.
    """
    name = task.path.name
    if task.listed and _sha256(task.path) == task.listed.sha256:
        return name, task.listed, False
    task.path.unlink(missing_ok=True)  # there may be no room for both

    def write(out: HashingFile) -> None:
        digests = np.empty(len(task.samples), DIGEST)
        with storage.opened(task.shard) as (read, _):
            for i, sample in enumerate(task.samples):
                jpeg = read(int(sample["size"]), int(sample["offset"]))
                try:
                    if zlib.crc32(jpeg) != sample["crc32"]:
                        raise ValueError("its CRC-32 differs")
                    record = records.record_of(jpeg, task.kind, task.size)
                except ValueError as error:
                    key = printable(read(100, int(sample["offset"]) - TAR_BLOCK).partition(b".")[0].decode("latin-1"))
                    raise DatasetError(f"{task.shard}: picture {i} (key {key}): {error}; {task.remedy}") from error
                digests[i] = records.digest(record)
                out.write(record.data)
        out.write(digests.tobytes())

    file = TierFile(**write_aside(task.path, write), shard_sha256=task.shard_sha256)
    note = asdict(Finished(file, records.fingerprint(task.kind)))
    write_bytes_aside(task.path.parent / WORK_FOLDER / f"{name}.json", canonical_json(note))
    return name, file, True


def _folder(dataset: Manifest, kind: str) -> Path:
    """Return the tier's folder. Raises UserError where such records cannot hold the data set's pictures."""
    recipe, root = dataset.recipe, dataset.root
    if not isinstance(root, Path):
        raise UserError(f"{root}: a raw tier is made on this machine's disk; copy the data set here first")
    if recipe.crop != "centre":
        raise UserError(f"{root}: built with --crop none: its pictures differ in size; build with --crop centre")
    if kind == "yuv420" and recipe.subsampling != "4:2:0":
        raise UserError(f"{root}: stored with {recipe.subsampling}, not 4:2:0; take --format rgb")
    return tier.folder(root, kind)


def tasks_of(dataset: Manifest, kind: str, root: Path) -> Iterator[FileTask]:
    """Yield the files of a tier, one for each shard of every split."""
    assert isinstance(dataset.root, Path)
    for name, split in dataset.splits.items():
        samples, end = dataset.samples(name), 0
        for shard in split.shards:
            start, end = end, end + shard.samples
            own = samples[start:end], dataset.files[shard.name].sha256
            path = root / file_of(shard.name)
            yield FileTask(path, dataset.root / shard.name, *own, kind, dataset.recipe.size, mending(dataset.root))


def _finished_tier(dataset: Manifest, kind: str, codec: str) -> tuple[Tier | None, str]:
    """Return the tier that tier.json describes, if it can be read, and why it is not the one to be made, if so."""
    root = _folder(dataset, kind)
    path = root / FILE_NAME
    try:
        before = tier.parse(storage.read_bytes(path), root)
    except FileNotFoundError:
        return None, ""
    except DatasetError as error:
        return None, str(error)
    if before.codec != codec:
        return before, f"{path}: decoded by a codec that gives other pixels than this machine's"
    return before, "" if before.is_of(dataset, kind) else f"{path}: made from other shards"


def _noted(root: Path, tasks: list[FileTask], codec: str) -> Iterator[tuple[str, TierFile]]:
    """Yield the files that an earlier run has finished, from the same shards by the same codec."""
    for task in tasks:
        with suppress(FileNotFoundError, UserError):  # without a note that can be read it is written again
            note = from_json((root / WORK_FOLDER / f"{task.path.name}.json").read_bytes(), Finished)
            if (note.codec, note.file.shard_sha256) == (codec, task.shard_sha256):
                yield task.path.name, note.file


def _has_size(task: FileTask, known: Mapping[str, TierFile]) -> bool:
    file = known.get(task.path.name)
    return file is not None and storage.is_file(task.path) and {file.bytes, task.path.stat().st_size} == {task.bytes}


def _sha256(path: Path) -> str:
    with naming(path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
