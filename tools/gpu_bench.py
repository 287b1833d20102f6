"""The measuring: decoding, loading, and training on one device, row by row."""

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from itertools import cycle, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.online.augment import VIEW_SIZE, AlexNet, Transform
from pipeline.online.feed import IN_GRAPH
from pipeline.online.graph import Graph, GraphOptions
from pipeline.online.loader import Batch, Loader
from pipeline.online.meter import Meter
from pipeline.online.samples import SampleReader
from pipeline.online.windows import Windows
from tools.gpu_training import BF16, FP32, WAYS, Training, Way, apart, evaluating, skipped, training

REPETITIONS = 5
WARM_UP = 8  # steps before the first that is timed: more than a loader has ahead
STORED = 8  # batches whose JPEGs lie in memory, for decoding alone
READERS, COMPARED = 4, 200  # at a time; views, at least
CORES = len(os.sched_getaffinity(0))
PLAIN, COLOUR = {"output": "uint8"}, {"mean": "colour"}
OUTPUTS = (PLAIN, *({"output": output, **mean} for output in ("float32", "bfloat16") for mean in ({}, COLOUR)))
KEPT, DRAWN, FED = "same batch, same masks", "same batch", "loader's batches"
CHECKED = 4  # steps; CUDA graphs are replayed from the third
WITHIN = {"fp32": 0.01, "tf32": 0.1, "bf16": 0.5}  # of the gradient of a layer: what rounding turns over is not little
TRAINED = ("grouped", "step", "fed")
FAILURES = (RuntimeError, UserError, ImportError, AssertionError, OSError, subprocess.SubprocessError)
Stored = list[tuple[list[np.ndarray], Windows]]


class Plan(NamedTuple):
    batches: tuple[int, ...]  # the first and the last, but for decoding
    shares: tuple[float, ...]  # hardware_share
    recipe: str  # the trainer's


PLANS = {
    "cuda": Plan((128, 512, 1024), (0, 0.5, 0.65, 0.9, 1), "original"),
    "cpu": Plan((8,), (0,), "tiny"),
}


@dataclass
class Row:
    part: str
    what: str
    batch: int
    rates: list[float] = field(default_factory=list)  # images/s of each repetition
    images_per_second: float | None = None  # their median
    host_cores: float | None = None  # seconds of this process on a core, per second
    ceiling: str = ""  # an earlier row
    share: float | None = None  # of the ceiling
    found: dict[str, float] = field(default_factory=dict)
    not_measured: str = ""

    def cells(self) -> tuple[str, ...]:
        """Text for `HEADER`."""
        rate = f"not measured: {self.not_measured}" if self.not_measured else ""
        if self.rates:
            rate = f"{self.images_per_second:,.0f} ({min(self.rates):,.0f} to {max(self.rates):,.0f})"
        cores = "" if self.host_cores is None else f"{self.host_cores:.1f}"
        share = "" if self.share is None else f"{100 * self.share:.0f} % of {self.ceiling}"
        found = ", ".join(f"{key} {value:.3g}" for key, value in self.found.items())
        return self.part, self.what, f"{self.batch:,}", rate, share, cores, found


