"""The build: plan → one task per shard → merge → manifest last. Resumes where an earlier run stopped."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline import UserError, manifest, storage
from pipeline.files import write_aside, write_bytes_aside
from pipeline.image import codec_versions
from pipeline.manifest import INFO_FILE, SAMPLE, STATISTICS_FILE, FileRecord, Manifest, Split, Statistics, timm_info
from pipeline.offline import executors
from pipeline.offline.lock import locked
from pipeline.offline.parquet import spool
from pipeline.offline.plan import Plan, Slot, slots
from pipeline.offline.shards import (
    BUILD_FOLDER,
    SKIPPED_FILE,
    Outcome,
    ShardTask,
    load_record,
    record_path,
    write_shard,
)
from pipeline.offline.statistics import Sums, finish
from pipeline.storage import Location

Run = Callable[[Callable[[ShardTask], Outcome], Iterable[ShardTask]], Iterator[Outcome]]


class ShardSlice(NamedTuple):
    """The shards number − 1, number − 1 + of, … of a build that several jobs share."""

    number: int  # 1 … of
    of: int


@dataclass(frozen=True)
class SkipLimit:
    """At most `count` images of a split, or `percent` of it where that is more, may be skipped before a build fails."""

    count: int = 10
    percent: float = 0.1

    @classmethod
    def parse(cls, text: str) -> "SkipLimit":
        """Read `25` images or `0.5%`. Raises UserError."""
        match = re.fullmatch(r"([0-9]{1,9})|([0-9]{1,3}(?:\.[0-9]{1,6})?)%", text.strip())
        if not match or float(match[2] or 0) > 100:
            raise UserError(f"--max-skipped {text}: neither a number of images, such as 25, nor a share, such as 0.5%")
        return cls(count=int(match[1]), percent=0.0) if match[1] else cls(count=0, percent=float(match[2]))

    def allowed(self, images: int) -> int:
        """Return how many images may be skipped of a split of so many."""
        return max(self.count, math.floor(images * self.percent / 100))

    def check_left_out(self, pictures: int, images: int) -> None:
        """Raise UserError where more pictures of RAW are left out before a build of so many `images` begins."""
        allowed = self.allowed(images + pictures)
        if pictures > allowed:
            raise UserError(
                f"{pictures:,} pictures of RAW are left out (see above), at most {allowed:,} may be; mend RAW, or "
                "allow more with --max-skipped, or all with --allow-incomplete"
            )

    def check(self, plan: Plan, split: str, skipped: Counter[str]) -> None:
        """Raise UserError where more images of a split were skipped, here counted by reason."""
        allowed = self.allowed(len(plan.splits[split]))
        if skipped.total() > allowed:
            listing = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
            raise UserError(
                f"{split}: {skipped.total():,} images skipped so far ({listing}), at most {allowed:,} may be; the "
                "finished shards stay. Mend RAW and run the same command with --retry-skipped, or allow more with "
                "--max-skipped"
            )


SKIP_LIMIT = SkipLimit()


def build(
    plan: Plan,
    root: Location,
    workers: int = 1,
    progress: Callable[[Outcome], None] = lambda outcome: None,
    *,
    run: Run | None = None,
    skip_limit: SkipLimit = SKIP_LIMIT,
    retry_skipped: bool = False,
    part: ShardSlice | None = None,
    parts_end: bool = False,
) -> Manifest | None:
    """Build the dataset directory `root`, or go on with the same build where an earlier run of it stopped.

    `progress` is called after each finished shard. The bytes are a function of the plan and the codecs alone: not of
    `workers`, not of `run`, not of the number of interruptions.

    Args:
        run: who runs the tasks; by default a pool of `workers` processes.
        retry_skipped: build those shards again of which an earlier run skipped images.
        part: build only these shards, and no manifest.
        parts_end: end a build whose parts are all built.

    Returns:
        The manifest; None for a part.
    Raises:
        UserError: `root` holds something else, too many images are skipped, no training image decodes, or parts are
            missing at their end; and what `write_shard` raises. What is finished stays.
    """
    every = slots(plan)
    chosen = every[part.number - 1 :: part.of] if part else every
    with locked(plan, root, alone=part is None) as ended:
        if ended:
            return manifest.load(root)
        missing = [slot.name for slot in every if parts_end and not load_record(root, slot.name)]
        if missing:
            problem = f"{len(missing):,} of {len(every):,} shards are not built yet, such as {', '.join(missing[:3])}"
            remedy = "build all parts first (--part), or all that is missing (without --merge)"
            raise UserError(f"{root}: {problem}; {remedy}")
        plan = spooled(plan, root, every)  # all shards', so that the parts of a build share the copies
        for slot in chosen if retry_skipped else ():
            if (record := load_record(root, slot.name)) and record.skipped:
                storage.remove(record_path(root, slot.name))
        skipped: dict[str, Counter[str]] = {split: Counter() for split in plan.splits}
        run = run or partial(executors.run, workers=min(workers, len(chosen)))
        for outcome in run(write_shard, shard_tasks(plan, root, chosen)):
            progress(outcome)
            split = outcome.name.partition("/")[0]
            skipped[split] += outcome.skipped
            skip_limit.check(plan, split, skipped[split])
        if part:
            return None
        return write_manifest(plan, root, {split: merge_split(plan, root, split) for split in plan.splits})


def spooled(plan: Plan, root: Location, chosen: Sequence[Slot]) -> Plan:
    """Return the plan with the parquet rows of these shards copied into `root`/.build; any other plan as it is."""
    indices = [plan.splits[slot.split][slot.start : slot.stop] for slot in chosen] or [np.empty(0, np.uint32)]
    return replace(plan, images=spool(plan.images, np.concatenate(indices), root / BUILD_FOLDER))


def shard_tasks(plan: Plan, root: Location, chosen: Sequence[Slot]) -> Iterator[ShardTask]:
    """Yield one task at a time: together they hold every image of the plan."""
    codecs = codec_versions()
    for slot in chosen:
        yield ShardTask(root, slot.name, tuple(plan.part(slot.split, slot.start, slot.stop)), plan.recipe, codecs)


class MergedSplit(NamedTuple):
    entry: Split  # in the manifest
    files: dict[str, FileRecord]  # of its shards, and samples.npy
    skipped: list[dict[str, str]]  # lines of skipped.jsonl
    sums: Sums  # over its rescaled pixels


def merge_split(plan: Plan, root: Location, split: str) -> MergedSplit:
    """Merge the records of a split's shards, and write its samples.npy."""
    files, skipped, sums = dict[str, FileRecord](), list[dict[str, str]](), Sums.zero(plan.recipe.statistics_size)
    shards, samples, end = [], np.empty(len(plan.splits[split]), SAMPLE), 0
    for slot in slots(plan):
        if slot.split != split:
            continue
        record = load_record(root, slot.name)  # one at a time: each holds a sum image
        if record is None:
            raise UserError(f"{root}: the record of {slot.name} is gone or damaged; run the same command again")
        sums.merge(record.sums)
        files |= record.files
        skipped += [{"split": split, **line} for line in record.skipped]
        start, end = end, end + len(record.samples)
        samples[start:end] = record.samples
        if record.manifest_entry:
            shards.append(record.manifest_entry)
    files[f"{split}/samples.npy"] = write_samples(root, split, samples[:end])
    return MergedSplit(Split(end, len(skipped), tuple(shards)), files, skipped, sums)


