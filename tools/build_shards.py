"""Raw images → a dataset directory: shards, their indexes, exact statistics, and dataset.json last."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from pipeline import storage
from pipeline.cli import Command, Place
from pipeline.errors import UserError
from pipeline.files import require_writable
from pipeline.manifest import FILE_NAME, Manifest, parse
from pipeline.offline.build import SKIP_LIMIT, SKIPPED_FILE, Run, SkipLimit, build, merge_parts
from pipeline.offline.plan import Plan, make_plan, slots
from pipeline.offline.repair import is_finished, retry
from pipeline.offline.shards import BUILD_FOLDER
from pipeline.offline.sources import Sources
from pipeline.storage import Location, is_remote
from tools.build_options import (
    chosen_run,
    chosen_sources,
    recipe_options,
    run_options,
    skip_options,
    source_options,
    split_recipe,
)
from tools.estimate import estimate
from tools.progress import BuildProgress, closing_table, duration, event


@click.command(cls=Command, interrupted="the finished shards stay, and the same command goes on")
@click.argument("raw", type=Place())
@click.argument("dataset", type=Place())
@run_options
@source_options
@skip_options
@recipe_options
def main(raw: Location, dataset: Location, **options: Any) -> None:
    """Build the dataset directory DATASET from the raw images in RAW.

    RAW holds the official archives of ILSVRC2012 or ILSVRC2010, packed or unpacked, Kaggle's CLS-LOC, synset tars
    (ImageNet Fall 2011), WebDataset shards, Hugging Face's parquet files, train/ and val/ with one folder per class,
    one folder per class, or files named WNID_….JPEG. Nothing is unpacked, and nothing is written outside DATASET. An
    interrupted build goes on with the same command. RAW and DATASET may be URLs of an object store, such as
    s3://bucket/folder.

    \b
    Examples:
      python tools/build_shards.py /data/imagenet /data/imagenet-256
      python tools/build_shards.py /data/imagenet /data/imagenet-256 --dry-run
      python tools/build_shards.py photos/ photos-256/ --holdout 0.2
      python tools/build_shards.py RAW DATASET --part 3/16      (job 3 of an array of 16)
      python tools/build_shards.py RAW DATASET --merge          (once all 16 have ended)
      python tools/build_shards.py s3://raw/imagenet s3://shards/imagenet-256
      python tools/build_shards.py RAW DATASET --executor ray --ray-address auto
    """
    recipe, asked = split_recipe(options)
    _require_apart(raw, dataset)
    if asked["executor"] == "ray":
        raw, dataset = raw.absolute(), dataset.absolute()  # its workers may have another working directory
    run = chosen_run(raw, dataset, asked)
    limit = SkipLimit.parse(asked["max_skipped"]) if asked["max_skipped"] else SKIP_LIMIT
    if isinstance(dataset, Path) and not asked["dry_run"]:
        require_writable(dataset)  # before RAW is listed, which may take minutes
    sources = chosen_sources(raw, asked, cache=None if asked["dry_run"] else dataset / BUILD_FOLDER)
    plan = make_plan(sources, recipe)
    _tell_plan(raw, sources, plan, asked["as_json"])
    if asked["dry_run"]:
        _tell_estimate(plan, asked["workers"], asked["as_json"])
    elif asked["merge"]:
        _finish(merge_parts(plan, dataset, limit), None, asked["as_json"])
    elif asked["retry_skipped"] and is_finished(dataset):
        _retry(plan, dataset, asked)
    else:
        _build(plan, dataset, limit, asked, run)


def _require_apart(raw: Location, dataset: Location) -> None:
    if is_remote(raw) != is_remote(dataset):
        return
    inside = f"{dataset}/".startswith(f"{raw}/") if is_remote(raw) else dataset.resolve().is_relative_to(raw.resolve())
    if inside:
        raise UserError(f"{dataset}: lies inside RAW, {raw}, and would be raw data itself; name a DATASET elsewhere")


def _build(plan: Plan, dataset: Location, limit: SkipLimit, asked: dict[str, Any], run: Run | None) -> None:
    part = asked["part"]
    mine = slots(plan)[part.number - 1 :: part.of] if part else slots(plan)
    form = "json" if asked["as_json"] else "bar" if sys.stderr.isatty() else "lines"
    with BuildProgress(sum(slot.stop - slot.start for slot in mine), form) as progress:
        built = build(
            plan,
            dataset,
            asked["workers"],
            progress.add,
            run=run,
            skip_limit=limit,
            retry_skipped=asked["retry_skipped"],
            part=part,
        )
    if built:
        _finish(built, progress, asked["as_json"])
    elif asked["as_json"]:
        event("part", number=part.number, of=part.of, shards=len(mine), **progress.figures())
    else:
        click.echo(f"part {part.number} of {part.of}: {len(mine):,} shards are built; end the build with --merge")


def _retry(plan: Plan, dataset: Location, asked: dict[str, Any]) -> None:
    built, gained = retry(parse(storage.read_bytes(dataset / FILE_NAME), dataset), plan, asked["workers"])
    if not asked["as_json"]:
        still = sum(split.skipped for split in built.splits.values())
        click.echo(f"{gained:,} images that were skipped are samples now; {still:,} are skipped still")
    _finish(built, None, asked["as_json"])


def _tell_plan(raw: Location, sources: Sources, plan: Plan, as_json: bool) -> None:
    counts = {split: len(places) for split, places in plan.splits.items()}
    trained = {plan.images.wnids[i] for i in set(plan.images.class_numbers[plan.splits["train"]].tolist()) if i >= 0}
    without = [record.wnid for record in plan.classes if record.wnid not in trained]
    if as_json:
        event(
            "plan",
            layout=sources.name,
            images=counts,
            classes=len(plan.classes),
            shards=len(slots(plan)),
            notes=sources.notes,
            left_out=dict(sources.ignored),
            classes_without_training_image=without,
        )
        return
    told = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    click.echo(f"{raw}: {sources.layout} ({sources.name}); {told}, {len(plan.classes)} classes")
    for note in sources.notes:
        click.echo(f"note: {note}")
    for line in sources.ignored.lines():
        click.echo(f"left out: {line}")
    if without:
        more = f" and {len(without) - 5:,} more" if len(without) > 5 else ""
        click.echo(f"note: classes without a training image: {', '.join(without[:5])}{more}")


def _tell_estimate(plan: Plan, workers: int, as_json: bool) -> None:
    found = estimate(plan, workers)
    if as_json:
        event("estimate", shards=len(slots(plan)), **found)
        return
    click.echo(
        f"would write {len(slots(plan)):,} shards, about {found['bytes'] / 1e9:,.1f} GB, in about "
        f"{duration(found['seconds'])} with {workers} workers (from {found['tried']} images tried here: "
        f"{found['skipped']} of them would be skipped, {found['images_per_second']:,.0f} images/s a worker)"
    )


def _finish(built: Manifest, progress: BuildProgress | None, as_json: bool) -> None:
    reasons: dict[str, Counter[str]] = {split: Counter() for split in built.splits}
    for line in map(json.loads, built.read(SKIPPED_FILE).splitlines()):
        reasons[line["split"]][line["reason"]] += 1
    figures = progress.figures() if progress else {}
    if as_json:
        splits = {
            name: {"samples": split.samples, "skipped": dict(reasons[name]), "shards": len(split.shards)}
            for name, split in built.splits.items()
        }
        event("done", dataset=str(built.root), identity=built.identity, splits=splits, **figures)
        return
    closing_table(built, reasons, figures)
    if any(reasons.values()):
        click.echo(f"which images were skipped: {built.root / SKIPPED_FILE}")


if __name__ == "__main__":
    main()
