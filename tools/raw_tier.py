"""Decode the pictures of a data set once, into large files beside its shards, from which views come much faster."""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import time
from functools import partial

import click

from pipeline import manifest
from pipeline.cli import JSON, Command, print_event, print_line, progress_bars
from pipeline.offline.raw_tier import build
from pipeline.records import KINDS
from pipeline.storage import location
from tools.build_shards import WORKERS


@click.command(cls=Command, params=[WORKERS, JSON], interrupted="what is finished stays; the same command goes on")
@click.argument("dataset", type=str)
@click.option(
    "--format",
    "kind",
    type=click.Choice(KINDS),
    default="rgb",
    show_default=True,
    help="Planes of red, green and blue, the best for a CPU; or of the JPEG's own 4:2:0, half the bytes, for a GPU.",
)
def main(dataset: str, kind: str, as_json: bool, workers: int) -> None:
    """Make the raw tier of the dataset directory DATASET: decoded pictures, to be read instead of JPEGs.

    It stands in DATASET/raw-rgb or DATASET/raw-yuv420, and the loader takes it where it is there (docs/tiers.md says
    when it pays). ImageNet takes 252 GB, or 126 GB. The command goes on where an earlier run of it stopped; on a
    finished tier it checks every file, and writes those anew that have changed.

    \b
    Examples:
      python tools/raw_tier.py /data/imagenet-256
      python tools/raw_tier.py /data/imagenet-256 --format yuv420
    """
    started = time.monotonic()
    data = manifest.load(location(dataset))
    pictures = sum(split.samples for split in data.splits.values())
    if as_json:
        print_event("plan", pictures=pictures, files=sum(len(split.shards) for split in data.splits.values()))
    with progress_bars(as_json) as show:
        tier, written = build(data, kind, workers, partial(show, "files"), partial(print_line, as_json))
    size, seconds = sum(file.bytes for file in tier.files.values()), time.monotonic() - started
    files = len(tier.files)
    state = f"{written:,} of {files:,} files written" if written else f"{files:,} files are as they were"
    text = f"{tier.root}: {state}, {pictures:,} pictures, {size:,} bytes, {seconds:.1f} s"
    counts = {"written": written, "files": files, "pictures": pictures, "bytes": size}
    print_line(as_json, text, "done", tier=str(tier.root), **counts, seconds=round(seconds, 3))


if __name__ == "__main__":
    main()
