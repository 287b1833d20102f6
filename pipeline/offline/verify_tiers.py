"""The check of a data set's raw tiers: what tier.json promises, and every record against the picture in its shard."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import records, storage, tier
from pipeline.files import content
from pipeline.manifest import DatasetError, Manifest
from pipeline.offline import executors
from pipeline.offline.raw_tier import FileTask, tasks_of
from pipeline.offline.verify import Failure, Failures, Violation
from pipeline.tier import DIGEST, FILE_NAME, Tier, TierFile
from pipeline.volumes import is_junk, open_regular


class CheckTask(NamedTuple):
    name: str  # of the file below the dataset directory
    file: FileTask
    promised: TierFile
    quick: bool  # do not decode the shard's pictures


def check(
    dataset: Manifest,
    *,
    quick: bool,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> Failures:
    """Check the raw tiers of a local data set whose shards hold; `progress` gets the files checked, and all.

    A file fails that has another size or SHA-256 than tier.json promises, or a record with another digest or, unless
    `quick`, other pixels than its shard's picture. `note` gets what could not be checked here, and why. Returns the
    failures, each with the command that mends it.
    """
    failures, tasks = Failures(), list[CheckTask]()
    for kind in records.KINDS:
        root = tier.folder(dataset.root, kind)
        if not storage.is_dir(root):
            continue
        if not isinstance(root, Path):
            note(f"{root}: not checked: a raw tier is read from a machine's own disk")
            continue
        if not content(root):  # no tier was begun: there was no room for it
            continue
        own = Failures()
        with own.of(f"{root.name}/{FILE_NAME}"):
            found = _load(dataset, root, kind)
            same = found.codec == records.fingerprint(kind)
            if not same and not quick:
                note(f"{root}: pixels not compared: decoded by a codec that gives other ones than this machine's")
            tasks += (own_tasks := _tasks(dataset, kind, quick or not same, found))
            failures += _unlisted(root, {task.file.path.name for task in own_tasks})
        failures += _with_remedy(own, dataset, kind)
    for i, (kind, result) in enumerate(executors.run(check_file, tasks, min(workers, len(tasks)))):
        failures += _with_remedy(result, dataset, kind)
        progress(i + 1, len(tasks))
    return failures


def _with_remedy(failures: Failures, dataset: Manifest, kind: str) -> Iterator[Failure]:
    for failure in failures:
        yield Failure(failure.file, f"{failure.reason}; mend it: {tier.build_command(dataset, kind)}")


def _load(dataset: Manifest, root: Path, kind: str) -> Tier:
    path = root / FILE_NAME
    if not storage.exists(path):
        raise Violation("missing: the tier is unfinished")
    try:
        found = tier.parse(storage.read_bytes(path), root)
    except DatasetError as error:
        raise Violation(str(error).removeprefix(f"{path}: ")) from error
    if not found.is_of(dataset, kind):
        raise Violation("made from other shards")
    return found


def _tasks(dataset: Manifest, kind: str, quick: bool, found: Tier) -> list[CheckTask]:
    tasks = {task.path.name: task for task in tasks_of(dataset, kind, found.root)}
    return [CheckTask(f"{found.root.name}/{name}", task, found.files[name], quick) for name, task in tasks.items()]


def _unlisted(root: Path, listed: set[str]) -> Iterator[Failure]:
    for entry in storage.scan(root):
        if entry.name not in {FILE_NAME, *listed} and not is_junk(entry.name):
            yield Failure(f"{root.name}/{entry.name}", f"not listed in {FILE_NAME}; delete it")


def check_file(task: CheckTask) -> tuple[str, Failures]:
    """Check one file of a tier; return its kind and its failure, if any."""
    failures = Failures()
    with failures.of(task.name):
        _check_file(task)
    return task.file.kind, failures


def _check_file(task: CheckTask) -> None:
    samples, record = task.file.samples, records.record_bytes(task.file.kind, task.file.size)
    expected = len(samples) * (record + DIGEST.itemsize)
    digests, sha256 = np.empty(len(samples), DIGEST), hashlib.sha256()
    with open_regular(task.file.path) as file, storage.opened(task.file.shard) as (read, _):
        size = file.seek(0, 2)
        if {size, task.promised.bytes} != {expected}:
            raise Violation(f"has {size:,} bytes, {task.promised.bytes:,} are promised, its pictures need {expected:,}")
        file.seek(0)
        for i, sample in enumerate(samples):
            data = file.read(record)
            sha256.update(data)
            digests[i] = records.digest(np.frombuffer(data, np.uint8))
            if not task.quick:
                jpeg = read(int(sample["size"]), int(sample["offset"]))
                if zlib.crc32(jpeg) != sample["crc32"]:
                    raise Violation(f"picture {i} cannot be compared: it is damaged in its shard")
                if records.record_of(jpeg, task.file.kind, task.file.size).tobytes() != data:
                    raise Violation(f"picture {i} is not that of its shard")
        stored = file.read()
        sha256.update(stored)
        for i in np.flatnonzero(np.frombuffer(stored, DIGEST) != digests)[:1]:
            raise Violation(f"picture {i} is not that of its digest")
        if sha256.hexdigest() != task.promised.sha256:
            raise Violation(f"its SHA-256 is not that of {FILE_NAME}")
