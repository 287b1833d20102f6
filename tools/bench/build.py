"""`bench build`: our builder beside JPEG decoding and encoding alone, and beside other builders."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import simplejpeg  # type: ignore[import-untyped,unused-ignore]

from pipeline import UserError
from pipeline.cli import Command
from pipeline.offline.sources import find_sources
from tools.bench import common
from tools.bench.common import CORES, COUNT, Figures, Row, find_row, ratio, ratio_text
from tools.bench.peers_build import FUNCTIONS

CEILING, OURS = "decode-encode", "penstock"
HEADER = ("row", "workers", "images/s, median (min to max)", "of decode + encode", "ours is", "largest process")
ROWS = (
    Row("decode", "ceiling: JPEG decode alone"),
    Row(CEILING, "ceiling: JPEG decode and encode alone", "decode_encode"),
    Row(OURS, "Penstock, tools/build_shards.py", options={"checkout": str(common.ROOT)}),
    Row("img2dataset", "img2dataset, Resizer and WebDatasetSampleWriter", environment="img2dataset"),
    Row("litdata", "LitData, optimize", environment="litdata"),
    Row("webdataset", "WebDataset, ShardWriter with stock Pillow", environment="webdataset"),
    Row("ffcv", "FFCV, DatasetWriter", environment="ffcv"),
    Row("opencv", "cuda-convnet2's recipe, OpenCV INTER_AREA", environment="opencv"),
)


@click.command(cls=Command)
@click.argument("raw", type=click.Path(path_type=Path))
@click.option("--images", type=COUNT, default=2000, show_default=True, help="Pictures in each run.")
@click.option(
    "--workers",
    type=click.IntRange(1, CORES),
    multiple=True,
    default=sorted({1, CORES}),
    show_default="1, and all cores",
    help="Processes, on as many cores; may be given more than once.",
)
@common.baseline_option
@common.report_options([row.name for row in ROWS])
def build(
    raw: Path, images: int, workers: tuple[int, ...], baseline: Path | None, only: tuple[str, ...], **report: Any
) -> None:
    """Measure the builder on pictures of RAW, beside JPEG decoding and encoding alone, and beside its peers.

    Rates are those of the job itself: from the first picture to the last file closed, without the start of
    interpreters and workers. The same pictures for all, warm in memory; repetitions are interleaved.

    \b
    Examples:
      python tools/bench build /data/imagenet --images 8000 --json bench.json
      python tools/bench build photos/ --only penstock --baseline ../before
    """
    chosen = common.with_baseline([row for row in ROWS if not only or row.name in only], baseline)
    rows = [row.fresh(workers=count) for row in chosen for count in sorted(set(workers))]
    per_shard = max(1, min(1000, images // (4 * max(workers))))
    with common.scratch_folder() as scratch:
        source, out = scratch / "pictures", scratch / "out"
        pictures = prepare(raw, source, images)

        def run(row: Row) -> Figures:
            os.sync()  # what the row before wrote is not written back during this one
            job = {"source": str(source), "out": str(out), "per_shard": per_shard}
            try:
                figures = common.run_job("peers_build.py", row, job, common.limit(images, row.workers))
                if figures["images"] != images:
                    raise UserError(f"stored {figures['images']:,} of {images:,} pictures")
                stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
                return figures | {"stored": stored}
            finally:
                shutil.rmtree(out, ignore_errors=True)

        common.interleave(rows, run, report["repetitions"])
    facts = [f"{pictures}; {per_shard:,} a shard; as many cores as workers"]
    notes = common.baseline_lines(rows) + common.notes_of(rows, FUNCTIONS)
    common.publish(HEADER, table(rows), rows, facts, notes, **report)


def prepare(raw: Path, folder: Path, images: int) -> str:
    """Write JPEGs drawn evenly over the training images of `raw` to `folder`, and links to them until there are enough.

    Returns:
        A description of the pictures.
    Raises:
        UserError: `raw` has no layout that we know, or not one JPEG that decodes; a peer may not survive the others.
    """
    table = find_sources(raw, allow_incomplete=True).images
    training = [i for i in range(len(table)) if table[i].split == "train"]
    chosen = [training[k * len(training) // images] for k in range(images)] if len(training) > images else training
    files: list[Path] = []
    pixels = 0
    for i in chosen:
        data = table[i].read()
        try:
            height, width, _ = simplejpeg.decode_jpeg(data).shape
        except ValueError:
            continue
        pixels += height * width
        files.append(folder / (table[i].wnid or "none") / f"{len(files):08d}.jpg")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_bytes(data)
    if not files:
        raise UserError(f"{raw}: none of {len(chosen):,} pictures looked at is a whole JPEG")
    for i in range(len(files), images):
        os.link(files[i % len(files)], files[i % len(files)].with_name(f"{i:08d}.jpg"))
    left_out, mean = len(chosen) - len(files), sum(path.stat().st_size for path in files) / len(files)
    return (
        f"{images:,} pictures ({len(files):,} distinct; {left_out:,} left out: no whole JPEG), {mean / 1e3:.1f} kB and "
        f"{pixels / len(files) / 1e6:.3f} megapixels on average"
    )


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a line for each row, and for our builder a second one, from start to exit."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.failed:
            lines.append((row.title, str(row.workers), f"not run: {row.failed}", "", "", ""))
            continue
        for title, seconds in ((row.title, "seconds"), (f"{row.title}, start to exit", "whole")):
            if seconds not in row.runs[0]:
                continue
            rates = row.rates(seconds)
            ceiling, ours = (find_row(rows, name, row.workers) for name in (CEILING, OURS))
            share = f"{100 * ratio(rates, ceiling.rates()):.0f} %" if ceiling else ""
            compared = ratio_text(ours.rates(), rates) if ours and row.name != OURS else ""
            memory = f"{max(run['rss'] for run in row.runs) / 2**20:,.0f} MiB"
            lines.append((title, str(row.workers), common.spread(rates), share, compared, memory))
    return lines
