"""The check of a dataset directory: every promise of its manifest against the content of its files."""

import hashlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline import manifest, storage
from pipeline.decode import ImageError, decode
from pipeline.image import pixels_of
from pipeline.manifest import (
    FILE_NAME,
    INFO_FILE,
    SAMPLE,
    STATISTICS_FILE,
    BuildRecipe,
    Manifest,
    ShardRecord,
    Statistics,
)
from pipeline.offline import executors
from pipeline.offline.shards import BUILD_FOLDER
from pipeline.offline.statistics import Sums, finish
from pipeline.storage import Location, StorageError

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
        except (ValueError, KeyError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            self.append(Failure(file, f"does not load ({' '.join(str(error).split())[:200]})"))


class TarContent(NamedTuple):
    """The content of a shard's tar, and what that demands of the files beside it."""

    samples: np.ndarray  # (n,) of SAMPLE, digests 0: they are of the raw images
    keys: list[str]
    idx: bytes  # the DALI index
    sums: Sums | None  # over the decoded pictures; each pixel counts as one picture: sum_image is (1, 1, 3)


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

    Returns:
        All failures, of each listed file the first, in an order that does not depend on `workers`.
    Raises:
        UserError: a worker process was killed.
    """
    failures = Failures(Failure(FILE_NAME, reason) for reason in _manifest_violations(dataset))
    failures += _unlisted(dataset, expected_files(dataset) | {FILE_NAME} | dataset.files.keys())
    checks = []
    for shard in (shard for split in dataset.splits.values() for shard in split.shards):
        own = {name: dataset.files[name] for name in (shard.name, _index_of(shard.name)) if name in dataset.files}
        checks.append((replace(dataset, splits={}, files=own), shard, quick))  # what one shard needs of the manifest
    results: dict[str, tuple[Failures, TarContent | None]] = {}
    for name, failed, content in executors.run(check_shard, checks, min(workers, len(checks))):
        results[name] = failed, content
        progress()
    file_of_key: dict[str, str] = {}
    for name, split in dataset.splits.items():
        for shard in split.shards:
            failures += results[shard.name][0]
        contents = [results[shard.name][1] for shard in split.shards]
        with failures.of(f"{name}/samples.npy"):
            _check_samples(dataset, name, contents)
        for shard, content in zip(split.shards, contents):
            with failures.of(shard.name):
                _check_unique(content.keys if content else [], shard.name, file_of_key)
    with failures.of("skipped.jsonl"):
        _check_unique(_skipped_keys(dataset), "skipped.jsonl", file_of_key)
    with failures.of(STATISTICS_FILE):
        statistics = _check_statistics(dataset)
        train = [results[shard.name][1] for shard in dataset.split("train").shards]
        stored = [content.sums for content in train if content and content.sums]
        if len(stored) == len(train):
            _check_drift(dataset.recipe, statistics, stored)
    for name in ("mean.png", *({INFO_FILE} & dataset.files.keys())):  # older data sets have no _info.json
        with failures.of(name), opened(dataset, name):
            pass  # its SHA-256 is right, and all that is in it follows from what was checked above
    return failures


def expected_files(dataset: Manifest) -> set[str]:
    """Return the files that a dataset directory must hold besides its manifest."""
    tars = [shard.name for split in dataset.splits.values() for shard in split.shards]
    tables = [f"{split}/samples.npy" for split in dataset.splits]
    info = {INFO_FILE} & dataset.files.keys()
    return {*tars, *map(_index_of, tars), *tables, STATISTICS_FILE, "mean.png", "skipped.jsonl", *info}


def _index_of(tar: str) -> str:
    return tar.removesuffix(".tar") + ".idx"


def _unlisted(dataset: Manifest, known: set[str], folder: str = "") -> Iterator[Failure]:
    for entry in storage.scan(dataset.root / folder if folder else dataset.root):
        path = f"{folder}/{entry.name}" if folder else entry.name
        link = not storage.is_remote(dataset.root) and os.path.islink(dataset.root / path)
        if path in LEFT_OVER and entry.is_dir:
            yield Failure(path, LEFT_OVER[path])
        elif entry.is_dir and not link:
            yield from _unlisted(dataset, known, path)
        elif path not in known and path not in dataset.splits:
            yield Failure(path, f"not listed in {FILE_NAME}")


def _manifest_violations(dataset: Manifest) -> Iterator[str]:
    if storage.read_bytes(dataset.root / FILE_NAME) != dataset.to_json():
        yield f"its identity is not that of its content ({dataset.identity})"
    wnids = [record.wnid for record in dataset.classes]
    if [record.label for record in dataset.classes] != list(range(len(wnids))) or wnids != sorted(set(wnids)):
        yield "the labels are not the ranks of the sorted wnids"
    for name, split in dataset.splits.items():
        if split.samples != sum(shard.samples for shard in split.shards):
            yield f"the shards of {name} do not add up to its {split.samples} samples"
    for name in sorted(dataset.files.keys() - expected_files(dataset)):
        yield f"lists {name!a}, which is no part of a dataset directory"


def check_shard(task: tuple[Manifest, ShardRecord, bool]) -> tuple[str, Failures, TarContent | None]:
    """Check a shard's tar and its index: each alone, and the index against the tar."""
    dataset, shard, quick = task
    failures = Failures()
    content: TarContent | None = None
    with failures.of(shard.name), opened(dataset, shard.name) as file:
        tar = _read_tar(file, dataset, shard.name, pictures=not quick)
        if len(tar.samples) != shard.samples:
            raise Violation(f"holds {len(tar.samples)} samples, the manifest promises {shard.samples}")
        content = tar
    with failures.of(_index_of(shard.name)), opened(dataset, _index_of(shard.name)) as file:
        if content and file.read() != content.idx:
            raise Violation("is not the index of its tar")
    return shard.name, failures, content


@contextmanager
def opened(dataset: Manifest, name: str) -> Iterator[BinaryIO]:
    """Open a file of the dataset directory, once its size and SHA-256 are those of the manifest.

    Raises:
        Violation: it is damaged. OSError: it is missing or unreadable.
    """
    path, promised = dataset.root / name, dataset.files.get(name)
    if promised is None:
        raise Violation(f"not listed in {FILE_NAME}")
    with io.BytesIO(storage.read_bytes(path)) if storage.is_remote(path) else open(path, "rb") as file:
        if (size := file.seek(0, io.SEEK_END)) != promised.bytes:
            raise Violation(f"has {size} bytes, the manifest promises {promised.bytes}")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != promised.sha256:
            raise Violation("its SHA-256 is not that of the manifest")
        file.seek(0)
        yield file


def _read_tar(file: BinaryIO, dataset: Manifest, name: str, pictures: bool) -> TarContent:
    """Read a shard back from its tar, one member in memory at a time; with `pictures`, decode those as well.

    Raises:
        Violation: a member or a label that does not belong there, or a picture that is not size×size RGB.
    """
    samples: list[tuple[int, int, int, int, int, int]] = []
    keys, index = [], []
    number, sums = int(name[-10:-4]), Sums.zero(1) if pictures else None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            member = tar.extractfile(info)
            data = member.read() if member else b""
            key, _, extension = info.name.partition(".")
            entry = f"{extension} {info.offset_data} {info.size} {info.name}"
            if extension == "jpg":
                keys.append(key)
                index.append(entry)
                samples.append((number, info.offset_data, info.size, -1, zlib.crc32(data), 0))
                if sums:
                    sums.add(_stored_pixels(info.name, data, dataset.recipe))
            elif extension != "cls" or keys[-1:] != [key] or samples[-1][3] >= 0:
                raise Violation(f"{info.name}: only KEY.jpg, and behind it its KEY.cls, belong here")
            elif not data.isdigit() or int(data) >= len(dataset.classes):
                raise Violation(f"{info.name}: holds {data[:20]!r}, not a label from 0 to {len(dataset.classes) - 1}")
            else:
                index[-1] += f" {entry}"
                samples[-1] = (*samples[-1][:3], int(data), *samples[-1][4:])
    for key, sample in zip(keys, samples):
        if sample[3] < 0 and not name.startswith("test/"):
            raise Violation(f"{key}.jpg has no label beside it")
    text = "".join(f"{line}\n" for line in (f"v1.2 {len(index)}", *index))
    return TarContent(np.array(samples, SAMPLE), keys, text.encode(), sums)


def _stored_pixels(name: str, data: bytes, recipe: BuildRecipe) -> np.ndarray:
    """Decode a stored JPEG to (height, width, 4) uint8, RGBX. Raises Violation where it is not what `recipe` says."""
    try:
        image = decode(data, max_bytes=len(data), max_pixels=64 * 10**6, max_scans=100)  # as many as a raw one may have
    except ImageError as error:
        raise Violation(f"{name}: {error}") from error
    square = recipe.crop == "centre"
    fits = image.size == (recipe.size, recipe.size) if square else min(image.size) == recipe.size
    if image.format != "JPEG" or not fits:  # an image that was converted to RGB has no format
        actual, longer = f"{image.width}×{image.height} {image.format or 'not RGB'}", "" if square else " or longer"
        raise Violation(f"{name}: {actual}, not an RGB JPEG of {recipe.size}×{recipe.size}{longer}")
    return pixels_of(image)


def _check_samples(dataset: Manifest, split: str, contents: list[TarContent | None]) -> None:
    """Check samples.npy against those tars that hold."""
    with opened(dataset, f"{split}/samples.npy"):
        samples = dataset.samples(split)
    end = 0
    for shard, content in zip(dataset.splits[split].shards, contents):
        start, end = end, end + shard.samples
        if content is None or end > len(samples):
            continue
        for name in ("shard", "offset", "size", "label", "crc32"):
            here, there = samples[name][start:end], content.samples[name]
            for i in np.flatnonzero(here != there)[:1]:
                key = content.keys[i]
                raise Violation(f"sample {start + i} ({key}): {name} {here[i]}, but {there[i]} in {shard.name}")


def _check_unique(keys: list[str], file: str, file_of_key: dict[str, str]) -> None:
    for key in keys:
        if key in file_of_key:
            raise Violation(f"its key {key} stands in {file_of_key[key]} as well")
        file_of_key[key] = file


def _skipped_keys(dataset: Manifest) -> list[str]:
    """Return the keys in skipped.jsonl. Raises Violation where a line or the number of lines of a split is wrong."""
    with opened(dataset, "skipped.jsonl") as file:
        lines = [json.loads(line) for line in file]
    count = Counter(line["split"] for line in lines)
    promised = {name: split.skipped for name, split in dataset.splits.items() if split.skipped}
    if count != promised:
        raise Violation(f"lists {dict(count)}, the manifest promises {promised}")
    return [line["key"] for line in lines]


def _check_statistics(dataset: Manifest) -> Statistics:
    """Check the exact sums against the manifest's shards, and all else against the exact sums, bit for bit."""
    with opened(dataset, STATISTICS_FILE):
        statistics = dataset.statistics()
    train = dataset.split("train")
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


def _check_drift(recipe: BuildRecipe, statistics: Statistics, stored: list[Sums]) -> None:
    """Check the stored training pictures against the exact statistics: they may differ by JPEG's losses alone.

    At 256 pixels and quality 95: each mean colour by 0.1 grey level, each eigenvalue by 2 % of the largest one. (Chroma
    subsampling takes up to 6 % of the smaller two themselves, in photographs 0.5 % of the largest, in the demo's drawn
    pictures 1.02 %.) Smaller pictures and coarser quantisation lose more, and the limits grow with both.
    """
    total = Sums.zero(1)
    for sums in stored:
        total.merge(sums)
    decoded = finish(total)
    small, coarse = max(1.0, 256 / recipe.size), max(1.0, (100 - recipe.quality) / 5)
    drift, limit = np.abs(decoded.mean_color - statistics.mean_color).max(), 0.1 * small * coarse
    if drift > limit:
        raise Violation(f"mean colour of the stored JPEGs: {drift:.2f} grey levels away, at most {limit:.2f}")
    drift = np.abs(decoded.eigenvalues - statistics.eigenvalues).max()
    limit = max(0.02 * statistics.eigenvalues[0], 1.0) * small**1.5 * coarse
    if drift > limit:
        raise Violation(f"eigenvalues of the stored JPEGs: {drift:.1f} squared grey levels away, at most {limit:.1f}")
