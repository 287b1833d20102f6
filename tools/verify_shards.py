"""Check every promise of a dataset directory, name the raw images that it holds twice, and repair what fails."""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import itertools
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline import storage
from pipeline.cli import JSON, Command, print_event, print_line, printable, progress_bars
from pipeline.doubts import Duplicates, doubts, duplicates
from pipeline.files import TAR_BLOCK, require_writable
from pipeline.manifest import FILE_NAME, BuildRecipe, DatasetError, Manifest
from pipeline.offline import verify_tiers
from pipeline.offline.plan import Plan, make_plan
from pipeline.offline.repair import repair, restore
from pipeline.offline.verify import Failures, check, load
from pipeline.records import KINDS
from pipeline.storage import is_dir, location
from pipeline.tier import SUFFIX
from tools.build_shards import SOURCE, WORKERS, chosen_sources

Copy = tuple[str, int, np.void]  # split, id and record (of SAMPLE) of a sample whose raw bytes another one has, too
EXAMPLES, COPIES = 10, 5  # groups of duplicates that are printed, and samples of each group


@click.command(cls=Command, params=[WORKERS, JSON, *SOURCE])
@click.argument("dataset", type=str)
@click.option("--quick", is_flag=True, help="Do not decode the JPEGs.")
@click.option("--repair", "raw", metavar="RAW", help="Rebuild the files that fail from the raw images in RAW.")
@click.pass_context
def main(
    context: click.Context, dataset: str, quick: bool, raw: str | None, as_json: bool, workers: int, **source: Any
) -> None:
    """Check every promise of the dataset directory DATASET: one line for each file that breaks one.

    Raw images that DATASET holds more than once are named, and no failure; nor is a warning of what is almost never
    meant, such as a validation split of one class. --repair rebuilds exactly the files that
    fail, with the build recipe in dataset.json, and puts them into place only if every byte is what dataset.json
    promises; then it checks again. A damaged dataset.json is written anew, which takes as long as a build. (--layout,
    --classes, --classes-of and so on as when DATASET was built.)

    Exit code 0: all holds; 1: something failed; 2: not a dataset directory, a damaged dataset.json, or a RAW that it
    was not built from.

    \b
    Examples:
      python tools/verify_shards.py /data/imagenet-256 --quick
      python tools/verify_shards.py /data/imagenet-256 --repair /data/imagenet
    """
    started = time.monotonic()
    root = location(dataset)

    def plan_of(recipe: BuildRecipe) -> Plan:
        return make_plan(chosen_sources(location(raw or ""), source), recipe)

    written_anew = False
    try:
        manifest = load(root)
    except DatasetError:
        if not raw or not storage.is_file(root / FILE_NAME):
            raise
        restore(root, plan_of, workers)
        print_line(as_json, f"repaired: {FILE_NAME}", "repaired", files=[FILE_NAME])
        manifest, written_anew = load(root), True
    failures = _check(manifest, quick, workers, as_json)
    failing = {failure.file for failure in failures} & manifest.files.keys()
    if raw and failing:
        if isinstance(manifest.root, Path):
            require_writable(manifest.root)
        repair(manifest, failing, plan_of(manifest.recipe), workers)
        print_line(as_json, "repaired: " + ", ".join(sorted(failing)), "repaired", files=sorted(failing))
        failures = _check(manifest, quick, workers, as_json)
    elif raw and not written_anew:
        print_line(as_json, "nothing that RAW could repair")
    _print_doubts(manifest, failures, as_json)
    samples = sum(split.samples for split in manifest.splits.values())
    size = sum(record.bytes for record in manifest.files.values())
    verdict = f"{len(failures)} failed" if failures else "all holds, pictures not decoded" if quick else "all holds"
    files, seconds = len(manifest.files) + 1, time.monotonic() - started
    raw_files = len(list(root.glob(f"raw-*/*{SUFFIX}"))) if isinstance(root, Path) else 0
    more = f" and {raw_files:,} of raw tiers" if raw_files else ""
    text = f"{verdict}: {files:,} files{more}, {samples:,} samples, {size:,} bytes, {seconds:.1f} s"
    counts = {"raw_files": raw_files, "failed": len(failures), "files": files, "samples": samples, "bytes": size}
    print_line(as_json, text, "done", **counts, seconds=round(seconds, 3))
    context.exit(1 if failures else 0)


