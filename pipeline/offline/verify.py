"""The check of a dataset directory: every promise of its manifest against the content of its files."""

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline import manifest, storage, tier
from pipeline.decode import ImageError, decode
from pipeline.image import pixels_of
from pipeline.manifest import FILE_NAME, SAMPLE, STATISTICS_FILE, BuildRecipe, DatasetError, Manifest, ShardRecord
from pipeline.offline import executors
from pipeline.offline.names import in_order
from pipeline.offline.shards import BUILD_FOLDER, SKIPPED_FILE
from pipeline.offline.statistics import Sums, finish
from pipeline.records import KINDS
from pipeline.storage import Location, StorageError
from pipeline.typed import PARSER_ERRORS
from pipeline.volumes import is_junk, open_regular

TIER_FOLDERS = {tier.folder(Path(), kind).name for kind in KINDS}
REPAIR_FOLDER, RETRY_FOLDER = ".repair", ".retry"  # see `repair`
LEFT_OVER = {
    BUILD_FOLDER: "unfinished: the build was killed at its very end; the same command again ends it",
    REPAIR_FOLDER: "left by a repair that was killed; delete it",
    RETRY_FOLDER: "unfinished: build_shards.py --retry-skipped was killed; the same command again ends it",
}


class Violation(ValueError):
    """The first promise that a file breaks; the rest of the file is then not looked at."""


class Failure(NamedTuple):
    file: str  # below the dataset directory
    reason: str


class Failures(list[Failure]):
    """All failures so far."""

    @contextmanager
    def of(self, file: str) -> Iterator[None]:
        """Note the violation or the parser's error that ends the block, and go on after it."""
        try:
            yield
        except StorageError:
            raise
        except (Violation, OSError) as error:
            missing = isinstance(error, FileNotFoundError)
            self.append(Failure(file, "missing" if missing else getattr(error, "strerror", "") or str(error)))
        except DatasetError as error:
            self.append(Failure(file, str(error).rpartition(f"{file}: ")[2].removesuffix("; build it again")))
        except (tarfile.TarError, *PARSER_ERRORS) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.append(Failure(file, f"does not load ({reason})"))


class CheckedShard(NamedTuple):
    """The failures of a shard's files, and the content of its tar."""

    name: str  # of its tar
    failures: Failures
    samples: np.ndarray | None  # (n,) of SAMPLE, digests 0: they are of the raw images; None: the tar does not hold
    sums: Sums  # of size 1: over all pixels of the decoded pictures


def load(root: Location) -> Manifest:
    """Load the manifest alone: the check finds out about the files that it lists. Raises DatasetError."""
    path = root / FILE_NAME
    return manifest.parse(storage.read_bytes(path), root) if storage.is_file(path) else manifest.load(root)


def check(
    dataset: Manifest, *, quick: bool = False, workers: int = 1, progress: Callable[[], None] = lambda: None
) -> Failures:
    """Check a dataset directory; `progress` is called after each shard.

    All promises but those about pixels; those too unless `quick`: every stored JPEG decodes to size×size RGB, and the
    stored training pictures have the statistics of statistics.npz, but for JPEG's losses (`_check_drift`).

    Returns all failures, of each listed file the first, in an order that does not depend on `workers`. Raises UserError
    where a worker process was killed.
    """
    failures, wnids = Failures(_unlisted(dataset)), [record.wnid for record in dataset.classes]
    if wnids not in (in_order(wnids), sorted(wnids)):  # the second: earlier versions ordered numbers as texts, too
        failures.insert(0, Failure(FILE_NAME, "the labels are not the ranks of the sorted wnids"))
    tasks = []
    for shard in (shard for split in dataset.splits.values() for shard in split.shards):
        own = {name: dataset.files[name] for name in (shard.name, _index_of(shard.name)) if name in dataset.files}
        tasks.append((replace(dataset, splits={}, files=own), shard, quick))  # what one shard needs of the manifest
    checked: dict[str, CheckedShard] = {}
    for result in executors.run(check_shard, tasks, min(workers, len(tasks))):
        checked[result.name] = result
        progress()
    for name, split in dataset.splits.items():
        for shard in split.shards:
            failures += checked[shard.name].failures
        with failures.of(f"{name}/samples.npy"):
            _check_samples(dataset, name, checked)
    with failures.of(SKIPPED_FILE):
        _check_skipped(dataset)
    with failures.of(STATISTICS_FILE):
        statistics = _check_statistics(dataset)
        train = [checked[shard.name] for shard in dataset.splits["train"].shards] if "train" in dataset.splits else []
        if train and not quick and all(shard.samples is not None for shard in train):
            stored = Sums.zero(1)
            for result in train:
                stored.merge(result.sums)
            _check_drift(dataset.recipe, statistics, finish(stored))
    tables = {f"{split}/samples.npy" for split in dataset.splits}
    others = {"mean.png", *dataset.files} - {*checked, *map(_index_of, checked), *tables, SKIPPED_FILE, STATISTICS_FILE}
    for name in sorted(others):
        with failures.of(name), opened(dataset, name):
            pass  # its SHA-256 is right, and all that is in it follows from what was checked above
    return failures


