"""The plan of a build, a pure function of (sources, build recipe): keys, labels, splits, order, shards."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline import UserError
from pipeline.image import codec_versions
from pipeline.manifest import BuildRecipe, ClassRecord, Manifest, Statistics, canonical_json, sha256
from pipeline.offline.names import SPLITS
from pipeline.offline.raw import RawImage, RawTable, Sources

FORMAT = 2  # of DATASET/.build: what one version of the code began, only a version with the same number continues
MAX_KEY = 90  # characters, so that KEY.jpg fits the 100 bytes of a USTAR name with room to spare
SPELLINGS = 3  # of a key
_FORBIDDEN = re.compile(rb"[^A-Za-z0-9_-]")


@dataclass(frozen=True, slots=True)
class PlannedImage:
    key: str
    label: int  # −1: none
    raw: RawImage


@dataclass(frozen=True)
class Slot:
    """One shard of a plan: the images start … stop − 1 of its split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.split}-{self.number:06d}"


@dataclass(frozen=True, eq=False)
class Keys(Sequence[str]):
    """The key of each path, made when it is asked for: one byte an image says how it is spelled."""

    paths: Sequence[str]
    spelling: np.ndarray  # (n,) uint8: see `_spell`; SPELLINGS: see `numbered`
    numbered: dict[int, str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]  # no slices
        return self.numbered[i] if i in self.numbered else _spell(self.paths[i], int(self.spelling[i]))


