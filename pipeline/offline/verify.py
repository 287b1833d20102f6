"""The check of a dataset directory: every promise of its manifest against what the files hold."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import manifest, storage
from pipeline.decode import REASONS
from pipeline.manifest import FILE_NAME, STATISTICS_FILE, BuildRecipe, Manifest, ShardRecord, Statistics
from pipeline.offline import executors
from pipeline.offline.build import npy
from pipeline.offline.listed import Failure, expected, index, unlisted
from pipeline.offline.plan import SPLITS
from pipeline.offline.statistics import Sums, finish
from pipeline.offline.tars import KEY, TarContent, Violation, loaded, opened, read_tar, stored_pixels


class Failures(list[Failure]):
    """What failed so far."""

    @contextmanager
    def of(self, file: str) -> Iterator[None]:
        """Note the violation that ends the block, and go on after it."""
        try:
            yield
        except Violation as violation:
            self.append(Failure(file, str(violation)))


class ShardFindings(NamedTuple):
    shard: ShardRecord
    failures: Failures
    content: TarContent | None  # None: the tar is among the failures


def load(root: Path) -> Manifest:
    """Load the manifest alone: whether the files that it lists are there is a matter of the check.

    Raises:
        DatasetError: `root` is not a dataset directory, or its manifest is damaged.
    """
    path = root / FILE_NAME
    if not storage.is_file(path):
        return manifest.load(root)  # raises: it knows what is the matter
    return manifest.parse(storage.read_bytes(path), root)


def check(
    found: Manifest, *, quick: bool = False, workers: int = 1, progress: Callable[[], None] = lambda: None
) -> Failures:
    """Check the dataset directory of the manifest `found`; `progress` is called after each shard.

    All promises but those about pixels; those too unless `quick`: every stored JPEG decodes to size×size RGB, and the
    stored training pictures have the statistics of statistics.npz, but for JPEG's losses (`_check_drift`).

    Returns:
        All failures, of each listed file the first, in an order that does not depend on `workers`.
    Raises:
        UserError: a worker process was killed.
    """
    failures = Failures(Failure(FILE_NAME, what) for what in _manifest_violations(found))
    failures += unlisted(found)
    results: dict[str, ShardFindings] = {}
    for result in _check_shards(found, quick, workers):
        results[result.shard.name] = result
        progress()
    findings: dict[str, list[ShardFindings]] = {}
    seen: dict[str, str] = {}
    for split in found.splits:
        findings[split] = [results[shard.name] for shard in found.splits[split].shards]
        failures += [failure for result in findings[split] for failure in result.failures]
        with failures.of(f"{split}/samples.npy"):
            _check_samples(found, split, findings[split])
        for shard, _, content in findings[split]:
            with failures.of(shard.name):
                _check_unique(content.keys if content else [], shard.name, seen)
    with failures.of("skipped.jsonl"):
        _check_unique(_skipped_keys(found), "skipped.jsonl", seen)
    statistics: Statistics | None = None
    with failures.of(STATISTICS_FILE):
        statistics = _check_statistics(found)
        stored = [content.sums for _, _, content in findings["train"] if content and content.sums]
        if len(stored) == len(findings["train"]):
            _check_drift(found.recipe, statistics, stored)
    with failures.of("mean.png"):
        _check_mean_png(found, statistics)
    return failures


def _manifest_violations(found: Manifest) -> Iterator[str]:
    if storage.read_bytes(found.root / FILE_NAME) != found.to_json():
        yield f"its identity is not that of its content ({found.identity})"
    wnids = [record.wnid for record in found.classes]
    if [record.label for record in found.classes] != list(range(len(wnids))) or wnids != sorted(set(wnids)):
        yield "the labels are not the ranks of the sorted wnids"
    if not found.splits.keys() <= set(SPLITS):
        yield f"its splits are not among {', '.join(SPLITS)}"
    limit = found.recipe.samples_per_shard
    for name, split in found.splits.items():
        names = [shard.name for shard in split.shards]
        form = re.compile(rf"({re.escape(name)})/\1-\d{{6}}\.tar")
        if names != sorted(set(names)) or not all(form.fullmatch(tar) for tar in names):
            yield f"the shards of {name} are not named {name}/{name}-NNNNNN.tar in ascending order"
        if split.samples != sum(shard.samples for shard in split.shards):
            yield f"the shards of {name} do not add up to its {split.samples} samples"
        for shard in split.shards:
            if not 1 <= shard.samples <= limit:
                yield f"{shard.name}: {shard.samples} samples, the build recipe says at most {limit}"
            if shard.name in found.files and found.files[shard.name].bytes != shard.bytes:
                yield f"{shard.name}: {shard.bytes} bytes in one place, {found.files[shard.name].bytes} in another"
    for name in sorted(found.files.keys() - expected(found)):
        yield f"lists {name!a}, which is no part of a dataset directory"


class ShardCheck(NamedTuple):
    """One shard to check, and what that needs of the manifest."""

    part: Manifest  # without splits, and with the shard's own files alone
    shard: ShardRecord
    quick: bool


def _check_shards(found: Manifest, quick: bool, workers: int) -> Iterator[ShardFindings]:
    """Each shard's findings, in any order."""
    shards = [shard for split in found.splits.values() for shard in split.shards]
    checks = []
    for shard in shards:
        mine = {name: found.files[name] for name in (shard.name, index(shard.name)) if name in found.files}
        checks.append(ShardCheck(replace(found, splits={}, files=mine), shard, quick))
    return executors.run(check_shard, checks, min(workers, len(checks)))


