"""Sample id → JPEG bytes and label, by positioned reads."""

import os
import zlib
from collections import OrderedDict
from types import TracebackType

import numpy as np

from pipeline.manifest import DatasetError, Manifest

MAX_OPEN = 256  # shards kept open at a time; descriptors are a bounded resource


class SampleReader:
    """Reads samples of one split. Not thread-safe: one thread reads."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.records = manifest.samples(split)  # (n,) of manifest.SAMPLE
        # records count planned shards; those whose images were all skipped have no file
        self._names = {int(shard.name[-10:-4]): manifest.root / shard.name for shard in manifest.split(split).shards}
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.records)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64; −1: none."""
        return self.records["label"][ids].astype(np.int64)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """The stored JPEG of each id, in the order of `ids`: views of one buffer, uint8.

        Raises:
            DatasetError: a shard that vanished, was cut short or changed (CRC-32), with its name and the sample's.
        """
        records = self.records[ids]
        ends = np.cumsum(records["size"], dtype=np.int64)
        buffer = np.empty(int(ends[-1]), np.uint8)
        parts = [buffer[end - size : end] for end, size in zip(ends.tolist(), records["size"].tolist())]
        for i in np.lexsort((records["offset"], records["shard"])):  # in the order of the disk
            shard, offset = int(records["shard"][i]), int(records["offset"][i])
            part = parts[i]
            if os.preadv(self._descriptor(shard), [memoryview(part)], offset) != len(part):
                raise DatasetError(f"{self._names[shard]}: cut short at sample {ids[i]}; build it again")
            if zlib.crc32(part) != records["crc32"][i]:
                raise DatasetError(
                    f"{self._names[shard]}: damaged at sample {ids[i]} (key {self._key(shard, offset)}); build it again"
                )
        return parts

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[shard] = os.open(self._names[shard], os.O_RDONLY)
            except FileNotFoundError as error:
                raise DatasetError(f"{self._names[shard]}: missing; build it again") from error
        return self._open[shard]

    def _key(self, shard: int, offset: int) -> str:
        header = os.pread(self._descriptor(shard), 100, offset - 512)  # the member's name in its tar header
        return header.partition(b"\0")[0].decode("ascii", "replace").removesuffix(".jpg")

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
