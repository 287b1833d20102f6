"""What a GPU gains from the feed: decoding alone, our loader, the trainer's step, and both at once, row by row.

    python tools/gpu.py [DATASET] [--device cuda:0] [--seconds 3] [--json FILE] [--markdown]      (some 5 minutes)

Where Penstock is not installed: PYTHONPATH=FOLDER_OF_DALI:. python3 tools/gpu.py DATASET, with torch, numpy and DALI
alone. Without DATASET pictures are drawn, for which it takes all of Penstock's packages.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import torch

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.online.augment import VIEW_SIZE, AlexNet, Transform
from pipeline.online.feed import IN_GRAPH
from pipeline.online.graph import Graph, GraphOptions
from pipeline.online.loader import Loader
from pipeline.online.meter import Meter
from pipeline.online.samples import SampleReader
from pipeline.online.windows import Windows
from tools.peers.datasets import of_images
from tools.peers.made_up import make_up

REPETITIONS = 5
WARM_UP = 8  # steps before the first that is timed: more than a loader has ahead
STORED = 8  # batches whose JPEGs lie in memory, for decoding alone
BATCHES = 20  # of the largest size, in an epoch; so no batch is short
READERS, COMPARED, CLASSES = 4, 200, 1000  # at a time; views, at least; of the network
CORES = len(os.sched_getaffinity(0))
PLAIN, COLOUR = {"output": "uint8"}, {"mean": "colour"}
OUTPUTS = (PLAIN, *({"output": output, **mean} for output in ("float32", "bfloat16") for mean in ({}, COLOUR)))
KEPT, DRAWN = "one batch, one dropout mask", "one batch, dropout masks drawn at each step"
HEADER = ("part", "what", "batch", "images/s, median (min to max)", "host cores", "of its ceiling", "found")
CEILINGS = """ceilings: of the loader, decode of its batch at its best hardware_share; of a step that draws masks, the one \
that does not; of fed, the step that draws masks; of two devices, the loader's uint8 on one"""
Step = Callable[[Sequence[torch.Tensor], torch.Tensor, int], int]  # images, labels, number → how many images
Stored = list[tuple[list[np.ndarray], Windows]]


class Plan(NamedTuple):
    batches: tuple[int, ...]  # for decoding alone; else the first and the last
    shares: tuple[float, ...]  # of the pictures, to the hardware decoder; pixels of the first and the last are compared
    recipe: str  # of the trainer


PLANS = {"cuda": Plan((128, 512, 1024), (0, 0.5, 0.65, 0.9, 1), "original"), "cpu": Plan((32,), (0,), "tiny")}


@dataclass
class Row:
    part: str
    what: str
    batch: int
    rates: list[float] = field(default_factory=list)  # images/s of each repetition
    images_per_second: float | None = None  # their median
    host_cores: float | None = None  # seconds of this process on a core, per second
    ceiling: float | None = None  # images/s
    share: float | None = None  # of the ceiling
    found: dict[str, Any] = field(default_factory=dict)
    not_measured: str = ""

    def cells(self) -> tuple[str, ...]:
        """Text for `HEADER`."""
        rate = f"not measured: {self.not_measured}" if self.not_measured else ""
        if self.rates:
            rate = f"{self.images_per_second:,.0f} ({min(self.rates):,.0f} to {max(self.rates):,.0f})"
        cores = "" if self.host_cores is None else f"{self.host_cores:.1f}"
        share = "" if self.share is None else f"{100 * self.share:.0f} %"
        found = ", ".join(f"{key} {_said(value)}" for key, value in self.found.items())
        return self.part, self.what, f"{self.batch:,}", rate, cores, share, found


def _said(value: Any) -> str:
    if isinstance(value, dict):  # shares of the time, by cause
        return f"{100 * sum(value.values()):.1f} % ({', '.join(f'{key} {100 * x:.1f}' for key, x in value.items())})"
    return f"{value:.3g}"


