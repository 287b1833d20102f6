"""Requests to an S3 server, many at a time and in order, few where little is read; and a server that fails.

Every byte is right, or one line says what is wrong; an object is there whole, or not at all.
"""

import io
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA, ROOT, one_line
from pipeline import files, manifest, storage, stores
from pipeline.manifest import DatasetError
from pipeline.storage import Entry, Location, StorageError, read_ahead, retried
from s3 import Store, empty_bucket, reconnect, running_server  # noqa: F401 – two are fixtures
from tars import tar_bytes

CALLS = (storage.read_bytes, storage.exists, storage.scan, lambda path: files.write_bytes_aside(path, b""))


@pytest.mark.proof
def test_the_headers_of_a_tar_take_few_requests(s3: Store, bucket: Location):
    data = tar_bytes((f"{i:04d}.jpg", bytes(20_000 + 17 * i)) for i in range(300))
    files.write_bytes_aside(bucket / "a.tar", data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar]
    s3.faults(0)
    with storage.opened(bucket / "a.tar") as (read, _):
        assert [read(512, at)[:8] for at in headers] == [f"{i:04d}.jpg".encode() for i in range(300)]
        near = len(s3.seen()["requests"])
        for at in (10, 6_000_000, 10):
            assert read(512, at) == data[at : at + 512]
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
        time.sleep(0.002)  # slower than the reads
        with lock:
            ahead -= 1
    assert 4 <= most[0] <= 9  # twice the threads, and the one in the caller's hands
    assert most[1] <= 8
    assert ahead == 0
    assert [task for task, _ in read_ahead([1, 2], lambda task: task, 4, lambda task: 5000)] == [1, 2]
    assert list(read_ahead([], read)) == []


def test_reading_ahead_raises_in_order_and_leaves_no_thread():
    started = []

    def read(task: int) -> int:
        started.append(task)
        time.sleep(0.01)
        return 10 // (task - 5)

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]

    results: list[int] = []
    with pytest.raises(ZeroDivisionError):
        results.extend(task for task, _ in read_ahead(range(100), read))
    assert results == [0, 1, 2, 3, 4]
    assert not threads()
    started.clear()
    reader = read_ahead(range(1000), read)
    assert next(reader) == (0, -2)
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
    remote = manifest.load(f"{s3.url}/data set")
    assert len(s3.seen()["requests"]) <= 7 < len(local.files)
    assert (remote.identity, remote.root) == (local.identity, bucket / "data set")
    assert np.array_equal(remote.samples("train"), local.samples("train"))
    assert np.array_equal(remote.statistics().mean_image, local.statistics().mean_image)
    shard = remote.splits["train"].shards[0]
    files.write_bytes_aside(remote.root / shard.name, b"short")
    with pytest.raises(DatasetError) as error:
        manifest.load(remote.root)
    one_line(error, f"{s3.url}/data set/{shard.name}: has 5 bytes, the manifest promises {shard.bytes}")
    storage.remove(remote.root / "dataset.json")
    with pytest.raises(DatasetError, match=r"dataset\.json: missing \(not a dataset directory\)"):
        manifest.load(remote.root)


def test_tries_are_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)

    def attempt(failures: int, error: Exception) -> int:
        errors = iter([error] * failures)

        def action(fs: object, path: str) -> int:
            for error in errors:
                raise error
            return 7

        return retried("s3://b/k", "read", action)

    assert attempt(4, TimeoutError()) == 7
    with pytest.raises(StorageError, match="5 tries"):
        attempt(5, ConnectionResetError("reset"))
    with pytest.raises(StorageError, match="cannot read: no"):
        attempt(1, ValueError("no"))
    with pytest.raises(ZeroDivisionError):
        attempt(1, ZeroDivisionError())
    monkeypatch.setattr(stores, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match="1 tries"):
        attempt(1, TimeoutError())


# A server that fails


@pytest.mark.proof
def test_every_byte_is_right_though_a_third_of_the_answers_fail(
    s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stores, "TRIES", 12)  # of 300 calls, one in a hundred runs would fail five times
    files.write_bytes_aside(bucket / "raw", DATA)
    s3.faults(0.3, seed=1)
    random = np.random.default_rng(2)
    ranges = list(zip(random.integers(0, 290_000, 200).tolist(), random.integers(1, 20_000, 200).tolist()))
    for (offset, size), data in read_ahead(ranges, lambda task: storage.read_range(f"{s3.url}/raw", *task)):
        assert data == DATA[offset : offset + size]
    assert s3.seen()["faults"] > 40
    assert s3.seen()["most"] > 4  # at a time
    parts = {f"{i:02d}": DATA[i : 1001 * i] for i in range(20)}
    for name, part in parts.items():
        files.write_bytes_aside(bucket / "out" / name, part)
        assert storage.read_bytes(bucket / "out" / name) == part
    with storage.opened(bucket / "raw") as (read, total):
        assert b"".join(read(7_000, at) for at in range(0, total, 7_000)) == DATA
    s3.faults(0)
    assert storage.sizes(bucket / "out", parts) == {name: len(part) for name, part in parts.items()}


