"""Samples that cannot be used in training: each is replaced by a rule, counted, and named; past a limit, an error."""

import logging
import threading
from collections.abc import Iterable

import numpy as np

from pipeline.manifest import DatasetError
from pipeline.online.samples import SampleReader

DAMAGED, UNDECODABLE = "its CRC-32 differs", "it does not decode"
_log = logging.getLogger("penstock")


class Replacements:
    """The rule: the next sample in the order of the ids that is whole stands in.

    So a batch keeps its size on every rank, and what stands in is a function of the data alone. Each rank counts those
    that it has met; a rank that has met too many ends, and the others' next exchange with it fails.

    Args:
        most: samples that may be replaced, each counted once, by this process.
        known: those that were, before a run was resumed.
    """

    def __init__(self, reader: SampleReader, most: int, known: Iterable[int] = ()) -> None:
        self._reader, self.most = reader, most
        self._ids = set(known)
        self._lock = threading.Lock()  # the reading and the decoding thread both find faults

    def known(self, sample: int) -> bool:
        """Whether it was found to be no good."""
        with self._lock:
            return sample in self._ids

    @property
    def ids(self) -> list[int]:
        with self._lock:
            return sorted(self._ids)

    def of(self, sample: int, why: str) -> tuple[int, np.ndarray]:
        """What stands in for `sample`, which is no good: its id and its JPEG.

        Raises:
            DatasetError: more samples have failed than may; it names this one and its shard.
        """
        reader = self._reader
        while True:
            where = f"{reader.shard(sample)}: sample {sample} (key {reader.key(sample)}): {why}"
            with self._lock:
                new = sample not in self._ids
                self._ids.add(sample)
                known = set(self._ids)
            if len(known) > self.most or len(known) == len(reader):
                raise DatasetError(
                    f"{where}; samples that failed: {len(known)}, allowed: max_bad={self.most}; "
                    "look at the data with tools/verify_shards.py"
                )
            stand_in = sample
            while stand_in in known:
                stand_in = (stand_in + 1) % len(reader)
            if new:
                _log.warning("%s; sample %d stands in", where, stand_in)
            damaged: list[int] = []
            (jpeg,) = reader.read(np.array([stand_in]), damaged)
            if not damaged:
                return stand_in, jpeg
            sample, why = stand_in, DAMAGED
