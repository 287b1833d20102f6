"""The progress, estimate and closing table of tools/build_shards.py, as text or as JSON lines."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.decode import ImageError
from pipeline.files import TAR_BLOCK
from pipeline.image import encode, rescaled
from pipeline.manifest import Manifest
from pipeline.offline.parquet import temporary_copy
from pipeline.offline.plan import Plan
from pipeline.offline.shards import Outcome

SECONDS_BETWEEN_LINES = 10.0
TRIED = 64  # images that an estimate rescales
TAR_BYTES = 4 * TAR_BLOCK  # around a JPEG: a header and at most a block of padding, for the image and for its label


class BuildProgress:
    """Count finished shards and print them as `form` says: a "bar" on stderr, plain "lines", or "json"."""

    def __init__(self, images: int, form: str) -> None:
        self._form, self._total = form, images
        self._images = self._resumed = self._raw_bytes = 0
        self._skipped: Counter[str] = Counter()
        self._started = self._last_line = time.monotonic()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=form != "bar")
        self._row = self._bar.add_task("images", total=images, rate="")

    def __enter__(self) -> "BuildProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def add(self, outcome: Outcome) -> None:
        """Count a finished shard."""
        self._images += outcome.images
        self._skipped += outcome.skipped
        if outcome.resumed:
            self._resumed += outcome.images
        else:
            self._raw_bytes += outcome.raw_bytes
        figures = self.figures()
        skipped = f", {self._skipped.total():,} skipped" if self._skipped else ""
        rate = f"{figures['images_per_second']:,.0f} images/s, {figures['megabytes_per_second']:,.0f} MB/s{skipped}"
        self._bar.update(self._row, completed=self._images, rate=rate)
        if self._form == "json":
            print_event("shard", name=outcome.name, images=outcome.images, skipped=dict(outcome.skipped), **figures)
        elif self._form == "lines" and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            speed = figures["images_per_second"]
            left = duration((self._total - self._images) / speed) if speed else "?"
            done = f"{self._images:,} of {self._total:,} images ({100 * self._images / self._total:.1f} %)"
            click.echo(f"{done}, {rate}, {left} left")

    def figures(self) -> dict[str, Any]:
        """Return counts and speeds of this run; what an earlier run had built is not in the speeds."""
        seconds = time.monotonic() - self._started
        return {
            "done": self._images,
            "resumed": self._resumed,
            "seconds": round(seconds, 3),
            "images_per_second": round((self._images - self._resumed) / seconds, 1),
            "megabytes_per_second": round(self._raw_bytes / seconds / 1e6, 1),
        }


def print_event(event: str, **values: Any) -> None:
    """Print one line of JSON."""
    click.echo(json.dumps({"event": event, **values}))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def print_estimate(plan: Plan, shards: int, workers: int, as_json: bool) -> None:
    """Rescale a few training images, drawn evenly, and print the size and time of the build. DATASET stays untouched."""
    count = len(plan.splits["train"])
    indexes = np.unique(np.linspace(0, count - 1, min(TRIED, count)).astype(int))
    with temporary_copy(plan.images, plan.splits["train"][indexes]) as images:
        plan = replace(plan, images=images)
        started, size, skipped = time.perf_counter(), 0, len(indexes)
        for index in indexes.tolist():
            (image,) = plan.part("train", index, index + 1)
            with suppress(ImageError):
                pixels = rescaled(image.raw.read(), plan.recipe)
                jpeg = encode(pixels, quality=plan.recipe.quality, subsampling=plan.recipe.subsampling)
                skipped, size = skipped - 1, size + TAR_BYTES + len(jpeg)
    speed = len(indexes) / (time.perf_counter() - started)  # images per second of one worker
    total = sum(map(len, plan.splits.values()))
    size, seconds = total * size // len(indexes), total / speed / workers
    if as_json:
        tried = {"tried": len(indexes), "skipped": skipped, "images_per_second": speed}
        print_event("estimate", shards=shards, **tried, seconds=seconds, bytes=size)
        return
    click.echo(
        f"would write {shards:,} shards, about {size / 1e9:,.1f} GB, in about {duration(seconds)} with {workers} "
        f"workers (from {len(indexes)} images tried here: {skipped} of them would be skipped, {speed:,.0f} images/s a "
        "worker)"
    )


def print_closing_table(built: Manifest, reasons: Mapping[str, Counter[str]], figures: Mapping[str, Any]) -> None:
    """Print the samples of each split, the reasons why images were skipped, by split, and the speed."""
    table = Table(box=None, pad_edge=False)
    for name in ("split", "samples", "skipped", "shards", "MB"):
        table.add_column(name, justify="left" if name == "split" else "right")
    table.add_column("skipped because")
    for name, split in built.splits.items():
        because = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons[name].items()))
        size = f"{sum(shard.bytes for shard in split.shards) / 1e6:,.1f}"
        table.add_row(name, f"{split.samples:,}", f"{split.skipped:,}", f"{len(split.shards):,}", size, because)
    Console(width=120 if not Console().is_terminal else None, highlight=False).print(table)
    color = ", ".join(f"{value:.1f}" for value in built.statistics_summary["mean_color"])
    speed = ""
    if figures:
        rates = f"{figures['images_per_second']:,.0f} images/s, {figures['megabytes_per_second']:,.0f} MB/s"
        speed = f"{rates}, {duration(figures['seconds'])}; "
    click.echo(f"mean colour (RGB) {color}; {speed}{built.root / 'dataset.json'}")
