"""Raw images → a dataset directory: shards, their indexes, exact statistics, and dataset.json last."""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline import UserError, storage
from pipeline.cli import JSON, Command, print_event, print_line, printable, progress_bars
from pipeline.doubts import doubts
from pipeline.files import require_writable
from pipeline.manifest import FILE_NAME, BuildRecipe, Manifest, parse
from pipeline.offline import executors
from pipeline.offline.build import SKIP_LIMIT, Run, ShardSlice, SkipLimit, build
from pipeline.offline.lock import PLAN_FILE
from pipeline.offline.plan import Plan, make_plan, slots
from pipeline.offline.repair import retry
from pipeline.offline.shards import BUILD_FOLDER, SKIPPED_FILE
from pipeline.offline.sources import LAYOUTS, Sources, find_sources
from pipeline.storage import Location, is_remote, location
from tools.build_progress import (
    BuildProgress,
    DecoderWarnings,
    class_rows,
    pictures_of_classes,
    print_closing_table,
    print_estimate,
    print_reading,
    print_warnings,
)

RECIPE_HELP = {  # of the fields of BuildRecipe that are options; the other fields keep their defaults
    "size": "Pixels of a side of the stored square.",
    "crop": "none: the whole picture, its shorter side --size, for other models' augmentation; the statistics are then "
    "only per colour, and this trainer does not take it.",
    "filter": "How pictures are rescaled; area as in cuda-convnet2.",
    "quality": "JPEG quality.",
    "subsampling": "Chroma subsampling of the stored JPEGs.",
    "exif": "The orientation tag: ignored as by torchvision and the original, or the picture turned.",
    "seed": "Seed of the order of the training split.",
    "samples_per_shard": "Samples in each shard but the last of a split.",
    "holdout": "Share of the training images that becomes the validation split, where RAW has none.",
    "limit": "Use at most this many images, drawn evenly over RAW; 0: all.",
}


def recipe_option(field: Field[Any]) -> click.Option:
    """Return the option of a field of BuildRecipe: the field's name, default, and choices or bounds."""
    if "choices" in field.metadata:
        kind: click.ParamType = click.Choice(field.metadata["choices"])
    else:
        kind = (click.FloatRange if type(field.default) is float else click.IntRange)(*field.metadata["bounds"])
    name, text = f"--{field.name.replace('_', '-')}", RECIPE_HELP[field.name]
    return click.Option([name], type=kind, default=field.default, show_default=True, help=text)


def parse_part(text: str) -> ShardSlice:
    """Return K/N as a `ShardSlice`."""
    number, slash, of = text.partition("/")
    if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= 10**6:
        return ShardSlice(int(number), int(of))
    raise click.BadParameter(f"{text}: not K/N with K from 1 to N, such as 3/16")


def parse_depth(text: str) -> int:
    """Return N; −1 for `last`."""
    if text == "last":
        return -1
    if str(text).isdecimal() and int(text) <= 100:
        return int(text)
    raise click.BadParameter(f"{text}: neither a number of folders, such as 2, nor last")


WORKERS = click.Option(
    ["--workers"],
    type=click.IntRange(min=1),
    default=len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Processes at a time.",
)

RUN = [
    WORKERS,
    click.Option(
        ["--executor"],
        type=click.Choice(["processes", "ray"]),
        default="processes",
        show_default=True,
        help="Who builds the shards: processes here, or a Ray cluster (with the extra ray installed): there --workers "
        "tasks at a time, by default one on each CPU.",
    ),
    click.Option(
        ["--ray-address"],
        metavar="ADDRESS",
        show_default="RAY_ADDRESS, else auto",
        help="HOST:PORT of a Ray cluster's head, or auto: the cluster of this machine. RAW and DATASET then lie where "
        "each node sees them under the same path.",
    ),
    click.Option(
        ["--part"],
        type=parse_part,
        metavar="K/N",
        help="Build every Nth shard from the Kth on, one job of N; see --merge.",
    ),
    click.Option(["--merge"], is_flag=True, help="End a build whose parts are all built."),
    click.Option(["--dry-run"], is_flag=True, help="Print counts, shards, expected size and time; write nothing."),
    JSON,
    click.Option(
        ["--max-skipped"],
        metavar="N|P%",
        help="Fail where more images of a split are skipped, or more pictures of RAW are left out (not counted with "
        "--allow-incomplete).  [default: 0.1%, at least 10]",
    ),
    click.Option(["--retry-skipped"], is_flag=True, help="Try again what an earlier run skipped, finished or not."),
]

