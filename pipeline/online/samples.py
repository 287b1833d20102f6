"""Sample id → JPEG bytes and label, by positioned reads; replacement of bad samples."""

import logging
import os
import threading
import weakref
import zlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np

from pipeline.manifest import DatasetError, Manifest

MAX_OPEN = 128  # shards kept open at a time; descriptors are a bounded resource
DAMAGED, UNDECODABLE = "its CRC-32 differs", "it does not decode"
_log = logging.getLogger("penstock")


class Shards(Protocol):
    """Open shards of a split: `LocalShards`, or the cache of a remote data set."""

    def lease(self, shards: Collection[int]) -> AbstractContextManager[dict[int, int]]:
        """Yield shard number → file descriptor, valid inside the context."""
        ...

    def close(self) -> None: ...


def shard_numbers(data: Manifest, split: str) -> dict[int, str]:
    """Return number in the records → name. A shard whose images were all skipped has a number, but no file."""
    return {int(shard.name[-10:-4]): shard.name for shard in data.split(split).shards}


class LocalShards:
    """The shards of a local dataset directory; the last `MAX_OPEN` used stay open. Threads may share it."""

    def __init__(self, data: Manifest, split: str) -> None:
        self._paths = {number: data.root / name for number, name in shard_numbers(data, split).items()}
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._leases: Counter[int] = Counter()
        weakref.finalize(self, _close, self._open)  # should nobody call close

    @contextmanager
    def lease(self, shards: Collection[int]) -> Iterator[dict[int, int]]:
        with self._lock:
            descriptors = {number: self._descriptor(number) for number in shards}
            self._leases.update(descriptors.keys())
        try:
            yield descriptors
        finally:
            with self._lock:
                self._leases.subtract(descriptors.keys())
                idle = [number for number in self._open if not self._leases[number]]  # most recently used last
                for number in idle[: max(0, len(self._open) - MAX_OPEN)]:
                    os.close(self._open.pop(number))

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            try:
                self._open[number] = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise DatasetError(f"{self._paths[number]}: missing; build it again") from error
            except OSError as error:
                raise DatasetError(f"{self._paths[number]}: {error.strerror}; let it be readable") from error
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        with self._lock:
            _close(self._open)


