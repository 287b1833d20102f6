"""Shards of a data set in a store, through a folder on disk: right bytes, a bound that holds; and what may fail."""

import os
import random
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cached import (  # noqa: F401 – three are fixtures
    AMPLE,
    SHARDS,
    built_locally,
    content,
    data_in_store,
    fetched,
    fetching,
    limit_of,
    name_of,
    none_left,
    on_disk,
    pieces,
    place,
    soon,
)
from conftest import one_line
from pipeline import UserError, files, storage
from pipeline.manifest import DatasetError, Manifest
from pipeline.online import cache as module
from pipeline.online.cache import ShardCache
from pipeline.storage import Location, StorageError
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures

pytestmark = pytest.mark.proof


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
                        assert content(descriptors[shard]) == (built / name_of(shard)).read_bytes()
                        with pytest.raises(OSError, match="Bad file descriptor"):
                            os.write(descriptors[shard], b"x")
        finally:
            over.set()
            watching.join()
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
                for shard, descriptor in descriptors.items():
                    assert content(descriptor) == (built / name_of(shard)).read_bytes()
        assert len(on_disk(tmp_path, data)) == SHARDS
        assert set(fetched(s3)) == expected
    s3.faults(0)
    small = limit_of(data, 3)
    with ShardCache(data, "train", tmp_path, small) as cache:  # what an ampler run has left is deleted
        cache.ahead([9, 10, 11])
        assert on_disk(tmp_path, data) == {9, 10, 11}
    assert not fetched(s3)


def test_a_shard_changed_in_the_store_is_refused_by_name(data: Manifest, bucket: Location, tmp_path: Path):
    right = storage.read_bytes(bucket / name_of(1))
    with ShardCache(data, "train", tmp_path, AMPLE) as cache:
        for data_there in (right[:-1] + b"x", right[:-512]):
            files.write_bytes_aside(bucket / name_of(1), data_there)
            cache.ahead([0, 1, 2, 3])
            with cache.lease([0, 2, 3]):
                pass
            with pytest.raises(DatasetError) as error, cache.lease([0, 1]):
                pytest.fail("leased")
            one_line(error, str(bucket / name_of(1)), "changed or damaged in the store", "tools/verify_shards.py")
        storage.remove(bucket / name_of(1))
        with pytest.raises(DatasetError) as error, cache.lease([1]):
            pytest.fail("leased")
        one_line(error, str(bucket / name_of(1)), "missing in the store")
        assert on_disk(tmp_path, data) == {0, 2, 3}
        files.write_bytes_aside(bucket / name_of(1), right)
        with cache.lease([1]) as descriptors:
            assert content(descriptors[1]) == right


