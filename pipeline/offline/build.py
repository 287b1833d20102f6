"""The build: plan → one task per shard → merge → manifest last. Resumes where an earlier run stopped."""

import fcntl
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.image import codec_versions
from pipeline.manifest import FileRecord, Manifest, ShardRecord, Split
from pipeline.offline import executors
from pipeline.offline.plan import Plan
from pipeline.offline.shards import BUILD_FOLDER, ShardResult, ShardTask
from pipeline.offline.statistics import Sums, finish

PLAN_FILE = "plan.json"


class BuildError(UserError):
    """A build that cannot begin, or cannot end."""


@dataclass(frozen=True)
class FinishedShard:
    """What the manifest needs of a finished shard; `record` is None where all its images were skipped."""

    name: str
    samples: np.ndarray  # (n,) of manifest.SAMPLE
    record: ShardRecord | None
    skipped: list[dict[str, str]]
    files: dict[str, dict[str, Any]]


def build(
    plan: Plan, root: Path, workers: int, progress: Callable[[ShardResult], None] = lambda result: None
) -> Manifest:
    """Build the dataset directory `root`, or go on with the same build where an earlier run of it stopped.

    `progress` is called after each finished shard. The bytes are a function of the plan and the codecs alone: not of
    `workers`, not of the number of interruptions.

    Raises:
        BuildError: `root` holds something else, or no training image decodes.
        OSError: as the file system says; what is finished stays.
    """
    with _claimed(plan, root) as ended:
        if ended:
            return manifest.load(root)
        tasks = shard_tasks(plan, root)
        finished: dict[str, FinishedShard] = {}
        total = Sums.zero(plan.recipe.size)
        for result in executors.run(tasks, workers):
            if result.name.startswith("train/"):
                total.merge(result.sums)
            finished[result.name] = finish_shard(result)  # without its sum image: a build has thousands
            progress(result)
        return merge(plan, root, [finished[task.name] for task in tasks], total)


def shard_tasks(plan: Plan, root: Path) -> list[ShardTask]:
    size = plan.recipe.samples_per_shard
    return [
        ShardTask(root, split, number, tuple(images[number * size : (number + 1) * size]), plan.recipe)
        for split, images in plan.splits.items()
        for number in range(-(-len(images) // size))
    ]


@contextmanager
def _claimed(plan: Plan, root: Path) -> Iterator[bool]:
    """Claim `root` for this plan, and for this process alone; delete the build state at the end.

    `root` must be empty or absent, or left by an interrupted run of the very same build. Yields whether that run had
    finished but for the deletion of its state.
    """
    folder = root / BUILD_FOLDER
    done = (root / manifest.FILE_NAME).exists()
    if done and not folder.exists():
        raise BuildError(f"{root}: a finished dataset is there already; delete it or name another DATASET")
    others = root.exists() and (not root.is_dir() or any(entry.name != BUILD_FOLDER for entry in root.iterdir()))
    if others and not (folder / PLAN_FILE).exists():
        raise BuildError(f"{root}: exists and is not an unfinished build; delete it or name another DATASET")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"{root}: another build is writing there; wait for it, or stop it") from error
        _require_same_plan(plan, root, folder / PLAN_FILE)
        yield done
        for entry in folder.iterdir():  # the plan last: until then the same command still ends this build
            if entry.name != PLAN_FILE:
                entry.unlink()
        shutil.rmtree(folder)


def _require_same_plan(plan: Plan, root: Path, state: Path) -> None:
    fingerprint = plan.fingerprint()
    if not state.exists():
        write_bytes_aside(state, fingerprint)
        return
    try:
        before, now = json.loads(state.read_bytes()), json.loads(fingerprint)
        differing = [key for key in now if before.get(key) != now[key]]
        if "recipe" in differing:
            old, new = before["recipe"], now["recipe"]
            differing = [f"{key} {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key]]
    except (ValueError, AttributeError, KeyError) as error:
        raise BuildError(f"{state}: damaged ({error}); delete {root} and build again") from error
    if differing:
        raise BuildError(
            f"{root}: holds an unfinished build that differs in {', '.join(differing)}; "
            f"run that one again, or delete {root}"
        )


def merge(plan: Plan, root: Path, shards: list[FinishedShard], total: Sums) -> Manifest:
    """Statistics, sample records and the list of skipped images from the finished shards; the manifest last.

    `shards` in the order of the tasks; `total` is the sum over the training split.
    """
    files = {name: FileRecord(**record) for shard in shards for name, record in shard.files.items()}

    def put(name: str, data: bytes) -> None:
        files[name] = FileRecord(**write_bytes_aside(root / name, data))

    splits, skipped = {}, []
    for split in plan.splits:
        mine = [shard for shard in shards if shard.name.startswith(f"{split}/")]
        samples = np.concatenate([shard.samples for shard in mine])
        put(f"{split}/samples.npy", npy(samples))
        left_out = [{"split": split, **line} for shard in mine for line in shard.skipped]
        skipped += left_out
        splits[split] = Split(len(samples), len(left_out), tuple(shard.record for shard in mine if shard.record))
    if not total.n:
        raise BuildError(f"{root}: no training image could be decoded; the reasons: {_reasons(skipped)}")
    statistics = finish(total)
    arrays = io.BytesIO()
    np.savez(arrays, **{key: getattr(statistics, key) for key in manifest.Statistics.__dataclass_fields__})
    put(manifest.STATISTICS_FILE, arrays.getvalue())
    put("mean.png", png(statistics.mean_image))
    put("skipped.jsonl", "".join(json.dumps(line, sort_keys=True) + "\n" for line in skipped).encode())
    built = Manifest(root, plan.recipe, plan.classes, splits, statistics.summary(), files, codec_versions())
    write_bytes_aside(root / manifest.FILE_NAME, built.to_json())
    return built


def finish_shard(result: ShardResult) -> FinishedShard:
    """A shard's record for the manifest, from its result."""
    record = None
    if result.files:
        red, green, blue = (int(value) for value in result.sums.sum_image.sum(axis=(0, 1)))
        moments: Any = tuple(tuple(row) for row in result.sums.second_moments.tolist())
        tar = f"{result.name}.tar"
        record = ShardRecord(tar, len(result.samples), result.files[tar]["bytes"], (red, green, blue), moments)
    return FinishedShard(result.name, result.samples, record, result.skipped, result.files)


def _reasons(skipped: list[dict[str, str]]) -> str:
    return ", ".join(sorted({line["reason"] for line in skipped}))


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def png(mean_image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.rint(mean_image).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
