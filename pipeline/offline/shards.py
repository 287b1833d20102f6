"""One shard: a deterministic tar and its DALI index, written aside, fsynced, renamed; its record in .build last."""

import hashlib
import io
import json
import os
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline import SourceError, UserError, storage
from pipeline.decode import ImageError
from pipeline.files import TAR_BLOCK, HashingFile, add_tar_member, write_aside, write_bytes_aside
from pipeline.image import codec_versions, encode, rescaled
from pipeline.manifest import SAMPLE, BuildRecipe, FileRecord, ShardRecord, canonical_json
from pipeline.offline.plan import PlannedImage, differences
from pipeline.offline.statistics import Sums
from pipeline.storage import Location
from pipeline.typed import PARSER_ERRORS

BUILD_FOLDER, SKIPPED_FILE = ".build", "skipped.jsonl"
SECONDS = 60.0  # that one image may take


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
    warned: Mapping[str, bool]  # see Record
    resumed: bool  # done by an earlier run


@dataclass(frozen=True)
class Record:
    """A finished shard, as the manifest needs it. One whose images were all skipped has no files."""

    name: str  # SPLIT/SPLIT-NNNNNN
    skipped: list[dict[str, str]]  # key, source, reason
    files: dict[str, FileRecord]  # by their paths below the root
    raw: str  # digest of where its raw images lay, and of their sizes
    raw_bytes: int
    samples: np.ndarray  # (n,) of manifest.SAMPLE
    sums: Sums
    # Sources of pictures that were decoded although libjpeg warned of damage → whether a CR stands before each LF.
    # Records of earlier versions do not have it.
    warned: dict[str, bool] = field(default_factory=dict)

    @property
    def manifest_entry(self) -> ShardRecord | None:
        """Return the shard's entry in the manifest; None where all its images were skipped."""
        if not self.files:
            return None
        red, green, blue = (int(value) for value in self.sums.sum_image.sum(axis=(0, 1)))
        moments: Any = tuple(tuple(row) for row in self.sums.second_moments.tolist())
        tar = f"{self.name}.tar"
        return ShardRecord(tar, len(self.samples), self.files[tar].bytes, (red, green, blue), moments)


def write_shard(task: ShardTask) -> Outcome:
    """Build one shard, unless its record says that it is done already.

    A kill at any moment leaves either the whole shard with its record, or files that the next run overwrites. An image
    that takes longer than `SECONDS` ends the process. Raises UserError where the codecs here are not those that the
    build began with, or the raw images not those of the record, and OSError: then nothing of the shard counts as done.
    """
    if wrong := differences(task.codecs, codec_versions()):
        raise UserError(
            f"{task.name}: a worker on {os.uname().nodename} has other codecs than the build began with "
            f"({'; '.join(wrong)}); install the same environment there"
        )
    raw = hashlib.sha256()  # of where the raw images lie, and of their sizes
    for image in task.images:
        raw.update(os.fsencode(f"{image.raw.path}\t{image.raw.offset}\t{image.raw.size}\n"))
    record = load_record(task.root, task.name)
    resumed = record is not None and all(_has_size(task.root / name, file) for name, file in record.files.items())
    if record is None or not resumed:
        record = _write(task, raw.hexdigest())
    elif record.raw != raw.hexdigest():
        raise SourceError(
            f"{task.name}: built by an earlier run when its raw images ({task.images[0].raw.path} and so on) had other "
            "sizes or other places in their archive; restore RAW, or delete DATASET and start again"
        )
    reasons = Counter(line["reason"] for line in record.skipped)
    return Outcome(task.name, len(task.images), record.raw_bytes, reasons, record.warned, resumed)


def _has_size(path: Location, file: FileRecord) -> bool:
    return storage.is_file(path) and storage.stamp(path)[0] == file.bytes


def _write(task: ShardTask, raw: str) -> Record:
    shard = _Shard(task)
    tar, idx = f"{task.name}.tar", f"{task.name}.idx"
    written = {tar: write_aside(task.root / tar, shard.write_tar)}
    text = "".join(f"{line}\n" for line in (f"v1.2 {len(shard.index)}", *shard.index))
    written[idx] = write_bytes_aside(task.root / idx, text.encode())
    if not shard.samples:
        for name in written:
            storage.remove(task.root / name)
        written = {}
    files = {name: FileRecord(**file) for name, file in written.items()}
    samples = np.array(shard.samples, SAMPLE)
    record = Record(task.name, shard.skipped, files, raw, shard.raw_bytes, samples, shard.sums, shard.warned)
    _save_record(task.root, record)
    return record


