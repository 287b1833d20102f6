"""The order of a plan where hashes collide, and its table of raw images."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.offline import plan
from pipeline.offline.plan import assign_keys
from pipeline.offline.raw import SPLITS, RawImage, RawTable


@pytest.mark.parametrize("values", [1, 2, 7, 500])
@pytest.mark.parametrize("shift", [0, 31, 32, 40])
def test_a_shuffle_is_by_hash_and_then_by_key(monkeypatch: pytest.MonkeyPatch, values: int, shift: int):
    """Of `values` different hashes, some differ in the upper half, some in the lower half, and some in both."""

    def poor_hash(purpose: str, key: str) -> int:
        return (zlib.crc32(f"{purpose}{key}".encode()) % values * 0x9E3779B1 << shift) % 2**64

    random = np.random.default_rng(shift)
    keys = assign_keys([f"{word}.jpg" for word in random.permutation(3000)])
    indices = random.permutation(3000)[:2000].astype(np.uint32)
    monkeypatch.setattr(plan, "_hash", poor_hash)
    shuffled = plan._shuffled("order", keys, indices)
    assert shuffled.dtype == np.uint32
    assert shuffled.tolist() == sorted(indices.tolist(), key=lambda i: (poor_hash("order", keys[i]), keys[i]))


def test_keys_stay_unique_where_all_hashes_are_equal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_hash", lambda purpose, key: 7)
    assert list(assign_keys(["a/b.c/x.jpg", "d_x.jpg"])) == ["a_b-2Ec_x-2Ejpg", "d_x-2Ejpg"]


def test_a_shuffle_of_none_and_of_one():
    keys = assign_keys(["a.jpg", "b.jpg"])
    assert plan._shuffled("order", keys, np.array([], np.uint32)).tolist() == []
    assert plan._shuffled("order", keys, np.array([1], np.uint32)).tolist() == [1]


def test_validation_and_test_are_ordered_by_the_bytes_of_the_names_and_then_of_the_folders():
    random = np.random.default_rng(3)
    letters = ["a", "b", "/", ".", "-", " ", "ü", "\udcff", "\x01", "日"]
    paths = list({"".join(random.choice(letters, random.integers(1, 9))) for _ in range(3000)})
    table = RawTable()
    for path in paths:
        table.append(RawImage("val", path, None, f"/raw/{path}", 0, 1))
    places = random.permutation(len(paths)).astype(np.uint32)

    def name_and_folder(i: int) -> tuple[bytes, bytes]:
        folder, slash, name = os.fsencode(paths[i]).rpartition(b"/")
        return name, folder + slash

    assert plan._by_name(table, places).tolist() == sorted(places.tolist(), key=name_and_folder)


def some_images(count: int) -> list[RawImage]:
    """Loose files, members of archives, with and without a label, under names of any bytes."""
    random = np.random.default_rng(11)
    images = []
    for i in range(count):
        name = os.fsdecode(bytes(random.integers(1, 256, random.integers(1, 30), dtype=np.uint8)).replace(b"/", b"_"))
        folder = ["", "train/n01/", "a b/ü/", "x/" * 20][random.integers(4)]
        path = f"{folder}{name}{i}.jpg"
        file = [f"/raw/{path}", f"s3://bucket/{path}", "/raw/train.tar", f"/other{i % 5}.tar", path][random.integers(5)]
        wnid = [None, "n01", "n02", "an other", "None"][random.integers(5)]
        offset, size = (int(random.integers(2**bits)) for bits in random.integers(1, 62, 2))
        images.append(RawImage(SPLITS[random.integers(3)], path, wnid, file, offset, size))
    return images


def test_a_table_gives_back_what_it_was_given():
    images = some_images(3000)
    table = RawTable()
    for image in images:
        table.append(image)
    assert len(table) == len(table.paths) == 3000
    assert list(table) == images
    for i in np.random.default_rng(1).permutation(3000).tolist():
        assert table[i] == images[i]
        assert table.paths[i] == images[i].path
    assert table.sizes.tolist() == [image.size for image in images]
    assert [SPLITS[number] for number in table.split_numbers] == [image.split for image in images]
    assert [None if c < 0 else table.wnids[c] for c in table.class_numbers.tolist()] == [i.wnid for i in images]
    for split in SPLITS:
        counted = table.per_class(split)
        assert table.has(split)
        for wnid in (None, *table.wnids):
            assert counted[wnid] == sum(image.split == split and image.wnid == wnid for image in images)
    assert not RawTable().has("train")
    assert list(RawTable()) == []


def test_renamed_classes_may_become_one():
    table = RawTable()
    images = some_images(500)
    for image in images:
        table.append(image)
    table.rename_classes(lambda wnid: "n01" if wnid.startswith("n0") else wnid.upper())
    new = {None: None, "n01": "n01", "n02": "n01", "an other": "AN OTHER", "None": "NONE"}
    assert [image.wnid for image in table] == [new[image.wnid] for image in images]
    assert sorted(table.wnids) == ["AN OTHER", "NONE", "n01"]
    table.append(RawImage("train", "late.jpg", "n01", str(Path("/raw/late.jpg")), 0, 1))
    assert table[500].wnid == "n01"
    assert len(table.wnids) == 3
