"""How a build tells its progress: a bar on a terminal, plain lines elsewhere, JSON lines for machines."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.manifest import Manifest
from pipeline.offline.shards import Outcome

SECONDS_BETWEEN_LINES = 10.0


class BuildProgress:
    """Counts finished shards, and tells of them as `form` says: "bar", "lines" or "json"."""

    def __init__(self, images: int, form: str) -> None:
        self._form, self._total = form, images
        self._images = self._resumed = self._raw_bytes = 0
        self._skipped: Counter[str] = Counter()
        self._started = self._told = time.monotonic()
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
        self._bar.update(self._row, completed=self._images, rate=self._rates())
        if self._form == "json":
            event("shard", name=outcome.name, images=outcome.images, skipped=dict(outcome.skipped), **self.figures())
        elif self._form == "lines" and time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            done = 100 * self._images / self._total
            click.echo(
                f"{self._images:,} of {self._total:,} images ({done:.1f} %), {self._rates()}, {self._left()} left"
            )

    def figures(self) -> dict[str, Any]:
        """Speeds of this run: what an earlier run had done is not in them."""
        seconds = time.monotonic() - self._started
        built = self._images - self._resumed
        return {
            "done": self._images,
            "resumed": self._resumed,
            "seconds": round(seconds, 3),
            "images_per_second": round(built / seconds, 1),
            "megabytes_per_second": round(self._raw_bytes / seconds / 1e6, 1),
        }

    def _rates(self) -> str:
        figures = self.figures()
        skipped = f", {self._skipped.total():,} skipped" if self._skipped else ""
        return f"{figures['images_per_second']:,.0f} images/s, {figures['megabytes_per_second']:,.0f} MB/s{skipped}"

    def _left(self) -> str:
        rate = float(self.figures()["images_per_second"])
        return duration((self._total - self._images) / rate) if rate else "?"


def event(kind: str, **fields: Any) -> None:
    """One line of JSON on stdout."""
    click.echo(json.dumps({"event": kind, **fields}))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def closing_table(built: Manifest, reasons: Mapping[str, Counter[str]], figures: Mapping[str, Any]) -> None:
    """What was built, split by split; `reasons`: why images were skipped, by split."""
    table = Table(box=None, pad_edge=False)
    for name in ("split", "samples", "skipped", "shards", "MB"):
        table.add_column(name, justify="left" if name == "split" else "right")
    table.add_column("skipped because")
    for name, split in built.splits.items():
        told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.get(name, Counter()).items()))
        size = sum(shard.bytes for shard in split.shards) / 1e6
        table.add_row(name, f"{split.samples:,}", f"{split.skipped:,}", f"{len(split.shards):,}", f"{size:,.1f}", told)
    Console(width=120 if not Console().is_terminal else None, highlight=False).print(table)
    color = ", ".join(f"{value:.1f}" for value in built.statistics_summary["mean_color"])
    speed = (
        f"{figures['images_per_second']:,.0f} images/s, {figures['megabytes_per_second']:,.0f} MB/s, "
        f"{duration(figures['seconds'])}; "
        if figures
        else ""
    )
    click.echo(f"mean colour (RGB) {color}; {speed}{built.root / 'dataset.json'}")
