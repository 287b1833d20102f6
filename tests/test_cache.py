"""Shards of a data set in a store, through a folder on disk: right bytes, a bound that holds, nothing fetched twice."""

import os
import random
import threading
import time
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
from pipeline import files, storage
from pipeline.manifest import DatasetError, Manifest
from pipeline.online.cache import ShardCache
from pipeline.storage import Location
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


def test_what_goes_first(data: Manifest, tmp_path: Path):
    with ShardCache(data, "train", tmp_path, limit_of(data, 3), fetchers=1) as cache:

        def lease(shard: int, then: set[int]) -> None:
            with cache.lease([shard]):
                pass
            soon(lambda: on_disk(tmp_path, data) == then and not fetching())

        cache.ahead([5, 3, 8, 1])
        soon(lambda: on_disk(tmp_path, data) == {5, 3, 8})
        lease(5, {5, 3, 8})  # it may be leased again before the next turn
        lease(3, {3, 8, 1})  # the turn of 5 is over
        lease(0, {3, 8, 0})  # a lease waits for it: what is furthest away goes
        lease(8, {8, 0, 1})  # the turns of 3 and 0 are over; 3 was released first
        cache.ahead([2, 8, 7])
        soon(lambda: on_disk(tmp_path, data) == {2, 8, 7})  # what is not in the list goes
        with cache.lease([2]), cache.lease([8]):
            cache.ahead([4, 6])
            soon(lambda: on_disk(tmp_path, data) == {2, 8, 4})  # what is leased stays


def test_what_comes_earlier_in_the_list_is_there_earlier(s3: Store, data: Manifest, tmp_path: Path):
    order = [9, 2, 7, 4, 11]
    with ShardCache(data, "train", tmp_path, AMPLE, fetchers=1) as cache:
        cache.ahead([*order, 2, 9])
        soon(lambda: len(on_disk(tmp_path, data)) == 5)
    assert list(fetched(s3)) == order


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


def test_a_second_run_fetches_nothing(s3: Store, data: Manifest, built: Path, tmp_path: Path):
    for _ in range(2):
        s3.faults(0)
        with ShardCache(data, "train", tmp_path, AMPLE) as cache:
            cache.ahead(range(SHARDS))
            with cache.lease(range(SHARDS)) as descriptors:
                for shard, descriptor in descriptors.items():
                    assert content(descriptor) == (built / name_of(shard)).read_bytes()
        assert len(on_disk(tmp_path, data)) == SHARDS
    assert not fetched(s3)
    small = limit_of(data, 3)
    with ShardCache(data, "train", tmp_path, small) as cache:  # what an ampler run has left is deleted
        cache.ahead([9, 10, 11])
        assert on_disk(tmp_path, data) == {9, 10, 11}
    assert not fetched(s3)


def test_a_damaged_shard_on_disk_is_fetched_again(s3: Store, data: Manifest, built: Path, tmp_path: Path):
    with ShardCache(data, "train", tmp_path, AMPLE) as cache, cache.lease(range(4)):
        pass
    flipped, cut = (place(tmp_path, data) / Path(name_of(shard)).name for shard in (1, 2))
    whole = flipped.read_bytes()
    flipped.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    cut.write_bytes(cut.read_bytes()[:-512])
    s3.faults(0)
    with ShardCache(data, "train", tmp_path, AMPLE) as cache, cache.lease(range(4)) as descriptors:
        for shard in range(4):
            assert content(descriptors[shard]) == (built / name_of(shard)).read_bytes()
    assert set(fetched(s3)) == {1, 2}


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


def test_bytes_are_right_though_a_third_of_the_answers_fail(
    s3: Store, data: Manifest, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "TRIES", 12)
    s3.faults(0.33, seed=7)
    with ShardCache(data, "train", tmp_path, limit_of(data, 5)) as cache:
        cache.ahead(range(SHARDS))
        for shard in range(SHARDS):
            with cache.lease([shard]) as descriptors:
                assert content(descriptors[shard]) == (built / name_of(shard)).read_bytes()
    assert s3.seen()["faults"] > 20
