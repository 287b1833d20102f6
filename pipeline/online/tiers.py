"""Decoders of the faster tiers: records from disk (`tier`), and such as stay in the memory of the devices."""

import logging
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.manifest import Manifest
from pipeline.online import turbo
from pipeline.online.batch import Batch, Transform
from pipeline.online.devices import Streams
from pipeline.online.samples import MAX_OPEN, SampleReader
from pipeline.records import digest, record_bytes, record_of
from pipeline.tier import DIGEST, Tier, build_command, file_of

_log = logging.getLogger("penstock")


class _OpenFile:
    """An open file of a tier, and the digests of its records. It is closed with the last reference to it."""

    def __init__(self, path: Path, samples: int, record: int) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self.descriptor)
        data = os.pread(self.descriptor, samples * DIGEST.itemsize, samples * record)
        self.digests = np.frombuffer(data.ljust(samples * DIGEST.itemsize, b"\0"), DIGEST)


class Records:
    """The records of a split by sample id: from the tier's files; without a tier, decoded from the shards.

    A record that is damaged is decoded from its shard, too, which gives the same bytes; a line on that is logged once
    for each file. Threads may share it.
    """

    def __init__(self, data: Manifest, split: str, kind: str, tier: Tier | None, reader: SampleReader) -> None:
        shards = data.split(split).shards
        self.kind, self.size, self.bytes = kind, data.recipe.size, record_bytes(kind, data.recipe.size)
        self._tier, self._reader, self._remedy = tier, reader, build_command(data, kind)
        counts = [shard.samples for shard in shards]
        self._file = np.repeat(np.arange(len(shards), dtype=np.int32), counts)  # of each sample
        self._first = np.cumsum([0, *counts])  # sample of each file
        self._opened = lru_cache(MAX_OPEN)(lambda i: _OpenFile(self._paths[i], shards[i].samples, self.bytes))
        self._paths = [tier.root / file_of(shard.name) for shard in shards] if tier else []
        self._told: set[Path] = set()

    def read(self, sample: int, out: np.ndarray) -> float:
        """Write a record to `out`, (bytes,) uint8; return the seconds that its reading took.

        Raises ValueError: the stored JPEG is needed, and does not decode; DatasetError as `SampleReader.read`.
        """
        if self._tier:
            began = time.perf_counter()
            number = self._file.item(sample)
            if not (problem := self._filled(number, sample - self._first.item(number), out)):
                return time.perf_counter() - began
            self._tell(self._paths[number], f"{problem} at sample {sample} (key {self._reader.key(sample)})")
        (jpeg,) = self._reader.read(np.array([sample]), damaged := list[int]())
        if damaged:
            raise ValueError("its CRC-32 differs")
        record_of(jpeg, self.kind, self.size, out)
        return 0.0

    def _filled(self, number: int, position: int, out: np.ndarray) -> str:
        """Read a record; return what is wrong with it, if anything."""
        try:
            file = self._opened(number)
            count = os.preadv(file.descriptor, [out.data], position * self.bytes)
        except OSError as error:
            return f"{error.strerror},"
        if count < self.bytes:
            return "cut short"
        return "" if digest(out) == file.digests[position] else "damaged"

    def _tell(self, path: Path, problem: str) -> None:
        if path not in self._told:
            self._told.add(path)
            _log.warning("%s: %s; its pictures come from the shard; mend it: %s", path, problem, self._remedy)

    def close(self) -> None:
        self._opened.cache_clear()


class _Scratch(threading.local):
    """A thread's memory for one picture after another, in the cache."""

    def __init__(self, size: int, side: int) -> None:
        self.record = np.empty(3 * size * size, np.uint8)
        self.picture = self.record.reshape(3, size, size)
        self.mirrored = np.empty((3, side, side), np.uint8)
        self.planes = np.empty((3, side, side), np.float32)


class _FromRecords(turbo.Decoder, ABC):
    """A decoder whose threads each read a record and make something of it."""

    _in_words = False

    def __init__(self, records: Records, recipe: Transform, normalised: bool, most: int, threads: int) -> None:
        super().__init__(recipe, normalised, most, threads)
        self._records = records
        self._reading = self._working = 0.0  # seconds of the threads; an update that two of them lose is no harm
        self._since = time.perf_counter()

    def result(self) -> tuple[Batch, list[Tensor]]:
        job = self._jobs[0]
        views = self.finish(job)
        # records are read amid the rest: reading has its share of the threads' time, as if it had come first
        share, now = self._reading / max(self._working, 1e-9), time.perf_counter()
        job.batch.read_at = self._since + share * (now - self._since)
        self._reading, self._working, self._since = 0.0, 0.0, now
        self._jobs.popleft()
        return job.batch, self._given(job, torch.from_numpy(views))

    def close(self) -> None:
        super().close()
        self._records.close()

    @abstractmethod
    def _given(self, job: turbo.Job, views: Tensor) -> list[Tensor]:
        """Return on each device what is made of a job's views."""

    def _decode(self, job: turbo.Job, i: int) -> None:
        began = time.perf_counter()
        self._reading += self._make(job, i)
        self._working += time.perf_counter() - began

    @abstractmethod
    def _make(self, job: turbo.Job, i: int) -> float:
        """Fill view `i`; return the seconds of reading. Raises ValueError."""


