"""Shards of a finished dataset directory built again aside and put into place: --repair and --retry-skipped."""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from pipeline import UserError, storage
from pipeline.decode import ImageError
from pipeline.files import write_aside, write_bytes_aside
from pipeline.image import codec_versions, rescaled
from pipeline.manifest import FILE_NAME, STATISTICS_FILE, FileRecord, Manifest, Split, parse
from pipeline.offline import executors
from pipeline.offline.build import SKIPPED_FILE, merge_split, shard_tasks, summary_files, write_manifest
from pipeline.offline.parquet import temporary_copy
from pipeline.offline.plan import Plan, Slot, differences, slots
from pipeline.offline.shards import BUILD_FOLDER, Record, load_record, load_samples, write_shard
from pipeline.offline.statistics import Sums, finish
from pipeline.offline.verify import REPAIR_FOLDER, RETRY_FOLDER
from pipeline.storage import Location


class RepairError(UserError):
    """A dataset directory that RAW cannot mend."""


def repair(dataset: Manifest, failing: Collection[str], plan: Plan, workers: int) -> None:
    """Rebuild the files `failing` of a dataset directory, and put them into place once all of them fit.

    `plan` is that of the raw images and the build recipe of `dataset`. Every rebuilt byte must be what the manifest
    promises, else nothing is changed. No other file is touched.

    Raises:
        RepairError: the raw images, or the codecs here, give other bytes.
        OSError: as the file system says; what is in place by then is whole.
    """
    _require_local(dataset, "--repair")
    aside = dataset.root / REPAIR_FOLDER
    try:
        if plan.classes != dataset.classes or plan.splits.keys() != dataset.splits.keys():
            raise _refusal(dataset, f"{dataset.root}: RAW has other classes or splits")
        rebuilt = _rebuild(dataset, set(failing), plan, aside, workers)
        if wrong := sorted(name for name in failing if rebuilt.get(name) != dataset.files[name]):
            raise _refusal(dataset, f"{wrong[0]}: RAW gives other bytes than the manifest promises")
        _put_into_place(aside, dataset.root, sorted(failing))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _rebuild(dataset: Manifest, failing: set[str], plan: Plan, aside: Path, workers: int) -> dict[str, FileRecord]:
    """Build what is needed for `failing` in the folder `aside`; of shards, only failing files stay there."""
    # The records of all shards of a split are needed for its samples.npy, those of all splits for skipped.jsonl. The
    # mean image alone follows from statistics.npz.
    complete = {split for split in plan.splits if f"{split}/samples.npy" in failing or SKIPPED_FILE in failing}
    complete |= {"train"} if STATISTICS_FILE in failing else set()
    chosen = [slot for slot in slots(plan) if slot.split in complete or not failing.isdisjoint(_files(slot.name))]
    rebuilt: dict[str, FileRecord] = {}
    for record in _build_aside(plan, aside, chosen, workers):
        built = {name: FileRecord(**file) for name, file in record.files.items()}
        if built != {name: dataset.files[name] for name in _files(record.name) if name in dataset.files}:
            raise _refusal(dataset, f"{record.name}.tar: RAW gives other bytes than the manifest promises")
        rebuilt |= built
        for name in built.keys() - failing:
            (aside / name).unlink()
    merged = {split: merge_split(plan, aside, split) for split in plan.splits if split in complete}
    for split in merged.values():
        rebuilt |= split.files
    skipped = [line for split in merged.values() for line in split.skipped]
    statistics = finish(merged["train"].sums) if "train" in merged else dataset.statistics()
    for name, data in summary_files(statistics, skipped, dataset.splits).items():
        if name in failing:
            rebuilt[name] = FileRecord(**write_bytes_aside(aside / name, data))
    return rebuilt


def is_finished(root: Location) -> bool:
    """Return whether `root` is a dataset directory, and no unfinished build."""
    return storage.is_file(root / FILE_NAME) and not storage.exists(root / BUILD_FOLDER)


def retry(dataset: Manifest, plan: Plan, workers: int) -> tuple[Manifest, int]:
    """Decode the skipped images again; build the shards anew in which one now has a place.

    The new files are put into place once all are there, the manifest last; the same command ends that where it was
    interrupted. The result has the bytes of a build from the mended raw images.

    Returns:
        The manifest as it is now, and the number of images that were skipped and are samples now.
    Raises:
        RepairError: the raw images, the recipe or the codecs are not those of the build.
    """
    _require_local(dataset, "--retry-skipped of a finished dataset")
    aside, gained = dataset.root / RETRY_FOLDER, dict[str, str]()
    if not (aside / FILE_NAME).exists():
        try:
            _require_same(dataset, plan)
            gained, sums = _decode_skipped(dataset, plan)
            if not gained:
                return dataset, 0
            _rebuild_with(dataset, plan, gained, sums, aside, workers)
        finally:
            if not (aside / FILE_NAME).exists():
                shutil.rmtree(aside, ignore_errors=True)
    new = parse((aside / FILE_NAME).read_bytes(), dataset.root)
    _put_into_place(aside, dataset.root, [*sorted(new.files), FILE_NAME])
    return new, len(gained)


def _require_same(dataset: Manifest, plan: Plan) -> None:
    samples = {name: split.samples + split.skipped for name, split in dataset.splits.items()}
    images = {split: len(indices) for split, indices in plan.splits.items()}
    before = {**asdict(dataset.recipe), **dataset.built_with, "raw images": samples}
    now = {**asdict(plan.recipe), **codec_versions(), "raw images": images}
    differing = differences(before, now)
    if plan.classes != dataset.classes:
        differing.append("the classes")
    if differing:
        raise RepairError(f"{dataset.root}: differs in {', '.join(differing)}; nothing was changed")