def _check(manifest: Manifest, quick: bool, workers: int, as_json: bool) -> Failures:
    """Check with a progress bar on a terminal, and print the failures."""
    total, done = sum(len(split.shards) for split in manifest.splits.values()), itertools.count(1)
    if as_json:
        print_event("plan", shards=total, quick=quick)
    with progress_bars(as_json) as show:
        failures = check(manifest, quick=quick, workers=workers, progress=lambda: show("shards", next(done), total))
        if not any(failure.file.endswith((".tar", "/samples.npy")) for failure in failures):
            show_files, note = partial(show, "raw files"), partial(print_line, as_json)
            failures += verify_tiers.check(manifest, quick=quick, workers=workers, progress=show_files, note=note)
        elif tiers := [kind for kind in KINDS if is_dir(manifest.root / f"raw-{kind}")]:
            print_line(as_json, f"note: raw tiers ({', '.join(tiers)}) are not checked until the shards hold")
    for failure in failures:
        name = failure.file if failure.file.isprintable() else ascii(failure.file)
        text = f"{name}: {printable(failure.reason)}"
        print_line(as_json, text, "failure", file=failure.file, reason=failure.reason)
    return failures


def _print_doubts(manifest: Manifest, failures: Failures, as_json: bool) -> None:
    """Print what is almost never meant, and equal raw images, over all splits whose samples.npy holds."""
    failing = {failure.file for failure in failures}
    whole = [name for name in manifest.splits if f"{name}/samples.npy" not in failing]
    samples = {name: manifest.samples(name) for name in whole}
    warnings, copies = doubts(manifest, samples), duplicates(samples)
    for warning in warnings:
        print_line(as_json, f"warning: {warning}", "warning", text=warning)
    groups = _groups(copies, samples)
    if groups and not (copies.across_labels or copies.across_splits):  # else the last warning is on them
        print_line(as_json, f"duplicates (no failure): {copies}")
    for group in groups:
        more = f", … {len(group) - COPIES} more" if len(group) > COPIES else ""
        names = [_name(manifest, *copy, failing) for copy in group[:COPIES]]
        print_line(as_json, f"  {' = '.join(names)}{more}", "duplicates", samples=names, count=len(group))


def _groups(copies: Duplicates, samples: Mapping[str, np.ndarray]) -> list[list[Copy]]:
    """Return the first groups of samples with equal digests, in the order of their first ones."""
    starts = np.cumsum([0, *map(len, samples.values())])
    groups: defaultdict[int, list[Copy]] = defaultdict(list)
    for number, position in zip(copies.groups.tolist(), copies.positions.tolist()):
        if number >= EXAMPLES:
            break
        of = int(np.searchsorted(starts, position, "right")) - 1
        split, i = [*samples][of], position - int(starts[of])
        groups[number].append((split, i, samples[split][i]))
    return list(groups.values())


def _name(manifest: Manifest, split: str, number: int, record: np.void, failing: set[str]) -> str:
    """Return SPLIT/LABEL KEY, the key from the header of its member; of a damaged shard, SPLIT/LABEL and the id."""
    shard, label, key = f"{split}/{split}-{record['shard']:06d}.tar", record["label"], f"sample {number}"
    if shard not in failing:
        header = storage.read_range(str(manifest.root / shard), int(record["offset"]) - TAR_BLOCK, 100)
        key = printable(header.decode("ascii", "replace").partition(".")[0])
    return f"{split}/{label if label >= 0 else 'none'} {key}"


if __name__ == "__main__":
    main()
