"""Shards of a data set in a store, through a folder on disk: right bytes, a bound that holds; and what may fail."""

import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import build, one_line
from pipeline import UserError, files, manifest, storage
from pipeline.manifest import DatasetError, Manifest
from pipeline.online import cache as module
from pipeline.online.cache import ShardCache
from pipeline.storage import Location, StorageError
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures

pytestmark = pytest.mark.proof

SHARDS = 12
PIECE = 8192  # bytes: a shard comes in three
AMPLE = 2**30  # bytes


@pytest.fixture(scope="module")
def built(little: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cached") / "dataset"
    result = build(little, root, "--size", 32, "--samples-per-shard", 12, "--workers", 1)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def data(built: Path, s3: Store, bucket: Location, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The data set in a store; of its files, the shards alone."""
    for shard in range(SHARDS):
        storage.put_if_absent(bucket / name_of(shard), (built / name_of(shard)).read_bytes())
    monkeypatch.setattr(module, "PIECE", PIECE)
    s3.faults(0)
    return replace(manifest.load(built), root=bucket)


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """No test leaves a thread behind."""
    yield
    soon(lambda: not fetching())


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


def assert_right(descriptors: dict[int, int], built: Path) -> None:
    for shard, descriptor in descriptors.items():
        assert os.pread(descriptor, 2**24, 0) == (built / name_of(shard)).read_bytes()


def place(folder: Path, data: Manifest) -> Path:
    return folder / data.identity / "train"


def on_disk(folder: Path, data: Manifest) -> set[int]:
    return {int(path.name[-10:-4]) for path in place(folder, data).glob("*.tar")}


def fetched(s3: Store) -> Counter[int]:
    """Return how many pieces of each shard were asked for since the last `faults`."""
    requests = [request for request in s3.seen()["requests"] if request.startswith("GET ") and ".tar" in request]
    return Counter(int(request.partition(".tar")[0][-6:]) for request in requests)


def soon(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "penstock-fetch"]


def refused(cache: ShardCache, shards: list[int], kind: type[UserError], *words: str) -> None:
    """Check that a lease is refused in a line."""
    with pytest.raises(kind) as error, cache.lease(shards):
        pytest.fail("leased")
    one_line(error, *words)


def test_every_byte_is_the_sources_and_the_bound_holds(data: Manifest, built: Path, tmp_path: Path):
    limit, most, over = limit_of(data, 4), [0], threading.Event()
    order = random.Random(1).sample(range(SHARDS), SHARDS)
    with ShardCache(data, "train", tmp_path, limit) as cache:

        def watch() -> None:
            while not over.is_set():
                with cache._changed:  # else a sum counts what is deleted and what is created meanwhile
                    most.append(sum(path.stat().st_size for path in place(tmp_path, data).iterdir()))
                time.sleep(0.001)

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            for _ in range(2):
                cache.ahead(order)
                for shard in order:
                    with cache.lease([shard]) as descriptors:
                        assert_right(descriptors, built)
                        with pytest.raises(OSError, match="Bad file descriptor"):
                            os.write(descriptors[shard], b"x")
        finally:
            over.set()
            watching.join()
        assert not any(str(tmp_path) in os.path.realpath(path) for path in Path("/proc/self/fd").iterdir())
    assert limit // 2 < max(most) <= limit
    assert len(most) > 100
    assert not list(tmp_path.rglob("*.part"))


def test_what_comes_first_and_what_goes_first(s3: Store, data: Manifest, tmp_path: Path):
    with ShardCache(data, "train", tmp_path, limit_of(data, 3), fetchers=1) as cache:

        def lease(shard: int, then: set[int]) -> None:
            with cache.lease([shard]):
                pass
            soon(lambda: on_disk(tmp_path, data) == then and not fetching())

        cache.ahead([5, 3, 8, 1])
        soon(lambda: on_disk(tmp_path, data) == {5, 3, 8})
        assert list(fetched(s3)) == [5, 3, 8]
        lease(5, {5, 3, 8})  # it may be leased again before the next turn
        lease(3, {3, 8, 1})  # the turn of 5 is over
        lease(0, {3, 8, 0})  # a lease waits for it: what is furthest away goes
        lease(8, {8, 0, 1})  # the turns of 3 and 0 are over; 3 was released first
        cache.ahead([2, 8, 7])
        soon(lambda: on_disk(tmp_path, data) == {2, 8, 7})  # what is not in the list goes
        with cache.lease([2]), cache.lease([8]):
            cache.ahead([4, 6])
            soon(lambda: on_disk(tmp_path, data) == {2, 8, 4})  # what is leased stays


@pytest.mark.parametrize(("size", "most"), [(16, 1.0), (3, 2.9)])  # 3: the first batches lack some of the shards
def test_batches_that_touch_some_shards_of_a_window_do_not_fetch_again_and_again(
    size: int, most: float, s3: Store, data: Manifest, tmp_path: Path
):
    """40 batches of each window of three shards, leased one by one, in room for two windows."""
    draws = random.Random(2)
    with ShardCache(data, "train", tmp_path, limit_of(data, 6)) as cache:
        cache.ahead(range(SHARDS))
        for start in range(0, SHARDS, 3):
            for _ in range(40):
                with cache.lease(set(draws.choices(range(start, start + 3), k=size))):
                    time.sleep(0.0005)
    times = {shard: count / pieces(data, shard) for shard, count in fetched(s3).items()}
    assert SHARDS <= sum(times.values()) <= most * SHARDS, times


def test_a_second_run_fetches_what_is_damaged_alone(s3: Store, data: Manifest, built: Path, tmp_path: Path):
    for damaged, expected in (((), set(range(SHARDS))), ((), set()), ((1, 2), {1, 2})):
        for shard in damaged:
            path = place(tmp_path, data) / Path(name_of(shard)).name
            whole = path.read_bytes()
            path.write_bytes(whole[:-512] if shard == 1 else whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
        s3.faults(0)
        with ShardCache(data, "train", tmp_path, AMPLE) as cache:
            cache.ahead(range(SHARDS))
            with cache.lease(range(SHARDS)) as descriptors:
                assert_right(descriptors, built)
        assert len(on_disk(tmp_path, data)) == SHARDS
        assert set(fetched(s3)) == expected
    s3.faults(0)
    small = limit_of(data, 3)
    with ShardCache(data, "train", tmp_path, small) as cache:  # what an ampler run has left is deleted
        cache.ahead([9, 10, 11])
        assert on_disk(tmp_path, data) == {9, 10, 11}
    assert not fetched(s3)


def test_a_shard_changed_in_the_store_is_refused_by_name(data: Manifest, built: Path, bucket: Location, tmp_path: Path):
    right, file = storage.read_bytes(bucket / name_of(1)), str(bucket / name_of(1))
    with ShardCache(data, "train", tmp_path, AMPLE) as cache:
        for content in (right[:-1] + b"x", right[:-512]):
            files.write_bytes_aside(bucket / name_of(1), content)
            cache.ahead([0, 1, 2, 3])
            with cache.lease([0, 2, 3]):
                pass
            words = "changed or damaged in the store", "tools/verify_shards.py"
            refused(cache, [0, 1], DatasetError, file, *words)
        storage.remove(bucket / name_of(1))
        refused(cache, [1], DatasetError, file, "missing in the store")
        assert on_disk(tmp_path, data) == {0, 2, 3}
        files.write_bytes_aside(bucket / name_of(1), right)
        with cache.lease([1]) as descriptors:
            assert_right(descriptors, built)


def test_a_first_download_with_wrong_bytes_is_repeated(
    data: Manifest, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads, real = [], storage.read_range

    def garbled(file: str, offset: int, size: int) -> bytes:
        reads.append(offset)
        return bytes(size) if len(reads) == 2 else real(file, offset, size)

    monkeypatch.setattr(storage, "read_range", garbled)
    with ShardCache(data, "train", tmp_path, AMPLE) as cache, cache.lease([6]) as descriptors:
        assert_right(descriptors, built)
    assert reads.count(0) == 2


def test_what_fails_ahead_reaches_the_lease_and_the_next_lease_tries_again(
    s3: Store, data: Manifest, built: Path, tmp_path: Path
):
    s3.faults(1, kinds=["denied"], only="000002.tar")
    with ShardCache(data, "train", tmp_path, AMPLE) as cache:
        cache.ahead(range(6))
        soon(lambda: on_disk(tmp_path, data) == {0, 1, 3, 4, 5} and not fetching())
        refused(cache, [2], StorageError, name_of(2), "access denied")
        cache.ahead([2])  # fails once more, which the next lease forgets
        soon(lambda: not fetching())
        s3.faults(0)
        with cache.lease([2]) as descriptors:
            assert_right(descriptors, built)


def test_close_amid_a_fetch_waits_for_no_answer(s3: Store, data: Manifest, tmp_path: Path):
    errors: list[BaseException] = []
    cache = ShardCache(data, "train", tmp_path, AMPLE, fetchers=2)
    with cache.lease([0]):
        pass
    s3.faults(0, delay=2.0)

    def wait() -> None:
        try:
            with cache.lease([1]):
                pass
        except RuntimeError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    cache.ahead(range(SHARDS))
    soon(lambda: len(list(place(tmp_path, data).glob("*.part"))) == 2)
    began = time.monotonic()
    cache.close()
    assert time.monotonic() - began < 1
    assert [path.name for path in place(tmp_path, data).iterdir()] == [Path(name_of(0)).name]
    waiting.join(1)
    assert str(errors[0]) == "the shard cache is closed"
    with pytest.raises(RuntimeError), cache.lease([0]):
        pytest.fail("leased")
    soon(lambda: not fetching())
    assert [path.name for path in place(tmp_path, data).iterdir()] == [Path(name_of(0)).name]


def test_caches_share_a_folder(s3: Store, data: Manifest, built: Path, tmp_path: Path):
    """Each uses what the others have fetched, and fetches again what they delete."""
    s3.faults(0, delay=0.005)
    right = []

    def walk(cache: ShardCache) -> None:
        cache.ahead(range(SHARDS))
        for shard in range(SHARDS):
            with cache.lease([shard]) as descriptors:
                assert_right(descriptors, built)
        right.append(cache)

    with ExitStack() as stack:
        caches = [stack.enter_context(ShardCache(data, "train", tmp_path, AMPLE)) for _ in range(3)]
        walks = [threading.Thread(target=walk, args=[cache]) for cache in caches]
        for thread in walks:
            thread.start()
        for thread in walks:
            thread.join(20)
        assert len(right) == 3
        once = sum(pieces(data, shard) for shard in range(SHARDS))
        assert once <= sum(fetched(s3).values()) <= 3 * once
        assert len(list(place(tmp_path, data).iterdir())) == len(on_disk(tmp_path, data)) == SHARDS
        narrow = stack.enter_context(ShardCache(data, "train", tmp_path, limit_of(data, 1)))
        with caches[0].lease([0]) as descriptors, narrow.lease([5]):
            assert on_disk(tmp_path, data) == {5}
            assert_right(descriptors, built)
        with caches[0].lease(range(4)) as descriptors:
            assert_right(descriptors, built)


def test_parts_of_the_dead_go_and_those_of_the_living_stay(data: Manifest, tmp_path: Path):
    folder = place(tmp_path, data)
    folder.mkdir(parents=True)
    dead, living = folder / "train-000001.1a.part", folder / "train-000002.2b.part"
    for part in (dead, living):
        part.write_bytes(b"left")
    os.utime(dead, (time.time() - module.STALE - 1,) * 2)
    with ShardCache(data, "train", tmp_path, AMPLE):
        assert [path.name for path in folder.iterdir()] == [living.name]


def test_limits_are_refused(data: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with ShardCache(data, "train", tmp_path, limit_of(data, 3)) as cache, cache.lease([0, 1]):
        limit = f"{limit_of(data, 3):,}"
        refused(
            cache, [1, 2, 3], UserError, "4 shards in use", limit, "raise it", "order='shards' with a smaller window"
        )
        with cache.lease([1, 2]):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        ShardCache(data, "train", tmp_path / "file", AMPLE)
    one_line(error, str(tmp_path / "file"), "Not a directory", "another cache folder")
    there = sum(path.stat().st_size for path in place(tmp_path, data).glob("*.tar"))
    needed = sum(shard.bytes for shard in data.splits["train"].shards) - there
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: shutil._ntuple_diskusage(free, 0, free))
        if free == needed:
            ShardCache(data, "train", tmp_path, AMPLE).close()
            continue
        with pytest.raises(UserError) as error:
            ShardCache(data, "train", tmp_path, AMPLE)
        one_line(error, str(tmp_path), f"{free:,} bytes free", f"needs {needed:,}", "lower the cache limit")


def test_a_folder_that_vanishes_is_one_line(data: Manifest, tmp_path: Path):
    with ShardCache(data, "train", tmp_path / "cache", AMPLE) as cache:
        shutil.rmtree(tmp_path / "cache")
        refused(cache, [0], UserError, str(tmp_path / "cache"), "No such file", "another cache folder")
