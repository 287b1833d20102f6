"""Check every promise of a dataset directory, name the raw images that it holds twice, and repair what fails."""

import itertools
import time
from collections import defaultdict
from typing import Any

import click
import numpy as np

from pipeline import storage
from pipeline.cli import Command, progress_bars
from pipeline.files import TAR_BLOCK
from pipeline.manifest import Manifest
from pipeline.offline.plan import make_plan
from pipeline.offline.repair import repair
from pipeline.offline.verify import Failures, check, load
from pipeline.storage import location
from tools.build_shards import SOURCE, WORKERS, chosen_sources

Copy = tuple[str, int, np.void]  # split, id and record (of SAMPLE) of a sample whose raw bytes another one has, too
EXAMPLES, COPIES = 10, 5  # groups of duplicates that are printed, and samples of each group


@click.command(cls=Command, params=[WORKERS, *SOURCE])
@click.argument("dataset", type=str)
@click.option("--quick", is_flag=True, help="Do not decode the JPEGs.")
@click.option("--repair", "raw", metavar="RAW", help="Rebuild the files that fail from the raw images in RAW.")
@click.pass_context
def main(context: click.Context, dataset: str, quick: bool, raw: str | None, workers: int, **source: Any) -> None:
    """Check every promise of the dataset directory DATASET: one line for each file that breaks one.

    Raw images that DATASET holds more than once are named, and no failure. --repair rebuilds exactly the files that
    fail, with the build recipe in dataset.json, and puts them into place only if every byte is what dataset.json
    promises; then it checks again. (--layout, --classes and --allow-incomplete as when DATASET was built.)

    Exit code 0: all holds; 1: something failed; 2: not a dataset directory, a damaged dataset.json, or a RAW that it
    was not built from.

    \b
    Examples:
      python tools/verify_shards.py /data/imagenet-256 --quick
      python tools/verify_shards.py /data/imagenet-256 --repair /data/imagenet
    """
    started = time.monotonic()
    manifest = load(location(dataset))
    failures = _check(manifest, quick, workers)
    failing = {failure.file for failure in failures} & manifest.files.keys()
    if raw and failing:
        repair(manifest, failing, make_plan(chosen_sources(location(raw), source), manifest.recipe), workers)
        click.echo("repaired: " + ", ".join(sorted(failing)))
        failures = _check(manifest, quick, workers)
    elif raw:
        click.echo("nothing that RAW could repair")
    _print_duplicates(manifest, failures)
    samples = sum(split.samples for split in manifest.splits.values())
    size = sum(record.bytes for record in manifest.files.values())
    verdict = f"{len(failures)} failed" if failures else "all holds, pictures not decoded" if quick else "all holds"
    click.echo(
        f"{verdict}: {len(manifest.files) + 1:,} files, {samples:,} samples, {size:,} bytes, "
        f"{time.monotonic() - started:.1f} s"
    )
    context.exit(1 if failures else 0)


def _check(manifest: Manifest, quick: bool, workers: int) -> Failures:
    """Check with a progress bar on a terminal, and print the failures."""
    total, done = sum(len(split.shards) for split in manifest.splits.values()), itertools.count(1)
    with progress_bars() as show:
        failures = check(manifest, quick=quick, workers=workers, progress=lambda: show("shards", next(done), total))
    for failure in failures:
        click.echo(f"{failure.file if failure.file.isprintable() else ascii(failure.file)}: {failure.reason}")
    return failures


def _print_duplicates(manifest: Manifest, failures: Failures) -> None:
    """Print the lines on equal raw images, over all splits whose samples.npy holds."""
    failing = {failure.file for failure in failures}
    groups = _equal_samples(manifest, [name for name in manifest.splits if f"{name}/samples.npy" not in failing])
    if not groups:
        return
    within = sum(len({(split, record["label"]) for split, _, record in group}) < len(group) for group in groups)
    across_labels = sum(len({record["label"] for _, _, record in group}) > 1 for group in groups)
    across_splits = sum(len({split for split, _, _ in group}) > 1 for group in groups)
    click.echo(
        f"duplicates (no failure): {len(groups):,} raw images in {sum(map(len, groups)):,} samples; "
        f"{within:,} within a class of a split, {across_labels:,} across labels, {across_splits:,} across splits"
    )
    for group in groups[:EXAMPLES]:
        more = f", … {len(group) - COPIES} more" if len(group) > COPIES else ""
        click.echo("  " + " = ".join(_name(manifest, *copy, failing) for copy in group[:COPIES]) + more)


def _equal_samples(manifest: Manifest, splits: list[str]) -> list[list[Copy]]:
    """Return the groups of two or more samples with equal digests, in the order of their first ones."""
    samples = [manifest.samples(split) for split in splits]
    digests = np.concatenate([records["digest"] for records in samples] or [np.empty((0, 16), "u1")]).view("V16")[:, 0]
    _, numbers, counts = np.unique(digests, return_inverse=True, return_counts=True)
    groups: defaultdict[int, list[Copy]] = defaultdict(list)  # by the number of the digest among all digests
    for split, records, of_split in zip(splits, samples, np.split(numbers, np.cumsum([*map(len, samples)]))):
        for i in np.flatnonzero(counts[of_split] > 1).tolist():
            groups[of_split[i]].append((split, i, records[i]))
    return list(groups.values())


def _name(manifest: Manifest, split: str, number: int, record: np.void, failing: set[str]) -> str:
    """Return SPLIT/LABEL KEY, the key from the header of its member; of a damaged shard, SPLIT/LABEL and the id."""
    shard, label, key = f"{split}/{split}-{record['shard']:06d}.tar", record["label"], f"sample {number}"
    if shard not in failing:
        header = storage.read_range(str(manifest.root / shard), int(record["offset"]) - TAR_BLOCK, 100)
        key = header.decode("ascii", "replace").partition(".")[0]
    return f"{split}/{label if label >= 0 else 'none'} {key}"


if __name__ == "__main__":
    main()