class Bench:
    """Measures a data set of pictures of 256 × 256 on a device; `rows` gives each row once it is measured."""

    def __init__(self, data: Manifest, device: torch.device, seconds: float) -> None:
        self._data, self._device, self._seconds = data, device, seconds
        self._plan, self._cuda, self.done = PLANS[device.type], device.type == "cuda", list[Row]()

    def rows(self) -> Iterator[Row]:
        sizes, shares, _ = self._plan
        for batch in sizes:
            stored = self._stored(batch)
            for share in shares:
                yield self._row("decode", "windows, uint8", batch, self._decode, share, stored)
        for batch, options in product(_ends(sizes), OUTPUTS):
            yield self._row("loader", ", ".join(options.values()), batch, self._load, self._device, options)
        for share in _ends(shares):
            yield self._row("pixels", "difference from the CPU's, grey levels", sizes[0], self._compare, share)
        for batch in _ends(sizes):
            for what in (KEPT, DRAWN):
                yield self._row("step", what, batch, self._step)
            yield self._row("fed", "the step on the loader's batches", batch, self._fed)
        for feed in ("split", "replicate"):
            yield self._row("two devices", f"uint8, {feed}", sizes[-1], self._two, feed)

    def _row(self, part: str, what: str, batch: int, measure: Callable[..., None], *arguments: object) -> Row:
        row = Row(part, what, batch)
        try:
            measure(row, *arguments)
        except (RuntimeError, UserError, ModuleNotFoundError) as error:  # torch's out of memory is a RuntimeError
            text = str(error).partition("encountered:\n")[2] or str(error)  # DALI has the cause there
            row.not_measured = (text.strip().splitlines() or [type(error).__name__])[0][:200]
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()  # DALI takes its memory elsewhere
        self.done.append(row)
        return row

    def fastest(self, part: str, batch: int, what: str = "") -> Row | None:
        """Of the rows of a part and a batch, whose `what` begins so."""
        rows = [row for row in self.done if (row.part, row.batch) == (part, batch) and row.what.startswith(what)]
        return max(rows, key=lambda row: row.images_per_second or 0.0, default=None)

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
            row.ceiling, row.share = ceiling.images_per_second, row.images_per_second / ceiling.images_per_second
        row.found |= {"stall": (meter.total - waited).shares(wall)} if loader else {}

    def _repetition(self, step: Callable[[], int], seconds: float, least: int) -> float:
        """Images/s of at least so many steps and seconds."""
        images, steps, began = 0, 0, time.perf_counter()
        while steps < least or time.perf_counter() < began + seconds:
            images, steps = images + step(), steps + 1
        for number in range(torch.cuda.device_count() if self._cuda else 0):
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

    def _load(self, row: Row, device: Any, options: dict[str, str], ceiling: Row | None = None) -> None:
        """The loader, with nobody who looks at its batches."""
        alone = self.fastest("decode", row.batch)
        row.found["hardware_share"] = share = alone.found["hardware_share"] if alone else 0.9
        plan: dict[str, Any] = {"readers": READERS, "threads": CORES, "hardware_share": share, **options}
        with Loader(self._data, batch_size=row.batch, device=device, **plan) as loader:
            self._time(row, lambda: len(next(loader).images), ceiling or alone, loader)

    def _two(self, row: Row, feed: str) -> None:
        if torch.cuda.device_count() < 2 or not self._cuda:
            row.not_measured = "one device"
            return
        other = torch.device("cuda", (self._device.index + 1) % torch.cuda.device_count())
        ceiling = self.fastest("loader", row.batch, "uint8")
        self._load(row, (self._device, other), {"feed": feed, **PLAIN}, ceiling)

    def _compare(self, row: Row, share: float) -> None:
        row.found["hardware_share"] = share
        options: dict[str, Any] = {"batch_size": row.batch, "hardware_share": share, **PLAIN}
        total, most, views, values = 0, 0, 0, 0
        with Loader(self._data, device=self._device, **options) as ours, Loader(self._data, **options) as theirs:
            while views < COMPARED:
                one, other = next(ours), next(theirs)
                assert one.ids.tolist() == other.ids.tolist()
                difference = (one.images.cpu().to(torch.int16) - other.images.to(torch.int16)).abs()
                total, most = total + int(difference.sum()), max(most, int(difference.max()))
                views, values = views + len(difference), values + difference.numel()
        row.found |= {"views": views, "mean": total / values, "most": most}

    def _step(self, row: Row) -> None:
        loader, step = self._training(row.batch, row.what == DRAWN)
        with loader:
            batch = next(loader)
        ceiling = self.fastest("step", row.batch, KEPT) if row.what == DRAWN else None
        self._time(row, lambda: step(batch.replicas, batch.labels, batch.step), ceiling)

    def _fed(self, row: Row) -> None:
        loader, step = self._training(row.batch, True)

        def fed() -> int:
            batch = next(loader)
            return step(batch.replicas, batch.labels, batch.step)

        with loader:
            self._time(row, fed, self.fastest("step", row.batch, DRAWN), loader)
        row.found |= {"lost": 1 - row.share} if row.share else {}

    def _training(self, batch: int, draw: bool) -> tuple[Loader, Step]:
        """The loader and the step as the trainer has them; at each step dropout masks are drawn, or the same serve."""
        from trainer import dropout, model, optim, parallel, recipe  # here: only these rows need the trainer

        if self._data.samples("train")["label"].min() < 0:
            raise UserError("there are training pictures without a label")
        parallel.reference_precision()
        plan, twice = recipe.load(self._plan.recipe), (self._device, self._device)
        classes, seed = max(CLASSES, len(self._data.classes)), plan.train.seed
        network = parallel.TwoColumns(plan.model, classes, twice)
        network.load(model.initial_weights(plan.model, classes, seed))
        optimiser = optim.Momentum(network.parts(), plan.optim)
        drawn = partial(dropout.masks, seed, units=plan.model.units, probability=plan.model.dropout)
        kept = [mask.to(self._device) for mask in drawn(step=0, samples=batch)]

        def step(images: Sequence[torch.Tensor], labels: torch.Tensor, number: int) -> int:
            logits = network(images, drawn(step=number, samples=len(labels)) if draw else kept)
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (losses / batch).backward()
            optimiser.step(optim.rates(plan.optim, number, plan.train.steps))
            return len(labels)

        return Loader(self._data, batch_size=batch, seed=seed, device=twice), step


