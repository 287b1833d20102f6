"""`bench load` and `bench first-batch`: our loader beside libjpeg-turbo alone and other loaders; its start."""

import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline import UserError, manifest, storage
from pipeline.cli import Command
from pipeline.manifest import FileRecord, Manifest, Split
from pipeline.offline.raw_tier import build
from tools.bench import common
from tools.bench.common import CORES, COUNT, ROOT, Figures, Row
from tools.bench.peers_build import SIDE, Job
from tools.bench.peers_load import images_of, stored_jpegs

TRAIN, CEILING, UINT8, COLOUR = "train", "decode", ["penstock-uint8"], ["penstock-colour"]
CHECKOUT = {"checkout": str(ROOT)}
OURS, RAW, DEVICE = (CHECKOUT | {"tier": tier} for tier in ("jpeg", "raw", "device"))
ROWS = (
    Row(CEILING, "ceiling: libjpeg-turbo decodes alone (simplejpeg)", "decode", against=UINT8),
    Row("penstock-uint8", "Penstock, uint8", "penstock", OURS | {"output": "uint8"}),
    Row("penstock-colour", "Penstock, minus the mean colour", "penstock", OURS | {"mean": "colour"}),
    Row("penstock-image", "Penstock, minus the mean image (default)", "penstock", OURS),
    Row("penstock-imagenet", "Penstock, recipe imagenet", "penstock", OURS | {"recipe": "imagenet"}),
    Row("raw-uint8", "Penstock, raw tier, uint8", "penstock", RAW | {"output": "uint8"}),
    Row("raw-image", "Penstock, raw tier, minus the mean image", "penstock", RAW),
    Row("device-uint8", "Penstock, 4:2:0 in memory, uint8", "penstock", DEVICE | {"output": "uint8"}),
    Row("records", "Penstock, raw tier, records of 4:2:0 alone", "records", OURS),
    Row("synthetic", "synthetic: no pictures", "synthetic", against=["penstock-image"]),
    Row("dali-reader", "DALI, readers.webdataset", "dali_reader", against=COLOUR),
    Row("ffcv-jpeg", "FFCV, JPEGs", "ffcv", {"write_mode": "jpg"}, "ffcv", UINT8),
    Row("ffcv-raw", "FFCV, raw pixels", "ffcv", {"write_mode": "raw"}, "ffcv", ["raw-uint8"]),
    Row("webdataset", "WebDataset, Pillow, DataLoader", "webdataset", {}, "webdataset", COLOUR),
    Row("litdata", "LitData, Pillow, StreamingDataLoader", "litdata", {}, "litdata", COLOUR),
    Row("grain", "Grain, simplejpeg, random_map", "grain", {}, "grain", UINT8),
)
NEEDS = {"raw": ("rgb",), "device": ("yuv420",), "records": ("yuv420",)}  # kinds of records
OWN_FORMAT = ("ffcv", "litdata")  # which peers_build.py writes first
batch_option = click.option("--batch", type=COUNT, default=128, show_default=True)


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path))
@batch_option
@click.option("--batches", type=COUNT, default=100, show_default=True, help="Batches in each run.")
@common.baseline_option
@common.report_options([row.name for row in ROWS])
def load(dataset: Path, batch: int, batches: int, baseline: Path | None, only: tuple[str, ...], **report: Any) -> None:
    """Measure how fast training views of DATASET come on this machine's cores, beside its decoder alone, and peers.

    Rates are those of batches after a warm-up, that nobody looks at: without the start of interpreters, workers and
    compilers. The same pictures for all, warm in memory: as many as a run takes, repeated where there are fewer;
    repetitions are interleaved. Peers that have formats of their own get those written first, untimed.

    \b
    Examples:
      python tools/bench load /data/imagenet-256 --json load.json
      python tools/bench load /data/imagenet-256 --only penstock-uint8 --baseline ../before
    """
    rows = common.with_baseline([row.fresh() for row in ROWS if not only or row.name in only], baseline)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        scratch = Path(name)
        source, pictures = scratch / "dataset", scratch / "pictures"
        sizes: Figures = {"batch": batch, "batches": batches}
        taken = images_of(Job("", "", "", CORES, **sizes))
        stored = np.unique(of_images(dataset, taken, source).samples(TRAIN))

        def run(row: Row) -> Figures:
            for kind in NEEDS.get("records" if row.function == "records" else row.options.get("tier", ""), ()):
                click.echo(f"{row.name}: making the raw tier, unless it is there, untimed", err=True)
                build(manifest.load(source), kind, CORES, lambda done, total: None)
            job = {"source": str(source), "out": str(scratch / row.name), **sizes}
            if row.function in OWN_FORMAT and not (scratch / row.name).exists():
                click.echo(f"{row.name}: writing its own format, untimed", err=True)
                if not pictures.exists():
                    (pictures / "all").mkdir(parents=True)
                    for i, jpeg in enumerate(islice(cycle(stored_jpegs(str(source))), taken)):
                        (pictures / "all" / f"{i:08d}.jpg").write_bytes(jpeg)
                built = {"source": str(pictures), "per_shard": max(1, min(1000, taken // (4 * CORES)))}
                common.run_job("peers_build.py", row, job | built)
            return common.run_job("peers_load.py", row, job)

        common.interleave(rows, run, report["repetitions"], batch * batches)
    facts = [
        f"{batches:,} batches of {batch:,} views of 224 × 224, after a warm-up, from {len(stored):,} pictures of "
        f"{SIDE} × {SIDE}, {stored['size'].mean() / 1e3:.1f} kB on average; {CORES} threads or processes each"
    ]
    header = ("row", "gives", *common.HEADER[2:])
    table = [common.cells(rows, row, CEILING, row.runs[0]["gives"] if row.runs else "") for row in rows]
    common.publish(header, table, rows, facts, common.baseline_lines(rows), **report)


@click.command(cls=Command)
@click.option("--samples", type=COUNT, default=1281167, show_default=True)
@click.option("--shards", type=COUNT, default=1000, show_default=True)
@batch_option
@common.report_options()
def first_batch(samples: int, shards: int, batch: int, **report: Any) -> None:
    """Measure the seconds from nothing to our loader's first batch, in a fresh process, once it has imported it.

    The dataset directory is made up: so many records and shards, that repeat a few drawn pictures, warm in memory.

    \b
    Example:
      python tools/bench first-batch --samples 1281167 --shards 1000
    """
    if shards > samples:
        raise UserError(f"{shards:,} shards of {samples:,} samples; give as many samples as shards, or more")
    row = Row("first-batch", "Penstock, first batch", "first_batch")
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        made = of_images(drawn(Path(scratch)), samples, Path(scratch, "dataset"), shards)
        job = {"source": str(made.root), "out": "", "batch": batch}
        common.interleave([row], lambda row: common.run_job("peers_load.py", row, job), report["repetitions"], batch)
    if row.failed:
        raise UserError(row.failed)
    seconds = {stage: [run["stages"][stage] for run in row.runs] for stage in row.runs[0]["stages"]}
    seconds["in all"] = [run["seconds"] for run in row.runs]
    table = [(stage, f"{np.median(s):.3f} ({min(s):.3f} to {max(s):.3f})") for stage, s in seconds.items()]
    facts = [f"{samples:,} made-up samples in {shards:,} shards, batches of {batch:,}"]
    common.publish(("stage", "seconds, median (min to max)"), table, [row], facts, [], **report)


def drawn(folder: Path) -> Path:
    """Draw pictures, build a data set of them by our commands, and return its directory below `folder`."""
    raw, built = str(folder / "raw"), str(folder / "built")
    pictures = ["make_raw.py", raw, "--classes", "10", "--train", "20", "--val", "1"]
    for program, *words in (pictures, ["build_shards.py", raw, built, "--workers", "1"]):
        command = [sys.executable, str(ROOT / "tools" / program), *words]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"tools/{program} failed: {(done.stderr.strip() or 'nothing on stderr').splitlines()[-1]}")
    return Path(built)


def of_images(dataset: Path, images: int, root: Path, shards: int = 0) -> Manifest:
    """Make a dataset directory of so many training images: the first of `dataset`, repeated where there are fewer.

    Its shards are links to those that it needs; or so many links to the first one.

    Raises:
        UserError: `dataset` is not a local dataset directory of training pictures of 256 × 256.
    """
    built = manifest.load(dataset)
    recipe, split = built.recipe, built.split(TRAIN)
    if storage.is_remote(built.root) or (recipe.crop, recipe.size) != ("centre", SIDE) or not split.samples:
        raise UserError(
            f"{dataset}: crop {recipe.crop}, size {recipe.size}, {split.samples:,} training pictures; to be measured, "
            f"it must be local, with pictures of {SIDE} × {SIDE}; build with --crop centre --size {SIDE}"
        )
    if shards:
        records = np.resize(built.samples(TRAIN)[: split.shards[0].samples], images)
        originals = split.shards[:1] * shards
        records["shard"] = np.arange(images) * shards // images
    else:
        records = np.resize(built.samples(TRAIN), images)
        records = records[np.argsort(records["shard"], kind="stable")]
        originals = split.shards[: records["shard"].max() + 1]
    files = {manifest.STATISTICS_FILE: manifest.STATISTICS_FILE}  # name → name of the original
    made = []
    for i, (original, count) in enumerate(zip(originals, np.bincount(records["shard"]).tolist())):
        made.append(replace(original, name=f"{TRAIN}/{TRAIN}-{i:06d}.tar", samples=count))
        files |= {made[-1].name[:-4] + suffix: original.name[:-4] + suffix for suffix in (".tar", ".idx")}
    (root / TRAIN).mkdir(parents=True)
    for name, original_name in files.items():
        (root / name).symlink_to((built.root / original_name).resolve())
    samples = f"{TRAIN}/samples.npy"
    np.save(root / samples, records)
    data = (root / samples).read_bytes()
    digests = {name: built.files[original_name] for name, original_name in files.items()}
    digests[samples] = FileRecord(len(data), manifest.sha256(data))
    splits = {TRAIN: Split(images, 0, tuple(made))}
    result = replace(built, root=root, splits=splits, files=digests)
    (root / manifest.FILE_NAME).write_bytes(result.to_json())
    return result
