"""Requests: few where little is read, many at a time where much is, and what they bring in order."""

import io
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import one_line
from pipeline import files, manifest, storage
from pipeline.manifest import DatasetError
from pipeline.storage import Location, read_ahead
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures


@pytest.mark.proof
def test_the_headers_of_a_tar_take_few_requests(s3: Store, bucket: Location):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(300):
            info = tarfile.TarInfo(f"{i:04d}.jpg")
            info.size = 20_000 + 17 * i
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    files.write_bytes_aside(bucket / "a.tar", buffer.getvalue())
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        headers = [member.offset for member in tar]
    s3.faults(0)
    with storage.opened(bucket / "a.tar") as (read, _):
        assert [read(512, at)[:8] for at in headers] == [f"{i:04d}.jpg".encode() for i in range(300)]
        near = len(s3.seen()["requests"])
        for at in (10, 6_000_000, 10):
            assert read(512, at) == buffer.getvalue()[at : at + 512]
    assert near < 12
    assert len(s3.seen()["requests"]) == near + 3


def test_reading_ahead_keeps_the_order_and_its_bounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "AHEAD_BYTES", 1000)
    lock, ahead, most = threading.Lock(), 0, [0, 0]

    def read(task: int) -> int:
        nonlocal ahead
        with lock:
            ahead += 1
            most[task >= 100] = max(most[task >= 100], ahead)
        time.sleep(0.001 * (task % 3))
        return -task

    tasks = list(range(200))
    for i, (task, result) in enumerate(read_ahead(iter(tasks), read, 4, lambda task: 1 if task < 100 else 400)):
        assert (task, result) == (i, -i)
        with lock:
            ahead -= 1
    assert 4 <= most[0] <= 9  # twice the threads, and the one in the caller's hands
    assert most[1] <= 8
    assert ahead == 0
    assert [task for task, _ in read_ahead([1, 2], lambda task: task, 4, lambda task: 5000)] == [1, 2]
    assert list(read_ahead([], read)) == []


def test_reading_ahead_raises_in_place_and_leaves_no_thread():
    def read(task: int) -> int:
        time.sleep(0.01)
        return 10 // (task - 5)

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]

    results: list[int] = []
    with pytest.raises(ZeroDivisionError):
        results.extend(task for task, _ in read_ahead(range(100), read))
    assert results == [0, 1, 2, 3, 4]
    assert not threads()
    started = []

    def slow(task: int) -> int:
        started.append(task)
        time.sleep(0.01)
        return task

    reader: Iterator[tuple[int, int]] = read_ahead(range(1000), slow)
    assert next(reader) == (0, 0)
    assert threads()
    reader.close()
    assert not threads()
    assert len(started) <= 2 * storage.THREADS


@pytest.mark.proof
def test_a_manifest_is_loaded_by_few_requests(s3: Store, bucket: Location, dataset: Path):
    local = manifest.load(dataset)
    for name in ("dataset.json", *local.files):
        files.write_bytes_aside(bucket / "data set" / name, (dataset / name).read_bytes())
    s3.faults(0)
    found = manifest.load(f"{s3.url}/data set")
    assert len(s3.seen()["requests"]) <= 7 < len(local.files)
    assert found.identity == local.identity
    assert found.root == bucket / "data set"
    assert np.array_equal(found.samples("train"), local.samples("train"))
    assert np.array_equal(found.statistics().mean_image, local.statistics().mean_image)
    shard = found.splits["train"].shards[0]
    files.write_bytes_aside(found.root / shard.name, b"short")
    with pytest.raises(DatasetError) as error:
        manifest.load(found.root)
    one_line(error, f"{s3.url}/data set/{shard.name}: has 5 bytes, the manifest promises {shard.bytes}")
    storage.remove(found.root / shard.name)
    with pytest.raises(DatasetError, match="missing, the manifest promises"):
        manifest.load(found.root)
    storage.remove(found.root / "dataset.json")
    with pytest.raises(DatasetError, match=r"dataset\.json: missing \(not a dataset directory\)"):
        manifest.load(found.root)
    with pytest.raises(DatasetError, match="no such directory"):
        manifest.load(f"{s3.url}/nothing")