def _ends(values: Sequence[Any]) -> list[Any]:
    return sorted({values[0], values[-1]})


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", metavar="DATASET", help="Default: drawn pictures.")
    parser.add_argument("--device", help="Default: cuda:0. On cpu it runs the same, smaller.")
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each row, after its warm-up. Default: 3.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Every row's figures to a file.")
    parser.add_argument("--markdown", action="store_true", help="The closing table as Markdown.")
    words = sys.argv[1:] if words is None else list(words)
    given = parser.parse_args(words)
    if not given.device and not torch.cuda.is_available():
        print("no CUDA device; --device cpu runs the same, smaller")
        return 0
    try:
        measure(_device(given.device or "cuda:0"), given, shlex.join(["python", "tools/gpu.py", *words]))
    except (UserError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device; give cuda:0, or cpu") from error
    count, number = torch.cuda.device_count(), device.index or 0
    if device.type not in PLANS or (device.type == "cuda" and number >= count):
        raise UserError(f"--device {name}: this machine has {count} CUDA devices; give one of them, or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(number)
    return torch.device(device.type, number) if device.type == "cuda" else device


def measure(device: torch.device, given: argparse.Namespace, command: str) -> None:
    samples = BATCHES * PLANS[device.type].batches[-1]
    with tempfile.TemporaryDirectory(prefix="penstock-gpu-") as folder:
        root = Path(folder)
        data = of_images(given.dataset, samples, root / "part") if given.dataset else make_up(root, samples, BATCHES)
        bench, facts = Bench(data, device, given.seconds), _facts(data, device, given.seconds, command)
        for row in bench.rows():
            print("  ".join(filter(None, row.cells())), flush=True)
            if given.json:
                record = {**facts, "repetitions": REPETITIONS, "rows": [asdict(row) for row in bench.done]}
                given.json.write_text(json.dumps(record, indent=1) + "\n")
    rows = [row.cells() for row in bench.done if row.part != "decode" or row is bench.fastest("decode", row.batch)]
    print_table(rows, [*facts.values(), CEILINGS], given.markdown)


def _facts(data: Manifest, device: torch.device, seconds: float, command: str) -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    host = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    records = data.samples("train")
    return {
        "hardware": f"{gpu}{host}, {CORES} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, DALI {nvidia.dali.__version__}, "
        f"numpy {np.__version__}",
        "command": command,
        "measured": f"n = {REPETITIONS} repetitions of {seconds / REPETITIONS:g} s or one batch, after a warm-up",
        "pictures": f"{len(records):,}, of which {len(np.unique(records['crc32'])):,} differ, warm in memory; "
        f"{records['size'].mean() / 1e3:.1f} kB on average",
    }


def print_table(rows: Sequence[tuple[str, ...]], facts: Sequence[str], markdown: bool) -> None:
    print()
    if markdown:
        print("\n".join(f"- {fact}" for fact in facts) + "\n")
        for row in (HEADER, ("---",) * len(HEADER), *rows):
            print(f"| {' | '.join(row)} |")
        return
    widths = [max(map(len, column)) for column in zip(HEADER, *rows)]
    for line in (*facts, "", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in (HEADER, *rows))):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
