"""Skipped images of a finished dataset directory, tried again: what decodes by now gets its place in the shards."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import manifest, storage
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.image import ImageError, codec_versions, rescaled
from pipeline.manifest import FileRecord, Manifest, Split
from pipeline.offline import executors, records
from pipeline.offline.build import SKIPPED_FILE, Slot, conclude, npy, shard_tasks, slots
from pipeline.offline.parquet import spool
from pipeline.offline.plan import Plan
from pipeline.offline.records import Record
from pipeline.offline.repair import require_local
from pipeline.offline.shards import write_shard
from pipeline.offline.statistics import Sums
from pipeline.storage import Location

RETRY_FOLDER = ".retry"


class RetryError(UserError):
    """A dataset directory whose skipped images cannot be tried again."""


def is_finished(root: Location) -> bool:
    """Whether `root` is a dataset directory, and no unfinished build."""
    return storage.is_file(root / manifest.FILE_NAME) and not storage.exists(root / records.BUILD_FOLDER)


def retry(found: Manifest, plan: Plan, workers: int) -> tuple[Manifest, int]:
    """Decode the skipped images again; build the shards anew in which one now has a place.

    The new files are written aside. They are put into place once all are there, the manifest last; the same command
    ends that where it was interrupted. The result has the bytes of a build from the mended raw images.

    Returns:
        The manifest as it is now, and the number of images that were skipped and are samples now.
    Raises:
        RetryError: the raw images, the recipe or the codecs are not those of the build.
    """
    require_local(found, "--retry-skipped of a finished dataset")
    aside = found.root / RETRY_FOLDER
    if (aside / manifest.FILE_NAME).exists():
        return _put_into_place(found, aside), 0
    _require_same(found, plan)
    shutil.rmtree(aside, ignore_errors=True)
    gained, sums = _try(found, plan)
    if not gained:
        return found, 0
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, aside, ignore_errors=True)
        _rebuild(found, plan, gained, sums, aside, workers)
        undo.pop_all()
    return _put_into_place(found, aside), len(gained)


def _require_same(found: Manifest, plan: Plan) -> None:
    before = {**asdict(found.recipe), **found.built_with}
    now = {**asdict(plan.recipe), **codec_versions()}
    other = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    differing = [f"{key} {before.get(key)} → {now.get(key)}" for key in other]
    images = {split: len(places) for split, places in plan.splits.items()}
    was = {name: split.samples + split.skipped for name, split in found.splits.items()}
    if plan.classes != found.classes:
        differing.append("the classes")
    if images != was:
        differing.append(f"the raw images: {was} → {images}")
    if differing:
        raise RetryError(f"{found.root}: differs in {', '.join(differing)}; nothing was changed")


def _try(found: Manifest, plan: Plan) -> tuple[dict[str, str], Sums]:
    """Key → split of each skipped image that decodes by now, and the sums over those of the training split."""
    skipped = {line["key"] for line in _skipped(found)}
    again = [
        (split, position, index)
        for split, indices in plan.splits.items()
        for position, index in enumerate(indices.tolist())
        if plan.keys[index] in skipped
    ]
    if gone := skipped - {plan.keys[index] for *_, index in again}:
        raise RetryError(f"{found.root}: RAW no longer has the skipped image {min(gone)}; nothing was changed")
    gained: dict[str, str] = {}
    sums = Sums.zero(plan.recipe.statistics_size)
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        indices = np.array([index for *_, index in again], np.uint32)
        plan = replace(plan, images=spool(plan.images, indices, Path(folder)))
        for split, position, _ in again:
            (image,) = plan.part(split, position, position + 1)
            try:
                pixels = rescaled(image.raw.read(), plan.recipe)
            except ImageError:
                continue
            gained[image.key] = split
            if split == "train":
                sums.add(pixels)
    return gained, sums


def _skipped(found: Manifest) -> list[dict[str, str]]:
    return [json.loads(line) for line in found.read(SKIPPED_FILE).splitlines()]


def _rebuild(found: Manifest, plan: Plan, gained: Mapping[str, str], sums: Sums, aside: Path, workers: int) -> None:
    """Everything that changes, in the folder `aside`, the manifest last."""
    concerned = [
        slot
        for slot in slots(plan)
        if slot.split in gained.values()
        and any(plan.keys[i] in gained for i in plan.splits[slot.split][slot.start : slot.stop].tolist())
    ]
    run = partial(executors.run, workers=min(workers, len(concerned)))
    for _ in run(write_shard, shard_tasks(plan, aside, concerned)):
        pass
    anew = {slot.name: records.load(aside, slot.name) for slot in concerned}
    files = {name: file for name, file in found.files.items() if name.endswith((".tar", ".idx"))}
    splits: dict[str, Split] = {}
    for split in plan.splits:
        splits[split], table = _join(found, plan, split, anew, gained, aside)
        files[_table(split)] = FileRecord(**write_bytes_aside(aside / _table(split), npy(table)))
    for record in anew.values():
        assert record is not None
        files |= {name: FileRecord(**file) for name, file in record.files.items()}
    before = found.statistics()
    total = Sums(before.n, before.sum_image, before.second_moments)
    total.merge(sums)
    still = [line for line in _skipped(found) if line["key"] not in gained]
    conclude(plan, aside, splits, still, total, files)
    shutil.rmtree(aside / records.BUILD_FOLDER)


def _join(
    found: Manifest, plan: Plan, split: str, anew: Mapping[str, Record | None], gained: Mapping[str, str], aside: Path
) -> tuple[Split, np.ndarray]:
    """The split's entry in the manifest, and its sample records: (n,) of manifest.SAMPLE."""
    shards = {shard.name: shard for shard in found.split(split).shards}
    old, parts = found.samples(split), []
    for slot in (slot for slot in slots(plan) if slot.split == split):
        before = old[old["shard"] == slot.number]
        record = anew.get(slot.name)
        if record is None:
            parts.append(before)
            continue
        parts.append(records.load_samples(aside, slot.name))
        if _unplaced(before) != _unplaced(parts[-1][_known(plan, slot, record, gained)]):
            raise RetryError(f"{slot.name}: RAW gives other samples than it has; nothing was changed")
        entry = record.manifest_entry
        assert entry is not None
        shards[entry.name] = entry
    skipped = found.split(split).skipped - sum(where == split for where in gained.values())
    table = np.concatenate(parts)
    return Split(len(table), skipped, tuple(shards[name] for name in sorted(shards))), table


def _known(plan: Plan, slot: Slot, record: Record, gained: Mapping[str, str]) -> list[bool]:
    """Which samples of a shard built anew it had before."""
    skipped = {line["key"] for line in record.skipped}
    keys = [plan.keys[i] for i in plan.splits[slot.split][slot.start : slot.stop].tolist()]
    return [key not in gained for key in keys if key not in skipped]


def _unplaced(samples: np.ndarray) -> list[Any]:
    """Sample records but for their offsets."""
    return [(s["size"], s["label"], s["crc32"], s["digest"].tobytes()) for s in samples]


def _table(split: str) -> str:
    return f"{split}/samples.npy"


def _put_into_place(found: Manifest, aside: Path) -> Manifest:
    files = [path for path in aside.rglob("*") if path.is_file() and path != aside / manifest.FILE_NAME]
    for path in [*sorted(files), aside / manifest.FILE_NAME]:
        target = found.root / path.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(aside)
    return manifest.load(found.root)