SOURCE = [
    click.Option(["--layout"], metavar="NAME", help=f"Of RAW, where it is not recognised: {', '.join(LAYOUTS)}."),
    click.Option(
        ["--class-depth"],
        type=parse_depth,
        default=0,
        metavar="N|last",
        help="The folders below RAW or a split that name the class: the first N, or all. [default: there is but one]",
    ),
    click.Option(
        ["--labels"], metavar="FILE", help="A table (CSV, TSV, JSON lines) of file names and labels, for flat pictures."
    ),
    click.Option(
        ["--classes"],
        metavar="FILE",
        help="Only the classes (wnids or folder names) in FILE, one a line, or in a mapping, CSV or JSON; labels are "
        "ranks among those.",
    ),
    click.Option(
        ["--classes-of"],
        metavar="DATASET",
        help="Classes and labels are those of another dataset directory; without train/, all is for validation.",
    ),
    click.Option(["--keep-labels"], is_flag=True, help="Numbers stay the labels that they are, also with gaps."),
    click.Option(
        ["--allow-incomplete"], is_flag=True, help="Build with what is there, where it is not what the layout promises."
    ),
]

RECIPE = [recipe_option(field) for field in fields(BuildRecipe) if field.name in RECIPE_HELP]


@click.command(
    cls=Command,
    params=[*RUN, *SOURCE, *RECIPE],
    interrupted="the finished shards stay, and the same command goes on",
)
@click.argument("raw", type=str)
@click.argument("dataset", type=str)
@click.pass_context
def main(context: click.Context, raw: str, dataset: str, **values: Any) -> None:
    """Build the dataset directory DATASET from the raw images in RAW.

    RAW holds the official archives of ILSVRC2012 or ILSVRC2010, packed or unpacked, Kaggle's CLS-LOC, Tiny ImageNet,
    synset tars (ImageNet Fall 2011), WebDataset shards, Hugging Face's parquet files, train/ and val/ with one folder
    per class, one folder per class, files named WNID_….JPEG, or pictures and a table (--labels). Nothing is unpacked,
    and nothing is written outside DATASET. An interrupted build goes on with the same command. RAW and DATASET may be
    URLs of an object store, such as s3://bucket/folder.

    \b
    Examples:
      python tools/build_shards.py /data/imagenet /data/imagenet-256
      python tools/build_shards.py /data/imagenet /data/imagenet-256 --dry-run
      python tools/build_shards.py photos/ photos-256/ --holdout 0.2
      python tools/build_shards.py RAW DATASET --part 3/16      (job 3 of an array of 16)
      python tools/build_shards.py RAW DATASET --merge          (once all 16 have ended)
      python tools/build_shards.py s3://raw/imagenet s3://shards/imagenet-256
      python tools/build_shards.py RAW DATASET --executor ray --ray-address HEAD:6379
    """
    recipe = BuildRecipe(**{name: values.pop(name) for name in RECIPE_HELP})
    source, root = location(raw), location(dataset)
    if values["executor"] == "ray":
        source, root = source.absolute(), root.absolute()  # the workers may have another working directory
    _require_apart(source, root)
    run = _executor((source, root / BUILD_FOLDER / PLAN_FILE), values, context)
    limit = SkipLimit.parse(values["max_skipped"]) if values["max_skipped"] else SKIP_LIMIT
    if isinstance(root, Path) and not values["dry_run"]:
        require_writable(root)  # before RAW is listed, which may take minutes
    sources = chosen_sources(source, values, cache=None if values["dry_run"] else root / BUILD_FOLDER)
    plan, as_json = make_plan(sources, recipe), values["as_json"]
    _print_plan(source, sources, plan, as_json)
    if not values["allow_incomplete"]:
        limit.check_left_out(sources.ignored.pictures, len(sources.images))
    if values["dry_run"]:
        print_estimate(plan, len(slots(plan)), values["workers"], as_json)
    elif values["merge"]:
        warnings = DecoderWarnings()
        built = build(plan, root, progress=warnings.add, skip_limit=limit, parts_end=True)
        assert built
        _print_result(built, warnings.figures(), as_json)
    elif values["retry_skipped"] and storage.is_file(root / FILE_NAME) and not storage.exists(root / BUILD_FOLDER):
        built, gained = retry(parse(storage.read_bytes(root / FILE_NAME), root), plan, values["workers"])
        skipped = sum(split.skipped for split in built.splits.values())
        print_line(as_json, f"{gained:,} images that were skipped are samples now; {skipped:,} are skipped still")
        _print_result(built, {}, as_json)
    else:
        _build(plan, root, limit, values, run)