def write_samples(root: Location, split: str, samples: np.ndarray) -> FileRecord:
    """Write a split's samples.npy, (n,) of SAMPLE."""
    return FileRecord(**write_aside(root / split / "samples.npy", partial(np.save, arr=samples)))


def write_manifest(plan: Plan, root: Location, merged: Mapping[str, MergedSplit]) -> Manifest:
    """Write the summaries of all splits, and the manifest last. Raises UserError where no training image decoded."""
    files = {name: record for split in merged.values() for name, record in split.files.items()}
    skipped = [line for split in merged.values() for line in split.skipped]
    splits = {name: split.entry for name, split in merged.items()}
    if not splits["val" if plan.statistics else "train"].samples:
        reasons = ", ".join(sorted({line["reason"] for line in skipped}))
        kind = "picture to evaluate" if plan.statistics else "training image"
        raise UserError(f"{root}: no {kind} could be decoded; the reasons: {reasons}")
    statistics = plan.statistics or finish(merged["train"].sums)
    for name, data in summary_files(statistics, skipped, splits).items():
        files[name] = FileRecord(**write_bytes_aside(root / name, data))
    written = Manifest(root, plan.recipe, plan.classes, splits, statistics.summary(), files, codec_versions())
    write_bytes_aside(root / manifest.FILE_NAME, written.to_json())
    return written


def summary_files(
    statistics: Statistics, skipped: Sequence[Mapping[str, str]], splits: Mapping[str, Split]
) -> dict[str, bytes]:
    """Return the files that describe all splits together, by name."""
    arrays, mean = io.BytesIO(), io.BytesIO()
    np.savez(arrays, **{key: getattr(statistics, key) for key in Statistics.__dataclass_fields__})
    Image.fromarray(np.rint(statistics.mean_image).astype(np.uint8)).save(mean, "PNG")
    return {
        STATISTICS_FILE: arrays.getvalue(),
        "mean.png": mean.getvalue(),
        SKIPPED_FILE: "".join(json.dumps(line, sort_keys=True) + "\n" for line in skipped).encode(),
        INFO_FILE: timm_info(splits),
    }