def _index_of(tar: str) -> str:
    return tar.removesuffix(".tar") + ".idx"


def _unlisted(dataset: Manifest) -> Iterator[Failure]:
    expected_files = {FILE_NAME, *dataset.files}
    for folder, entries in storage.walk(dataset.root):
        if folder.partition("/")[0] in TIER_FOLDERS:  # which `verify_tiers` looks at
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if path in LEFT_OVER:
                yield Failure(path, LEFT_OVER[path])
            elif path in expected_files or is_junk(entry.name) or (entry.is_dir and not entry.name.startswith(".")):
                continue  # folders that are not hidden are entered
            else:
                yield Failure(path, f"not listed in {FILE_NAME}")


def check_shard(task: tuple[Manifest, ShardRecord, bool]) -> CheckedShard:
    """Check a shard's tar and its index: each alone, and the index against the tar."""
    dataset, shard, quick = task
    failures, sums, samples, index = Failures(), Sums.zero(1), None, b""
    with failures.of(shard.name), opened(dataset, shard.name) as file:
        records, index = _read_tar(file, dataset, shard, None if quick else sums)
        if len(records) != shard.samples:
            raise Violation(f"holds {len(records)} samples, the manifest promises {shard.samples}")
        samples = records
    with failures.of(_index_of(shard.name)), opened(dataset, _index_of(shard.name)) as file:
        if samples is not None and file.read() != index:
            raise Violation("is not the index of its tar")
    return CheckedShard(shard.name, failures, samples, sums)


@contextmanager
def opened(dataset: Manifest, name: str) -> Iterator[BinaryIO]:
    """Open a file of the dataset directory whose size and SHA-256 are those of the manifest, else raise Violation."""
    path, promised = dataset.root / name, dataset.files.get(name)
    if promised is None:
        raise Violation(f"not listed in {FILE_NAME}")
    with io.BytesIO(storage.read_bytes(path)) if storage.is_remote(path) else open_regular(path) as file:
        if (size := file.seek(0, io.SEEK_END)) != promised.bytes:
            raise Violation(f"has {size} bytes, the manifest promises {promised.bytes}")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != promised.sha256:
            raise Violation("its SHA-256 is not that of the manifest")
        file.seek(0)  # a digest of BytesIO leaves it where it was, one of a file does not
        yield file


def _read_tar(file: BinaryIO, dataset: Manifest, shard: ShardRecord, sums: Sums | None) -> tuple[np.ndarray, bytes]:
    """Read a shard back from its tar, one member in memory at a time; add the decoded pictures to `sums`, if any.

    Returns its records, (n,) of SAMPLE without digests, and its DALI index. Raises Violation where a member or a label
    does not belong there, or a picture is not size×size RGB.
    """
    samples, index = list[list[int]](), list[str]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            member = tar.extractfile(info)
            data = member.read() if member else b""
            extension = info.name.partition(".")[2]
            entry = f"{extension} {info.offset_data} {info.size} {info.name}"
            if extension == "jpg":
                index.append(entry)
                samples.append([int(shard.name[-10:-4]), info.offset_data, info.size, -1, zlib.crc32(data), 0])
                if sums:
                    sums.add(_stored_pixels(info.name, data, dataset.recipe))
            elif extension == "cls" and data.isdigit() and int(data) < len(dataset.classes):
                index[-1] += f" {entry}"
                samples[-1][3] = int(data)
            else:
                raise Violation(f"{info.name}: neither a KEY.jpg nor a label from 0 to {len(dataset.classes) - 1}")
    lines = (f"v1.2 {len(index)}", *index)
    return np.array([tuple(sample) for sample in samples], SAMPLE), "".join(f"{line}\n" for line in lines).encode()


