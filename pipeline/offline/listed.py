"""What a dataset directory holds by its manifest, and what lies there besides."""

import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

from pipeline import storage
from pipeline.manifest import FILE_NAME, STATISTICS_FILE, Manifest
from pipeline.offline.repair import REPAIR_FOLDER
from pipeline.offline.retry import RETRY_FOLDER
from pipeline.offline.shards import BUILD_FOLDER
from pipeline.storage import Location

LEFT_OVER = {
    BUILD_FOLDER: "unfinished: the build was killed at its very end; the same command again ends it",
    REPAIR_FOLDER: "left by a repair that was killed; delete it",
    RETRY_FOLDER: "unfinished: build_shards.py --retry-skipped was killed; the same command again ends it",
}


class Failure(NamedTuple):
    file: str  # below the dataset directory
    what: str


def expected(found: Manifest) -> set[str]:
    """What a dataset directory holds besides its manifest."""
    tars = [shard.name for split in found.splits.values() for shard in split.shards]
    tables = [f"{split}/samples.npy" for split in found.splits]
    return {*tars, *(index(name) for name in tars), *tables, STATISTICS_FILE, "mean.png", "skipped.jsonl"}


def index(tar: str) -> str:
    return tar.removesuffix(".tar") + ".idx"


def unlisted(found: Manifest) -> Iterator[Failure]:
    known = expected(found) | {FILE_NAME} | found.files.keys()
    if storage.is_remote(found.root):
        yield from _unlisted_objects(found.root, known)
        return
    for folder, folders, files in os.walk(found.root):
        inner = Path(folder).relative_to(found.root)
        for name in sorted(LEFT_OVER.keys() & set(folders)) if inner == Path() else ():
            folders.remove(name)
            yield Failure(name, LEFT_OVER[name])
        links = [name for name in folders if name not in found.splits and os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            if (path := (inner / name).as_posix()) not in known:
                yield Failure(path, f"not listed in {FILE_NAME}")
        folders.sort()


def _unlisted_objects(root: Location, known: Set[str]) -> Iterator[Failure]:
    for below, entries in storage.walk(root):
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir and path in LEFT_OVER:
                yield Failure(path, LEFT_OVER[path])
            elif entry.is_file and path not in known:
                yield Failure(path, f"not listed in {FILE_NAME}")
