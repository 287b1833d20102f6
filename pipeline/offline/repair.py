"""Shards of a finished dataset directory built again aside and put into place: --repair and --retry-skipped."""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline import UserError, storage
from pipeline.decode import ImageError
from pipeline.files import write_bytes_aside
from pipeline.image import codec_versions, rescaled
from pipeline.manifest import FILE_NAME, STATISTICS_FILE, FileRecord, Manifest, Split, parse
from pipeline.offline import build, executors
from pipeline.offline.parquet import temporary_copy
from pipeline.offline.plan import Plan, Slot, differences, slots
from pipeline.offline.shards import BUILD_FOLDER, SKIPPED_FILE, Record, load_record, write_shard
from pipeline.offline.statistics import Sums, finish
from pipeline.offline.verify import REPAIR_FOLDER, RETRY_FOLDER
from pipeline.typed import from_values


def repair(dataset: Manifest, failing: Collection[str], plan: Plan, workers: int) -> None:
    """Rebuild the files `failing` of a dataset directory, and put them into place once all of them fit.

    `plan` is that of the raw images and the build recipe of `dataset`. Every rebuilt byte must be what the manifest
    promises, else nothing is changed. No other file is touched. Raises UserError where RAW, or the codecs here, give
    other bytes.
    """
    aside = _local(dataset, "--repair") / REPAIR_FOLDER
    try:
        if plan.classes != dataset.classes or plan.splits.keys() != dataset.splits.keys():
            hint = "" if "train" in dataset.splits else " (built with --classes-of DATASET: name that again)"
            raise _refusal(dataset, f"{dataset.root}: RAW has other classes or splits{hint}")
        if plan.statistics and plan.statistics.summary() != dataset.statistics_summary:
            raise UserError(f"{dataset.root}: has the statistics of another --classes-of DATASET; nothing was changed")
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
    shards = {name.rpartition(".")[0] for name in failing}
    chosen = [slot for slot in slots(plan) if slot.split in complete or slot.name in shards]
    rebuilt: dict[str, FileRecord] = {}
    for record in _build_aside(plan, aside, chosen, workers):
        if any(dataset.files.get(name) != file for name, file in record.files.items()):
            raise _refusal(dataset, f"{record.name}.tar: RAW gives other bytes than the manifest promises")
        rebuilt |= record.files
        for name in record.files.keys() - failing:
            (aside / name).unlink()
    merged = {split: build.merge_split(plan, aside, split) for split in plan.splits if split in complete}
    for split in merged.values():
        rebuilt |= split.files
    skipped = [line for split in merged.values() for line in split.skipped]
    statistics = plan.statistics or (finish(merged["train"].sums) if "train" in merged else dataset.statistics())
    for name, data in build.summary_files(statistics, skipped, dataset.splits).items():
        if name in failing:
            rebuilt[name] = FileRecord(**write_bytes_aside(aside / name, data))
    return rebuilt


def retry(dataset: Manifest, plan: Plan, workers: int) -> tuple[Manifest, int]:
    """Decode the skipped images again; build the shards anew in which one now has a place.

    The new files are put into place once all are there, the manifest last; the same command ends that where it was
    interrupted. The result has the bytes of a build from the mended raw images.

    Returns the manifest as it is now, and the number of images that were skipped and are samples now. Raises UserError
    where the raw images, the recipe or the codecs are not those of the build.
    """
    aside, gained = _local(dataset, "--retry-skipped of a finished dataset") / RETRY_FOLDER, set[str]()
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
    differing = differences(before, {**asdict(plan.recipe), **codec_versions(), "raw images": images})
    if plan.classes != dataset.classes:
        differing.append("the classes")
    if plan.statistics and plan.statistics.summary() != dataset.statistics_summary:
        differing.append("the statistics")
    if differing:
        raise UserError(f"{dataset.root}: differs in {', '.join(differing)}; nothing was changed")