def _stored_pixels(name: str, data: bytes, recipe: BuildRecipe) -> np.ndarray:
    """Decode a stored JPEG to (height, width, 4) uint8, RGBX. Raises Violation where it is not what `recipe` says."""
    try:
        image = decode(data, max_bytes=len(data), max_pixels=64 * 10**6, max_scans=100)  # as many as a raw one may have
    except ImageError as error:
        raise Violation(f"{name}: {error}") from error
    longest = recipe.size if recipe.crop == "centre" else max(image.size)
    if image.format != "JPEG" or (min(image.size), max(image.size)) != (recipe.size, longest):
        actual = f"{image.width}×{image.height} {image.format or 'not RGB'}"  # one that was converted has no format
        raise Violation(f"{name}: {actual}, not an RGB JPEG of {recipe.size}×{recipe.size}, or longer with --crop none")
    return pixels_of(image)


def _check_samples(dataset: Manifest, split: str, checked: Mapping[str, CheckedShard]) -> None:
    """Check samples.npy against those tars that hold."""
    with opened(dataset, f"{split}/samples.npy"):
        samples = dataset.samples(split)
    end = 0
    for shard in dataset.splits[split].shards:
        start, end = end, end + shard.samples
        stored = checked[shard.name].samples
        if stored is None or end > len(samples):
            continue
        for name in ("shard", "offset", "size", "label", "crc32"):
            here, there = samples[name][start:end], stored[name]
            for i in np.flatnonzero(here != there)[:1]:
                raise Violation(f"sample {start + i}: {name} {here[i]}, but {there[i]} in {shard.name}")


def _check_skipped(dataset: Manifest) -> None:
    with opened(dataset, SKIPPED_FILE) as file:
        count = Counter(json.loads(line)["split"] for line in file)
    promised = {name: split.skipped for name, split in dataset.splits.items() if split.skipped}
    if count != promised:
        raise Violation(f"lists {dict(count)}, the manifest promises {promised}")


def _check_statistics(dataset: Manifest) -> manifest.Statistics:
    """Check the exact sums against the manifest's shards, and all else against the exact sums, bit for bit."""
    with opened(dataset, STATISTICS_FILE):
        statistics = dataset.statistics()
    if train := dataset.splits.get("train"):  # else they are another data set's, and must fit themselves alone
        if dataset.recipe.crop == "centre" and statistics.n != train.samples:
            raise Violation(f"is of {statistics.n} pictures, the manifest promises {train.samples}")
        exact = np.sum([[shard.sum_color, *shard.second_moments] for shard in train.shards], axis=0)  # (4, 3) int64
        if not np.array_equal([statistics.sum_image.sum(axis=(0, 1)), *statistics.second_moments], exact):
            raise Violation(f"the colour sums of the training shards in {FILE_NAME} do not add up to its own")
    derived = finish(Sums(statistics.n, statistics.sum_image, statistics.second_moments))
    for name in ("mean_image", "mean_color", "covariance", "eigenvalues", "eigenvectors"):
        if not np.array_equal(getattr(statistics, name), getattr(derived, name)):
            raise Violation(f"{name} is not what its exact sums give")
    return statistics


def _check_drift(recipe: BuildRecipe, statistics: manifest.Statistics, stored: manifest.Statistics) -> None:
    """Check the stored training pictures against the exact statistics: they may differ by JPEG's losses alone.

    At 256 pixels and quality 95: each mean colour by 0.1 grey level, each eigenvalue by 2 % of the largest one (chroma
    subsampling takes 0.5 % of it in photographs, 1.02 % in the demo's drawn pictures). Smaller pictures and coarser
    quantisation lose more, and the limits grow with both.
    """
    small, coarse = max(1.0, 256 / recipe.size), max(1.0, (100 - recipe.quality) / 5)
    drift, limit = np.abs(stored.mean_color - statistics.mean_color).max(), 0.1 * small * coarse
    if drift > limit:
        raise Violation(f"mean colour of the stored JPEGs: {drift:.2f} grey levels away, at most {limit:.2f}")
    drift = np.abs(stored.eigenvalues - statistics.eigenvalues).max()
    limit = max(0.02 * statistics.eigenvalues[0], 1.0) * small**1.5 * coarse
    if drift > limit:
        raise Violation(f"eigenvalues of the stored JPEGs: {drift:.1f} squared grey levels away, at most {limit:.1f}")
