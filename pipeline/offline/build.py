"""The build: plan → one task per shard → merge → manifest last. Resumes where an earlier run stopped."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline import manifest, storage
from pipeline.files import HashingFile, write_aside, write_bytes_aside
from pipeline.image import codec_versions
from pipeline.manifest import SAMPLE, FileRecord, Manifest, Split
from pipeline.offline import executors, records
from pipeline.offline.claim import BuildError, claimed
from pipeline.offline.parquet import spool
from pipeline.offline.plan import Plan
from pipeline.offline.records import Record
from pipeline.offline.remote_claim import claimed_remotely
from pipeline.offline.shards import Outcome, ShardTask, write_shard
from pipeline.offline.skips import SKIP_LIMIT, SkipLimit
from pipeline.offline.statistics import Sums, finish
from pipeline.storage import Location

__all__ = ["BuildError", "Part", "build", "merge", "npy", "png", "shard_tasks", "slots"]

Run = Callable[[Callable[[ShardTask], Outcome], Iterable[ShardTask]], Iterator[Outcome]]


SKIPPED_FILE = "skipped.jsonl"


class Part(NamedTuple):
    """The shards number − 1, number − 1 + of, … of a build that several jobs share."""

    number: int  # 1 … of
    of: int


@dataclass(frozen=True)
class Slot:
    """The place of a shard in its split: the images start … stop − 1."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.split}-{self.number:06d}"


def build(
    plan: Plan,
    root: Location,
    workers: int = 1,
    progress: Callable[[Outcome], None] = lambda outcome: None,
    *,
    run: Run | None = None,
    skip_limit: SkipLimit = SKIP_LIMIT,
    retry_skipped: bool = False,
    part: Part | None = None,
) -> Manifest | None:
    """Build the dataset directory `root`, or go on with the same build where an earlier run of it stopped.

    `progress` is called after each finished shard. The bytes are a function of the plan and the codecs alone: not of
    `workers`, not of `run`, not of the number of interruptions.

    Args:
        run: who runs the tasks; by default a pool of `workers` processes.
        skip_limit: how many images of a split may be skipped.
        retry_skipped: build those shards again of which an earlier run skipped images.
        part: build only these shards, and no manifest: `merge_parts` ends such a build.

    Returns:
        The manifest; None for a part.
    Raises:
        BuildError: `root` holds something else, too many images were skipped, or no training image decodes.
        UserError, OSError: as `write_shard` says; what is finished stays.
    """
    with _claim(plan, root, alone=part is None) as ended:
        if ended:
            return manifest.load(root)
        mine = slots(plan)[part.number - 1 :: part.of] if part else slots(plan)
        plan = spooled(plan, root, slots(plan))  # all shards', so that the parts of a build share the copies
        if retry_skipped:
            _forget_skipped(root, mine)
        counted = skip_limit.counter({split: len(places) for split, places in plan.splits.items()})
        run = run or partial(executors.run, workers=min(workers, len(mine)))
        for outcome in run(write_shard, shard_tasks(plan, root, mine)):
            progress(outcome)
            counted.add(outcome)
        return None if part else merge(plan, root, slots(plan))


def merge_parts(plan: Plan, root: Location, skip_limit: SkipLimit = SKIP_LIMIT) -> Manifest:
    """End a build whose parts were built apart.

    Raises:
        BuildError: a shard is missing, or too many images were skipped in all.
    """
    with _claim(plan, root, alone=True) as ended:
        if ended:
            return manifest.load(root)
        counted = skip_limit.counter({split: len(places) for split, places in plan.splits.items()})
        missing = []
        for slot in slots(plan):
            if record := records.load(root, slot.name):
                reasons = Counter(line["reason"] for line in record.skipped)
                counted.add(Outcome(slot.name, slot.stop - slot.start, record.raw_bytes, reasons, True))
            else:
                missing.append(slot.name)
        if missing:
            raise BuildError(
                f"{root}: {len(missing):,} of {len(slots(plan)):,} shards are not built yet, such as "
                f"{', '.join(missing[:3])}; build all parts first (--part), or all that is missing (without --merge)"
            )
        return merge(plan, root, slots(plan))


def _claim(plan: Plan, root: Location, *, alone: bool) -> AbstractContextManager[bool]:
    return (claimed_remotely if storage.is_remote(root) else claimed)(plan, root, alone=alone)


def slots(plan: Plan) -> list[Slot]:
    """All shards of a plan, in order."""
    size = plan.recipe.samples_per_shard
    return [
        Slot(split, number, start, min(start + size, len(places)))
        for split, places in plan.splits.items()
        for number, start in enumerate(range(0, len(places), size))
    ]


