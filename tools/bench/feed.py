"""`bench feed`: views from decoding workers beside the local loader and tf.data service, and what they cost."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from pipeline.cli import Command
from tools.bench import common
from tools.bench.common import CORES, COUNT, Figures, Row, find_row, number, ratio_text
from tools.bench.load import TRAIN, batch_option, of_images
from tools.bench.peers_build import SIDE, Job
from tools.bench.peers_load import images_of

DEPTH, DEEP = 4, 16  # batches ahead of use; where eight workers are to be kept at work
LOCAL, TWO, ONE_ASLEEP = "local", "tcp-2", "growth-1"


def workers(count: int, unix: bool) -> Row:
    """Return the row of so many workers that decode."""
    kind, title = ("unix", "Unix socket") if unix else ("tcp", "TCP")
    options = {"feeds": count, "depth": DEPTH, "unix": unix}
    return Row(f"{kind}-{count}", f"Penstock, workers {count}, {title}", "feed", options, against=[LOCAL])


def asleep(count: int) -> Row:
    """Return the row of so many workers that sleep."""
    options = {"feeds": count, "depth": DEEP}
    return Row(f"growth-{count}", f"workers {count}, asleep", "feed", options, against=[ONE_ASLEEP][: count > 1])


ROWS = (
    Row(LOCAL, "Penstock, no workers", "local", {"depth": DEPTH}),
    *(workers(count, unix) for unix in (False, True) for count in (1, 2)),
    Row("tf-data", "tf.data service, workers 2", "tf_data", {"feeds": 2, "depth": DEPTH}, "tensorflow", [LOCAL, TWO]),
    *(asleep(count) for count in (1, 2, 4, 8)),
)
HEADER = (
    *("row", "images/s, median (min to max)", "compared", "views per core-second of the workers"),
    *("of the local loader", "core-seconds of the consumer per 1,000 views", "memory of the consumer"),
)


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path))
@batch_option
@click.option("--batches", type=COUNT, default=100, show_default=True, help="Batches in each run.")
@click.option(
    "--sleep",
    type=click.FloatRange(min=0, min_open=True),
    default=270.0,
    show_default=True,
    help="Microseconds a view that the workers of the rows growth-N sleep, as if one core decoded.",
)
@common.report_options([row.name for row in ROWS])
def feed(dataset: Path, batch: int, batches: int, sleep: float, only: tuple[str, ...], **report: Any) -> None:
    """Measure how fast views of DATASET come from workers on the same cores as their consumer.

    The rows take random views, uint8. Processor time is counted apart: that of the workers, over the views that they
    answered, and that of the consumer. Workers of the rows growth-N sleep instead of decoding, so that more of them
    than cores show how the rate grows; each of them gives --batches. A warm-up is not counted; repetitions are
    interleaved.

    \b
    Examples:
      python tools/bench feed /data/imagenet-256 --json feed.json
      python tools/bench feed /data/imagenet-256 --only growth-1 --only growth-8 --sleep 1000
    """
    rows = [row.fresh() for row in ROWS if not only or row.name in only]
    for row in rows:
        if row.name.startswith("growth"):
            row.options = row.options | {"sleep": sleep / 1e6}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        source = Path(scratch, "dataset")
        sizes: Figures = {"batch": batch, "batches": batches}
        taken = images_of(Job("", "", "", CORES, **sizes)) + DEEP * batch
        stored = np.unique(of_images(dataset, taken, source).samples(TRAIN))

        def run(row: Row) -> Figures:
            job = {"source": str(source), "out": f"{scratch}/{row.name}", **sizes}
            return common.run_job("peers_feed.py", row, job)

        common.interleave(rows, run, report["repetitions"])
    facts = [
        f"{batches:,} batches of {batch:,} views, uint8, after a warm-up, from {len(stored):,} pictures of "
        f"{SIDE} × {SIDE}, {stored['size'].mean() / 1e3:.1f} kB on average; {CORES} cores for consumer and workers",
        f"workers asleep: {sleep:g} µs a view, one part after another; {DEEP} batches ahead, {DEPTH} in other rows",
    ]
    common.publish(HEADER, [cells(rows, row) for row in rows], rows, facts, [], **report)


def per_core_second(row: Row) -> list[float]:
    """Return the views per core-second of each repetition: of the workers, or of the local loader; none of a sleep."""
    if row.name == LOCAL:
        return [run["images"] / run["cpu"] for run in row.runs]
    if "sleep" in row.options:
        return []
    return [run.get("workers_views", run["images"]) / run["workers_cpu"] for run in row.runs]


def cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    """Return the row's cells below HEADER."""
    if row.failed:
        return row.title, f"not run: {row.failed}", *[""] * 5
    others = ((name, find_row(rows, name, row.workers)) for name in row.against)
    views, local = per_core_second(row), find_row(rows, LOCAL, row.workers)
    consumer = median(1e3 * run["cpu"] / run["images"] for run in row.runs)
    return (
        row.title,
        common.spread(row.rates()),
        ", ".join(f"{ratio_text(row.rates(), other.rates())} {name}" for name, other in others if other),
        number(median(views)) if views else "",
        ratio_text(views, per_core_second(local)) if views and local and local is not row else "",
        f"{consumer:.3f}" if row is not local else "",
        f"{max(run['rss'] for run in row.runs) / 2**20:,.0f} MiB",
    )
