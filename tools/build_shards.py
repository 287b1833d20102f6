"""Raw images → a dataset directory: shards, their indexes, exact statistics, and dataset.json last."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli import Command
from pipeline.errors import UserError
from pipeline.manifest import BuildRecipe, Manifest
from pipeline.offline.build import build, shard_tasks
from pipeline.offline.plan import Plan, make_plan
from pipeline.offline.shards import BUILD_FOLDER, ShardResult
from pipeline.offline.sources import LAYOUTS, Sources, find_sources


@click.command(cls=Command)
@click.argument("raw", type=click.Path(path_type=Path))
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Processes.",
)
@click.option(
    "--holdout",
    type=click.FloatRange(0, 0.5),
    default=0.1,
    show_default=True,
    help="Share of the training images that becomes the validation split, where RAW has none.",
)
@click.option(
    "--size",
    type=click.IntRange(16, 1024),
    default=256,
    show_default=True,
    help="Pixels of a side of the stored square.",
)
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="JPEG quality.")
@click.option("--samples-per-shard", type=click.IntRange(1, 65536), default=4096, show_default=True)
@click.option(
    "--seed", type=click.IntRange(min=0), default=2012, show_default=True, help="Of the order of the training split."
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=0,
    help="Use at most this many images, drawn evenly over RAW (0: all).",
)
@click.option(
    "--filter",
    "kernel",
    type=click.Choice(["bicubic", "area"]),
    default="bicubic",
    show_default=True,
    help="How pictures are rescaled; area as in cuda-convnet2.",
)
@click.option(
    "--subsampling",
    type=click.Choice(["4:2:0", "4:2:2", "4:4:4"]),
    default="4:2:0",
    show_default=True,
    help="Of the stored JPEGs' chroma.",
)
@click.option(
    "--exif",
    type=click.Choice(["ignore", "apply"]),
    default="ignore",
    show_default=True,
    help="The orientation tag: ignored as by torchvision and the original, or the picture turned.",
)
@click.option("--layout", metavar="NAME", help=f"Of RAW, where it is not recognised: {', '.join(LAYOUTS)}.")
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Only the classes (wnids or folder names) in FILE, one a line; labels are ranks among those.",
)
@click.option(
    "--allow-incomplete", is_flag=True, help="Build with what is there, where it is not what the layout promises."
)
def main(
    raw: Path,
    dataset: Path,
    workers: int,
    holdout: float,
    size: int,
    quality: int,
    samples_per_shard: int,
    seed: int,
    limit: int,
    kernel: str,
    subsampling: str,
    exif: str,
    layout: str | None,
    classes: Path | None,
    allow_incomplete: bool,
) -> None:
    """Build the dataset directory DATASET from the raw images in RAW.

    RAW holds the official archives of ILSVRC2012 or ILSVRC2010, packed or unpacked, Kaggle's CLS-LOC, synset tars
    (ImageNet Fall 2011), WebDataset shards, train/ and val/ with one folder per class, one folder per class, or files
    named WNID_….JPEG. Nothing is unpacked, and nothing is written outside DATASET. An interrupted build goes on with
    the same command.

    \b
    Examples:
      python tools/build_shards.py /data/imagenet /data/imagenet-256
      python tools/build_shards.py photos/ photos-256/ --holdout 0.2
    """
    recipe = BuildRecipe(
        size=size,
        quality=quality,
        seed=seed,
        samples_per_shard=samples_per_shard,
        holdout=holdout,
        limit=limit,
        filter=kernel,
        subsampling=subsampling,
        exif=exif,
    )
    started = time.monotonic()
    if dataset.resolve().is_relative_to(raw.resolve()):
        raise UserError(f"{dataset}: lies inside RAW, {raw}, and would be raw data itself; name a DATASET elsewhere")
    sources = find_sources(
        raw, layout, classes=classes, allow_incomplete=allow_incomplete, cache=dataset / BUILD_FOLDER
    )
    plan = make_plan(sources, recipe)
    click.echo(f"{raw}: {sources.layout} ({sources.name}); {_counted(plan)}, {len(plan.classes)} classes")
    for note in sources.notes:
        click.echo(f"note: {note}")
    for line in sources.ignored.lines():
        click.echo(f"left out: {line}")
    trained = {image.label for image in plan.splits["train"]}
    if without := [record.wnid for record in plan.classes if record.label not in trained]:
        more = f" and {len(without) - 5:,} more" if len(without) > 5 else ""
        click.echo(f"note: classes without a training image: {', '.join(without[:5])}{more}")
    built = _build_with_progress(plan, dataset, workers)
    _report(built, sources, time.monotonic() - started)


def _build_with_progress(plan: Plan, dataset: Path, workers: int) -> Manifest:
    total = sum(len(images) for images in plan.splits.values())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        sizes = {task.name: len(task.images) for task in shard_tasks(plan, dataset)}
        row = bar.add_task("images", total=total, rate="")
        started = time.monotonic()

        def progress(result: ShardResult) -> None:
            bar.advance(row, sizes[result.name])
            bar.update(row, rate=f"{bar.tasks[0].completed / (time.monotonic() - started):.0f} images/s")

        return build(plan, dataset, workers, progress)


def _report(built: Manifest, sources: Sources, seconds: float) -> None:
    samples = sum(split.samples for split in built.splits.values())
    skipped = sum(split.skipped for split in built.splits.values())
    for name, split in built.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        click.echo(
            f"  {name:5} {split.samples:9,} samples  {split.skipped:5,} skipped  "
            f"{len(split.shards):4} shards  {size / 1e6:9,.1f} MB"
        )
    if skipped:
        reasons = Counter(_skip_reasons(built.root))
        click.echo(
            f"skipped {skipped}: "
            + ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            + f" (see {built.root / 'skipped.jsonl'})"
        )
    color = ", ".join(f"{value:.1f}" for value in built.statistics_summary["mean_color"])
    click.echo(
        f"mean colour (RGB) {color}; {(samples + skipped) / seconds:,.0f} images/s; {seconds:.1f} s; "
        f"{built.root / 'dataset.json'}"
    )


def _counted(plan: Plan) -> str:
    return ", ".join(f"{len(images):,} {split}" for split, images in plan.splits.items())


def _skip_reasons(root: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (root / "skipped.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
