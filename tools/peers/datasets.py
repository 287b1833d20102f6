"""Dataset directories of another size than was built: part of one, or one inflated by repetition."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import UserError, storage
from pipeline.manifest import FILE_NAME, STATISTICS_FILE, FileRecord, Manifest, ShardRecord, Split, load, sha256
from tools.peers.job import SIDE

TRAIN = "train"


def of_images(dataset: Path, images: int, root: Path) -> Manifest:
    """A dataset directory `root` of so many training images: the first of `dataset`, repeated where there are fewer.

    It has whole shards, those that are needed, as links.

    Raises:
        UserError: `dataset` is not a dataset directory of training pictures of 256 × 256.
    """
    built = load(dataset)
    recipe, split = built.recipe, built.split(TRAIN)
    if storage.is_remote(built.root) or (recipe.crop, recipe.size) != ("centre", SIDE) or not split.samples:
        raise UserError(
            f"{dataset}: crop {recipe.crop}, size {recipe.size}, {split.samples:,} training pictures; to be measured, "
            f"it must be local, with pictures of {SIDE} × {SIDE}; build with --crop centre --size {SIDE}"
        )
    ends = np.cumsum([shard.samples for shard in split.shards])
    shards = split.shards[: int(np.searchsorted(ends, images)) + 1]
    records = np.resize(built.samples(TRAIN), images)  # in the order of the shards
    files = {name: name for shard in shards for name in (shard.name, _index(shard.name))}
    return _write(built, root, records, shards, files)


def inflated(built: Manifest, samples: int, shards: int, root: Path) -> Manifest:
    """A dataset directory `root` of so many training samples and shards, which repeat `built`'s only shard.

    Every shard is a link to that file. The statistics are those of `built`.
    """
    (original,) = built.split(TRAIN).shards
    records = np.resize(built.samples(TRAIN), samples)
    records["shard"] = np.arange(samples) * shards // samples
    names = [f"{TRAIN}/{TRAIN}-{number:06d}.tar" for number in range(shards)]
    made = [replace(original, name=name) for name in names]
    files = dict.fromkeys(names, original.name) | {_index(name): _index(original.name) for name in names}
    return _write(built, root, records, made, files)


def _write(
    built: Manifest,
    root: Path,
    records: np.ndarray,
    shards: Sequence[ShardRecord],
    files: Mapping[str, str],
) -> Manifest:
    """`files`: paths below `root` → what they link to below `built.root`."""
    files = {STATISTICS_FILE: STATISTICS_FILE, **files}
    (root / TRAIN).mkdir(parents=True)
    for name, original in files.items():
        (root / name).symlink_to((built.root / original).resolve())
    out = io.BytesIO()
    np.save(out, records)
    samples = f"{TRAIN}/samples.npy"
    (root / samples).write_bytes(out.getvalue())
    counts = np.bincount(records["shard"])
    shards = [replace(shard, samples=int(counts[int(shard.name[-10:-4])])) for shard in shards]
    manifest = replace(
        built,
        root=root,
        splits={TRAIN: Split(len(records), 0, tuple(shards))},
        files={name: built.files[original] for name, original in files.items()}
        | {samples: FileRecord(len(out.getvalue()), sha256(out.getvalue()))},
    )
    (root / FILE_NAME).write_bytes(manifest.to_json())
    return manifest


def _index(shard: str) -> str:
    return shard.removesuffix(".tar") + ".idx"