def _decode_skipped(dataset: Manifest, plan: Plan) -> tuple[dict[str, str], Sums]:
    """Return key → split of each skipped image that decodes by now, and the sums over those of the training split."""
    skipped = {line["key"] for line in _skipped(dataset)}
    again = [  # split, position in it, key
        (slot.split, position, key)
        for slot in slots(plan)
        for position, key in enumerate(plan.slot_keys(slot), slot.start)
        if key in skipped
    ]
    if gone := skipped - {key for *_, key in again}:
        raise RepairError(f"{dataset.root}: RAW no longer has the skipped image {min(gone)}; nothing was changed")
    gained: dict[str, str] = {}
    sums = Sums.zero(plan.recipe.statistics_size)
    indices = np.array([plan.splits[split][position] for split, position, _ in again], np.uint32)
    with temporary_copy(plan.images, indices) as images:
        plan = replace(plan, images=images)
        for split, position, key in again:
            (image,) = plan.part(split, position, position + 1)
            try:
                pixels = rescaled(image.raw.read(), plan.recipe)
            except ImageError:
                continue
            gained[key] = split
            if split == "train":
                sums.add(pixels)
    return gained, sums


def _skipped(dataset: Manifest) -> list[dict[str, str]]:
    return [json.loads(line) for line in dataset.read(SKIPPED_FILE).splitlines()]


def _rebuild_with(
    dataset: Manifest, plan: Plan, gained: Mapping[str, str], sums: Sums, aside: Path, workers: int
) -> None:
    """Build everything that changes by the images `gained` in the folder `aside`, the manifest last."""
    chosen = [slot for slot in slots(plan) if not gained.keys().isdisjoint(plan.slot_keys(slot))]
    records = {record.name: record for record in _build_aside(plan, aside, chosen, workers)}
    files = {name: file for name, file in dataset.files.items() if name.endswith((".tar", ".idx"))}
    files |= {name: FileRecord(**file) for record in records.values() for name, file in record.files.items()}
    splits = dict(dataset.splits)
    for split in plan.splits:
        samples = dataset.samples(split)
        tables = [samples[samples["shard"] == slot.number] for slot in slots(plan) if slot.split == split]
        shards = {shard.name: shard for shard in dataset.splits[split].shards}
        for slot in (slot for slot in chosen if slot.split == split):
            record, before = records[slot.name], tables[slot.number]
            tables[slot.number] = load_samples(aside, slot.name)
            skipped = {line["key"] for line in record.skipped}
            known = [key not in gained for key in plan.slot_keys(slot) if key not in skipped]
            if _without_offsets(before) != _without_offsets(tables[slot.number][known]):
                raise RepairError(f"{slot.name}: RAW gives other samples than it has; nothing was changed")
            entry = record.manifest_entry
            assert entry is not None  # a gained image is in it
            shards[entry.name] = entry
        table, left = np.concatenate(tables), dataset.splits[split].skipped - list(gained.values()).count(split)
        splits[split] = Split(len(table), left, tuple(shards[name] for name in sorted(shards)))
        name = f"{split}/samples.npy"
        files[name] = FileRecord(**write_aside(aside / name, partial(np.save, arr=table)))
    before_sums = dataset.statistics()
    total = Sums(before_sums.n, before_sums.sum_image, before_sums.second_moments)
    total.merge(sums)
    still = [line for line in _skipped(dataset) if line["key"] not in gained]
    write_manifest(plan, aside, splits, still, total, files)


def _without_offsets(samples: np.ndarray) -> bytes:
    samples = samples.copy()
    samples["offset"] = 0
    return samples.tobytes()


def _require_local(dataset: Manifest, option: str) -> None:
    """Raises RepairError: files of an object store cannot be renamed into place."""
    if storage.is_remote(dataset.root):
        raise RepairError(
            f"{dataset.root}: {option} works on a local folder; copy DATASET, mend the copy, and copy it back"
        )


def _build_aside(plan: Plan, aside: Path, chosen: Sequence[Slot], workers: int) -> Iterator[Record]:
    """Build some shards in the folder `aside`, from nothing; yield the record of each as it is finished."""
    for folder in (BUILD_FOLDER, *plan.splits):
        shutil.rmtree(aside / folder, ignore_errors=True)
    for outcome in executors.run(write_shard, shard_tasks(plan, aside, chosen), min(workers, len(chosen))):
        record = load_record(aside, outcome.name)
        assert record is not None, outcome.name  # it was written just now
        yield record


def _put_into_place(aside: Path, root: Path, names: Iterable[str]) -> None:
    """Move those of the files `names` that are in `aside` to `root`, in this order, and delete `aside`."""
    for name in names:
        if (aside / name).exists():
            (root / name).parent.mkdir(exist_ok=True)
            os.replace(aside / name, root / name)
    shutil.rmtree(aside)


def _files(shard: str) -> tuple[str, str]:
    return f"{shard}.tar", f"{shard}.idx"


def _refusal(dataset: Manifest, problem: str) -> RepairError:
    codecs = ", ".join(differences(dataset.built_with, codec_versions()))
    reason = f"it was built with other codecs ({codecs})" if codecs else "RAW is not what it was built from"
    return RepairError(f"{problem}: {reason}; nothing was changed")
