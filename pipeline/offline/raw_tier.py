"""Builds the raw tier: every stored picture decoded once, a file for each shard, the manifest last."""

import errno
import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import UserError, records, storage, tier
from pipeline.cli import printable
from pipeline.files import TAR_BLOCK, HashingFile, locked, sweep, write_aside, write_bytes_aside
from pipeline.image import codec_versions
from pipeline.manifest import DatasetError, Manifest, canonical_json, mending
from pipeline.offline import executors
from pipeline.tier import DIGEST, FILE_NAME, Tier, TierFile, file_of
from pipeline.typed import Sha256, from_json

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


def build(dataset: Manifest, kind: str, workers: int, progress: Callable[[int, int], None]) -> tuple[Tier, int]:
    """Make the raw tier of a local data set, or go on where an earlier run stopped; mend the files that changed.

    The bytes are a function of the shards and the codec alone. `progress` is called with the files that are there, and
    how many there are to be. Returns the tier, and how many files were written.
    Raises UserError: no such tier can be made, another process makes it, no room; a stored picture is damaged.
    """
    root = _folder(dataset, kind)
    root.mkdir(exist_ok=True)
    with locked(root, "another process makes this tier"):
        sweep(root)
        tasks = list(tasks_of(dataset, kind, root))
        codec = records.fingerprint(kind)
        finished = dict(_finished(root, tasks, codec))
        missing = [task for task in tasks if task.path.name not in finished]
        _require_room(root, missing)
        if missing and not _is_whole(root, tasks, codec):
            (root / FILE_NAME).unlink(missing_ok=True)  # it lists other files than those to come
        progress(len(finished), len(tasks))
        try:
            for name, file in executors.run(write_file, missing, min(workers, len(missing))):
                finished[name] = file
                progress(len(finished), len(tasks))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "what is finished stays; make room, and the same command goes on"
            raise UserError(f"{error.filename or root}: {error.strerror}; {remedy}") from error
        for path in root.glob(f"*{tier.SUFFIX}"):
            if path.name not in finished:  # of shards that are no more
                path.unlink()
        made = Tier(root, kind, dataset.recipe.size, codec, codec_versions(), finished)
        data = made.to_json()
        if not storage.is_file(root / FILE_NAME) or (root / FILE_NAME).read_bytes() != data:
            write_bytes_aside(root / FILE_NAME, data)
        shutil.rmtree(root / WORK_FOLDER, ignore_errors=True)
        return made, len(missing)


def write_file(task: FileTask) -> tuple[str, TierFile]:
    """Decode the pictures of a shard into a file of the tier; return its name and its record. Raises DatasetError."""

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
    write_bytes_aside(task.path.parent / WORK_FOLDER / f"{task.path.name}.json", canonical_json(note))
    return task.path.name, file


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


def _expected(task: FileTask) -> int:
    return len(task.samples) * (records.record_bytes(task.kind, task.size) + DIGEST.itemsize)


def _is_whole(root: Path, tasks: list[FileTask], codec: str) -> bool:
    """Return whether tier.json is that of the tier to be made, so that only files need be mended."""
    try:
        known = tier.parse(storage.read_bytes(root / FILE_NAME), root)
    except (OSError, DatasetError):
        return False
    shards = {task.path.name: task.shard_sha256 for task in tasks}
    return known.codec == codec and {name: file.shard_sha256 for name, file in known.files.items()} == shards


def _finished(root: Path, tasks: list[FileTask], codec: str) -> Iterator[tuple[str, TierFile]]:
    """Yield the files that need not be written: noted by a run before, or, after its end, unchanged since."""
    whole = _is_whole(root, tasks, codec)
    listed: Mapping[str, TierFile] = tier.parse((root / FILE_NAME).read_bytes(), root).files if whole else {}
    for task in tasks:
        path = task.path
        if not storage.is_file(path) or path.stat().st_size != _expected(task):
            continue
        if file := listed.get(path.name):
            with open(path, "rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() == file.sha256:
                    yield path.name, file
            continue
        try:
            note = from_json((root / WORK_FOLDER / f"{path.name}.json").read_bytes(), Finished)
        except (OSError, UserError):
            continue
        if note.codec == codec and note.file.shard_sha256 == task.shard_sha256:
            yield path.name, note.file


def _require_room(root: Path, missing: list[FileTask]) -> None:
    there = sum(task.path.stat().st_size for task in missing if storage.is_file(task.path))
    needed, free = sum(map(_expected, missing)) - there, shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root}: needs {needed:,} bytes more, and {free:,} are free; make room, or take another format"
        )
