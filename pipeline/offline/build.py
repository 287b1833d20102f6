"""The build: plan → one task per shard → merge → manifest last. Resumes where an earlier run stopped."""

import io
import json
import shutil
from collections.abc import Callable
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
    if ended := _ended(plan, root):
        return ended
    _begin(plan, root)
    tasks = shard_tasks(plan, root)
    results: dict[str, ShardResult] = {}
    for result in executors.run(tasks, workers):
        results[result.name] = result
        progress(result)
    built = _merge(plan, root, [results[task.name] for task in tasks])
    shutil.rmtree(root / BUILD_FOLDER)
    return built


def shard_tasks(plan: Plan, root: Path) -> list[ShardTask]:
    size = plan.recipe.samples_per_shard
    return [
        ShardTask(root, split, number, tuple(images[number * size : (number + 1) * size]), plan.recipe)
        for split, images in plan.splits.items()
        for number in range(-(-len(images) // size))
    ]


def _ended(plan: Plan, root: Path) -> Manifest | None:
    """The manifest of a run that was killed after writing it, and before it had deleted its build state."""
    if not ((root / manifest.FILE_NAME).exists() and (root / BUILD_FOLDER).exists()):
        return None
    built = manifest.load(root)
    if built.recipe != plan.recipe or built.classes != plan.classes:
        return None
    shutil.rmtree(root / BUILD_FOLDER)
    return built


def _begin(plan: Plan, root: Path) -> None:
    """Claim `root` for this plan: empty or absent, or left by an interrupted run of the very same build."""
    state = root / BUILD_FOLDER / PLAN_FILE
    fingerprint = plan.fingerprint()
    if (root / manifest.FILE_NAME).exists():
        raise BuildError(f"{root}: a finished dataset is there already; delete it or name another DATASET")
    if state.exists():
        before, now = json.loads(state.read_bytes()), json.loads(fingerprint)
        differing = [key for key in now if before.get(key) != now[key]]
        if "recipe" in differing:
            differing = [
                f"{key} {before['recipe'].get(key)} → {now['recipe'][key]}"
                for key in now["recipe"]
                if before["recipe"].get(key) != now["recipe"][key]
            ]
        if differing:
            raise BuildError(
                f"{root}: holds an unfinished build that differs in {', '.join(differing)}; "
                f"run that one again, or delete {root}"
            )
        return
    if root.exists() and (not root.is_dir() or any(entry.name != BUILD_FOLDER for entry in root.iterdir())):
        raise BuildError(f"{root}: exists and is not an unfinished build; delete it or name another DATASET")
    write_bytes_aside(state, fingerprint)


def _merge(plan: Plan, root: Path, results: list[ShardResult]) -> Manifest:
    """Statistics, sample records and the list of skipped images from the shards' results; the manifest last."""
    files = {name: FileRecord(**record) for result in results for name, record in result.files.items()}

    def put(name: str, data: bytes) -> None:
        files[name] = FileRecord(**write_bytes_aside(root / name, data))

    total = Sums.zero(plan.recipe.size)
    splits, skipped = {}, []
    for split in plan.splits:
        mine = [result for result in results if result.name.startswith(f"{split}/")]
        if split == "train":
            for result in mine:
                total.merge(result.sums)
        samples = np.concatenate([result.samples for result in mine])
        put(f"{split}/samples.npy", _npy(samples))
        left_out = [{"split": split, **line} for result in mine for line in result.skipped]
        skipped += left_out
        splits[split] = Split(
            len(samples), len(left_out), tuple(_shard_record(result) for result in mine if result.files)
        )
    if not total.n:
        raise BuildError(f"{root}: no training image could be decoded; the reasons: {_reasons(skipped)}")
    statistics = finish(total)
    arrays = io.BytesIO()
    np.savez(arrays, **{key: getattr(statistics, key) for key in manifest.Statistics.__dataclass_fields__})
    put(manifest.STATISTICS_FILE, arrays.getvalue())
    put("mean.png", _png(statistics.mean_image))
    put("skipped.jsonl", "".join(json.dumps(line, sort_keys=True) + "\n" for line in skipped).encode())
    built = Manifest(root, plan.recipe, plan.classes, splits, statistics.summary(), files, codec_versions())
    write_bytes_aside(root / manifest.FILE_NAME, built.to_json())
    return built


def _shard_record(result: ShardResult) -> ShardRecord:
    red, green, blue = (int(value) for value in result.sums.sum_image.sum(axis=(0, 1)))
    moments: Any = tuple(tuple(row) for row in result.sums.second_moments.tolist())
    tar = f"{result.name}.tar"
    return ShardRecord(tar, len(result.samples), result.files[tar]["bytes"], (red, green, blue), moments)


def _reasons(skipped: list[dict[str, str]]) -> str:
    return ", ".join(sorted({line["reason"] for line in skipped}))


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _png(mean_image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.rint(mean_image).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