class _Shard:
    """The content of a shard, as far as it is written."""

    def __init__(self, task: ShardTask) -> None:
        self._task = task
        self.sums = Sums.zero(task.recipe.statistics_size)
        self.skipped: list[dict[str, str]] = []
        self.warned: dict[str, bool] = {}
        self.samples: list[tuple[int, int, int, int, int, np.ndarray]] = []
        self.index: list[str] = []
        self.raw_bytes = 0
        self.current: PlannedImage | None = None  # for the watchdog

    def write_tar(self, out: HashingFile) -> None:
        ended = threading.Event()
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # `_watch` puts it back, as long as it can run
        threading.Thread(target=_watch, args=(self, ended), daemon=True).start()
        try:
            with closing(_read(self._task)) as images:
                for self.current, data in images:
                    self._add(self.current, data, out)
                    self.current = None  # reading has limits of its own
        finally:
            ended.set()
        out.write(bytes(2 * TAR_BLOCK))

    def _add(self, image: PlannedImage, data: bytes | None, out: HashingFile) -> None:
        recipe, warnings = self._task.recipe, list[str]()
        try:
            if data is None:  # not even read
                raise ImageError("too_many_bytes")
            self.raw_bytes += len(data)
            pixels = rescaled(data, recipe, warnings.append)
        except ImageError as error:
            self.skipped.append({"key": image.key, "source": image.raw.path, "reason": error.code})
            return
        if warnings:
            self.warned[image.raw.path] = data.count(b"\n") == data.count(b"\r\n") > 2  # by chance: once in 10 million
        self.sums.add(pixels)
        jpeg = encode(pixels, quality=recipe.quality, subsampling=recipe.subsampling)
        offset = add_tar_member(out, f"{image.key}.jpg", jpeg)
        line = f"jpg {offset} {len(jpeg)} {image.key}.jpg"
        if image.label >= 0:
            label = str(image.label).encode()
            line += f" cls {add_tar_member(out, f'{image.key}.cls', label)} {len(label)} {image.key}.cls"
        self.index.append(line)
        digest = np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint8)
        self.samples.append((int(self._task.name[-6:]), offset, len(jpeg), image.label, zlib.crc32(jpeg), digest))


def _read(task: ShardTask) -> Generator[tuple[PlannedImage, bytes | None], None, None]:
    """Yield each image and its bytes; None for one that is larger than the limit. A store is read ahead."""
    limit = task.recipe.max_bytes

    def read(image: PlannedImage) -> bytes | None:
        return None if image.raw.size > limit else image.raw.read()

    if not storage.is_remote(task.images[0].raw.file):
        return ((image, read(image)) for image in task.images)
    return storage.read_ahead(task.images, read, size=lambda image: min(image.raw.size, limit))


def _watch(shard: _Shard, ended: threading.Event) -> None:
    """End the process when one image takes longer than `SECONDS`. A time never skips it: times differ between machines.

    This thread counts its looks, and not the time between them, so that a process that was stopped (Ctrl-Z, a suspended
    job) may go on. Where a decoder keeps threads from running, the kernel's timer of CPU time ends the process.
    """
    pause = min(0.5, SECONDS / 4)  # seconds between two looks
    image, looks = None, 0
    while not ended.wait(pause):
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
        looks = looks + 1 if shard.current is image else 0
        image = shard.current
        if image and looks * pause > SECONDS:
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
            remedy = "remove the file, or run the same command again on a faster machine"
            problem = f"still decoding after {SECONDS:g} s, which fails the build (a time never skips an image)"
            print(f"{show_cursor}Error: {image.raw.path}: {problem}; {remedy}", file=sys.stderr, flush=True)
            os._exit(2)  # a decoder in C hears no exception
    signal.setitimer(signal.ITIMER_PROF, 0)


def record_path(root: Location, name: str) -> Location:
    return root / BUILD_FOLDER / f"{name.partition('/')[2]}.npz"


def _save_record(root: Location, record: Record) -> None:
    meta = {key: getattr(record, key) for key in ("name", "skipped", "warned", "raw", "raw_bytes")}
    meta["files"] = {name: asdict(file) for name, file in record.files.items()}
    small = record.sums.sum_image.max() < 2**32  # 255 · samples_per_shard is, the sum over all pixels is not
    buffer = io.BytesIO()
    np.savez(
        buffer,
        meta=np.frombuffer(canonical_json(meta), np.uint8),
        samples=record.samples,
        n=record.sums.n,
        sum_image=record.sums.sum_image.astype(np.uint32 if small else np.int64),
        second_moments=record.sums.second_moments,
    )
    write_bytes_aside(record_path(root, record.name), buffer.getvalue())


def load_record(root: Location, name: str) -> Record | None:
    """Return the record of a shard; None where there is none, or none that can be read: then it is built again."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(record_path(root, name))), allow_pickle=False) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            files = {file: FileRecord(**written) for file, written in meta.pop("files").items()}
            sums = Sums(int(arrays["n"]), arrays["sum_image"].astype(np.int64), arrays["second_moments"])
            return Record(**meta, files=files, samples=arrays["samples"], sums=sums)
    except (FileNotFoundError, AttributeError, *PARSER_ERRORS):
        return None
