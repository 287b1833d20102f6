"""Sample id → JPEG bytes and label, by positioned reads; replacement of bad samples."""

import logging
import os
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pipeline.cli import printable
from pipeline.manifest import DatasetError, Manifest, mending
from pipeline.online.batch import Batch, Transform
from pipeline.volumes import naming

MAX_OPEN = 128  # shards kept open at a time; descriptors are a bounded resource
DAMAGED, UNDECODABLE = "its CRC-32 differs", "it does not decode"
# Takes shards by number; yields number → file descriptor, valid inside the context.
Lease: TypeAlias = Callable[[Collection[int]], AbstractContextManager[dict[int, int]]]
_log = logging.getLogger("penstock")


class BadSample(DatasetError):
    """A stored picture that is damaged or does not decode, and one too many of these."""


def shard_numbers(data: Manifest, split: str) -> dict[int, str]:
    """Return number in the records → name. A shard whose images were all skipped has a number, but no file."""
    return {int(shard.name[-10:-4]): shard.name for shard in data.split(split).shards}


class _OpenShard:
    """An open local shard. Its descriptor is closed with the last reference to it, so that no lease loses it."""

    def __init__(self, path: Path, remedy: str) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # waits for no pipe's writer
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}; let it be readable, or {remedy}") from error
        weakref.finalize(self, os.close, self.descriptor)


class SampleReader(AbstractContextManager["SampleReader"]):
    """Reads samples of one split, `readers` at a time. Threads may share it.

    `lease` gives the shards of a remote data set. Of a local one, the last `MAX_OPEN` that were used stay open.
    """

    def __init__(self, data: Manifest, split: str, lease: Lease | None = None, readers: int = 1) -> None:
        self.records = data.samples(split)  # (n,) of manifest.SAMPLE
        self._paths = {number: data.root / name for number, name in shard_numbers(data, split).items()}
        self._opened = lru_cache(MAX_OPEN)(lambda number: _OpenShard(self._paths[number], self.remedy))
        self._leased, self._lease = lease is not None, lease or self._lease_local
        self.remedy = mending(data.root)
        self._stop = threading.Event()
        self._use(readers)

    def _use(self, readers: int) -> None:
        self._readers, self._pool = readers, ThreadPoolExecutor(readers, thread_name_prefix="penstock-reader")

    def resize(self, readers: int) -> None:
        """Read so many samples at a time from now on, while nobody reads."""
        if readers != self._readers:
            self._pool.shutdown()
            self._use(readers)

    def __len__(self) -> int:
        return len(self.records)

    def is_here(self) -> bool:
        """Return whether the shards can be read on this machine."""
        return self._leased or all(isinstance(path, Path) and path.is_file() for path in self._paths.values())

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Return (n,) int64; −1: none."""
        return self.records["label"][ids].astype(np.int64)

    def read(self, ids: np.ndarray, damaged: list[int] | None = None) -> list[np.ndarray]:
        """Return the stored JPEG of each id, in the order of `ids`: views of one buffer, uint8.

        `damaged` receives the positions in `ids` whose CRC-32 differs; without it they are errors. Raises DatasetError:
        a shard that vanished, was cut short or changed, with its name and the sample's.
        """
        records = self.records[ids]
        ends = np.cumsum(records["size"], dtype=np.int64).tolist()
        buffer = np.empty(ends[-1] if ends else 0, np.uint8)
        jpegs = [buffer[end - size : end] for end, size in zip(ends, records["size"].tolist())]
        in_disk_order = np.lexsort((records["offset"], records["shard"]))
        starts = np.flatnonzero(np.diff(records["shard"][in_disk_order], prepend=-1))[::MAX_OPEN]
        wrong: list[int] = []
        for positions in np.split(in_disk_order, starts[1:]):  # so many shards at a time
            with self._lease(np.unique(records["shard"][positions]).tolist()) as descriptors:
                fill = partial(self._fill, jpegs, ids, descriptors)
                wrong += chain.from_iterable(self._pool.map(fill, np.array_split(positions, self._readers)))
        if damaged is not None:
            damaged += sorted(wrong)
        elif wrong:
            sample = int(ids[min(wrong)])
            where = f"{self.shard(sample)}: damaged at sample {sample} (key {self.key(sample)})"
            raise BadSample(f"{where}; {self.remedy}")
        return jpegs

    def _fill(
        self, jpegs: list[np.ndarray], ids: np.ndarray, descriptors: dict[int, int], positions: np.ndarray
    ) -> list[int]:
        """Read the JPEGs at `positions`; return those whose CRC-32 differs."""
        wrong, records = [], self.records[ids[positions]]
        columns = (records[name].tolist() for name in ("shard", "offset", "crc32"))
        for i, shard, offset, crc in zip(positions.tolist(), *columns):
            if self._stop.is_set():
                raise RuntimeError("the reader is closed")
            jpeg, done = jpegs[i].data, 0
            while done < len(jpeg):
                try:
                    count = os.preadv(descriptors[shard], [jpeg[done:]], offset + done)
                except OSError as error:
                    raise DatasetError(f"{self._paths[shard]}: {error.strerror}, at sample {ids[i]}") from error
                if not count:
                    raise DatasetError(f"{self._paths[shard]}: cut short at sample {ids[i]}; {self.remedy}")
                done += count
            if zlib.crc32(jpeg) != crc:
                wrong.append(i)
        return wrong

    @contextmanager
    def _lease_local(self, shards: Collection[int]) -> Iterator[dict[int, int]]:
        opened = {number: self._opened(number) for number in shards}
        yield {number: shard.descriptor for number, shard in opened.items()}

    def shard(self, number: int) -> object:
        """Return the path or URL of a sample's shard."""
        return self._paths[int(self.records["shard"][number])]

    def key(self, number: int) -> str:
        """Return the key of a sample: its member's name in the tar header before it."""
        shard, offset = int(self.records["shard"][number]), int(self.records["offset"][number])
        with self._lease([shard]) as descriptors, naming(self._paths[shard]):
            header = os.pread(descriptors[shard], 100, offset - 512)
        return printable(header.partition(b"\0")[0].decode("ascii", "replace").removesuffix(".jpg"))

    def stop(self) -> None:
        """Let reads under way, and later ones, end with RuntimeError."""
        self._stop.set()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown()
        self._opened.cache_clear()

    def __exit__(self, *_: object) -> None:
        self.close()


