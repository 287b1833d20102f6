"""`bench build`: our builder beside JPEG decoding and encoding alone, and beside other builders."""

import os
import tempfile
from pathlib import Path
from typing import Any

import click
import simplejpeg  # type: ignore[import-untyped,unused-ignore]

from pipeline import UserError
from pipeline.cli import Command
from pipeline.offline.sources import find_sources
from tools.bench import common
from tools.bench.common import CORES, COUNT, Figures, Row

CEILING, OURS = "decode-encode", ["penstock"]
ROWS = (
    Row("decode", "JPEG decode alone", "codec", {"encode": False}, against=OURS),
    Row(CEILING, "ceiling: JPEG decode and encode alone", "codec", {"encode": True}, against=OURS),
    Row("penstock", "Penstock, tools/build_shards.py", "penstock", {"checkout": str(common.ROOT)}),
    Row("img2dataset", "img2dataset, Resizer, WebDatasetSampleWriter", "img2dataset", {}, "img2dataset", OURS),
    Row("litdata", "LitData, optimize", "litdata", {}, "litdata", OURS),
    Row("webdataset", "WebDataset, ShardWriter with stock Pillow", "webdataset", {}, "webdataset", OURS),
    Row("ffcv", "FFCV, DatasetWriter", "ffcv", {}, "ffcv", OURS),
    Row("opencv", "cuda-convnet2's recipe, OpenCV INTER_AREA", "opencv", {}, "opencv", OURS),
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
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        source = Path(scratch, "pictures")
        pictures = prepare(raw, source, images)

        def run(row: Row) -> Figures:
            os.sync()  # what the row before wrote is not written back during this one
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                job = {"source": str(source), "out": f"{out}/built", "per_shard": per_shard}
                return common.run_job("peers_build.py", row, job)

        common.interleave(rows, run, report["repetitions"], images)
    table = [common.cells(rows, row, CEILING, str(row.workers)) for row in rows]
    facts = [f"{pictures}; {per_shard:,} a shard; as many cores as workers"]
    start_to_exit = [
        f"{row.name}, workers {row.workers}, start to exit: {common.spread(row.rates('start_to_exit'))} images/s"
        for row in rows
        if row.function == "penstock" and row.runs
    ]
    notes = common.baseline_lines(rows) + start_to_exit
    common.publish(common.HEADER, table, rows, facts, notes, **report)


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