def _close(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class SampleReader:
    """Reads samples of one split. Threads may share it.

    Args:
        readers: reads at a time; more than one where a read takes long to answer, or one core is too slow to check.
    """

    def __init__(self, data: Manifest, split: str, shards: Shards | None = None, readers: int = 1) -> None:
        self.records = data.samples(split)  # (n,) of manifest.SAMPLE
        self._names = {number: data.root / name for number, name in shard_numbers(data, split).items()}
        self._shards: Shards = shards or LocalShards(data, split)
        self._readers = readers
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="penstock-reader") if readers > 1 else None

    def __len__(self) -> int:
        return len(self.records)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64; −1: none."""
        return self.records["label"][ids].astype(np.int64)

    def read(self, ids: np.ndarray, damaged: list[int] | None = None) -> list[np.ndarray]:
        """Return the stored JPEG of each id, in the order of `ids`: views of one buffer, uint8.

        Args:
            damaged: receives the positions in `ids` whose CRC-32 differs; without it they are errors.
        Raises:
            DatasetError: a shard that vanished, was cut short or changed, with its name and the sample's.
        """
        records = self.records[ids]
        ends = np.cumsum(records["size"], dtype=np.int64)
        buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        parts = [buffer[end - size : end] for end, size in zip(ends.tolist(), records["size"].tolist())]
        positions = np.lexsort((records["offset"], records["shard"]))  # in the order of the disk
        shards = records["shard"][positions]
        starts = np.flatnonzero(np.diff(shards, prepend=-1))[::MAX_OPEN].tolist()  # so many shards at a time
        wrong: list[int] = []
        for first, end in zip(starts, [*starts[1:], len(positions)]):
            with self._shards.lease(np.unique(shards[first:end]).tolist()) as descriptors:
                wrong += self._fill(parts, ids, positions[first:end], descriptors)
        if wrong and damaged is None:
            at = int(ids[min(wrong)])
            raise DatasetError(f"{self.shard(at)}: damaged at sample {at} (key {self.key(at)}); build it again")
        if damaged is not None:
            damaged += sorted(wrong)
        return parts

    def _fill(
        self, parts: list[np.ndarray], ids: np.ndarray, positions: np.ndarray, descriptors: dict[int, int]
    ) -> list[int]:
        """Read the parts at `positions`; return those whose CRC-32 differs."""
        records = self.records[ids]
        columns = [records[name].tolist() for name in ("shard", "offset", "crc32")]

        def fill(chosen: list[int]) -> list[int]:
            wrong = []
            for i in chosen:
                shard, offset, crc = (column[i] for column in columns)
                if self._stop.is_set():
                    raise RuntimeError("the reader is closed")
                part = memoryview(parts[i])  # type: ignore[arg-type]  # numpy's stubs for 3.11 do not say that it may
                try:
                    whole = _read_whole(descriptors[shard], part, offset)
                except OSError as error:
                    raise DatasetError(f"{self._names[shard]}: {error.strerror}, at sample {ids[i]}") from error
                if not whole:
                    raise DatasetError(f"{self._names[shard]}: cut short at sample {ids[i]}; build it again")
                if zlib.crc32(part) != crc:
                    wrong.append(i)
            return wrong

        chosen = positions.tolist()
        if self._pool is None:
            return fill(chosen)
        each = -(-len(chosen) // self._readers)
        shares = [chosen[start : start + each] for start in range(0, len(chosen), each)]
        return [i for wrong in self._pool.map(fill, shares) for i in wrong]

    def shard(self, number: int) -> object:
        """Return the path or URL of a sample's shard."""
        return self._names[int(self.records["shard"][number])]

    def key(self, number: int) -> str:
        """Return the key of a sample: its member's name in the tar header before it."""
        shard, offset = int(self.records["shard"][number]), int(self.records["offset"][number])
        with self._shards.lease([shard]) as descriptors:
            header = os.pread(descriptors[shard], 100, offset - 512)
        return header.partition(b"\0")[0].decode("ascii", "replace").removesuffix(".jpg")

    def stop(self) -> None:
        """Let reads under way, and later ones, end with RuntimeError."""
        self._stop.set()

    def close(self) -> None:
        self.stop()
        if self._pool:
            self._pool.shutdown()
        self._shards.close()

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BadSamples:
    """Samples that cannot be used in training. The next whole sample in the order of the ids replaces each.

    So a batch keeps its size on every rank, and the replacement is a function of the data alone. Each rank counts those
    that it has met; a rank that has met too many ends, and the others' next exchange with it fails.

    Args:
        limit: samples that may be replaced, each counted once, by this process.
        ids: those that were, before a run was resumed.
    """

    def __init__(self, reader: SampleReader, limit: int, ids: Iterable[int] = ()) -> None:
        self._reader, self.limit = reader, limit
        self._ids = set(ids)
        self._lock = threading.Lock()  # the reading and the decoding thread both find bad samples

    def __contains__(self, sample: int) -> bool:
        with self._lock:
            return sample in self._ids

    @property
    def ids(self) -> list[int]:
        with self._lock:
            return sorted(self._ids)

    def replacement(self, sample: int, reason: str) -> tuple[int, np.ndarray]:
        """Return the id and the JPEG of the sample that replaces a bad one.

        Raises:
            DatasetError: more samples have failed than may; it names this one and its shard.
        """
        reader = self._reader
        while True:
            where = f"{reader.shard(sample)}: sample {sample} (key {reader.key(sample)}): {reason}"
            with self._lock:
                new = sample not in self._ids
                self._ids.add(sample)
                known = set(self._ids)
            if len(known) > self.limit or len(known) == len(reader):
                raise DatasetError(
                    f"{where}; samples that failed: {len(known)}, allowed: max_bad={self.limit}; "
                    "look at the data with tools/verify_shards.py"
                )
            replacement = sample
            while replacement in known:
                replacement = (replacement + 1) % len(reader)
            if new:
                _log.warning("%s; sample %d stands in", where, replacement)
            damaged: list[int] = []
            (jpeg,) = reader.read(np.array([replacement]), damaged)
            if not damaged:
                return replacement, jpeg
            sample, reason = replacement, DAMAGED


def jpeg_size(jpeg: np.ndarray) -> tuple[int, int]:
    """Return (height, width) in pixels from the frame header of a JPEG. Raises DatasetError where there is none."""
    data, at = jpeg.tobytes(), 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    raise DatasetError("a stored JPEG has no frame header; check the data with tools/verify_shards.py")


def _read_whole(descriptor: int, part: memoryview, offset: int) -> bool:
    """Fill `part` from `offset`; return False where the file ends before that."""
    done = 0
    while done < len(part):
        if not (count := os.preadv(descriptor, [part[done:]], offset + done)):
            return False
        done += count
    return True
