"""What a GPU gains from the feed: decoding alone, our loader, the trainer's step, and both at once, row by row.

    python tools/gpu.py [DATASET] [--device cuda:0] [--seconds 3] [--json FILE] [--markdown]      (some 5 minutes)

Where Penstock is not installed: PYTHONPATH=FOLDER_OF_DALI:. python3 tools/gpu.py DATASET, with torch, numpy and DALI
alone. Without DATASET pictures are drawn, for which it takes all of Penstock's packages.
"""

import gc
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
import torch

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.online.augment import VIEW_SIZE, AlexNet, Transform
from pipeline.online.feed import IN_GRAPH
from pipeline.online.graph import Graph, GraphOptions
from pipeline.online.loader import Batch, Loader
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
KEPT, DRAWN = "same batch, same masks", "same batch"
HEADER = ("part", "what", "batch", "images/s, median (min to max)", "of the ceiling", "host cores", "found")
Stored = list[tuple[list[np.ndarray], Windows]]
PLANS: dict[str, tuple[tuple[int, ...], tuple[float, ...], str]] = {  # batches, hardware_shares, the trainer's recipe;
    "cuda": ((128, 512, 1024), (0, 0.5, 0.65, 0.9, 1), "original"),  # the first and the last batch, but for decoding
    "cpu": ((32,), (0,), "tiny"),
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
        self._cuda, self.done = device.type == "cuda", list[Row]()
        self._sizes, self._shares, self._recipe = PLANS[device.type]

    def rows(self) -> Iterator[Row]:
        ends = sorted({self._sizes[0], self._sizes[-1]})
        for batch in self._sizes:
            stored = self._stored(batch)
            for share in self._shares:
                yield self._row("decode", "uint8", batch, self._decode, share, stored)
        for batch, options in product(ends, OUTPUTS):
            yield self._row("loader", ", ".join(options.values()), batch, self._load, options)
        for share in sorted({self._shares[0], self._shares[-1]}):
            yield self._row("pixels", f"uint8, hardware_share {share}", ends[0], self._compare, share)
        for batch in ends:
            for what in (KEPT, DRAWN):
                yield self._row("step", what, batch, self._step)
            yield self._row("fed", "loader's batches", batch, self._fed)
        for feed in ("split", "replicate"):
            yield self._row("two devices", f"uint8, {feed}", ends[-1], self._two, feed)

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

    def fastest(self, part: str, what: str, batch: int) -> Row:
        """Of the rows so far with these names."""
        rows = [row for row in self.done if (row.part, row.what, row.batch) == (part, what, batch)]
        return max(rows, key=lambda row: row.images_per_second or 0.0)

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

    def _step(self, row: Row) -> None:
        loader, step = self._training(row.batch, row.what == DRAWN)
        with loader:
            batch = next(loader)
        self._time(row, lambda: step(batch), self.fastest("step", KEPT, row.batch) if row.what == DRAWN else None)

    def _fed(self, row: Row) -> None:
        loader, step = self._training(row.batch, True)
        with loader:
            self._time(row, lambda: step(next(loader)), self.fastest("step", DRAWN, row.batch), loader)
        row.found |= {"lost": 1 - row.share} if row.share else {}

    def _training(self, batch: int, draw: bool) -> tuple[Loader, Callable[[Batch], int]]:
        """The loader and the step as the trainer has them; at each step dropout masks are drawn, or the same serve."""
        from trainer import feed, model, optim, parallel, recipe, watch  # here: only these rows need the trainer
        from trainer.step import drawn_masks, update

        if self._data.samples("train")["label"].min() < 0:
            raise UserError("there are training pictures without a label")
        # a batch learned by heart has denormals, slow on a CPU
        rates = ("optim.lr=1e-9", "optim.bias_lr=1e-9", f"train.batch_size={batch}", f"optim.batch_size={batch}")
        plan, twice = recipe.load(self._recipe, rates), (self._device, self._device)
        parallel.reference_precision(plan.train.precision)
        classes, seed = max(CLASSES, len(self._data.classes)), plan.train.seed
        network = parallel.Columns(plan.model, classes, twice, plan.train.compile, plan.train.channels_last)
        network.load(model.initial_weights(plan.model, classes, seed))
        optimiser = optim.Momentum(network.parts(), plan.optim.momentum)
        schedule = optim.Schedule(plan, feed.steps_of(self._data, plan))
        watched, drop = watch.Watch(network), list[Any]()

        def step(given: Batch) -> int:
            if draw or not drop:
                drop[:] = drawn_masks(network, seed, given)
            update(network, optimiser, given, drop, schedule.rates(given.step), plan.train, watched)
            return len(given.ids)

        return feed.training(self._data, plan, twice), step


def main(words: Sequence[str] | None = None) -> None:
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, usage=SUPPRESS)
    parser.add_argument("dataset", type=Path, nargs="?", metavar="DATASET", help="Default: drawn pictures.")
    parser.add_argument("--device", choices=(*devices, "cpu"), default=devices[0] if devices else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each row, after its warm-up. Default: 3.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Every row's figures to a file.")
    parser.add_argument("--markdown", action="store_true", help="The closing table as Markdown.")
    given = parser.parse_args(words)
    if not given.device:
        return print("no CUDA device; --device cpu runs the same, smaller")
    try:
        measure(given, shlex.join(["python", "tools/gpu.py", *(sys.argv[1:] if words is None else words)]))
    except (UserError, OSError) as error:
        parser.exit(2, f"Error: {error}\n")


def measure(given: Namespace, command: str) -> None:
    device = torch.device(given.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    samples = BATCHES * PLANS[device.type][0][-1]
    with tempfile.TemporaryDirectory(prefix="penstock-gpu-") as folder:
        root = Path(folder)
        data = of_images(given.dataset, samples, root / "part") if given.dataset else make_up(root, samples, BATCHES)
        bench, facts = Bench(data, device, given.seconds), _facts(data, device, given.seconds, command)
        for row in bench.rows():
            print("  ".join(filter(None, row.cells())), flush=True)
            if given.json:
                record = {**facts, "repetitions": REPETITIONS, "rows": [asdict(row) for row in bench.done]}
                given.json.write_text(json.dumps(record, indent=1) + "\n")
    shown = [row.cells() for row in bench.done if row is bench.fastest(row.part, row.what, row.batch)]
    print_table(shown, list(facts.values()), given.markdown)


def _facts(data: Manifest, device: torch.device, seconds: float, command: str) -> dict[str, str]:
    lines, records = Path("/proc/cpuinfo").read_text().splitlines(), data.samples("train")
    host = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    packages = f"torch {torch.__version__}, DALI {nvidia.dali.__version__}, numpy {np.__version__}"
    return {
        "hardware": f"{gpu}{host}, {CORES} cores",
        "versions": f"Python {platform.python_version()}, {packages}",
        "command": command,
        "measured": f"n = {REPETITIONS} repetitions of {seconds / REPETITIONS:g} s or one batch, after a warm-up",
        "pictures": f"{len(records):,}, {len(np.unique(records['crc32'])):,} distinct, warm in memory; "
        f"{records['size'].mean() / 1e3:.1f} kB on average",
    }


def print_table(rows: Sequence[tuple[str, ...]], facts: Sequence[str], markdown: bool) -> None:
    bullet, before, between, after = ("- ", "| ", " | ", " |") if markdown else ("", "", "  ", "")
    rows = [HEADER, *[("---",) * len(HEADER)] * markdown, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [before + between.join(map(str.ljust, row, widths)) + after for row in rows]
    print("", *(bullet + fact for fact in facts), "", *map(str.rstrip, lines), sep="\n")


if __name__ == "__main__":
    main()