def spooled(plan: Plan, root: Location, chosen: Sequence[Slot]) -> Plan:
    """Return the plan with the parquet rows of these shards copied into `root`/.build; any other plan as it is."""
    indices = [plan.splits[slot.split][slot.start : slot.stop] for slot in chosen] or [np.empty(0, np.uint32)]
    return replace(plan, images=spool(plan.images, np.concatenate(indices), root / records.BUILD_FOLDER))


def shard_tasks(plan: Plan, root: Location, chosen: Sequence[Slot]) -> Iterator[ShardTask]:
    """One task at a time: together they hold every image of the plan."""
    plan = spooled(plan, root, chosen)
    codecs = codec_versions()
    for slot in chosen:
        yield ShardTask(root, slot.name, plan.part(slot.split, slot.start, slot.stop), plan.recipe, codecs)


def merge(plan: Plan, root: Location, built: Sequence[Slot]) -> Manifest:
    """Statistics, sample records and the list of skipped images from the records of all shards; the manifest last."""
    files: dict[str, FileRecord] = {}
    splits: dict[str, Split] = {}
    skipped: list[dict[str, str]] = []
    total = Sums.zero(plan.recipe.statistics_size)
    for split in dict.fromkeys(slot.split for slot in built):
        names = [slot.name for slot in built if slot.split == split]
        shards, left_out = [], 0
        for record in map(partial(_recorded, root), names):  # one at a time: each holds a sum image
            if split == "train":
                total.merge(record.sums)
            files |= {name: FileRecord(**file) for name, file in record.files.items()}
            skipped += [{"split": split, **line} for line in record.skipped]
            left_out += len(record.skipped)
            shards.append(record.manifest_entry)
        samples = sum(shard.samples for shard in shards if shard)
        table = f"{split}/samples.npy"
        files[table] = FileRecord(**write_aside(root / table, partial(_write_samples, root, names, samples)))
        splits[split] = Split(samples, left_out, tuple(shard for shard in shards if shard))
    return conclude(plan, root, splits, skipped, total, files)


def conclude(
    plan: Plan,
    root: Location,
    splits: Mapping[str, Split],
    skipped: Sequence[Mapping[str, str]],
    total: Sums,
    files: Mapping[str, FileRecord],
) -> Manifest:
    """Write the statistics, the list of skipped images and the manifest of a dataset directory with these `files`.

    `skipped` are the lines of skipped.jsonl, `total` the sums over the training split.

    Raises:
        BuildError: no training image was decoded.
    """
    if not total.n:
        reasons = ", ".join(sorted({line["reason"] for line in skipped}))
        raise BuildError(f"{root}: no training image could be decoded; the reasons: {reasons}")
    statistics = finish(total)
    arrays = io.BytesIO()
    np.savez(arrays, **{key: getattr(statistics, key) for key in manifest.Statistics.__dataclass_fields__})
    contents = {
        manifest.STATISTICS_FILE: arrays.getvalue(),
        "mean.png": png(statistics.mean_image),
        SKIPPED_FILE: "".join(json.dumps(line, sort_keys=True) + "\n" for line in skipped).encode(),
    }
    written = {name: FileRecord(**write_bytes_aside(root / name, data)) for name, data in contents.items()}
    found = Manifest(
        root, plan.recipe, plan.classes, splits, statistics.summary(), {**files, **written}, codec_versions()
    )
    write_bytes_aside(root / manifest.FILE_NAME, found.to_json())
    return found


def _recorded(root: Location, name: str) -> Record:
    record = records.load(root, name)
    if record is None:
        raise BuildError(f"{root}: the record of {name} is gone or damaged; run the same command again")
    return record


def _write_samples(root: Location, names: Sequence[str], count: int, file: HashingFile) -> None:
    """samples.npy, shard by shard: the bytes that numpy would write of all at once."""
    file.write(_npy_header(count))
    for name in names:
        file.write(records.load_samples(root, name).astype(SAMPLE).tobytes())


def _npy_header(count: int) -> bytes:
    out = io.BytesIO()
    form = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(out, form)
    return out.getvalue()


def _forget_skipped(root: Location, chosen: Sequence[Slot]) -> None:
    for slot in chosen:
        record = records.load(root, slot.name)
        if record and record.skipped:
            storage.remove(records.record_path(root, slot.name))


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def png(mean_image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.rint(mean_image).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
