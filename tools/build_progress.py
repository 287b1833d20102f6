"""The progress, estimate and closing table of tools/build_shards.py, as text or as JSON lines."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from pipeline.cli import print_event, printable
from pipeline.decode import ImageError
from pipeline.files import TAR_BLOCK
from pipeline.image import encode, rescaled
from pipeline.manifest import Manifest
from pipeline.offline.parquet import temporary_copy
from pipeline.offline.plan import Plan
from pipeline.offline.raw import Sources
from pipeline.offline.shards import Outcome

SECONDS_BETWEEN_LINES = 10.0
TRIED = 64  # images that an estimate rescales
NAMED = 3  # pictures that libjpeg warned of
ENDS = 3  # the first and the last classes in a table
LONGEST = 40  # characters of a class's name or words in a table
TAR_BYTES = 4 * TAR_BLOCK  # around a JPEG: a header and at most a block of padding, for the image and for its label


class DecoderWarnings:
    """Count pictures of finished shards that were decoded although libjpeg warned of damage, and name the first."""

    def __init__(self) -> None:
        self._pictures, self._as_text, self._first = 0, 0, list[str]()

    def add(self, outcome: Outcome) -> None:
        """Count those of a finished shard."""
        self._pictures += len(outcome.warned)
        self._as_text += sum(outcome.warned.values())
        self._first += list(outcome.warned)[: NAMED - len(self._first)]

    def figures(self) -> dict[str, Any]:
        """Return the counts and the first names; nothing where no picture was warned of."""
        counts = {"pictures": self._pictures, "as_text": self._as_text, "such_as": self._first}
        return {"decoder_warnings": counts} if self._pictures else {}


class BuildProgress:
    """Count finished shards and print them: as JSON lines, as a bar by `show` of `cli.progress_bars`, or as lines."""

    def __init__(self, images: int, as_json: bool, show: Callable[..., None]) -> None:
        self._total, self._as_json, self._show = images, as_json, show
        self._images = self._resumed = self._raw_bytes = 0
        self._skipped: Counter[str] = Counter()
        self._warnings = DecoderWarnings()
        self._started = self._last_line = time.monotonic()
        if not as_json:
            show("images", 0, images)

    def add(self, outcome: Outcome) -> None:
        """Count a finished shard."""
        self._images += outcome.images
        self._skipped += outcome.skipped
        self._warnings.add(outcome)
        if outcome.resumed:
            self._resumed += outcome.images
        else:
            self._raw_bytes += outcome.raw_bytes
        figures = self.figures()
        if self._as_json:
            return print_event("shard", name=outcome.name, images=outcome.images, skipped=outcome.skipped, **figures)
        note = _speed(figures) + (f", {self._skipped.total():,} skipped" if self._skipped else "")
        self._show("images", self._images, self._total, note)
        if not sys.stderr.isatty() and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share, rate = self._images / self._total, figures["images_per_second"]
            left = timedelta(seconds=round((self._total - self._images) / rate)) if rate else "?"
            click.echo(f"{self._images:,} of {self._total:,} images ({100 * share:.1f} %), {note}, {left} left")

    def figures(self) -> dict[str, Any]:
        """Return counts and speeds of this run; what an earlier run had built is not in the speeds."""
        seconds = time.monotonic() - self._started
        return {
            "done": self._images,
            "resumed": self._resumed,
            "seconds": round(seconds, 3),
            "images_per_second": round((self._images - self._resumed) / seconds, 1),
            "megabytes_per_second": round(self._raw_bytes / seconds / 1e6, 1),
            **self._warnings.figures(),
        }


def print_warnings(figures: Mapping[str, Any]) -> None:
    """Print a note where libjpeg warned of pictures."""
    if not (warnings := figures.get("decoder_warnings")):
        return
    number, as_text, first = (warnings[key] for key in ("pictures", "as_text", "such_as"))
    names = ", ".join(printable(name, 120) for name in first)
    text = f"; in {as_text:,} a CR stands before each LF, as after a transfer as text: fetch them again as binary files"
    problem = f"{number:,} pictures were decoded although libjpeg warned of damaged data, such as {names}"
    click.echo(f"note: {problem}{text if as_text else ''}")


def _speed(figures: Mapping[str, Any]) -> str:
    return f"{figures['images_per_second']:,.0f} images/s, {figures['megabytes_per_second']:,.0f} MB/s"


def pictures_of_classes(plan: Plan) -> dict[str, np.ndarray]:
    """Return split → the number of pictures of each class of the plan, (classes,) int64."""
    images, number_of = plan.images, {wnid: number for number, wnid in enumerate(plan.images.wnids)}
    columns = [number_of.get(record.wnid, len(number_of)) for record in plan.classes]  # the last: in no image
    numbers = np.asarray(images.class_numbers)
    counts = {split: np.bincount(numbers[ids] + 1, minlength=len(number_of) + 2) for split, ids in plan.splits.items()}
    return {split: count[1:][columns] for split, count in counts.items()}


def class_rows(plan: Plan, counts: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return label, name, words and the pictures of each split, by `counts`, of the first and last classes.

    Of a plan to evaluate another data set, which may have few of its classes, those with pictures count.
    """
    some = np.flatnonzero(sum(counts.values())).tolist() if plan.statistics else range(len(plan.classes))
    records = [plan.classes[i] for i in (some if len(some) <= 2 * ENDS else (*some[:ENDS], *some[-ENDS:]))]
    return [
        {"label": record.label, "name": record.wnid, "words": record.words}
        | {"pictures": {split: int(count[record.label]) for split, count in counts.items()}}
        for record in records
    ]