class Decoder(_FromRecords):
    """The CPU's decoder for records of kind "rgb": the views of `turbo.Decoder`, in planes in memory."""

    def __init__(self, records: Records, recipe: Transform, normalised: bool, most: int, threads: int) -> None:
        super().__init__(records, recipe, normalised, most, threads)
        self._own = _Scratch(records.size, recipe.decoded)
        self._shape = (3, recipe.decoded, recipe.decoded)

    def _given(self, job: turbo.Job, views: Tensor) -> list[Tensor]:
        return [views if self._normalised else views.permute(0, 2, 3, 1)]

    def _make(self, job: turbo.Job, i: int) -> float:
        own, size = self._own, self._records.size
        seconds = self._records.read(job.batch.ids.item(i), own.record)
        top, left, height, width, mirrored = job.boxes[i]
        flip = mirrored == 1
        if top + height > size or left + width > size:
            raise ValueError(f"{height} × {width} at {top}, {left} of {size} × {size}")
        levels = own.picture[:, top : top + height, left : left + width]
        if self._recipe.resize:
            box = np.empty((height, width, 4), np.uint8)
            for channel in range(3):
                box[..., channel] = levels[channel]
            levels = turbo.resized(box.reshape(height, -1), self._recipe.decoded, flip)[..., :3].transpose(2, 0, 1)
            flip = False
        if self._normalised:
            if flip:
                # as bytes: numpy converts rows that run backwards at a quarter of the speed
                turbo.copy(levels, own.mirrored, True)
                levels = own.mirrored
            self._normalise(job, i, levels, flip, own.planes)
        elif self._recipe.resize:
            job.views[i][...] = levels
        else:
            turbo.copy(levels, job.views[i], flip)
        return seconds


class Resident:
    """The records of the first samples of a split, as many as there is room for, in the memory of each device."""

    def __init__(self, devices: tuple[torch.device, ...], samples: int, record: int) -> None:
        self._records = {device: torch.empty((samples, record), dtype=torch.uint8, device=device) for device in devices}
        self._there = np.zeros(samples, bool)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Return (n,) bool: whose records are there."""
        inside = ids < len(self._there)
        return inside & self._there[np.where(inside, ids, 0)] if len(self._there) else inside

    def gather(self, device: torch.device, ids: np.ndarray) -> Tensor:
        """Return the records of samples that it holds, (n, bytes) uint8 on the device."""
        return self._records[device][torch.from_numpy(ids).to(device)]

    def keep(self, device: torch.device, ids: np.ndarray, records: Tensor) -> None:
        """Keep those of these records, on the device, that there is room for."""
        inside = np.flatnonzero(ids < len(self._there))
        if inside.size:
            places, chosen = (torch.from_numpy(array).to(device) for array in (ids[inside], inside))
            self._records[device][places] = records[chosen]

    def kept(self, ids: np.ndarray) -> None:
        """Note that the records of these samples are on every device."""
        self._there[ids[ids < len(self._there)]] = True


@dataclass
class _RecordJob(turbo.Job):
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # (n,) in `views`; −1: resident


class RecordDecoder(_FromRecords):
    """Batches in, the records of their pictures on every device out, (n, bytes) uint8, in the same order.

    Records that are resident are not read, and those that are read become so where there is room.
    """

    def __init__(
        self,
        records: Records,
        resident: Resident | None,
        recipe: Transform,
        most: int,
        threads: int,
        devices: tuple[torch.device, ...],
    ) -> None:
        self._pinned, self._devices, self._streams = devices[0].type == "cuda", devices, Streams(devices)
        super().__init__(records, recipe, False, most, threads)
        self._shape, self._least, self._resident = (records.bytes,), most * records.bytes, resident

    def begin(self, batch: Batch) -> turbo.Job:
        there = self._resident.holds(batch.ids) if self._resident else np.zeros(len(batch.ids), bool)
        rows = np.where(there, -1, np.cumsum(~there) - 1)
        job = _RecordJob(batch, self._array(int((~there).sum())), (batch.crops.offset,) * 2, None, rows=rows)
        self._start(job, np.flatnonzero(~there).tolist())
        return job

    def streams(self) -> AbstractContextManager[None]:
        """Make streams of the decoder current on every GPU; what is copied there is ready when the context ends."""
        return self._streams.current()

    def _fresh(self, size: int) -> np.ndarray:
        memory: np.ndarray = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned).numpy()
        return memory

    def _make(self, job: turbo.Job, i: int) -> float:
        assert isinstance(job, _RecordJob)
        return self._records.read(job.batch.ids.item(i), job.views[job.rows[i]])

    def _given(self, job: turbo.Job, views: Tensor) -> list[Tensor]:
        assert isinstance(job, _RecordJob)
        job.batch.kind = self._records.kind
        result = [self._on(device, job.batch.ids, job.rows, views) for device in self._devices]
        for device in self._devices:
            if device.type == "cuda":  # what is copied is for later batches
                torch.cuda.current_stream(device).synchronize()
        if self._resident:
            self._resident.kept(job.batch.ids[job.rows >= 0])
        return result

    def _on(self, device: torch.device, ids: np.ndarray, rows: np.ndarray, views: Tensor) -> Tensor:
        """Return the records of a batch on a device: those that were read, and those that are there."""
        fresh, read = views.to(device, non_blocking=True), rows >= 0
        if not self._resident:
            return fresh
        self._resident.keep(device, ids[read], fresh)
        if read.all():
            return fresh
        both = torch.empty((len(ids), self._records.bytes), dtype=torch.uint8, device=device)
        for chosen, records in ((read, fresh), (~read, self._resident.gather(device, ids[~read]))):
            both[torch.from_numpy(np.flatnonzero(chosen)).to(device)] = records
        return both
