"""Locations on this machine, in memory and on an S3 server over HTTP: the same calls, and the same answers."""

import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA, LITTLE, ROOT, build, digests, one_line
from pipeline import UserError, files, storage
from pipeline.storage import Entry, Location
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures

STRANGE = "a b+c/ü#?%20&=[1]*.jpg"  # a path whose bytes mean something in URLs and in patterns
FOLDERS = itertools.count()


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.proof)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder of each kind."""
    if request.param == "local":
        return storage.location(tmp_path)
    pytest.importorskip("upath")
    if request.param == "memory":
        return storage.location(f"memory://folder-{next(FOLDERS)}")
    return storage.location(request.getfixturevalue("s3").url) / "deep" / "folder"


# Locations


def test_a_location_is_a_path_or_a_url(tmp_path: Path):
    pytest.importorskip("upath")
    for text in ("a/b", "/a/b", "a:/b", "s3:/a", tmp_path):
        assert storage.location(text) == Path(text)
        assert not storage.is_remote(text)
    assert storage.location((tmp_path / "ü b#?").as_uri()) == tmp_path / "ü b#?"
    remote = storage.location("memory://a/b")
    assert storage.location(remote) is remote
    assert storage.is_remote(remote)
    assert storage.is_remote("memory://a/b")
    assert (str(remote / "c d"), (remote / "c d").name) == ("memory://a/b/c d", "c d")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3:///key", "s3://BUCKET/FOLDER"),
        ("gs://x/y", "gcsfs"),
        ("ftp://host/x", "names no folder or file"),
        ("zip://x.zip", "names no folder or file"),
        ("file://host/x", "file:///FOLDER"),
        ("s3://x::y", "::"),
    ],
)
def test_an_impossible_location_is_one_line(text: str, words: str):
    pytest.importorskip("s3fs")
    with pytest.raises(UserError) as error:
        storage.location(text)
    one_line(error, text.split("/")[0], words)


def test_remote_packages_are_imported_for_remote_work_alone():
    pytest.importorskip("s3fs")
    code = (
        "import sys, pipeline.manifest, pipeline.files; print({'fsspec', 'upath', 's3fs'} & {*sys.modules})\n"
        "sys.modules['s3fs'] = None\n"
        "from pipeline import UserError, storage; print(storage.location('a/b'))\n"
        "try: storage.location('s3://bucket/x')\n"
        "except UserError as error: print(error)"
    )
    imported, path, message = python(code).splitlines()
    assert (imported, path) == ("set()", "a/b")
    assert message.startswith("s3://: ")
    assert "s3fs" in message
    assert "pip install 'penstock-imagenet[s3]'" in message


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


# The same calls everywhere


def test_a_written_file_is_listed_and_read(folder: Location, monkeypatch: pytest.MonkeyPatch):
    path = folder / STRANGE
    assert not storage.exists(path)
    promised = {"bytes": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
    assert files.write_bytes_aside(path, DATA) == promised
    files.write_bytes_aside(folder / "b", b"")
    files.write_bytes_aside(folder / "B", b"x")
    entries = [Entry("B", True, False, 1), Entry("a b+c", False, True, 0), Entry("b", True, False, 0)]
    assert storage.scan(folder) == entries
    name = STRANGE.partition("/")[2]
    assert storage.scan(folder / "a b+c") == [Entry(name, True, False, len(DATA))]
    assert storage.read_bytes(folder / "b") == b""
    monkeypatch.setattr(storage, "PIECE", 70_000)
    assert storage.read_bytes(path) == DATA
    paths = (path, folder / "a b+c", folder / "c")
    kinds = [(storage.exists(path), storage.is_file(path), storage.is_dir(path)) for path in paths]
    assert kinds == [(True, True, False), (True, False, True), (False, False, False)]
    assert storage.sizes(folder, [STRANGE, "b", "c", "a b+c"]) == {STRANGE: len(DATA), "b": 0}


def test_ranges_are_those_of_the_bytes(folder: Location):
    files.write_bytes_aside(folder / STRANGE, DATA)
    n = len(DATA)
    for offset, size in [(7, 0), (n - 5, 50), (0, n), (1000, 100_000)]:
        assert storage.read_range(str(folder / STRANGE), offset, size) == DATA[offset : offset + size]
    with storage.opened(folder / STRANGE) as (read, total):
        assert total == n
        random = np.random.default_rng(1)
        for offset, size in zip(random.integers(0, n + 100, 200).tolist(), random.integers(0, 9000, 200).tolist()):
            assert read(size, offset) == DATA[offset : offset + size]


def test_a_missing_file_raises_as_a_local_one_does(folder: Location):
    files.write_bytes_aside(folder / "file", b"x")
    for call in (storage.read_bytes, storage.stamp, storage.scan, lambda path: storage.read_range(str(path), 0, 1)):
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


@pytest.mark.proof
def test_a_full_temporary_folder_is_one_line(bucket: Location):
    def write(file: files.HashingFile) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError) as error:
        files.write_aside(bucket / "shard", write)
    one_line(error, tempfile.gettempdir(), "No space left", f"{bucket}shard", "TMPDIR")
    assert not storage.exists(bucket / "shard")


def test_a_tree_is_walked_by_levels(folder: Location):
    for name in ("a/b/1", "a/2", "c/3", "4", ".git/5"):
        files.write_bytes_aside(folder / name, b"x")
    levels = [(below, [entry.name for entry in entries]) for below, entries in storage.walk(folder)]
    assert levels == [("", [".git", "4", "a", "c"]), ("a", ["2", "b"]), ("c", ["3"]), ("a/b", ["1"])]


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


@pytest.mark.proof
def test_the_file_of_a_killed_writer_is_swept(tmp_path: Path):
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


# File systems that lack a call


def no_lock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: object, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_build_warns_in_one_line(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    no_lock(monkeypatch, number)
    root = tmp_path / "dataset"
    done = build(little, root, *LITTLE, "--workers", 1)
    assert done.exit_code == 0, done.output
    problem = "its file system has no locks, and nothing keeps a second process from writing there"
    assert done.stderr == f"warning: {root}: {problem}; start one at a time\n"
    assert digests(root) == little_dataset


def test_without_locks_parts_of_a_build_leave_each_others_files_alone(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    no_lock(monkeypatch, errno.ENOSYS)
    root, other = tmp_path / "dataset", tmp_path / "dataset/train/train-000001.tar.0a1b2c3d.tmp"
    for part in ("1/2", "2/2"):
        done = build(little, root, *LITTLE, "--workers", 1, "--part", part)
        assert done.exit_code == 0, done.output
        other.touch()  # as a part writes it that is at work
    assert other.exists()
    assert build(little, root, *LITTLE, "--merge").exit_code == 0
    assert digests(root) == little_dataset


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_fault(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """But an error of the disk is one, and names the folder."""
    sync, root = os.fsync, tmp_path / "dataset"

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    done = build(little, root, *LITTLE, "--workers", 1)
    if number == errno.EIO:
        assert (done.exit_code, done.stderr) == (2, f"Error: {root}/.build: Input/output error\n")
    else:
        assert done.exit_code == 0, done.output
        assert digests(root) == little_dataset


def test_errors_of_open_files_name_their_path(tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to("/proc/self/mem")  # nothing is at address 0
    for read in (storage.read_bytes, lambda path: storage.read_range(str(path), 0, 1), _first_byte):
        with pytest.raises(OSError, match="Input/output error") as error:
            read(link)
        assert error.value.filename == str(link)


def test_no_error_names_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "folder" / "file"
    with pytest.raises(FileNotFoundError) as gone:
        files.write_aside(path, lambda file: shutil.rmtree(path.parent))
    assert gone.value.filename == str(path)

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "tmp7gxz4qw6"))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)  # as without free inodes
    with pytest.raises(OSError, match="No space left") as no_inode:
        files.require_writable(path.parent)
    assert no_inode.value.filename == str(tmp_path)


def _first_byte(path: Path) -> bytes:
    with storage.opened(path) as (read, _):
        return read(1, 0)


# Between processes


@pytest.mark.proof
def test_files_of_another_machine_are_seen(s3: Store, bucket: Location):
    files.write_bytes_aside(bucket / "a" / "1", b"1")
    assert (len(storage.scan(bucket / "a")), storage.exists(bucket / "a" / "2")) == (1, False)
    code = "import sys; from pipeline import storage; storage.put_if_absent(storage.location(sys.argv[1]), b'2')"
    python(code, bucket / "a" / "2")
    assert storage.exists(bucket / "a" / "2")
    assert storage.sizes(bucket, ["a/2"]) == {"a/2": 1}
    assert len(storage.scan(bucket / "a")) == 2


@pytest.mark.proof
def test_a_public_bucket_needs_no_credentials(s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch):
    files.write_bytes_aside(bucket / "a", b"1")
    storage.filesystem("s3").chmod(f"{s3.bucket}/a", "public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")  # fsspec reads it when it is imported
    code = "import sys; from pipeline import storage; print(storage.read_bytes(storage.location(sys.argv[1])))"
    assert python(code, f"{s3.url}/a") == "b'1'"
