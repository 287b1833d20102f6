"""`bench load` and `bench first-batch`: our loader beside DALI alone and other loaders; its start."""

import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline import UserError, manifest, storage
from pipeline.cli import Command
from pipeline.manifest import FileRecord, Manifest, ShardRecord, Split
from tools.bench import common
from tools.bench.common import CORES, COUNT, ROOT, Figures, Row, find_row, ratio, ratio_text
from tools.bench.peers_build import SIDE, Job
from tools.bench.peers_load import FUNCTIONS, images_of

TRAIN, CEILING, UINT8, COLOUR, IMAGE = "train", "decode", "penstock-uint8", "penstock-colour", "penstock-image"
HEADER = ("row", "gives", "images/s, median (min to max)", "of the ceiling", "ours is", "largest process")
OURS = {"checkout": str(ROOT)}
ROWS = (
    Row(CEILING, "ceiling: DALI decodes the windows alone", "dali_window", against=[UINT8]),
    Row(UINT8, "Penstock, uint8", "penstock", OURS | {"output": "uint8"}),
    Row(COLOUR, "Penstock, minus the mean colour", "penstock", OURS | {"mean": "colour"}),
    Row(IMAGE, "Penstock, minus the mean image (default)", "penstock", OURS),
    Row("penstock-imagenet", "Penstock, recipe imagenet", "penstock", OURS | {"recipe": "imagenet"}),
    Row("synthetic", "synthetic: no pictures", against=[IMAGE]),
    Row("dali-reader", "DALI, readers.webdataset", "dali_reader", against=[COLOUR]),
    Row("ffcv-jpeg", "FFCV, the same JPEGs", "ffcv", {"raw": False}, "ffcv", [UINT8], "ffcv_convert"),
    Row("ffcv-raw", "FFCV, raw pixels", "ffcv", {"raw": True}, "ffcv", [UINT8], "ffcv_convert"),
    Row("webdataset", "WebDataset, Pillow, DataLoader", environment="webdataset", against=[COLOUR]),
    Row("litdata", "LitData, Pillow, StreamingDataLoader", "", {}, "litdata", [COLOUR], "litdata_convert"),
)
batch_option = click.option("--batch", type=COUNT, default=128, show_default=True)


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path))
@batch_option
@click.option("--batches", type=COUNT, default=100, show_default=True, help="Batches in each run.")
@common.baseline_option
@common.report_options([row.name for row in ROWS])
def load(dataset: Path, batch: int, batches: int, baseline: Path | None, only: tuple[str, ...], **report: Any) -> None:
    """Measure how fast training views of DATASET come on this machine's cores, beside DALI's decoder, and peers.

    Rates are those of batches after a warm-up, that nobody looks at: without the start of interpreters, workers and
    compilers. The same pictures for all, warm in memory: as many as a run takes, repeated where there are fewer;
    repetitions are interleaved. Peers that have formats of their own get those written first, untimed.

    \b
    Examples:
      python tools/bench load /data/imagenet-256 --json load.json
      python tools/bench load /data/imagenet-256 --only penstock-uint8 --baseline ../before
    """
    rows = [row.fresh() for row in ROWS if not only or row.name in only]
    rows = common.with_baseline(rows, baseline)
    with common.scratch_folder() as scratch:
        source = str(scratch / "dataset")
        taken = images_of(Job("", source, "", CORES, {}, batch=batch, batches=batches))
        data = of_images(dataset, taken, Path(source))

        def run(row: Row) -> Figures:
            out = scratch / row.name
            job = {"source": source, "out": str(out), "batch": batch, "batches": batches}
            if row.prepare and not out.exists():
                common.log(f"{row.name}: writing its own format, untimed")
                common.run_job("peers_load.py", row, job, common.limit(taken, CORES), row.prepare)
            figures = common.run_job("peers_load.py", row, job, common.limit(taken, CORES))
            if figures["images"] != batch * batches:
                raise UserError(f"delivered {figures['images']:,} of {batch * batches:,} pictures")
            return figures

        common.interleave(rows, run, report["repetitions"])
        stored = np.unique(data.samples(TRAIN))
    facts = [
        f"{batches:,} batches of {batch:,} views of 224 × 224, after a warm-up, from {len(stored):,} pictures of "
        f"{SIDE} × {SIDE}, {stored['size'].mean() / 1e3:.1f} kB on average; {CORES} threads or processes each"
    ]
    notes = common.baseline_lines(rows) + waits(rows) + common.notes_of(rows, FUNCTIONS)
    common.publish(HEADER, [cells(rows, row) for row in rows], rows, facts, notes, **report)


def cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    """Return the row's cells of the table."""
    if row.failed:
        return row.title, "", f"not run: {row.failed}", "", "", ""
    ceiling, ours = find_row(rows, CEILING), find_row(rows, (*row.against, "")[0])
    share = f"{100 * ratio(row.rates(), ceiling.rates()):.0f} %" if ceiling else ""
    compared = ratio_text(ours.rates(), row.rates()) if ours else ""
    memory = f"{max(run['rss'] for run in row.runs) / 2**20:,.0f} MiB"
    return row.title, row.runs[0]["gives"], common.spread(row.rates()), share, compared, memory


