"""The measuring: decoding, loading, and training on one device, row by row."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from itertools import cycle, product
from typing import Any, NamedTuple

import numpy as np
import torch
from pipeline.online.feed import IN_GRAPH
from pipeline.online.windows import Windows
from torch import Tensor

from pipeline.manifest import Manifest
from pipeline.online.augment import VIEW_SIZE, AlexNet, Transform
from pipeline.online.graph import Graph, GraphOptions
from pipeline.online.loader import Batch, Loader
from pipeline.online.samples import SampleReader
from tools.gpu_rows import Row, Rows
from tools.gpu_training import (
    BESIDE,
    BF16,
    FP32,
    WAYS,
    Training,
    apart,
    evaluating,
    plain_training,
    restored,
    skipped,
    training,
)
from tools.operations import SIDES, Product
from tools.plain_alexnet import PlainTraining
from tools.ways import Way, synthetic

STORED = 8  # batches whose JPEGs lie in memory, for decoding alone
ONE = "one device"
READERS, COMPARED = 4, 200  # at a time; views, at least
CORES = len(os.sched_getaffinity(0))
PLAIN, COLOUR = {"output": "uint8"}, {"mean": "colour"}
OUTPUTS = (PLAIN, *({"output": output, **mean} for output in ("float32", "bfloat16") for mean in ({}, COLOUR)))
KEPT, DRAWN, FED = "same batch, same masks", "same batch", "loader's batches"
RUN, SYNTHETIC = "as a run asks for it", "synthetic batch"
CHECKED = 4  # steps; CUDA graphs are replayed from the third
WITHIN = {"fp32": 0.01, "tf32": 0.1, "bf16": 0.5}  # of the gradient of a layer: what rounding turns over is not little
Stored = list[tuple[list[np.ndarray], Windows]]


class Plan(NamedTuple):
    batches: tuple[int, ...]  # the first and the last, but for decoding
    shares: tuple[float, ...]  # hardware_share
    recipe: str  # the trainer's


PLANS = {
    "cuda": Plan((128, 512, 1024), (0, 0.5, 0.65, 0.9, 1), "original"),
    "cpu": Plan((8,), (0,), "tiny"),
}


class Bench(Rows):
    """Measures a data set of pictures of 256 × 256 on a device; `rows` gives each row once it is measured."""

    def __init__(self, data: Manifest, device: torch.device, seconds: float) -> None:
        super().__init__(device, seconds)
        self._data, self._plan, self._ways = data, PLANS[device.type], WAYS[device.type]
        self._products = dict[str, float]()  # operations/s of a matrix product, by precision
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
        for batch in ends:
            yield self._row("loader", RUN, batch, self._supply)
        for share in sorted({shares[0], shares[-1]}):
            yield self._row("pixels", f"uint8, hardware_share {share}", ends[0], self._compare, share)
        for precision in dict.fromkeys(way.precision for way in self._ways):
            yield self._row("matrix", f"{precision}, n × n", SIDES[self._device.type], self._product, precision)
        for batch in ends:
            for way in BESIDE[self._device.type]:
                yield self._row("grouped", f"{way}, {DRAWN}", batch, self._step, way)
            for way in BESIDE[self._device.type]:
                yield self._row("torchvision", f"{way}, {DRAWN}", batch, self._plain, way)
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
        for batch, way in product(ends, (FP32, BF16)):
            yield self._row("two devices", f"step, {way}, {SYNTHETIC}", batch, self._step_on_two, way)

    def _fastest_bf16(self, batch: int) -> Way:
        """Of the ways of this device, in steps on the same batch."""
        rates = {way: self.fastest("step", f"{way}, {DRAWN}", batch).images_per_second or 0.0 for way in self._ways}
        return max((way for way in self._ways if way.precision == "bf16"), key=rates.__getitem__)

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

    def _supply(self, row: Row) -> None:
        """The loader with the options of a run, with nobody who looks at its batches."""
        with self._training(FP32, row.batch) as trained, trained.loader() as loader:
            self._time(row, lambda: len(next(loader).ids), loader=loader)

    def _product(self, row: Row, precision: str) -> None:
        with restored():
            self._time(row, Product(precision, self._device, row.batch).step)
        assert row.images_per_second is not None
        self._products[precision] = row.images_per_second
        rates, row.rates, row.images_per_second, row.host_cores = row.rates, [], None, None  # they are of no images
        row.found = {"TFLOP/s": self._products[precision] / 1e12, "least": min(rates) / 1e12, "most": max(rates) / 1e12}

    def _second(self) -> torch.device | None:
        """Another GPU, where there is one."""
        count = torch.cuda.device_count() if self._cuda else 0
        return torch.device("cuda", (self._device.index + 1) % count) if count > 1 else None

    def _two(self, row: Row, feed: str) -> None:
        if not (other := self._second()):
            row.not_measured = ONE
            return
        options = {"device": (self._device, other), "feed": feed, **PLAIN}
        self._load(row, options, self.fastest("loader", "uint8", row.batch))

    def _step_on_two(self, row: Row, way: Way) -> None:
        """A column on each device, beside both on one."""
        if not (other := self._second()):
            row.not_measured = ONE
            return
        with self._training(way, row.batch, second=other) as trained:
            given = synthetic(row.batch, trained.side, trained.devices)
            self._time(row, lambda: trained.step(given))
            trained.check()
            self._operations(row, way, trained)
        self._against(row, "step", f"{way}, {DRAWN}", "times one device")

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
            self._operations(row, way, trained)
        if not grouped and row.what != kept:
            self._against(row, row.part, kept, "for masks", lambda ours, theirs: 1 - ours / theirs)
            self._against(row, "torchvision", row.what, "times torchvision")
            self._against_fp32(row, way, DRAWN)

    def _plain(self, row: Row, way: Way) -> None:
        """Torchvision's network in plain torch, on the same batch."""
        with plain_training(self._data, self._device, self._plan.recipe, row.batch, way) as trained:
            given = self._batch(row.batch, trained)
            self._time(row, lambda: trained.step(given))
            trained.check()
            self._operations(row, way, trained)
        self._against_fp32(row, way, DRAWN)

    def _operations(self, row: Row, way: Way, trained: Training | PlainTraining) -> None:
        """Operations/s, and their share of the matrix rate of all devices."""
        if row.images_per_second:
            made, most = row.images_per_second * trained.operations, self._products.get(way.precision)
            row.found["TFLOP/s"] = made / 1e12
            if most:
                row.found["of the matrix rate"] = made / most / len(set(trained.devices))

    def _fed(self, row: Row, way: Way) -> None:
        ceiling = self.fastest("step", f"{way}, {DRAWN}", row.batch)
        with self._training(way, row.batch) as trained, trained.loader() as loader:
            self._time(row, lambda: trained.step(next(loader)), ceiling, loader)
        row.found |= {"lost": 1 - row.share} if row.share else {}
        supply, demand = self.fastest("loader", RUN, row.batch).images_per_second, ceiling.images_per_second
        if supply and demand:
            row.found["supply over demand"] = supply / demand
        self._against_fp32(row, way, FED)

    def _evaluate(self, row: Row, views: str) -> None:
        """Probabilities of the network on the host, as the command `evaluate` has them; the stall is a pass's."""
        ceiling = self.fastest("loader", "float32", row.batch)
        stall: dict[str, float] = {}
        with closing(evaluating(self._data, self._device, self._plan.recipe, row.batch, views, stall)) as steps:
            self._time(row, lambda: next(steps), ceiling)
        row.found |= stall

    def _training(self, way: Way, batch: int, **more: Any) -> AbstractContextManager[Training]:
        return training(self._data, self._device, self._plan.recipe, batch, way, **more)

    def _batch(self, size: int, trained: Training | PlainTraining) -> Batch:
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
            self._against(row, row.part, f"{FP32}, {on}", "times fp32")