def print_reading(sources: Sources, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print which folder, file or column gives the class, the order of labels, and the `class_rows` as a table."""
    click.echo(f"class: {sources.gives}; {sources.order}")
    texts = ["class"]
    if any(row["name"] != row["words"] for row in rows):
        texts.append("words")
    columns = (Column(split, justify="right") for split in plan.splits)
    table = Table(Column("label", justify="right"), *texts, *columns, box=None)
    for i, row in enumerate(rows):
        if i == ENDS and len(plan.classes) > len(rows) == 2 * ENDS:
            table.add_row("…")
        names = [printable(row[key], LONGEST) for key in ("name", "words")][: len(texts)]
        table.add_row(str(row["label"]), *names, *(f"{count:,}" for count in row["pictures"].values()))
    width = None if Console().is_terminal else 120
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def print_estimate(plan: Plan, shards: int, workers: int, as_json: bool) -> None:
    """Rescale a few training images, drawn evenly, and print what they foretell: the size and time of the build."""
    split = "train" if "train" in plan.splits else "val"
    count = len(plan.splits[split])
    indexes = np.unique(np.linspace(0, count - 1, min(TRIED, count)).astype(int))
    tried, sizes = len(indexes), []
    with temporary_copy(plan.images, plan.splits[split][indexes]) as images:
        plan = replace(plan, images=images)
        started = time.perf_counter()
        for index in indexes.tolist():
            (image,) = plan.part(split, index, index + 1)
            with suppress(ImageError):
                pixels = rescaled(image.raw.read(), plan.recipe)
                jpeg = encode(pixels, quality=plan.recipe.quality, subsampling=plan.recipe.subsampling)
                sizes.append(TAR_BYTES + len(jpeg))
        rate = tried / (time.perf_counter() - started)  # images per second of one worker
    total, skipped = sum(map(len, plan.splits.values())), tried - len(sizes)
    size, seconds = total * sum(sizes) // tried, total / rate / workers
    if as_json:
        counts = {"shards": shards, "tried": tried, "skipped": skipped}
        return print_event("estimate", **counts, images_per_second=rate, seconds=seconds, bytes=size)
    click.echo(
        f"would write {shards:,} shards, about {size / 1e9:,.1f} GB, "
        f"in about {timedelta(seconds=max(1, round(seconds)))} with {workers} workers "
        f"(from {tried} images tried here: {skipped} of them would be skipped, {rate:,.0f} images/s a worker)"
    )


def print_closing_table(built: Manifest, reasons: Mapping[str, Counter[str]], figures: Mapping[str, Any]) -> None:
    """Print the samples of each split, the reasons why images were skipped, by split, the speed, and warnings."""
    numbers = (Column(name, justify="right") for name in ("samples", "skipped", "shards", "MB"))
    table = Table("split", *numbers, "skipped because", box=None, pad_edge=False)
    for name, split in built.splits.items():
        because = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons[name].items()))
        size = f"{sum(shard.bytes for shard in split.shards) / 1e6:,.1f}"
        table.add_row(name, f"{split.samples:,}", f"{split.skipped:,}", f"{len(split.shards):,}", size, because)
    Console(width=None if Console().is_terminal else 120, highlight=False).print(table)
    colour = ", ".join(f"{value:.1f}" for value in built.statistics_summary["mean_color"])
    speed = f"{_speed(figures)}, {figures['seconds']:,.1f} s; " if "seconds" in figures else ""
    click.echo(f"mean colour (RGB) {colour}; {speed}{built.root / 'dataset.json'}")
    print_warnings(figures)