def test_a_first_download_with_wrong_bytes_is_repeated(
    data: Manifest, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads, real = [], storage.read_range

    def garbled(file: str, offset: int, size: int) -> bytes:
        reads.append(offset)
        return bytes(size) if len(reads) == 2 else real(file, offset, size)

    monkeypatch.setattr(storage, "read_range", garbled)
    with ShardCache(data, "train", tmp_path, AMPLE) as cache, cache.lease([6]) as descriptors:
        assert content(descriptors[6]) == (built / name_of(6)).read_bytes()
    assert reads.count(0) == 2


def test_what_fails_ahead_reaches_the_lease_and_the_next_lease_tries_again(s3: Store, data: Manifest, tmp_path: Path):
    s3.faults(1, kinds=["denied"], only="000002.tar")
    with ShardCache(data, "train", tmp_path, AMPLE) as cache:
        cache.ahead(range(6))
        soon(lambda: on_disk(tmp_path, data) == {0, 1, 3, 4, 5} and not fetching())
        with pytest.raises(StorageError) as error, cache.lease([2]):
            pytest.fail("leased")
        one_line(error, name_of(2), "access denied")
        soon(lambda: not fetching())
        s3.faults(0)
        with cache.lease([2]) as descriptors:
            assert len(content(descriptors[2])) == data.files[name_of(2)].bytes


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
    """Each uses what the others have fetched; of what they fetch at once, the last to end puts the same bytes there."""
    s3.faults(0, delay=0.005)
    wrong = []

    def walk(cache: ShardCache) -> None:
        cache.ahead(range(SHARDS))
        for shard in range(SHARDS):
            with cache.lease([shard]) as descriptors:
                if content(descriptors[shard]) != (built / name_of(shard)).read_bytes():
                    wrong.append(shard)

    with ExitStack() as stack:
        caches = [stack.enter_context(ShardCache(data, "train", tmp_path, AMPLE)) for _ in range(3)]
        walks = [threading.Thread(target=walk, args=[cache]) for cache in caches]
        for each in walks:
            each.start()
        for each in walks:
            each.join(20)
            assert not each.is_alive()
    assert not wrong
    once = sum(pieces(data, shard) for shard in range(SHARDS))
    assert once <= sum(fetched(s3).values()) <= 3 * once
    assert len(list(place(tmp_path, data).iterdir())) == len(on_disk(tmp_path, data)) == SHARDS


def test_what_another_cache_deletes_is_fetched_again(data: Manifest, built: Path, tmp_path: Path):
    with (
        ShardCache(data, "train", tmp_path, AMPLE) as ample,
        ShardCache(data, "train", tmp_path, limit_of(data, 1)) as narrow,
    ):
        ample.ahead(range(4))
        soon(lambda: on_disk(tmp_path, data) == set(range(4)) and not fetching())
        with ample.lease([0]) as descriptors:
            for shard in (0, 1, 2, 5):
                with narrow.lease([shard]) as others:
                    assert content(others[shard]) == (built / name_of(shard)).read_bytes()
            assert 0 not in on_disk(tmp_path, data)
            assert content(descriptors[0]) == (built / name_of(0)).read_bytes()
        with ample.lease(range(4)) as descriptors:
            for shard in range(4):
                assert content(descriptors[shard]) == (built / name_of(shard)).read_bytes()


def test_parts_of_the_dead_go_and_those_of_the_living_stay(data: Manifest, tmp_path: Path):
    folder = place(tmp_path, data)
    folder.mkdir(parents=True)
    dead, living = folder / "train-000001.1a.part", folder / "train-000002.2b.part"
    for part in (dead, living):
        part.write_bytes(b"left")
    os.utime(dead, (time.time() - module.STALE - 1,) * 2)
    with ShardCache(data, "train", tmp_path, AMPLE):
        assert [path.name for path in folder.iterdir()] == [living.name]


def test_descriptors_are_closed_with_their_lease(data: Manifest, tmp_path: Path):
    def opened() -> int:
        return sum(str(tmp_path) in os.path.realpath(path) for path in Path("/proc/self/fd").iterdir())

    with ShardCache(data, "train", tmp_path, AMPLE) as cache:
        with cache.lease(range(10)) as descriptors, cache.lease([0]):
            assert len(set(descriptors.values())) == 10
            assert opened() == 11
        assert opened() == 0


def test_limits_are_refused(data: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with ShardCache(data, "train", tmp_path, limit_of(data, 3)) as cache, cache.lease([0, 1]):
        with pytest.raises(UserError) as error, cache.lease([1, 2, 3]):
            pytest.fail("leased")
        one_line(error, "4 shards in use", f"{limit_of(data, 3):,}", "raise it", "order='shards' with a smaller window")
        with cache.lease([1, 2]):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        ShardCache(data, "train", tmp_path / "file", AMPLE)
    one_line(error, str(tmp_path / "file"), "Not a directory", "another cache folder")
    every = sum(shard.bytes for shard in data.splits["train"].shards)
    there = sum(path.stat().st_size for path in place(tmp_path, data).glob("*.tar"))
    assert 0 < there < every
    for free, fits in ((every - there, True), (every - there - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: shutil._ntuple_diskusage(free, 0, free))
        if fits:
            ShardCache(data, "train", tmp_path, AMPLE).close()
            continue
        with pytest.raises(UserError) as error:
            ShardCache(data, "train", tmp_path, AMPLE)
        one_line(error, str(tmp_path), f"{free:,} bytes free", f"needs {free + 1:,}", "lower the cache limit")


def test_a_folder_that_vanishes_is_one_line(data: Manifest, tmp_path: Path):
    with ShardCache(data, "train", tmp_path / "cache", AMPLE) as cache:
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(UserError) as error, cache.lease([0]):
            pytest.fail("leased")
        one_line(error, str(tmp_path / "cache"), "No such file", "another cache folder")
