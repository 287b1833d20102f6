"""One shard: a deterministic tar and its DALI index, written aside, fsynced, renamed; its record last."""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.errors import SourceError, UserError
from pipeline.files import TAR_BLOCK, HashingFile, add_tar_member, write_aside, write_bytes_aside
from pipeline.image import ImageError, codec_versions, encode, rescaled
from pipeline.manifest import SAMPLE, BuildRecipe
from pipeline.offline import records
from pipeline.offline.plan import PlannedImage
from pipeline.offline.records import Record
from pipeline.offline.statistics import Sums
from pipeline.offline.watchdog import Watchdog
from pipeline.storage import Location

BLOCK = TAR_BLOCK


@dataclass(frozen=True)
class ShardTask:
    """Everything that determines one shard's bytes, and where to put it."""

    root: Location
    name: str  # SPLIT/SPLIT-NNNNNN
    images: tuple[PlannedImage, ...]
    recipe: BuildRecipe
    codecs: Mapping[str, str]  # that the build began with


@dataclass(frozen=True)
class Outcome:
    """A finished shard, for those who watch."""

    name: str
    images: int
    raw_bytes: int
    skipped: Counter[str]  # by reason
    resumed: bool  # done by an earlier run


def write_shard(task: ShardTask) -> Outcome:
    """Build one shard, unless its record says that it is done already.

    A pure function of the task, but for the place where it puts its files. A kill at any moment leaves either the
    whole shard with its record, or files that the next run overwrites.

    Raises:
        UserError: the codecs here are not those that the build began with; the raw images are not those of the
            record; a decode takes longer than watchdog.SECONDS.
        OSError: as the file system says. In every case nothing of the shard counts as done.
    """
    _require_codecs(task)
    done = _done(task)
    record = done or _write(task)
    reasons = Counter(line["reason"] for line in record.skipped)
    return Outcome(task.name, len(task.images), record.raw_bytes, reasons, done is not None)


def raw_digest(images: tuple[PlannedImage, ...]) -> str:
    """Return the SHA-256 (hex) of where the raw images lie, and of their sizes."""
    digest = hashlib.sha256()
    for image in images:
        raw = image.raw
        digest.update(os.fsencode(f"{raw.path}\t{raw.offset}\t{raw.size}\n"))
    return digest.hexdigest()


def _require_codecs(task: ShardTask) -> None:
    here = codec_versions()
    if wrong := [name for name in sorted(here.keys() | task.codecs.keys()) if here.get(name) != task.codecs.get(name)]:
        differing = "; ".join(
            f"{name} {task.codecs.get(name, 'none')}, here {here.get(name, 'none')}" for name in wrong
        )
        raise UserError(
            f"{task.name}: a worker on {os.uname().nodename} has other codecs than the build began with ({differing}); "
            "install the same environment there"
        )


def _done(task: ShardTask) -> Record | None:
    """The record of an earlier run, if the shard's files are there."""
    record = records.load(task.root, task.name)
    if record is None:
        return None
    for name, file in record.files.items():
        path = task.root / name
        if not storage.is_file(path) or storage.stamp(path)[0] != file["bytes"]:
            return None
    if record.raw != raw_digest(task.images):
        raise SourceError(
            f"{task.name}: built by an earlier run when its raw images ({task.images[0].raw.path} and so on) had other "
            "sizes or other places in their archive; restore RAW, or delete DATASET and start again"
        )
    return record


class _Shard:
    """The shard while it is written."""

    def __init__(self, task: ShardTask, out: HashingFile) -> None:
        self._out, self._recipe = out, task.recipe
        self._number = int(task.name[-6:])
        self.sums = Sums.zero(task.recipe.statistics_size)
        self.skipped: list[dict[str, str]] = []
        self.samples: list[tuple[int, int, int, int, int, np.ndarray]] = []
        self.index: list[str] = []
        self.raw_bytes = 0

    def add(self, image: PlannedImage, data: bytes | None) -> None:
        """Add an image; `data` is None where it is too large to be read."""
        recipe = self._recipe
        try:
            if data is None:
                raise ImageError("too_many_bytes")
            self.raw_bytes += len(data)
            pixels = rescaled(data, recipe)
        except ImageError as error:
            self.skipped.append({"key": image.key, "source": image.raw.path, "reason": error.code})
            return
        self.sums.add(pixels)
        jpeg = encode(pixels, quality=recipe.quality, subsampling=recipe.subsampling)
        offset = add_tar_member(self._out, f"{image.key}.jpg", jpeg)
        line = f"jpg {offset} {len(jpeg)} {image.key}.jpg"
        if image.label >= 0:
            label = str(image.label).encode()
            line += f" cls {add_tar_member(self._out, f'{image.key}.cls', label)} {len(label)} {image.key}.cls"
        self.index.append(line)
        digest = np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint8)
        self.samples.append((self._number, offset, len(jpeg), image.label, zlib.crc32(jpeg), digest))


def _write(task: ShardTask) -> Record:
    written: list[_Shard] = []

    def write_tar(out: HashingFile) -> None:
        shard = _Shard(task, out)
        with Watchdog() as watchdog, closing(_read(task)) as images:
            for image, data in images:
                with watchdog.over(image.raw.path):
                    shard.add(image, data)
        out.write(bytes(2 * BLOCK))
        written.append(shard)

    tar, idx = f"{task.name}.tar", f"{task.name}.idx"
    files = {tar: write_aside(task.root / tar, write_tar)}
    shard = written[0]
    text = f"v1.2 {len(shard.index)}\n" + "".join(line + "\n" for line in shard.index)
    files[idx] = write_bytes_aside(task.root / idx, text.encode())
    if not shard.samples:
        for name in files:
            storage.remove(task.root / name)
        files = {}
    raw = raw_digest(task.images)
    record = Record(task.name, len(shard.samples), shard.skipped, files, raw, shard.raw_bytes, shard.sums)
    records.save(task.root, record, np.array(shard.samples, SAMPLE))
    return record


def _read(task: ShardTask) -> Generator[tuple[PlannedImage, bytes | None], None, None]:
    """Each image's raw bytes; None for one that is larger than the limit. Of a store, many are fetched at a time."""
    limit = task.recipe.max_bytes

    def read(image: PlannedImage) -> bytes | None:
        return None if image.raw.size > limit else image.raw.read()

    if not storage.is_remote(task.images[0].raw.file):
        return ((image, read(image)) for image in task.images)
    return storage.read_ahead(task.images, read, size=lambda image: min(image.raw.size, limit))