def check_shard(task: ShardCheck) -> ShardFindings:
    """A shard's tar and its index: each alone, and the index against the tar."""
    found, shard, quick = task
    failures = Failures()
    content: TarContent | None = None
    with failures.of(shard.name), opened(found, shard.name) as file:
        number = int(re.sub(r"\D", "", shard.name)[-6:] or 0)
        read = read_tar(file, number, len(found.classes), found.recipe, pictures=not quick)
        if len(read.samples) != shard.samples:
            raise Violation(f"holds {len(read.samples)} samples, the manifest promises {shard.samples}")
        without = np.flatnonzero(read.samples["label"] < 0)
        if len(without) and not shard.name.startswith("test/"):
            raise Violation(f"{read.keys[without[0]]}.jpg has no label beside it")
        content = read
    with failures.of(index(shard.name)), opened(found, index(shard.name)) as file:
        if content and file.read() != content.index:
            raise Violation("is not the index of its tar")
    return ShardFindings(shard, failures, content)


def _check_samples(found: Manifest, split: str, findings: list[ShardFindings]) -> None:
    """samples.npy against those tars that hold."""
    with opened(found, f"{split}/samples.npy") as file:
        samples = loaded(lambda: found.samples(split))
        if file.read() != npy(samples):
            raise Violation("is not in the form in which numpy writes it")
    end = 0
    for shard, _, content in findings:
        start, end = end, end + shard.samples
        if content is None or end > len(samples):
            continue
        for name in ("shard", "offset", "size", "label", "crc32"):
            here, there = samples[name][start:end], content.samples[name]
            for i in np.flatnonzero(here != there)[:1]:
                raise Violation(f"sample {start + i}: {name} {here[i]}, but {there[i]} in {shard.name}")


def _check_unique(keys: list[str], file: str, seen: dict[str, str]) -> None:
    for key in keys:
        if key in seen:
            raise Violation(f"its key {key} stands in {seen[key]} as well")
        seen[key] = file