def _decode_skipped(dataset: Manifest, plan: Plan) -> tuple[set[str], Sums]:
    """Return the keys of skipped images that decode by now, and the sums over those of the training split."""
    skipped = {line["key"] for line in _skipped(dataset)}
    again = [(split, i) for split, ids in plan.splits.items() for i in ids.tolist() if plan.keys[i] in skipped]
    if missing := len(skipped) - len(again):
        raise UserError(f"{dataset.root}: RAW no longer has {missing} of its skipped images; nothing was changed")
    gained, sums = set[str](), Sums.zero(plan.recipe.statistics_size)
    with temporary_copy(plan.images, np.array([i for _, i in again], np.uint32)) as images:
        for split, i in again:
            try:
                pixels = rescaled(images[i].read(), plan.recipe)
            except ImageError:
                continue
            gained.add(plan.keys[i])
            if split == "train":
                sums.add(pixels)
    return gained, sums


def _skipped(dataset: Manifest) -> list[dict[str, str]]:
    """Return the lines of skipped.jsonl, whose paths may not be UTF-8. Raises UserError if they are something else."""
    lines = dataset.read(SKIPPED_FILE).splitlines()
    try:
        skipped = [from_values(json.loads(line), dict[str, str]) for line in lines]
        if all(line.keys() >= {"key", "split"} for line in skipped):
            return skipped
        raise ValueError("a line lacks its key or split")
    except (ValueError, RecursionError) as error:
        path = dataset.root / SKIPPED_FILE
        raise UserError(f"{path}: no list of skipped images ({error}); build the data set again") from error


def _rebuild_with(dataset: Manifest, plan: Plan, gained: set[str], sums: Sums, aside: Path, workers: int) -> None:
    """Build everything that changes by the images `gained` in the folder `aside`, the manifest last."""
    chosen = {slot.name: slot for slot in slots(plan) if not gained.isdisjoint(plan.slot_keys(slot))}
    files = {name: file for name, file in dataset.files.items() if name.endswith((".tar", ".idx"))}
    tables = {split: dataset.samples(split) for split in plan.splits}
    shards = {shard.name: shard for split in dataset.splits.values() for shard in split.shards}
    for record in _build_aside(plan, aside, [*chosen.values()], workers):
        slot = chosen[record.name]
        table = tables[slot.split]
        start, stop = np.searchsorted(table["shard"], [slot.number, slot.number + 1])
        skipped = {line["key"] for line in record.skipped}
        known = [key not in gained for key in plan.slot_keys(slot) if key not in skipped]
        same = ["size", "label", "crc32", "digest"]
        if not np.array_equal(table[start:stop][same], record.samples[known][same]):
            raise UserError(f"{slot.name}: RAW gives other samples than it has; nothing was changed")
        tables[slot.split] = np.concatenate([table[:start], record.samples, table[stop:]])
        entry = record.manifest_entry
        assert entry is not None  # a gained image is in it
        shards[entry.name] = entry
        files |= record.files
    before = dataset.statistics()
    sums.merge(Sums(before.n, before.sum_image, before.second_moments))
    merged = {}
    for split, table in tables.items():
        own = {name: file for name, file in files.items() if name.startswith(f"{split}/")}
        own[f"{split}/samples.npy"] = build.write_samples(aside, split, table)
        left = [line for line in _skipped(dataset) if line["split"] == split and line["key"] not in gained]
        entries = tuple(shards[name] for name in sorted(shards) if name in own)
        merged[split] = build.MergedSplit(Split(len(table), len(left), entries), own, left, sums)
    build.write_manifest(plan, aside, merged)


def _local(dataset: Manifest, option: str) -> Path:
    """Return the folder of a data set. Raises UserError: of a store, whose files cannot be renamed into place."""
    if storage.is_remote(root := dataset.root):
        raise UserError(f"{root}: {option} works on a local folder; copy DATASET, mend the copy, and copy it back")
    return root


def _build_aside(plan: Plan, aside: Path, chosen: Sequence[Slot], workers: int) -> Iterator[Record]:
    """Build some shards in the folder `aside`, from nothing; yield the record of each as it is finished."""
    for folder in (BUILD_FOLDER, *plan.splits):
        shutil.rmtree(aside / folder, ignore_errors=True)
    tasks = build.shard_tasks(build.spooled(plan, aside, chosen), aside, chosen)
    for outcome in executors.run(write_shard, tasks, min(workers, len(chosen))):
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


def _refusal(dataset: Manifest, problem: str) -> UserError:
    codecs = ", ".join(differences(dataset.built_with, codec_versions()))
    reason = f"it was built with other codecs ({codecs})" if codecs else "RAW is not what it was built from"
    return UserError(f"{problem}: {reason}; nothing was changed")