def waits(rows: Sequence[Row]) -> list[str]:
    """Return shares of our loader's waiting by cause: it does nothing else, so the largest is its limit."""
    lines = []
    for row in rows:
        seconds = row.runs[0].get("waits", {}) if row.runs else {}
        if seconds:
            shares = (f"{cause} {100 * part / sum(seconds.values()):.0f} %" for cause, part in seconds.items())
            lines.append(f"{row.name} waited, in its first run, for: {', '.join(shares)}")
    return lines


@click.command(cls=Command)
@click.option("--samples", type=COUNT, default=1281167, show_default=True)
@click.option("--shards", type=COUNT, default=1000, show_default=True)
@batch_option
@common.report_options(["first-batch"])
def first_batch(samples: int, shards: int, batch: int, only: tuple[str, ...], **report: Any) -> None:
    """Measure the seconds from nothing to our loader's first batch, in a fresh process, once it has imported it.

    The dataset directory is made up: so many records and shards, that repeat a few drawn pictures, warm in memory.

    \b
    Example:
      python tools/bench first-batch --samples 1281167 --shards 1000
    """
    row = Row("first-batch", "Penstock, first batch", "first_batch")
    with common.scratch_folder() as scratch:
        job = {"source": str(made_up(scratch, samples, shards).root), "out": "", "batch": batch}
        common.interleave(
            [row], lambda row: common.run_job("peers_load.py", row, job, common.limit(batch, 1)), report["repetitions"]
        )
    if row.failed:
        raise UserError(row.failed)
    seconds = {stage: [run["stages"][stage] for run in row.runs] for stage in row.runs[0]["stages"]}
    seconds["in all"] = [run["seconds"] for run in row.runs]
    table = [(stage, f"{np.median(s):.3f} ({min(s):.3f} to {max(s):.3f})") for stage, s in seconds.items()]
    facts = [f"{samples:,} made-up samples in {shards:,} shards, batches of {batch:,}"]
    common.publish(("stage", "seconds, median (min to max)"), table, [row], facts, [], **report)


def of_images(dataset: Path, images: int, root: Path) -> Manifest:
    """Make a dataset directory of so many training images: the first of `dataset`, repeated where there are fewer.

    Its shards are links to those that it needs.

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
    ends = np.cumsum([shard.samples for shard in split.shards])
    shards = split.shards[: int(np.searchsorted(ends, images)) + 1]
    records = np.resize(built.samples(TRAIN), images)  # in the order of the shards
    return write_links(built, root, records, shards, {shard.name: shard.name for shard in shards})


def made_up(folder: Path, samples: int, shards: int) -> Manifest:
    """Make a dataset directory of so many training samples and shards from few drawn pictures, built by our commands.

    Raises:
        UserError: there are more shards than samples, or a command fails (a full disk).
    """
    if shards > samples:
        raise UserError(f"{shards:,} shards of {samples:,} samples; give as many samples as shards, or more")
    raw, built = str(folder / "raw"), str(folder / "built")
    drawn = ["make_raw.py", raw, "--classes", "10", "--train", "20", "--val", "1"]
    for program, *words in (drawn, ["build_shards.py", raw, built, "--workers", "1"]):
        command = [sys.executable, str(ROOT / "tools" / program), *words]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"tools/{program} failed: {(done.stderr.strip() or 'nothing on stderr').splitlines()[-1]}")
    return inflated(manifest.load(built), samples, shards, folder / "dataset")


def inflated(built: Manifest, samples: int, shards: int, root: Path) -> Manifest:
    """Make a dataset directory of so many training samples and shards, each a link to `built`'s only shard."""
    (original,) = built.split(TRAIN).shards
    records = np.resize(built.samples(TRAIN), samples)
    records["shard"] = np.arange(samples) * shards // samples
    names = [f"{TRAIN}/{TRAIN}-{number:06d}.tar" for number in range(shards)]
    made = [replace(original, name=name) for name in names]
    return write_links(built, root, records, made, dict.fromkeys(names, original.name))


def write_links(
    built: Manifest, root: Path, records: np.ndarray, shards: Sequence[ShardRecord], originals: Mapping[str, str]
) -> Manifest:
    """Write a dataset directory of training `records`, whose shards are links: name → name below `built.root`."""
    links = {name[:-4] + suffix: tar[:-4] + suffix for name, tar in originals.items() for suffix in (".tar", ".idx")}
    links |= {manifest.STATISTICS_FILE: manifest.STATISTICS_FILE}
    (root / TRAIN).mkdir(parents=True)
    for name, original in links.items():
        (root / name).symlink_to((built.root / original).resolve())
    out = io.BytesIO()
    np.save(out, records)
    samples, data = f"{TRAIN}/samples.npy", out.getvalue()
    (root / samples).write_bytes(data)
    counts = np.bincount(records["shard"])
    shards = [replace(shard, samples=int(counts[int(shard.name[-10:-4])])) for shard in shards]
    files = {name: built.files[original] for name, original in links.items()}
    files |= {samples: FileRecord(len(data), manifest.sha256(data))}
    made = replace(built, root=root, splits={TRAIN: Split(len(records), 0, tuple(shards))}, files=files)
    (root / manifest.FILE_NAME).write_bytes(made.to_json())
    return made