@dataclass(frozen=True)
class Plan:
    """38 bytes an image, and the table's paths; a `PlannedImage` is made when it is asked for."""

    recipe: BuildRecipe
    classes: tuple[ClassRecord, ...]
    images: RawTable
    keys: Keys
    splits: dict[str, np.ndarray]  # (n,) uint32: indices into `images`, by sample id, skipped images included
    statistics: Statistics | None = None  # of the data set that this one evaluates; None: of its own training split
    notes: tuple[str, ...] = ()  # lines for the user

    def part(self, split: str, start: int, stop: int) -> Iterator[PlannedImage]:
        """Yield the images start … stop − 1 of a split."""
        labels = {record.wnid: record.label for record in self.classes}
        for i in map(int, self.splits[split][start:stop]):
            raw = self.images[i]
            yield PlannedImage(self.keys[i], -1 if raw.wnid is None else labels[raw.wnid], raw)

    def slot_keys(self, slot: Slot) -> list[str]:
        return [self.keys[i] for i in self.splits[slot.split][slot.start : slot.stop].tolist()]

    def fingerprint(self) -> bytes:
        """Return as JSON all that must be equal for a build to be resumed; `write_shard` compares offsets and sizes."""
        digest = hashlib.sha256()
        for split, indices in self.splits.items():
            for image in self.part(split, 0, len(indices)):
                digest.update(os.fsencode(f"{split}\t{image.key}\t{image.label}\t{image.raw.path}\n"))
        return canonical_json(
            {
                "format": FORMAT,
                "recipe": asdict(self.recipe),
                "codecs": codec_versions(),
                "classes": [asdict(record) for record in self.classes],
                "images": {split: len(indices) for split, indices in self.splits.items()},
                "images_sha256": digest.hexdigest(),
            }
            | ({"statistics": sha256(canonical_json(self.statistics.summary()))} if self.statistics else {})
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two mappings in the user's words, as `quality 95 → 80`."""
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return [f"{key} {before.get(key)} → {now.get(key)}" for key in keys]


def slots(plan: Plan) -> list[Slot]:
    """Return all shards of a plan, in order."""
    size = plan.recipe.samples_per_shard
    return [
        Slot(split, number, start, min(start + size, len(indices)))
        for split, indices in plan.splits.items()
        for number, start in enumerate(range(0, len(indices), size))
    ]


def make_plan(sources: Sources, recipe: BuildRecipe) -> Plan:
    """Choose keys, labels, splits and order.

    The training split is ordered by SHA-256 of (seed, key), a shuffle that no library's generator can change;
    validation and test by the bytes of their file names. Where no validation split exists, the training images whose
    hashed key falls below `recipe.holdout` become one: whether an image is held out depends on its key alone. (Of a
    class that would lose all, the one with the highest hash stays.) Sources that evaluate another data set have no
    training split, and its statistics.

    Raises UserError: no training image is left; pictures of another size than those of the data set to evaluate.
    """
    images = sources.images
    keys = assign_keys(images.paths)
    chosen = np.arange(len(images), dtype=np.uint32)
    if recipe.limit and recipe.limit < len(images):
        chosen = np.sort(_shuffled("limit", keys, chosen)[: recipe.limit])
    numbers = np.asarray(images.split_numbers)[chosen]
    splits = {split: chosen[numbers == number] for number, split in enumerate(SPLITS)}
    notes: list[str] = []
    if recipe.holdout and not images.has("val") and not sources.evaluation_of:
        held_out, note = _held_out(images, keys, splits["train"], recipe.holdout)
        splits["train"], splits["val"] = splits["train"][~held_out], splits["train"][held_out]
        notes.append(note)
    splits["train"] = _shuffled(f"order {recipe.seed}", keys, splits["train"])
    for split in ("val", "test"):
        splits[split] = _by_name(images, splits[split])
    statistics = None
    if sources.evaluation_of:
        statistics, differing = _statistics_of(sources.evaluation_of, recipe)
        notes += differing
    if not len(splits["val" if statistics else "train"]):
        kind = "picture to evaluate" if statistics else "training image"
        raise UserError(f"no {kind} is left: the raw data has too few, or --holdout or --limit is too greedy")
    used = {split: ids for split, ids in splits.items() if len(ids)}
    return Plan(recipe, sources.classes, images, keys, used, statistics, tuple(notes))


def _held_out(images: RawTable, keys: Keys, ids: np.ndarray, share: float) -> tuple[np.ndarray, str]:
    """Return which of the training images `ids` are held out, (n,) bool, and a note on it."""
    hashes = _hashes("holdout", (keys[i] for i in map(int, ids)), len(ids))
    held_out = hashes < np.uint64(share * 2.0**64)
    classes = np.asarray(images.class_numbers)[ids]
    emptied = np.ones(len(images.wnids) + 1, bool)  # by class; the last: no label
    emptied[classes[~held_out]] = emptied[-1] = False
    alone = np.flatnonzero(emptied[classes])
    alone = alone[np.lexsort((hashes[alone], classes[alone]))]
    last = alone[np.diff(classes[alone], append=-2) != 0]  # of each such class the one with the highest hash
    held_out[last] = False
    rule = f"--holdout {share:g}, by a hash of the key"
    note = (
        f"no validation split in RAW: {held_out.sum():,} of {len(ids):,} training pictures ({rule}) are held out as one"
    )
    if not held_out.any():
        note = f"no validation split: RAW has none, and none of {len(ids):,} training pictures is held out ({rule})"
    return held_out, note + (f"; {len(last):,} stay as the last of their class" if len(last) else "")


def _statistics_of(dataset: Manifest, recipe: BuildRecipe) -> tuple[Statistics, list[str]]:
    """Return the statistics of the data set to evaluate, and notes on pictures that are made in another way.

    Raises UserError where pictures have another size or crop: its mean image does not fit them.
    """
    options = ("size", "crop", "filter", "quality", "subsampling", "exif")
    differing = [name for name in options if getattr(recipe, name) != getattr(dataset.recipe, name)]
    for name in differing:
        if name in ("size", "crop"):
            own, its = getattr(recipe, name), getattr(dataset.recipe, name)
            raise UserError(f"--{name} {own}: {dataset.root} was built with {its}; add --{name} {its}")
    remedy = " ".join(f"--{name} {getattr(dataset.recipe, name)}" for name in differing)
    note = f"pictures are made in another way than those of {dataset.root}; {remedy} makes them alike"
    return dataset.statistics(), [note] if differing else []


def assign_keys(paths: Sequence[str]) -> Keys:
    """Return one key per raw path: WebDataset's `__key__`, unique over all splits, without dot or slash.

    A key is the file's stem where that is unique; else the path without its extension, `/` as `_`; else that with the
    extension; else that with -2, -3, … in sorted path order. (Two neighbouring samples with one stem would silently
    become one sample in WebDataset; a dot would move the extension.)
    """
    # Of 14 million strings a set takes gigabytes, so 64 bits of each spelling's hash are compared instead. Where two
    # different spellings should have one hash, both images use the next spelling.
    spelling = np.full(len(paths), SPELLINGS, np.uint8)
    taken = np.empty(0, np.uint64)  # hashes of the keys in use, sorted
    rest = np.arange(len(paths), dtype=np.uint32)
    for number in range(SPELLINGS):
        hashes = _hashes("key", (_spell(paths[i], number) for i in map(int, rest)), len(rest))
        ordered = np.sort(hashes)
        free = ~(_among(hashes, ordered[1:][ordered[1:] == ordered[:-1]]) | _among(hashes, taken))
        spelling[rest[free]] = number
        rest = rest[~free]
        taken = np.sort(np.concatenate([taken, hashes[free]]))
    return Keys(paths, spelling, _numbered(paths, rest.tolist(), taken))


def _numbered(paths: Sequence[str], rest: list[int], taken: np.ndarray) -> dict[int, str]:
    """Return keys for paths that are alike in every spelling, such as a_b/c.x beside a/b_c.x, in sorted path order."""
    keys: dict[str, int] = {}
    for i in sorted(rest, key=lambda i: os.fsencode(paths[i])):
        stem = key = _spell(paths[i], SPELLINGS - 1)
        number = 1
        while key in keys or _among(_hashes("key", [key], 1), taken)[0]:
            number += 1
            key = stem[: MAX_KEY - len(f"-{number}")] + f"-{number}"
        keys[key] = i
    return {i: key for key, i in keys.items()}


def _spell(path: str, spelling: int) -> str:
    """Return the stem (spelling 0), the path without its extension (1) or with it (2), escaped."""
    path = path if spelling == 2 else os.path.splitext(path)[0]
    return _escape(path.rpartition("/")[2] if spelling == 0 else path.replace("/", "_"))


def _escape(text: str) -> str:
    """Keep [A-Za-z0-9_-], write any other byte as -XX; cut what is longer than 90 characters, and add its digest."""
    raw = os.fsencode(text)
    escaped = _FORBIDDEN.sub(lambda match: b"-%02X" % match.group()[0], raw).decode("ascii")
    return escaped if len(escaped) <= MAX_KEY else f"{escaped[: MAX_KEY - 17]}-{hashlib.sha256(raw).hexdigest()[:16]}"


def _hash(purpose: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}\t{key}".encode()).digest()[:8], "big")


def _hashes(purpose: str, keys: Iterable[str], count: int) -> np.ndarray:
    """Return (count,) uint64, uniform, each a function of the purpose and one key."""
    return np.fromiter((_hash(purpose, key) for key in keys), np.uint64, count)


def _among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Return (n,) bool: which values are in the sorted array `ordered`."""
    return np.searchsorted(ordered, values, "left") < np.searchsorted(ordered, values, "right")


def _shuffled(purpose: str, keys: Keys, indices: np.ndarray) -> np.ndarray:
    """Return the (n,) uint32 indices ordered by (hash, key)."""
    hashes = _hashes(purpose, (keys[i] for i in map(int, indices)), len(indices))
    order = np.argsort(hashes)
    ordered = hashes[order]
    if (ordered[1:] != ordered[:-1]).all():  # np.unique would take 40 bytes a hash
        return indices[order]
    # of 64 bits: once in 10⁵ data sets of 14 million images
    return np.array(sorted(indices.tolist(), key=lambda i: (_hash(purpose, keys[i]), keys[i])), np.uint32)


def _by_name(images: RawTable, indices: np.ndarray) -> np.ndarray:
    """Return the (n,) uint32 indices ordered by the bytes of the file names, then of the folders."""

    def name_and_folder(i: int) -> bytes:
        folder, slash, name = os.fsencode(images.paths[i]).rpartition(b"/")
        return name + b"\0" + folder + slash  # no path holds a zero byte; a tuple would take twice the memory

    return np.array(sorted(map(int, indices), key=name_and_folder), np.uint32)