def chosen_sources(raw: Location, values: Mapping[str, Any], cache: Location | None = None) -> Sources:
    """Return the sources in RAW as the options SOURCE have them, here and in tools/verify_shards.py."""
    options = {name: values[name] for name in ("class_depth", "keep_labels", "allow_incomplete")}
    options |= {name: location(values[name]) for name in ("classes", "classes_of", "labels") if values[name]}
    return find_sources(raw, values["layout"], **options, cache=cache)


def _require_apart(raw: Location, dataset: Location) -> None:
    paths = [path if is_remote(path) else os.path.realpath(path) for path in (raw, dataset)]
    if f"{paths[1]}/".startswith(f"{str(paths[0]).rstrip('/')}/"):
        raise UserError(f"{dataset}: lies inside RAW, {raw}, and would be raw data itself; name a DATASET elsewhere")


def _executor(shared: tuple[Location, ...], values: Mapping[str, Any], context: click.Context) -> Run | None:
    """Return the runner of a Ray cluster whose nodes see the paths `shared`, or None for a pool of processes."""
    address = values["ray_address"]
    if values["executor"] == "ray":
        chosen = context.get_parameter_source("workers") is not ParameterSource.DEFAULT
        at_once = values["workers"] if chosen else None
        return partial(executors.run_on_ray, address=address, at_once=at_once, shared=shared)
    if address:
        raise UserError(f"--ray-address {address}: means something only with --executor ray")
    return None


def _print_plan(raw: Location, sources: Sources, plan: Plan, as_json: bool) -> None:
    counts = {split: len(images) for split, images in plan.splits.items()}
    pictures = pictures_of_classes(plan)
    rows, trained = class_rows(plan, pictures), pictures.get("train", ())
    without = [record.wnid for record, count in zip(plan.classes, trained) if not count]
    notes = [*sources.notes, *plan.notes]
    if as_json:
        sizes = {"images": counts, "classes": len(plan.classes), "shards": len(slots(plan))}
        lacks = {"left_out": dict(sources.ignored), "classes_without_training_image": without}
        reading = {"gives": sources.gives, "order": sources.order, "table": rows}
        return print_event("plan", layout=sources.name, **reading, **sizes, notes=notes, **lacks)
    splits = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    click.echo(f"{raw}: {sources.layout} ({sources.name}); {splits}, {len(plan.classes)} classes")
    print_reading(sources, plan, rows)
    for note in notes:
        click.echo(f"note: {note}")
    for line in sources.ignored.lines():
        click.echo(f"left out: {line}")
    if without:
        more = f" and {len(without) - 5:,} more" if len(without) > 5 else ""
        click.echo(f"note: classes without a training image: {', '.join(map(printable, without[:5]))}{more}")


def _build(plan: Plan, dataset: Location, limit: SkipLimit, values: Mapping[str, Any], run: Run | None) -> None:
    part, retry_skipped = values["part"], values["retry_skipped"]
    shards = slots(plan)[part.number - 1 :: part.of] if part else slots(plan)
    images = sum(shard.stop - shard.start for shard in shards)
    with progress_bars() as show:
        progress = BuildProgress(images, values["as_json"], show)
        settings: dict[str, Any] = {"run": run, "skip_limit": limit, "retry_skipped": retry_skipped, "part": part}
        built = build(plan, dataset, values["workers"], progress.add, **settings)
    if built:
        _print_result(built, progress.figures(), values["as_json"])
    elif values["as_json"]:
        print_event("part", number=part.number, of=part.of, shards=len(shards), **progress.figures())
    else:
        click.echo(f"part {part.number} of {part.of}: {len(shards):,} shards are built; end the build with --merge")
        print_warnings(progress.figures())


def _print_result(built: Manifest, figures: Mapping[str, Any], as_json: bool) -> None:
    """Print what was built, with the `figures` of a BuildProgress, if any."""
    reasons: dict[str, Counter[str]] = {split: Counter() for split in built.splits}
    for line in map(json.loads, built.read(SKIPPED_FILE).splitlines()):
        reasons[line["split"]][line["reason"]] += 1
    warnings = doubts(built)
    if as_json:
        splits = {
            name: {"samples": split.samples, "skipped": reasons[name], "shards": len(split.shards)}
            for name, split in built.splits.items()
        }
        done = {"dataset": str(built.root), "identity": built.identity, "splits": splits, "warnings": warnings}
        return print_event("done", **done, **figures)
    print_closing_table(built, reasons, figures)
    if any(reasons.values()):
        click.echo(f"which images were skipped: {built.root / SKIPPED_FILE}")
    for warning in warnings:
        click.echo(f"warning: {warning}")


if __name__ == "__main__":
    main()
