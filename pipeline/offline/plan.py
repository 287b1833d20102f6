"""The plan of a build, a pure function of (sources, build recipe): which raw image goes where, under which key."""

import hashlib
import os
from dataclasses import asdict, dataclass

from pipeline.errors import UserError
from pipeline.image import codec_versions
from pipeline.manifest import BuildRecipe, ClassRecord, canonical_json
from pipeline.offline.keys import assign_keys
from pipeline.offline.sources import RawImage, Sources

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class PlannedImage:
    key: str
    label: int  # −1: none
    raw: RawImage


@dataclass(frozen=True)
class Plan:
    recipe: BuildRecipe
    classes: tuple[ClassRecord, ...]
    splits: dict[str, list[PlannedImage]]  # in the order of the sample ids, skipped images included

    def fingerprint(self) -> bytes:
        """What must be equal for a build to be resumed: recipe, codecs, classes, a digest of all raw images. JSON."""
        digest = hashlib.sha256()
        for split, images in self.splits.items():
            for image in images:
                raw = image.raw
                line = f"{split}\t{image.key}\t{image.label}\t{raw.path}\t{raw.offset}\t{raw.size}\n"
                digest.update(os.fsencode(line))
        return canonical_json(
            {
                "recipe": asdict(self.recipe),
                "codecs": codec_versions(),
                "classes": [asdict(record) for record in self.classes],
                "images": {split: len(images) for split, images in self.splits.items()},
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
    keys = assign_keys([image.path for image in sources.images])
    chosen = list(range(len(keys)))
    if recipe.limit:
        chosen = sorted(chosen, key=lambda i: _uniform("limit", keys[i]))[: recipe.limit]
    hold_out = recipe.holdout if not any(image.split == "val" for image in sources.images) else 0.0
    labels = {record.wnid: record.label for record in sources.classes}
    splits: dict[str, list[PlannedImage]] = {split: [] for split in SPLITS}
    for i in chosen:
        raw = sources.images[i]
        split = "val" if raw.split == "train" and _uniform("holdout", keys[i]) < hold_out else raw.split
        splits[split].append(PlannedImage(keys[i], -1 if raw.wnid is None else labels[raw.wnid], raw))
    splits["train"].sort(key=lambda image: (_uniform(f"order {recipe.seed}", image.key), image.key))
    for split in ("val", "test"):
        splits[split].sort(key=lambda image: (os.fsencode(image.raw.name), os.fsencode(image.raw.path)))
    if not splits["train"]:
        raise UserError("no training image is left: the raw data has too few, or --holdout or --limit is too greedy")
    return Plan(recipe, sources.classes, {split: images for split, images in splits.items() if images})


def _uniform(purpose: str, key: str) -> float:
    """[0, 1), a function of the two strings."""
    digest = hashlib.sha256(f"{purpose}\t{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