def _skipped_keys(found: Manifest) -> list[str]:
    """The keys in skipped.jsonl, once each line and the number of lines hold."""
    keys: list[str] = []
    count: Counter[str] = Counter()
    with opened(found, "skipped.jsonl") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                same = line == (json.dumps(entry, sort_keys=True) + "\n").encode()
            except (ValueError, RecursionError) as error:
                raise Violation(f"line {number}: not JSON ({error})") from error
            if not same or not isinstance(entry, dict) or entry.keys() != {"key", "reason", "source", "split"}:
                raise Violation(f"line {number}: not an object of key, reason, source and split")
            if str(entry["reason"]) not in REASONS or not re.fullmatch(KEY, str(entry["key"])):
                raise Violation(f"line {number}: {entry['reason']!a} is no reason, or {entry['key']!a} no key")
            count[str(entry["split"])] += 1
            keys.append(str(entry["key"]))
    promised = {name: split.skipped for name, split in found.splits.items() if split.skipped}
    if count != promised:
        raise Violation(f"lists {dict(count)}, the manifest promises {promised}")
    return keys


def _check_statistics(found: Manifest) -> Statistics:
    """The exact sums against the manifest's shards; all else against the exact sums, bit for bit."""
    with opened(found, STATISTICS_FILE):
        statistics: Statistics = loaded(found.statistics)
    train, recipe, size = found.split("train"), found.recipe, found.recipe.statistics_size
    sums = Sums(statistics.n, statistics.sum_image, statistics.second_moments)
    forms = [(array.dtype, array.shape) for array in (sums.sum_image, sums.second_moments)]
    counted = sums.n == train.samples if recipe.crop == "centre" else sums.n >= train.samples * recipe.size**2
    if forms != [(np.int64, (size, size, 3)), (np.int64, (3, 3))] or not sums.n or not counted:
        raise Violation(f"is not of {train.samples} pictures of {recipe.size}×{recipe.size}")
    exact = np.sum([[shard.sum_color, *shard.second_moments] for shard in train.shards], axis=0)  # (4, 3) int64
    if not np.array_equal([sums.sum_image.sum(axis=(0, 1)), *sums.second_moments], exact):
        raise Violation(f"the colour sums of the training shards in {FILE_NAME} do not add up to its own")
    derived = finish(sums)
    for name in ("mean_image", "mean_color", "covariance", "eigenvalues", "eigenvectors"):
        here, there = getattr(statistics, name), getattr(derived, name)
        if (here.dtype, here.shape, here.tobytes()) != (there.dtype, there.shape, there.tobytes()):
            raise Violation(f"{name} is not what its exact sums give")
    return statistics


def _check_mean_png(found: Manifest, statistics: Statistics | None) -> None:
    with opened(found, "mean.png") as file:
        pixels = stored_pixels(file.read(), "PNG", found.recipe.statistics_size)[..., :3]
    if statistics and not np.array_equal(pixels, np.rint(statistics.mean_image)):
        raise Violation("is not the rounded mean image")


def _check_drift(recipe: BuildRecipe, statistics: Statistics, stored: list[Sums]) -> None:
    """The stored training pictures against the exact statistics: they may differ by JPEG's losses alone.

    At 256 pixels and quality 95: each mean colour by 0.1 grey level, each eigenvalue by 2 % of the largest one. (Chroma
    subsampling takes up to 6 % of the smaller two themselves, in photographs 0.5 % of the largest, in the demo's drawn
    pictures 1.02 %.) Smaller pictures and coarser quantisation lose more, and the limits grow with both.
    """
    total = Sums.zero(1)
    for sums in stored:
        total.merge(sums)
    found = finish(total)
    small, coarse = max(1.0, 256 / recipe.size), max(1.0, (100 - recipe.quality) / 5)
    drift, limit = np.abs(found.mean_color - statistics.mean_color).max(), 0.1 * small * coarse
    if drift > limit:
        raise Violation(f"mean colour of the stored JPEGs: {drift:.2f} grey levels away, at most {limit:.2f}")
    drift = np.abs(found.eigenvalues - statistics.eigenvalues).max()
    limit = max(0.02 * statistics.eigenvalues[0], 1.0) * small**1.5 * coarse
    if drift > limit:
        raise Violation(f"eigenvalues of the stored JPEGs: {drift:.1f} squared grey levels away, at most {limit:.1f}")
