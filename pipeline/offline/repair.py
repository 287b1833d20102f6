"""The repair of a dataset directory: failing files are rebuilt from the raw images, and must be what was promised."""

import os
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np

from pipeline import UserError, manifest, storage
from pipeline.files import write_bytes_aside
from pipeline.image import codec_versions
from pipeline.manifest import FileRecord, Manifest
from pipeline.offline import executors
from pipeline.offline.build import Slot, merge, npy, png, shard_tasks, slots
from pipeline.offline.plan import Plan
from pipeline.offline.shards import load_record, load_samples, write_shard

REPAIR_FOLDER = ".repair"


class RepairError(UserError):
    """A dataset directory that RAW cannot mend."""


def repair(found: Manifest, failing: Collection[str], plan: Plan, workers: int) -> None:
    """Rebuild the files `failing` of a dataset directory, and put them into place once all of them fit.

    `plan` is that of the raw images and the build recipe of `found`. Every rebuilt byte must be what the manifest
    promises, else nothing is changed. No other file is touched.

    Raises:
        RepairError: the raw images, or the codecs here, give other bytes.
        OSError: as the file system says; what is in place by then is whole.
    """
    require_local(found, "--repair")
    if plan.classes != found.classes or plan.splits.keys() != found.splits.keys():
        raise _refusal(found, f"{found.root}: RAW has other classes or splits")
    aside = found.root / REPAIR_FOLDER
    if aside.exists():
        shutil.rmtree(aside)
    try:
        rebuilt = _rebuild(found, set(failing), plan, aside, workers)
        if wrong := sorted(name for name in failing if rebuilt.get(name) != found.files[name]):
            raise _refusal(found, f"{wrong[0]}: RAW gives other bytes than the manifest promises")
        for name in sorted(failing):
            (found.root / name).parent.mkdir(exist_ok=True)
            os.replace(aside / name, found.root / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def require_local(found: Manifest, what: str) -> None:
    """Raises RepairError: files of an object store cannot be renamed into place."""
    if storage.is_remote(found.root):
        raise RepairError(
            f"{found.root}: {what} works on a local folder; copy DATASET, mend the copy, and copy it back"
        )


def _rebuild(found: Manifest, failing: set[str], plan: Plan, aside: Path, workers: int) -> dict[str, FileRecord]:
    """Build what is needed for `failing` in the folder `aside`; of shards, only failing files stay there."""
    whole = _whole_splits(failing, plan)
    chosen = [slot for slot in slots(plan) if slot.split in whole or not failing.isdisjoint(_files(slot))]
    rebuilt: dict[str, FileRecord] = {}
    run = partial(executors.run, workers=min(workers, len(chosen)))
    for outcome in run(write_shard, shard_tasks(plan, aside, chosen)):
        record = load_record(aside, outcome.name)
        assert record is not None, outcome.name  # it was written just now
        mine = {name: FileRecord(**file) for name, file in record.files.items()}
        if wrong := next((name for name in sorted(mine)[::-1] if mine[name] != found.files.get(name)), None):
            raise _refusal(found, f"{wrong}: RAW gives other bytes than the manifest promises")
        rebuilt |= mine
        for name in mine.keys() - failing:
            (aside / name).unlink()
    in_whole = [slot for slot in chosen if slot.split in whole]
    if "train" in whole:
        return rebuilt | dict(merge(plan, aside, in_whole).files)
    for split in whole:
        samples = [load_samples(aside, slot.name) for slot in in_whole if slot.split == split]
        rebuilt[f"{split}/samples.npy"] = _put(aside / split / "samples.npy", npy(np.concatenate(samples)))
    if "mean.png" in failing:
        rebuilt["mean.png"] = _put(aside / "mean.png", png(found.statistics().mean_image))
    return rebuilt


def _files(slot: Slot) -> tuple[str, str]:
    return f"{slot.name}.tar", f"{slot.name}.idx"


def _whole_splits(failing: set[str], plan: Plan) -> set[str]:
    """The splits of which every shard's result is needed. The mean image alone follows from statistics.npz."""
    if "skipped.jsonl" in failing:
        return set(plan.splits)
    return {split for split in plan.splits if f"{split}/samples.npy" in failing} | (
        {"train"} if manifest.STATISTICS_FILE in failing else set()
    )


def _put(path: Path, data: bytes) -> FileRecord:
    return FileRecord(**write_bytes_aside(path, data))


def _refusal(found: Manifest, what: str) -> RepairError:
    here = codec_versions()
    changed = [
        f"{name} {found.built_with.get(name, 'none')}, here {here.get(name, 'none')}"
        for name in sorted(here.keys() | found.built_with.keys())
        if here.get(name) != found.built_with.get(name)
    ]
    why = f"it was built with {'; '.join(changed)}" if changed else "RAW is not what it was built from"
    return RepairError(f"{what}: {why}; nothing was changed")
