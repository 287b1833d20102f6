"""Objects on an S3 server that fails: every byte is right or one line says what is wrong; all is there, or nothing."""

import hashlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA, ROOT, one_line
from pipeline import files, storage
from pipeline.storage import Entry, Location, StorageError, read_ahead, retried
from s3 import Store, empty_bucket, reconnect, running_server  # noqa: F401 – two are fixtures

pytestmark = pytest.mark.proof


def test_every_byte_is_right_though_a_third_of_the_answers_fail(
    s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "TRIES", 12)  # of 300 calls, one in a hundred runs would fail five times
    files.write_bytes_aside(bucket / "raw", DATA)
    s3.faults(0.3, seed=1)
    random = np.random.default_rng(2)
    ranges = list(zip(random.integers(0, 290_000, 200).tolist(), random.integers(1, 20_000, 200).tolist()))
    for (offset, size), data in read_ahead(ranges, lambda each: storage.read_range(f"{s3.url}/raw", *each)):
        assert data == DATA[offset : offset + size]
    assert s3.seen()["faults"] > 40
    assert s3.seen()["most"] > 4  # at a time
    for i in range(20):
        part = DATA[i : i + 1000 * i]
        files.write_bytes_aside(bucket / "out" / f"{i:02d}", part)
        assert storage.stamp(bucket / "out" / f"{i:02d}")[0] == len(part)
        assert storage.read_bytes(bucket / "out" / f"{i:02d}") == part
        assert len(storage.scan(bucket / "out")) == i + 1
    with storage.opened(bucket / "raw") as (read, total):
        assert b"".join(read(7_000, at) for at in range(0, total, 7_000)) == DATA
    s3.faults(0)
    assert [storage.read_bytes(bucket / "out" / f"{i:02d}") for i in range(20)] == [
        DATA[i : 1001 * i] for i in range(20)
    ]


@pytest.mark.parametrize("kind", ["cut", "short"])
@pytest.mark.parametrize("length", [1000, len(DATA)])
def test_a_torn_answer_is_asked_for_again(kind: str, length: int, s3: Store, bucket: Location):
    """Of a whole object the checksum tells (botocore checks it), of a part of one only the length."""
    files.write_bytes_aside(bucket / "raw", DATA)
    s3.faults(1, kinds=[kind], only=f"GET /{s3.bucket}/raw", times=1)
    assert storage.read_range(f"{s3.url}/raw", 0, length) == DATA[:length]
    assert s3.seen()["faults"] == 1


@pytest.mark.parametrize("kind", ["slow_down", "internal", "close", "cut", "short"])
def test_a_store_that_only_fails_is_one_line_soon(kind: str, s3: Store, bucket: Location):
    files.write_bytes_aside(bucket / "raw", DATA)
    s3.faults(1, kinds=[kind], only="GET")
    began = time.monotonic()
    with pytest.raises(StorageError) as error:
        storage.read_range(f"{s3.url}/raw", 10, 1000)
    assert time.monotonic() - began < 10
    one_line(error, f"{s3.url}/raw", "cannot read", "5 tries", "check the network and AWS_ENDPOINT_URL")
    # botocore tries 3 times, aiohttp twice where a connection breaks; s3fs's 5 tries must not multiply with them
    assert storage.TRIES <= s3.seen()["faults"] <= 3 * 2 * storage.TRIES


def test_a_failing_upload_is_one_line_and_leaves_nothing(s3: Store, bucket: Location):
    s3.faults(1, kinds=["slow_down"], only="PUT")
    with pytest.raises(StorageError) as error:
        files.write_bytes_aside(bucket / "a" / "shard", DATA)
    one_line(error, f"{s3.url}/a/shard", "cannot write", "5 tries")
    assert storage.scan(bucket) == []


@pytest.mark.parametrize("kind", ["lost", "slow_down"])
def test_an_upload_in_parts_survives_faults(kind: str, s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "PIECE", 5 * 2**20)
    monkeypatch.setattr(storage, "TRIES", 12)
    data = 60 * DATA  # four parts
    s3.faults(0.3, kinds=[kind], seed=3, only="shard")
    files.write_bytes_aside(bucket / "shard", data)
    assert s3.seen()["faults"]
    s3.faults(0)
    assert hashlib.sha256(storage.read_bytes(bucket / "shard")).digest() == hashlib.sha256(data).digest()


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


def test_what_cannot_help_is_not_tried_again(s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch):
    missing = storage.location("s3://no-such-bucket/x")
    for call in (storage.read_bytes, storage.exists, storage.scan, lambda place: files.write_bytes_aside(place, b"")):
        with pytest.raises(StorageError) as error:
            call(missing)
        one_line(error, "s3://no-such-bucket/x", "NoSuchBucket", "create the bucket")
    s3.faults(1, kinds=["denied"])
    for call in (storage.read_bytes, storage.scan, lambda place: files.write_bytes_aside(place, b"")):
        with pytest.raises(StorageError) as error:
            call(bucket / "x")
        one_line(error, f"{s3.url}/x", "access denied", "AWS_PROFILE")
    assert s3.seen()["faults"] <= 5
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    reconnect()
    with pytest.raises(StorageError) as error:
        storage.read_bytes(bucket / "x")
    one_line(error, f"{s3.url}/x", "redentials", "AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize(("endpoint", "words"), [("http://127.0.0.1:1", "5 tries"), ("nonsense", "nonsense")])
def test_an_unreachable_endpoint_is_one_line(
    endpoint: str, words: str, s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    reconnect()
    for call in (storage.read_bytes, storage.exists, storage.scan, lambda place: files.write_bytes_aside(place, b"")):
        with pytest.raises(StorageError) as error:
            call(bucket / "x")
        one_line(error, f"{s3.url}/x", words, "AWS_ENDPOINT_URL")


def test_tries_are_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)

    def failing(times: int, error: Exception) -> Callable[[], int]:
        calls = itertools.count(1)

        def action(fs: object, path: str) -> int:
            if (call := next(calls)) <= times:
                raise error
            return call

        return action

    assert retried("s3://b/k", "read", failing(4, TimeoutError())) == 5
    with pytest.raises(StorageError, match="5 tries"):
        retried("s3://b/k", "read", failing(5, ConnectionResetError("reset")))
    with pytest.raises(StorageError, match="cannot read: no"):
        retried("s3://b/k", "read", failing(1, ValueError("no")))
    with pytest.raises(ZeroDivisionError):
        retried("s3://b/k", "read", failing(1, ZeroDivisionError()))
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match="1 tries"):
        retried("s3://b/k", "read", failing(1, TimeoutError()))


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


def test_of_many_who_put_one_file_one_does(s3: Store, bucket: Location):
    s3.faults(0.3, kinds=["lost", "slow_down"], seed=5)
    for i in range(5):
        place, mine = bucket / f"plan-{i}", [str(who).encode() for who in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda data, place=place: storage.put_if_absent(place, data), mine))
        assert len(set(found)) == 1
        assert found[0] == storage.read_bytes(place)
        assert storage.put_if_absent(place, b"later") == found[0]
