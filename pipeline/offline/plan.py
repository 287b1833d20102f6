"""The plan of a build, a pure function of (sources, build recipe): which raw image goes where, under which key."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.errors import UserError
from pipeline.image import codec_versions
from pipeline.manifest import BuildRecipe, ClassRecord, canonical_json
from pipeline.offline.keys import Keys, assign_keys
from pipeline.offline.raw import SPLITS, RawImage, RawTable, Sources

__all__ = ["SPLITS", "Plan", "PlannedImage", "make_plan"]


@dataclass(frozen=True, slots=True)
class PlannedImage:
    key: str
    label: int  # −1: none
    raw: RawImage


@dataclass(frozen=True)
class Plan:
    """38 bytes an image, and the table's paths; a `PlannedImage` is made when it is asked for."""

    recipe: BuildRecipe
    classes: tuple[ClassRecord, ...]
    images: RawTable
    keys: Keys
    splits: dict[str, np.ndarray]  # (n,) uint32: places in `images`, by sample id, skipped images included

    def part(self, split: str, start: int, stop: int) -> tuple[PlannedImage, ...]:
        """The images start … stop − 1 of a split."""
        return tuple(self._planned(split, start, stop))

    def _planned(self, split: str, start: int, stop: int) -> Iterator[PlannedImage]:
        labels = {record.wnid: record.label for record in self.classes}
        for i in self.splits[split][start:stop].tolist():
            raw = self.images[i]
            yield PlannedImage(self.keys[i], -1 if raw.wnid is None else labels[raw.wnid], raw)

    def fingerprint(self) -> bytes:
        """What must be equal for a build to be resumed, as JSON: recipe, codecs, classes, names of all raw images.

        Where the raw images lie and how large they are is a matter of each shard (`shards.raw_digest`).
        """
        digest = hashlib.sha256()
        for split, places in self.splits.items():
            for image in self._planned(split, 0, len(places)):
                digest.update(os.fsencode(f"{split}\t{image.key}\t{image.label}\t{image.raw.path}\n"))
        return canonical_json(
            {
                "recipe": asdict(self.recipe),
                "codecs": codec_versions(),
                "classes": [asdict(record) for record in self.classes],
                "images": {split: len(places) for split, places in self.splits.items()},
                "images_sha256": digest.hexdigest(),
            }
        )


def make_plan(sources: Sources, recipe: BuildRecipe) -> Plan:
    """Keys, labels, splits and order.

    The training split is ordered by SHA-256 of (seed, key), a shuffle that no library's generator can change;
    validation and test by the bytes of their file names. Where no validation split exists, the training images whose
    hashed key falls below `recipe.holdout` become one: whether an image is held out depends on its key alone.

    Raises:
        UserError: no training image is left.
    """
    images = sources.images
    keys = assign_keys(images.paths)
    chosen = np.arange(len(images), dtype=np.uint32)
    if recipe.limit and recipe.limit < len(images):
        chosen = np.sort(_shuffled("limit", keys, chosen)[: recipe.limit])
    splits = {split: chosen[images.split_numbers[chosen] == number] for number, split in enumerate(SPLITS)}
    del chosen
    if recipe.holdout and not images.has("val"):
        held_out = _hashes("holdout", keys, splits["train"]) < np.uint64(recipe.holdout * 2.0**64)
        splits["train"], splits["val"] = splits["train"][~held_out], splits["train"][held_out]
    splits["train"] = _shuffled(f"order {recipe.seed}", keys, splits["train"])
    for split in ("val", "test"):
        splits[split] = _by_name(images, splits[split])
    if not len(splits["train"]):
        raise UserError("no training image is left: the raw data has too few, or --holdout or --limit is too greedy")
    splits = {split: places for split, places in splits.items() if len(places)}
    return Plan(recipe, sources.classes, images, keys, splits)


def _hashes(purpose: str, keys: Keys, places: np.ndarray) -> np.ndarray:
    """(n,) uint64, uniform, each a function of the purpose and one key."""
    return np.fromiter((_hash(purpose, keys[i]) for i in map(int, places)), np.uint64, len(places))


def _hash(purpose: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}\t{key}".encode()).digest()[:8], "big")


def _shuffled(purpose: str, keys: Keys, places: np.ndarray) -> np.ndarray:
    """(n,) uint32: the places ordered by (hash, key)."""
    packed = _hashes(purpose, keys, places)  # then its upper half before the place in `places`: 8 bytes each to sort
    packed &= np.uint64(0xFFFFFFFF00000000)
    packed |= np.arange(len(places), dtype=np.uint32)
    packed.sort()
    low, high = packed.astype("<u8", copy=False).view("<u4").reshape(-1, 2).T
    ordered = places[low]
    same = high[1:] == high[:-1]
    for start, stop in _runs(same):  # of 14 million, some 20,000 pairs
        ordered[start:stop] = sorted(ordered[start:stop].tolist(), key=lambda i: (_hash(purpose, keys[i]), keys[i]))
    return ordered


def _runs(same: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of each run of equal neighbours; same[i]: the items i and i + 1 are equal."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    return [(int(start), int(stop) + 1) for start, stop in zip(edges[::2], edges[1::2])]


def _by_name(images: RawTable, places: np.ndarray) -> np.ndarray:
    """Ordered by the bytes of the file names, then of the paths."""
    rows = []  # one bytes object an image: no path holds a zero byte, so the order is that of (name, path)
    for i in map(int, places):
        above, slash, name = os.fsencode(images.path(i)).rpartition(b"/")
        rows.append(name + b"\0" + above + slash + i.to_bytes(4, "big"))
    rows.sort()
    return np.fromiter((int.from_bytes(row[-4:], "big") for row in rows), np.uint32, len(rows))