class Bench:
    """Measures a data set of pictures of 256 × 256 on a device; `rows` gives each row once it is measured."""

    def __init__(self, data: Manifest, device: torch.device, seconds: float) -> None:
        self._data, self._device, self._seconds = data, device, seconds
        self._cuda, self._plan, self._ways = device.type == "cuda", PLANS[device.type], WAYS[device.type]
        self.done = list[Row]()
        self._given: Batch | None = None  # what all steps of one size are on
        self._reference = dict[str, Tensor]()  # what fp32 makes of it

    def rows(self) -> Iterator[Row]:
        sizes, shares = self._plan.batches, self._plan.shares
        ends = sorted({sizes[0], sizes[-1]})
        for batch in sizes:
            stored = self._stored(batch)
            for share in shares:
                yield self._row("decode", "uint8", batch, self._decode, share, stored)
        for batch, options in product(ends, OUTPUTS):
            yield self._row("loader", ", ".join(options.values()), batch, self._load, options)
        for share in sorted({shares[0], shares[-1]}):
            yield self._row("pixels", f"uint8, hardware_share {share}", ends[0], self._compare, share)
        for batch in ends:
            for way in (FP32, BF16):
                yield self._row("grouped", f"{way}, {DRAWN}", batch, self._step, way)
            yield self._row("step", f"{FP32}, {KEPT}", batch, self._step, FP32)
            for way in self._ways:
                yield self._row("step", f"{way}, {DRAWN}", batch, self._step, way)
            for way in (FP32, self._fastest_bf16(batch)):
                yield self._row("fed", f"{way}, {FED}", batch, self._fed, way)
        self._given, self._reference = None, {}
        for views in ("centre", "ten"):
            yield self._row("evaluate", f"fp32, {views}", ends[0], self._evaluate, views)
        for feed in ("split", "replicate"):
            yield self._row("two devices", f"uint8, {feed}", ends[-1], self._two, feed)

    def _row(self, part: str, what: str, batch: int, measure: Callable[..., None], *arguments: object) -> Row:
        row = Row(part, what, batch)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            measure(row, *arguments)
        except FAILURES as error:  # torch's out of memory is a RuntimeError, and so is what it cannot compile
            text = str(error)
            for before in ("encountered:\n", "raised:\n"):  # DALI, torch.compile: the cause stands behind it
                text = text.partition(before)[2] or text
            row.not_measured = (text.strip().splitlines() or [type(error).__name__])[0][:200]
        if self._cuda and part in TRAINED:
            row.found["GiB"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()  # DALI takes its memory elsewhere
        self.done.append(row)
        return row

    def fastest(self, part: str, what: str, batch: int) -> Row:
        """Of the rows so far with these names; one without figures where there is none."""
        rows = [row for row in self.done if (row.part, row.what, row.batch) == (part, what, batch)]
        return max(rows, key=lambda row: row.images_per_second or 0.0, default=Row(part, what, batch))

    def _fastest_bf16(self, batch: int) -> Way:
        """Of the ways of this device, in steps on the same batch."""
        rates = {way: self.fastest("step", f"{way}, {DRAWN}", batch).images_per_second or 0.0 for way in self._ways}
        return max((way for way in self._ways if way.precision == "bf16"), key=rates.__getitem__)

    def _time(self, row: Row, step: Callable[[], int], ceiling: Row | None = None, loader: Any = None) -> None:
        """Repetitions of `step`, which returns its images; the device is waited for at the end of each alone."""
        each = self._seconds / REPETITIONS
        step()  # alone: it may compile
        self._repetition(step, each, WARM_UP)
        meter = loader.meter if loader else Meter()
        waited, cpu, began = meter.total, time.process_time(), time.perf_counter()
        row.rates = [self._repetition(step, each, 1) for _ in range(REPETITIONS)]
        wall, row.images_per_second = time.perf_counter() - began, statistics.median(row.rates)
        row.host_cores = (time.process_time() - cpu) / wall
        if ceiling and ceiling.images_per_second:
            row.ceiling = f"{ceiling.part}, {ceiling.what}"
            row.share = row.images_per_second / ceiling.images_per_second
        if loader:
            shares = (meter.total - waited).shares(wall)
            row.found |= {"stall": sum(shares.values()), **shares}

    def _repetition(self, step: Callable[[], int], seconds: float, least: int) -> float:
        """Images/s of at least so many steps and seconds."""
        images, steps, began = 0, 0, time.perf_counter()
        while steps < least or time.perf_counter() < began + seconds:
            images, steps = images + step(), steps + 1
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
        return images / (time.perf_counter() - began)

    def _stored(self, batch: int) -> Stored:
        """A few batches in memory: JPEGs, and random windows."""
        recipe = AlexNet(Transform(), self._data.statistics(), self._data.recipe.size, seed=0)
        sizes = np.full((batch, 2), self._data.recipe.size)
        with SampleReader(self._data, "train") as reader:
            ids = np.arange(STORED * batch).reshape(STORED, batch)
            return [(reader.read(some), recipe.windows(0, 0, some, None, sizes)) for some in ids]

    def _decode(self, row: Row, share: float, stored: Stored) -> None:
        row.found["hardware_share"] = share
        options = GraphOptions(VIEW_SIZE, threads=CORES, hardware_share=share)
        graph = Graph(options, row.batch, self._device.index if self._cuda else None)
        stream, batches = torch.cuda.Stream(self._device) if self._cuda else None, cycle(stored)
        for _ in range(IN_GRAPH - 1):
            graph.submit(*next(batches))

        def step() -> int:
            graph.submit(*next(batches))
            return len(graph.result(stream))

        self._time(row, step)

    def _load(self, row: Row, options: dict[str, Any], ceiling: Row | None = None) -> None:
        """The loader, with nobody who looks at its batches."""
        alone = self.fastest("decode", "uint8", row.batch)
        row.found["hardware_share"] = share = alone.found["hardware_share"]
        options = {"device": self._device, "hardware_share": share, "readers": READERS, "threads": CORES, **options}
        with Loader(self._data, batch_size=row.batch, **options) as loader:
            self._time(row, lambda: len(next(loader).images), ceiling or alone, loader)

    def _two(self, row: Row, feed: str) -> None:
        if not self._cuda or torch.cuda.device_count() < 2:
            row.not_measured = "one device"
            return
        other = torch.device("cuda", (self._device.index + 1) % torch.cuda.device_count())
        options = {"device": (self._device, other), "feed": feed, **PLAIN}
        self._load(row, options, self.fastest("loader", "uint8", row.batch))

    def _compare(self, row: Row, share: float) -> None:
        options: dict[str, Any] = {"batch_size": row.batch, "hardware_share": share, **PLAIN}
        total, most, views, values = 0, 0, 0, 0
        with Loader(self._data, device=self._device, **options) as ours, Loader(self._data, **options) as theirs:
            while views < COMPARED:
                one, other = next(ours), next(theirs)
                assert one.ids.tolist() == other.ids.tolist()
                difference = (one.images.cpu().to(torch.int16) - other.images.to(torch.int16)).abs()
                total, most = total + int(difference.sum()), max(most, int(difference.max()))
                views, values = views + len(difference), values + difference.numel()
        row.found = {"views": views, "mean difference from the CPU's": total / values, "largest": most}

    def _step(self, row: Row, way: Way) -> None:
        """The trainer's step, or the grouped network's, on one batch."""
        grouped, kept = row.part == "grouped", f"{way}, {KEPT}"
        with self._training(way, row.batch, draw=row.what != kept, whole=grouped) as trained:
            given = self._batch(row.batch, trained)
            self._check(row, way, trained, given)
            self._time(row, lambda: trained.step(given), self.fastest("grouped", row.what, row.batch))
        if not grouped and row.what != kept:
            self._against(row, kept, "for masks", lambda ours, theirs: 1 - ours / theirs)
            self._against_fp32(row, way, DRAWN)

    def _fed(self, row: Row, way: Way) -> None:
        ceiling = self.fastest("step", f"{way}, {DRAWN}", row.batch)
        with self._training(way, row.batch) as trained, trained.loader() as loader:
            self._time(row, lambda: trained.step(next(loader)), ceiling, loader)
        row.found |= {"lost": 1 - row.share} if row.share else {}
        self._against_fp32(row, way, FED)

    def _evaluate(self, row: Row, views: str) -> None:
        """Probabilities of the network on the host, as the command `evaluate` has them; the stall is a pass's."""
        ceiling = self.fastest("loader", "float32", row.batch)
        stall: dict[str, float] = {}
        with closing(evaluating(self._data, self._device, self._plan.recipe, row.batch, views, stall)) as steps:
            self._time(row, lambda: next(steps), ceiling)
        row.found |= stall

    def _training(self, way: Way, batch: int, **more: bool) -> AbstractContextManager[Training]:
        return training(self._data, self._device, self._plan.recipe, batch, way, **more)

    def _batch(self, size: int, trained: Training) -> Batch:
        """The first of the loader, kept for all rows of its size."""
        if self._given is None or len(self._given.ids) != size:
            self._given, self._reference = None, {}
            with trained.loader() as loader:
                self._given = next(loader)
        return self._given

    def _check(self, row: Row, way: Way, trained: Training, given: Batch) -> None:
        """Some steps: what they make of the batch against what the first row in fp32 made of it."""
        before, began = skipped(), time.perf_counter()
        for _ in range(CHECKED):
            trained.step(given)
        outcome = trained.outcome()
        if way.compile != "no":
            row.found["compiled in, s"] = time.perf_counter() - began
        if way.compile == "graphs":
            row.found["graphs skipped"] = skipped() - before
        if self._reference:
            loss, gradient = apart(outcome, self._reference)
            row.found |= {"loss off": loss, "gradient off": gradient, "agrees": float(gradient < WITHIN[way.precision])}
        elif way == FP32:
            self._reference = outcome

    def _against_fp32(self, row: Row, way: Way, on: str) -> None:
        if way != FP32:
            self._against(row, f"{FP32}, {on}", "times fp32", lambda ours, theirs: ours / theirs)

    def _against(self, row: Row, what: str, key: str, figure: Callable[[float, float], float]) -> None:
        """Note a figure of this row's rate and an earlier one's of the same part, where there are both."""
        other = self.fastest(row.part, what, row.batch).images_per_second
        if row.images_per_second and other:
            row.found[key] = figure(row.images_per_second, other)
