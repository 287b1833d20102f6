"""Locations on this machine, in memory and on an S3 server over HTTP: what is read is right, whatever fails between."""

import errno
import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from pipeline import files, manifest, storage
from pipeline.errors import UserError
from pipeline.manifest import DatasetError
from pipeline.storage import Entry, Location, objects, readahead, retries
from pipeline.storage.readahead import read_ahead
from pipeline.storage.retries import StorageError, retried
from s3 import Store, empty_bucket, reconnect, running_server  # noqa: F401 – two are fixtures

STRANGE = "a b+c/ü#?%20&=[1]*.jpg"  # a path whose bytes mean something in URLs and in patterns
DATA = np.random.default_rng(0).bytes(300_000)
FOLDERS = itertools.count()


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder of each kind."""
    if request.param == "local":
        return storage.location(tmp_path)
    pytest.importorskip("upath")
    if request.param == "memory":
        return storage.location(f"memory://folder-{next(FOLDERS)}")
    return storage.location(request.getfixturevalue("s3").url) / "deep" / "folder"


@pytest.fixture
def bucket(s3: Store) -> Location:
    return storage.location(s3.url)


def one_line(error: pytest.ExceptionInfo[BaseException], *words: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    for word in words:
        assert word in text
    return text


# Locations


def test_a_location_is_a_path_or_a_url(tmp_path: Path):
    pytest.importorskip("upath")
    for text in ("a/b", "/a/b", "a:/b", "s3:/a", tmp_path):
        assert storage.location(text) == Path(text)
        assert not storage.is_remote(text)
    assert storage.location((tmp_path / "ü b#?").as_uri()) == tmp_path / "ü b#?"
    place = storage.location("memory://a/b")
    assert storage.location(place) is place
    assert storage.is_remote(place)
    assert storage.is_remote("memory://a/b")
    assert (str(place / "c d"), (place / "c d").name) == ("memory://a/b/c d", "c d")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://", "no bucket"),
        ("s3:///key", "no bucket"),
        ("nothing://x", "nothing"),
        ("gs://x/y", "gcsfs"),
        ("file://host/x", "another machine"),
        ("s3://x::y", "::"),
    ],
)
def test_an_impossible_location_is_one_line(text: str, words: str):
    pytest.importorskip("s3fs")
    with pytest.raises(UserError) as error:
        storage.location(text)
    one_line(error, text.split("/")[0], words)


@pytest.mark.parametrize("package", ["fsspec", "upath", "s3fs"])
def test_a_missing_package_is_one_line(package: str):
    pytest.importorskip("s3fs")
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from pipeline import errors, storage; print(storage.location('a/b'))\n"
        "try: storage.location('s3://bucket/x')\n"
        "except errors.UserError as error: print(error)"
    )
    path, message = _python(code).splitlines()
    assert path == "a/b"
    assert message.startswith("s3://: a package is missing")
    assert "pip install 'penstock[s3]'" in message


def test_local_work_imports_no_remote_package():
    code = "import sys, pipeline.manifest, pipeline.files; print(sorted({'fsspec', 'upath', 's3fs'} & {*sys.modules}))"
    assert _python(code) == "[]"


def _python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


# The same calls everywhere


def test_what_is_written_is_listed_and_read(folder: Location):
    place = folder / STRANGE
    assert not storage.exists(place)
    promised = {"bytes": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
    assert files.write_bytes_aside(place, DATA) == promised
    files.write_bytes_aside(folder / "b", b"")
    files.write_bytes_aside(folder / "B", b"x")
    assert storage.scan(folder) == [
        Entry("B", True, False, 1),
        Entry("a b+c", False, True, 0),
        Entry("b", True, False, 0),
    ]
    name = STRANGE.partition("/")[2]
    assert storage.scan(folder / "a b+c") == [Entry(name, True, False, len(DATA))]
    assert storage.read_bytes(place) == DATA
    assert storage.read_bytes(folder / "b") == b""
    kinds = [
        (storage.exists(p), storage.is_file(p), storage.is_dir(p)) for p in (place, folder / "a b+c", folder / "c")
    ]
    assert kinds == [(True, True, False), (True, False, True), (False, False, False)]
    assert storage.sizes(folder, [STRANGE, "b", "c", "a b+c"]) == {STRANGE: len(DATA), "b": 0}


def test_ranges_are_those_of_the_bytes(folder: Location):
    files.write_bytes_aside(folder / STRANGE, DATA)
    n = len(DATA)
    for offset, size in [(0, 10), (7, 0), (n - 5, 5), (n - 5, 50), (n, 10), (n + 9, 10), (0, n), (1000, 100_000)]:
        assert storage.read_range(str(folder / STRANGE), offset, size) == DATA[offset : offset + size]
    with storage.opened(folder / STRANGE) as (read, total):
        assert total == n
        random = np.random.default_rng(1)
        for offset, size in zip(random.integers(0, n + 100, 200).tolist(), random.integers(0, 9000, 200).tolist()):
            assert read(size, offset) == DATA[offset : offset + size]


def test_what_is_missing_raises_as_a_local_file_does(folder: Location):
    files.write_bytes_aside(folder / "file", b"x")
    for call in (storage.read_bytes, storage.stamp, storage.scan, lambda place: storage.read_range(str(place), 0, 1)):
        with pytest.raises(FileNotFoundError):
            call(folder / "nothing")
    with pytest.raises(NotADirectoryError):
        storage.scan(folder / "file")


def test_removal_is_exact_and_may_be_repeated(folder: Location):
    for name in ("a/x[1]/1", "a/x[1]/2/3", "a/x1/4", "b"):
        files.write_bytes_aside(folder / name, b"1")
    for _ in range(2):
        storage.remove_tree(folder / "a" / "x[1]")  # a pattern would match a/x1
        storage.remove_tree(folder / "nothing")
        storage.remove(folder / "b")
    assert [entry.name for entry in storage.scan(folder)] == ["a"]
    assert [entry.name for entry in storage.scan(folder / "a")] == ["x1"]


def test_a_stamp_changes_with_the_file(folder: Location):
    files.write_bytes_aside(folder / "a", b"123")
    before = storage.stamp(folder / "a")
    assert before == storage.stamp(folder / "a")
    time.sleep(0.01)
    files.write_bytes_aside(folder / "a", b"321")
    assert storage.stamp(folder / "a") != before
    assert before[0] == 3


def test_a_failed_write_leaves_nothing(folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    files.write_bytes_aside(folder / "shard", b"older")

    def write(file: files.HashingFile) -> None:
        file.write(DATA)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.write_aside(folder / "shard", write)
    assert storage.read_bytes(folder / "shard") == b"older"
    assert [entry.name for entry in storage.scan(folder) if entry.is_file] == ["shard"]
    assert not list(aside.iterdir())


def test_a_full_temporary_folder_is_one_line(bucket: Location):
    def write(file: files.HashingFile) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError) as error:
        files.write_aside(bucket / "shard", write)
    one_line(error, tempfile.gettempdir(), "No space left", f"{bucket}shard", "TMPDIR")
    assert not storage.exists(bucket / "shard")


def test_a_whole_file_is_read_in_pieces(folder: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "PIECE", 70_000)
    files.write_bytes_aside(folder / "a", DATA)
    assert storage.read_bytes(folder / "a") == DATA


# Local files


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path):
    barrier = threading.Barrier(2, timeout=30)

    def write(content: bytes) -> None:
        def fill(file: files.HashingFile) -> None:
            barrier.wait()
            for _ in range(100):
                file.write(content)
            barrier.wait()

        files.write_aside(tmp_path / "shard", fill)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [b"1", b"2"]))
    assert (tmp_path / "shard").read_bytes() in (100 * b"1", 100 * b"2")
    assert os.listdir(tmp_path) == ["shard"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path):
    code = (
        "import os, sys; from pathlib import Path; from pipeline import files\n"
        "files.write_aside(Path(sys.argv[1]) / 'shard', lambda file: os.kill(os.getpid(), 9))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=False)
    (left,) = os.listdir(tmp_path)
    assert left.startswith("shard.")
    (tmp_path / "tmp").write_bytes(b"")
    assert (files.sweep(tmp_path), files.sweep(tmp_path)) == (1, 0)
    assert os.listdir(tmp_path) == ["tmp"]


# Faults


def test_every_byte_is_right_though_a_third_of_the_answers_fail(
    s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retries, "TRIES", 12)  # of 300 calls, one in a hundred runs would fail five times
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
        assert len(storage.scan(bucket / "out")) == len(objects.below(f"{s3.url}/out")) == i + 1
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
    assert retries.TRIES <= s3.seen()["faults"] <= 3 * 2 * retries.TRIES


def test_a_failing_upload_is_one_line_and_leaves_nothing(s3: Store, bucket: Location):
    s3.faults(1, kinds=["slow_down"], only="PUT")
    with pytest.raises(StorageError) as error:
        files.write_bytes_aside(bucket / "a" / "shard", DATA)
    one_line(error, f"{s3.url}/a/shard", "cannot write", "5 tries")
    assert storage.scan(bucket) == []


@pytest.mark.parametrize("kind", ["lost", "slow_down"])
def test_an_upload_in_parts_survives_faults(kind: str, s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "PIECE", 5 * 2**20)
    monkeypatch.setattr(retries, "TRIES", 12)
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
    monkeypatch.setattr(objects, "PIECE", 5 * 2**20)
    s3.faults(1, kinds=[kind], only=f"POST /{s3.bucket}/shard?uploadId", times=1)
    files.write_bytes_aside(bucket / "shard", 60 * DATA)
    assert s3.seen()["faults"] == 1
    assert storage.read_bytes(bucket / "shard") == 60 * DATA


def test_what_another_machine_writes_is_seen(s3: Store, bucket: Location):
    files.write_bytes_aside(bucket / "a" / "1", b"1")
    assert (len(storage.scan(bucket / "a")), storage.exists(bucket / "a" / "2")) == (1, False)
    code = (
        "import sys; from pipeline import files, storage; files.write_bytes_aside(storage.location(sys.argv[1]), b'2')"
    )
    _python(code, bucket / "a" / "2")
    assert storage.exists(bucket / "a" / "2")
    assert storage.sizes(bucket, ["a/2"]) == {"a/2": 1}
    assert len(storage.scan(bucket / "a")) == 2


def test_what_cannot_help_is_not_tried_again(s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch):
    missing = storage.location("s3://no-such-bucket/x")
    for call in (storage.read_bytes, storage.exists, storage.scan, lambda place: files.write_bytes_aside(place, b"")):
        with pytest.raises(StorageError) as error:
            call(missing)
        one_line(error, "s3://no-such-bucket/x: no such bucket")
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
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)

    def failing(times: int, error: Exception) -> Callable[[], int]:
        calls = itertools.count(1)

        def action() -> int:
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
    monkeypatch.setattr(retries, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match="1 tries"):
        retried("s3://b/k", "read", failing(1, TimeoutError()))


def test_a_killed_upload_is_absent_or_whole(s3: Store, bucket: Location, tmp_path: Path):
    """SIGKILL amid the parts of an upload, over nothing and over an older file; then the parts are swept away."""
    code = (
        "import sys; from pathlib import Path; from pipeline.storage import objects\n"
        "objects.PIECE = 5 * 2**20; objects.upload(Path(sys.argv[1]), sys.argv[2])"
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
    objects.upload(source, f"{s3.url}/train/new")
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


# Many requests at a time, and few


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


def test_a_tree_is_walked_by_levels(folder: Location):
    for name in ("a/b/1", "a/2", "c/3", "4", ".git/5"):
        files.write_bytes_aside(folder / name, b"x")
    found = [(below, [entry.name for entry in entries]) for below, entries in storage.walk(folder)]
    assert found == [("", [".git", "4", "a", "c"]), ("a", ["2", "b"]), ("c", ["3"]), ("a/b", ["1"])]


def test_reading_ahead_keeps_the_order_and_its_bounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 1000)
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
    assert len(started) <= 2 * readahead.THREADS


def _in_a_child(place: Location) -> tuple[str, bytes, bytes, list[Entry]]:
    return str(place), storage.read_bytes(place / "a"), (place / "a").read_bytes(), storage.scan(place)


def test_locations_travel_to_spawned_processes(s3: Store, bucket: Location):
    files.write_bytes_aside(bucket / "in" / "a", DATA)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_in_a_child, [bucket / "in"] * 4))
    assert found == [(f"{s3.url}/in", DATA, DATA, [Entry("a", True, False, len(DATA))])] * 4
    assert pickle.loads(pickle.dumps(bucket / "in")) == bucket / "in"


# A dataset directory there


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


def test_a_public_bucket_needs_no_credentials(s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch):
    files.write_bytes_aside(bucket / "a", b"1")
    objects.filesystem("s3").chmod(f"{s3.bucket}/a", "public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")  # fsspec reads it when it is imported
    code = "import sys; from pipeline import storage; print(storage.read_bytes(storage.location(sys.argv[1])))"
    assert _python(code, f"{s3.url}/a") == "b'1'"
