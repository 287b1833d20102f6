"""Sample id → JPEG bytes and label, by positioned reads."""

import os
import threading
import weakref
import zlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np

from pipeline.manifest import DatasetError, Manifest

MAX_OPEN = 128  # shards kept open at a time; descriptors are a bounded resource


class Shards(Protocol):
    """Where the shards of a split are opened: this folder of this machine, or a cache of a remote one."""

    def lease(self, shards: Collection[int]) -> AbstractContextManager[dict[int, int]]:
        """Number of a shard → its descriptor, for as long as the context lasts."""
        ...

    def close(self) -> None: ...


def shard_numbers(data: Manifest, split: str) -> dict[int, str]:
    """Number, as the records have it → name. A shard whose images were all skipped has a number, but no file."""
    return {int(shard.name[-10:-4]): shard.name for shard in data.split(split).shards}


class LocalShards:
    """The shards of a dataset directory on this machine, the latest `MAX_OPEN` of them open. Threads may share it."""

    def __init__(self, data: Manifest, split: str) -> None:
        self._paths = {number: data.root / name for number, name in shard_numbers(data, split).items()}
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._leases: Counter[int] = Counter()
        weakref.finalize(self, _close, self._open)  # for who forgets to

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
                idle = [number for number in self._open if not self._leases[number]]  # the latest used last
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
        """The stored JPEG of each id, in the order of `ids`: views of one buffer, uint8.

        Args:
            damaged: takes the places of samples whose CRC-32 differs; without it they are errors.
        Raises:
            DatasetError: a shard that vanished, was cut short or changed, with its name and the sample's.
        """
        records = self.records[ids]
        ends = np.cumsum(records["size"], dtype=np.int64)
        buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        parts = [buffer[end - size : end] for end, size in zip(ends.tolist(), records["size"].tolist())]
        places = np.lexsort((records["offset"], records["shard"]))  # in the order of the disk
        shards = records["shard"][places]
        starts = np.flatnonzero(np.diff(shards, prepend=-1))[::MAX_OPEN].tolist()  # so many shards at a time
        wrong: list[int] = []
        for first, end in zip(starts, [*starts[1:], len(places)]):
            with self._shards.lease(np.unique(shards[first:end]).tolist()) as descriptors:
                wrong += self._fill(parts, ids, places[first:end], descriptors)
        if wrong and damaged is None:
            at = int(ids[min(wrong)])
            raise DatasetError(f"{self.shard(at)}: damaged at sample {at} (key {self.key(at)}); build it again")
        if damaged is not None:
            damaged += sorted(wrong)
        return parts

    def _fill(
        self, parts: list[np.ndarray], ids: np.ndarray, places: np.ndarray, descriptors: dict[int, int]
    ) -> list[int]:
        """Read the parts at `places`; those whose CRC-32 differs."""
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

        chosen = places.tolist()
        if self._pool is None:
            return fill(chosen)
        each = -(-len(chosen) // self._readers)
        shares = [chosen[start : start + each] for start in range(0, len(chosen), each)]
        return [i for wrong in self._pool.map(fill, shares) for i in wrong]

    def shard(self, number: int) -> object:
        """Where the shard of a sample is."""
        return self._names[int(self.records["shard"][number])]

    def key(self, number: int) -> str:
        """The key of a sample: its member's name in the tar header before it."""
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


def picture_size(jpeg: np.ndarray) -> tuple[int, int]:
    """(height, width) in pixels, from the frame header of a JPEG. Raises DatasetError where there is none."""
    data, at = jpeg.tobytes(), 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    raise DatasetError("a stored JPEG has no frame header; check the data with tools/verify_shards.py")


def _read_whole(descriptor: int, part: memoryview, offset: int) -> bool:
    """Fill `part` from `offset`. False where the file ends before that."""
    done = 0
    while done < len(part):
        if not (count := os.preadv(descriptor, [part[done:]], offset + done)):
            return False
        done += count
    return True