@pytest.mark.proof
@pytest.mark.parametrize(("kind", "length"), [("cut", 1000), ("short", 1000), ("short", len(DATA))])
def test_a_torn_answer_is_asked_for_again(kind: str, length: int, s3: Store, bucket: Location):
    """A whole object has a checksum, which botocore checks; a part of one has only its length."""
    files.write_bytes_aside(bucket / "raw", DATA)
    s3.faults(1, kinds=[kind], only=f"GET /{s3.bucket}/raw", times=1)
    assert storage.read_range(f"{s3.url}/raw", 0, length) == DATA[:length]
    assert s3.seen()["faults"] == 1


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["slow_down", "close", "short"])
def test_a_store_that_only_fails_is_one_line_soon(kind: str, s3: Store, bucket: Location):
    files.write_bytes_aside(bucket / "raw", DATA)
    s3.faults(1, kinds=[kind], only="GET")
    began = time.monotonic()
    with pytest.raises(StorageError) as error:
        storage.read_range(f"{s3.url}/raw", 10, 1000)
    assert time.monotonic() - began < 10
    one_line(error, f"{s3.url}/raw", "cannot read", "5 tries", "check the network and AWS_ENDPOINT_URL")
    # botocore tries 3 times, aiohttp twice where a connection breaks; s3fs's 5 tries must not multiply with them
    assert stores.TRIES <= s3.seen()["faults"] <= 3 * 2 * stores.TRIES


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["lost", "no_upload"])
def test_an_upload_begins_again_where_its_parts_are_gone(
    kind: str, s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch
):
    """Asked again to complete what it has completed, a store may say that there is no such upload."""
    monkeypatch.setattr(storage, "PIECE", 5 * 2**20)
    s3.faults(1, kinds=[kind], only=f"POST /{s3.bucket}/shard?uploadId", times=1)
    files.write_bytes_aside(bucket / "shard", 60 * DATA)
    assert s3.seen()["faults"] == 1
    assert storage.read_bytes(bucket / "shard") == 60 * DATA


@pytest.mark.proof
def test_an_error_that_lasts_is_not_tried_again(s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch):
    for call in CALLS:
        with pytest.raises(StorageError) as error:
            call(storage.location("s3://no-such-bucket/x"))
        one_line(error, "s3://no-such-bucket/x", "NoSuchBucket", "create the bucket")
    s3.faults(1, kinds=["denied"])
    for call in CALLS:
        with pytest.raises(StorageError) as error:
            call(bucket / "x")
        one_line(error, f"{s3.url}/x", "access denied", "AWS_PROFILE")
    assert s3.seen()["faults"] <= 6
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    reconnect()
    with pytest.raises(StorageError) as error:
        storage.read_bytes(bucket / "x")
    one_line(error, f"{s3.url}/x", "redentials", "AWS_ACCESS_KEY_ID")


@pytest.mark.proof
@pytest.mark.parametrize(("endpoint", "words"), [("http://127.0.0.1:1", "5 tries"), ("nonsense", "nonsense")])
def test_an_unreachable_endpoint_is_one_line(
    endpoint: str, words: str, s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    reconnect()
    for call in CALLS:
        with pytest.raises(StorageError) as error:
            call(bucket / "x")
        one_line(error, f"{s3.url}/x", words, "AWS_ENDPOINT_URL")


@pytest.mark.proof
def test_a_killed_upload_is_absent_or_whole(s3: Store, bucket: Location, tmp_path: Path):
    """SIGKILL amid the parts of an upload, over nothing and over an older file; then the parts are swept away."""
    code = (
        "import sys; from pathlib import Path; from pipeline import storage\n"
        "storage.PIECE = 5 * 2**20; storage.upload(Path(sys.argv[1]), storage.location(sys.argv[2]))"
    )
    source = tmp_path / "shard"
    source.write_bytes(200 * DATA)  # twelve parts
    files.write_bytes_aside(bucket / "train" / "older", b"older")
    for name in ("train/new", "train/older"):
        s3.faults(0, delay=0.2)
        command = [sys.executable, "-c", code, source, f"{s3.url}/{name}"]
        with subprocess.Popen(command, cwd=ROOT) as child:
            while sum("partNumber" in request for request in s3.seen()["requests"]) < 6:
                assert child.poll() is None
                time.sleep(0.02)
            child.kill()
    s3.faults(0)
    assert not storage.exists(bucket / "train" / "new")
    assert storage.scan(bucket / "train") == [Entry("older", True, False, 5)]
    assert storage.read_bytes(bucket / "train" / "older") == b"older"
    assert files.sweep(bucket / "val") == 0
    assert (files.sweep(bucket / "train"), files.sweep(bucket)) == (2, 0)
    storage.upload(source, bucket / "train" / "new")
    assert storage.read_bytes(bucket / "train" / "new") == source.read_bytes()


@pytest.mark.proof
def test_one_of_many_writers_of_an_absent_file_wins(s3: Store, bucket: Location):
    s3.faults(0.3, kinds=["lost", "slow_down"], seed=5)
    for i in range(5):
        path, plans = bucket / f"plan-{i}", [str(writer).encode() for writer in range(8)]
        with ThreadPoolExecutor(8) as pool:
            (stored,) = set(pool.map(lambda data, path=path: storage.put_if_absent(path, data), plans))
        assert storage.read_bytes(path) == stored
        assert storage.put_if_absent(path, b"later") == stored