class BadSamples:
    """Ids of the samples of a split that cannot be used. The next whole sample in the order of the ids replaces each.

    So a batch keeps its size on every rank, and the replacement is a function of the data alone; in evaluation it has
    no label (−1), which nobody predicts. Each rank counts those that it has met, at most `limit`; with more it ends.
    `ids` are those that it had met before a run was resumed.
    """

    def __init__(
        self, data: Manifest, split: str, limit: int, ids: Iterable[int], training: bool, announce: bool = True
    ) -> None:
        """`announce`: log each."""
        self._samples, self._remedy = data.split(split).samples, mending(data.root)
        self.limit, self.ids, self.training = limit, frozenset(ids), training
        self.texts: dict[int, str] = {}  # of those found here: shard, key and reason
        self._announce = announce
        self._lock = threading.Lock()  # the reading and the decoding thread both find bad samples

    def add(self, sample: int, where: str) -> int:
        """Count a sample, unless it is known; return the id of the next one that is not known to be bad.

        Raises BadSample where more samples have failed than may; it begins with `where`.
        """
        with self._lock:
            new, bad = sample not in self.ids, self.ids | {sample}
            if len(bad) > self.limit or len(bad) == self._samples:  # this one is not counted: it may be mended
                count = f"samples that failed: {len(bad)}, allowed: max_bad={self.limit}"
                raise BadSample(f"{where}; {count}; {self._remedy}")
            self.ids = bad
        following = sample
        while following in bad:
            following = (following + 1) % self._samples
        if new:
            self.texts[sample] = where
        if new and self._announce:
            outcome = f"sample {following} stands in" if self.training else "its label is −1 now"
            _log.warning("%s; %s", where, outcome)
        return following


@dataclass(frozen=True)
class Pictures:
    """Reads the pictures of batches, replaces bad ones, and draws the crops."""

    reader: SampleReader
    bad: BadSamples
    recipe: Transform
    size: int | None  # pixels of a side of every stored picture; None: each has its own height and width
    stored: bool = True  # False: the decoder reads by itself, records instead of JPEGs

    def read(self, batch: Batch) -> None:
        """Set JPEGs, crops and, where bad samples are replaced, ids of a batch. Raises as `SampleReader.read`."""
        damaged: list[int] = []
        if self.stored:
            batch.jpegs = self.reader.read(batch.ids, damaged if self.bad.limit else None)
        else:
            batch.jpegs = [np.empty(0, np.uint8)] * len(batch.ids)
        known = [i for i, sample in enumerate(batch.ids.tolist()) if sample in self.bad.ids]
        self.replace(batch, sorted({*damaged, *known}), DAMAGED)

    def replace(self, batch: Batch, positions: Iterable[int], reason: str) -> None:
        """Replace the samples at these positions, which are bad. Raises BadSample: too many are."""
        for i in positions:
            batch.ids[i], batch.jpegs[i] = self._replacement(int(batch.ids[i]), reason)
        pixels = [(self.size,) * 2 if self.size else jpeg_size(jpeg) for jpeg in batch.jpegs]
        batch.draw(self.recipe, np.array(pixels, np.int64).reshape(-1, 2))

    def labels(self, batch: Batch) -> np.ndarray:
        """Return (n,) int64; −1: none."""
        labels = self.reader.labels(batch.ids)
        if not self.bad.training:
            labels[batch.ids != batch.requested_ids] = -1
        return labels

    def _replacement(self, sample: int, reason: str) -> tuple[int, np.ndarray]:
        while True:
            where = f"{self.reader.shard(sample)}: sample {sample} (key {self.reader.key(sample)}): {reason}"
            sample = self.bad.add(sample, where)
            damaged: list[int] = []
            (jpeg,) = self.reader.read(np.array([sample]), damaged)
            if not damaged:
                return sample, jpeg
            reason = DAMAGED


def jpeg_size(jpeg: np.ndarray) -> tuple[int, int]:
    """Return (height, width) in pixels from the frame header of a JPEG. Raises DatasetError where there is none."""
    data, at = jpeg.tobytes(), 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    raise DatasetError("a stored JPEG has no frame header; check the data with tools/verify_shards.py")
