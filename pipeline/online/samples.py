"""Sample id → JPEG bytes and label, by positioned reads; replacement of bad samples."""

import logging
import os
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pipeline.cli import printable
from pipeline.manifest import DatasetError, Manifest
from pipeline.volumes import naming

MAX_OPEN = 128  # shards kept open at a time; descriptors are a bounded resource
DAMAGED, UNDECODABLE = "its CRC-32 differs", "it does not decode"
# Takes shards by number; yields number → file descriptor, valid inside the context.
Lease: TypeAlias = Callable[[Collection[int]], AbstractContextManager[dict[int, int]]]
_log = logging.getLogger("penstock")


def shard_numbers(data: Manifest, split: str) -> dict[int, str]:
    """Return number in the records → name. A shard whose images were all skipped has a number, but no file."""
    return {int(shard.name[-10:-4]): shard.name for shard in data.split(split).shards}


class _OpenShard:
    """An open local shard. Its descriptor is closed with the last reference to it, so that no lease loses it."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # waits for no pipe's writer
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}; let it be readable, or build it again") from error
        weakref.finalize(self, os.close, self.descriptor)


class SampleReader(AbstractContextManager["SampleReader"]):
    """Reads samples of one split, `readers` at a time. Threads may share it.

    `lease` gives the shards of a remote data set. Of a local one, the last `MAX_OPEN` that were used stay open.
    """

    def __init__(self, data: Manifest, split: str, lease: Lease | None = None, readers: int = 1) -> None:
        self.records = data.samples(split)  # (n,) of manifest.SAMPLE
        self._paths = {number: data.root / name for number, name in shard_numbers(data, split).items()}
        self._opened = lru_cache(MAX_OPEN)(lambda number: _OpenShard(self._paths[number]))
        self._lease = lease or self._lease_local
        self._readers = readers
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="penstock-reader")

    def __len__(self) -> int:
        return len(self.records)

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
            raise DatasetError(f"{where}; build it again")
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
                    raise DatasetError(f"{self._paths[shard]}: cut short at sample {ids[i]}; build it again")
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
    """Samples that cannot be used in training. The next whole sample in the order of the ids replaces each.

    So a batch keeps its size on every rank, and the replacement is a function of the data alone. Each rank counts those
    that it has met, at most `limit`; with more it ends, and the others' next exchange with it fails. `ids` are those
    that it had met before a run was resumed.
    """

    def __init__(self, reader: SampleReader, limit: int, ids: Iterable[int] = ()) -> None:
        self._reader, self.limit, self.ids = reader, limit, frozenset(ids)
        self._lock = threading.Lock()  # the reading and the decoding thread both find bad samples

    def replacement(self, sample: int, reason: str) -> tuple[int, np.ndarray]:
        """Return the id and the JPEG of the sample that replaces a bad one.

        Raises DatasetError where more samples have failed than may; it names this one and its shard.
        """
        reader = self._reader
        while True:
            where = f"{reader.shard(sample)}: sample {sample} (key {reader.key(sample)}): {reason}"
            with self._lock:
                new = sample not in self.ids
                self.ids = bad = self.ids | {sample}
            if len(bad) > self.limit or len(bad) == len(reader):
                count = f"samples that failed: {len(bad)}, allowed: max_bad={self.limit}"
                raise DatasetError(f"{where}; {count}; look at the data with tools/verify_shards.py")
            while sample in bad:
                sample = (sample + 1) % len(reader)
            if new:
                _log.warning("%s; sample %d stands in", where, sample)
            damaged: list[int] = []
            (jpeg,) = reader.read(np.array([sample]), damaged)
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
