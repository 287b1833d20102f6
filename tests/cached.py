"""A data set in a store and the folder that caches its shards: what the tests of the cache share."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import build
from pipeline import manifest, storage
from pipeline.manifest import Manifest
from pipeline.online import cache as module
from pipeline.storage import Location, read_ahead
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures

SHARDS = 12
PIECE = 8192  # bytes: a shard comes in three
AMPLE = 2**30  # bytes


@pytest.fixture(scope="module", name="built")
def built_locally(little: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cached") / "dataset"
    result = build(little, root, "--size", 32, "--samples-per-shard", 12, "--workers", 1)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(name="data")
def data_in_store(built: Path, s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The data set in a store; of its files, the shards alone."""
    names = [name_of(shard) for shard in range(SHARDS)]
    for _ in read_ahead(names, lambda name: storage.put_if_absent(bucket / name, (built / name).read_bytes())):
        pass
    monkeypatch.setattr(module, "PIECE", PIECE)
    data = replace(manifest.load(built), root=bucket)
    assert [shard.name for shard in data.splits["train"].shards] == names
    s3.faults(0)
    return data


def limit_of(data: Manifest, shards: int) -> int:
    """Bytes that any so many shards fit in, and no more shards than that."""
    sizes = sorted(data.files[name_of(shard)].bytes for shard in range(SHARDS))
    assert shards == SHARDS or sum(sizes[: shards + 1]) > sum(sizes[-shards:])
    return sum(sizes[-shards:])


def pieces(data: Manifest, shard: int) -> int:
    """Return the requests for a whole shard."""
    return -(-data.files[name_of(shard)].bytes // PIECE)


def name_of(shard: int) -> str:
    return f"train/train-{shard:06d}.tar"


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, 2**24, 0)


def place(folder: Path, data: Manifest) -> Path:
    return folder / data.identity / "train"


def on_disk(folder: Path, data: Manifest) -> set[int]:
    return {int(path.name[-10:-4]) for path in place(folder, data).glob("*.tar")}


def fetched(s3: Store) -> Counter[int]:
    """How many pieces of each shard were asked for since the last `faults`."""
    return Counter(
        int(request.partition(".tar")[0][-6:])
        for request in s3.seen()["requests"]
        if request.startswith("GET ") and ".tar" in request
    )


def soon(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "penstock-fetch"]


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """No test leaves a thread behind."""
    yield
    soon(lambda: not fetching())
