"""The plan of a build: unique and safe keys, order by hashes and names, the table of raw images, and its memory."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from conftest import ROOT
from pipeline.manifest import BuildRecipe, ClassRecord
from pipeline.offline import plan
from pipeline.offline.plan import MAX_KEY, _escape, assign_keys, make_plan
from pipeline.offline.raw import SPLITS, RawImage, RawTable, Sources


def plain_keys(paths: Sequence[str]) -> list[str]:
    """Return the keys by the rule of `assign_keys`, in sets of strings."""
    spellings = (
        lambda path: os.path.splitext(path.rpartition("/")[2])[0],
        lambda path: os.path.splitext(path)[0].replace("/", "_"),
        lambda path: path.replace("/", "_"),
    )
    keys: dict[int, str] = {}
    rest = sorted(range(len(paths)), key=lambda i: os.fsencode(paths[i]))
    for spell in spellings:
        spelled = {i: _escape(spell(paths[i])) for i in rest}
        count, taken = Counter(spelled.values()), set(keys.values())
        keys |= {i: key for i, key in spelled.items() if count[key] == 1 and key not in taken}
        rest = [i for i in rest if i not in keys]
    taken = set(keys.values())
    for i in rest:
        stem, number = _escape(paths[i].replace("/", "_")), 1
        key = stem
        while key in taken:
            number += 1
            key = stem[: MAX_KEY - len(f"-{number}")] + f"-{number}"
        keys[i] = key
        taken.add(key)
    return [keys[i] for i in range(len(paths))]


@pytest.mark.parametrize(
    ("count", "letters", "longest"),
    [
        (4000, ["a", "b", "/", ".jpg", "_", "-2", "-", "-2E"], 7),
        (2000, ["-2Ejpg", "/", "_", "a", ".jpg", "-2", "-3", "\udcff", "-FF"], 6),
        (1500, ["x" * 60, "y" * 45, "/", ".", "_", "-2"], 6),
        (3000, [chr(c) for c in range(1, 256)], 40),
    ],
)
def test_keys_are_unique_and_those_of_the_plain_rule_in_any_order(count: int, letters: list[str], longest: int):
    """Paths of few letters, so that many meet in every spelling."""
    random = np.random.default_rng(count + longest)
    drawn = dict.fromkeys("".join(random.choice(letters, random.integers(1, longest))) for _ in range(count))
    paths = [path for path in drawn if not path.endswith("/")]
    keys = list(assign_keys(paths))
    assert keys == plain_keys(paths)
    assert list(assign_keys(paths[::-1])) == keys[::-1]
    assert len(set(keys)) == len(paths)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        ("train/n01/n01_10.JPEG train/n02/n02_7.JPEG", "n01_10 n02_7"),
        ("test/cat/1.jpg train/cat/1.jpg train/cat/1.png", "test_cat_1 train_cat_1-2Ejpg train_cat_1-2Epng"),
        ("a/b_1.gif a_b/1.gif", "b_1 1"),
        ("a/b/c.x a_b/c.x a/b_c.x", "a_b_c-2Ex a_b_c-2Ex-2 b_c"),
        ("a+b.c.jpg ü.jpg bad\udcff.jpg", "a-2Bb-2Ec -C3-BC bad-FF"),
        (f"{'x' * 200}.jpg", f"{'x' * 73}-{hashlib.sha256(b'x' * 200).hexdigest()[:16]}"),
    ],
)
def test_keys_take_the_stem_then_the_path_then_the_extension_then_a_number(paths: str, keys: str):
    assert list(assign_keys(paths.split())) == keys.split()


def test_keys_stay_unique_where_all_hashes_are_equal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_hash", lambda purpose, key: 7)
    assert list(assign_keys(["a/b.c/x.jpg", "d_x.jpg"])) == ["a_b-2Ec_x-2Ejpg", "d_x-2Ejpg"]


@pytest.mark.parametrize("values", [1, 7, 500])
@pytest.mark.parametrize("shift", [0, 32])
def test_a_shuffle_is_by_hash_and_then_by_key(monkeypatch: pytest.MonkeyPatch, values: int, shift: int):
    """Compare with sorted(), for `values` different hashes in the lower or the upper half."""

    def poor_hash(purpose: str, key: str) -> int:
        return (zlib.crc32(f"{purpose}{key}".encode()) % values * 0x9E3779B1 << shift) % 2**64

    random = np.random.default_rng(shift)
    keys = assign_keys([f"{word}.jpg" for word in random.permutation(3000)])
    indices = random.permutation(3000)[:2000].astype(np.uint32)
    monkeypatch.setattr(plan, "_hash", poor_hash)
    for chosen in (indices, indices[:1], indices[:0]):
        shuffled = plan._shuffled("order", keys, chosen)
        assert shuffled.dtype == np.uint32
        assert shuffled.tolist() == sorted(chosen.tolist(), key=lambda i: (poor_hash("order", keys[i]), keys[i]))


def test_validation_and_test_are_ordered_by_the_bytes_of_the_names_and_then_of_the_folders():
    random = np.random.default_rng(3)
    letters = ["a", "b", "/", ".", "-", " ", "ü", "\udcff", "\x01", "日"]
    paths = list({"".join(random.choice(letters, random.integers(1, 9))) for _ in range(3000)})
    table = RawTable()
    for path in paths:
        table.append(RawImage("val", path, None, f"/raw/{path}", 0, 1))
    indices = random.permutation(len(paths)).astype(np.uint32)

    def name_and_folder(i: int) -> tuple[bytes, bytes]:
        folder, slash, name = os.fsencode(paths[i]).rpartition(b"/")
        return name, folder + slash

    assert plan._by_name(table, indices).tolist() == sorted(indices.tolist(), key=name_and_folder)


@pytest.fixture
def images() -> list[RawImage]:
    """Loose files, members of archives, with and without a label, under names of any bytes."""
    random = np.random.default_rng(11)
    images = []
    for i in range(3000):
        name = os.fsdecode(bytes(random.integers(1, 256, random.integers(1, 30), dtype=np.uint8)).replace(b"/", b"_"))
        folder = ["", "train/n01/", "a b/ü/", "x/" * 20][random.integers(4)]
        path = f"{folder}{name}{i}.jpg"
        file = [f"/raw/{path}", f"s3://bucket/{path}", "/raw/train.tar", f"/other{i % 5}.tar", path][random.integers(5)]
        wnid = [None, "n01", "n02", "an other", "None"][random.integers(5)]
        offset, size = (int(random.integers(2**bits)) for bits in random.integers(1, 62, 2))
        images.append(RawImage(SPLITS[random.integers(3)], path, wnid, file, offset, size))
    return images


def test_a_table_returns_the_images_that_were_appended(images: list[RawImage]):
    table = RawTable()
    assert list(table) == []
    assert not table.has("train")
    for image in images:
        table.append(image)
    assert len(table) == len(table.paths) == 3000
    assert list(table) == images
    for i in np.random.default_rng(1).permutation(3000).tolist():
        assert table[i] == images[i]
        assert table.paths[i] == images[i].path
    assert table.sizes.tolist() == [image.size for image in images]
    assert [SPLITS[number] for number in table.split_numbers] == [image.split for image in images]
    for split in SPLITS:
        assert table.has(split)
        assert table.per_class(split) == Counter(image.wnid for image in images if image.split == split)


def test_renamed_classes_may_become_one(images: list[RawImage]):
    table = RawTable()
    for image in images:
        table.append(image)
    table.rename_classes(lambda wnid: "n01" if wnid.startswith("n0") else wnid.upper())
    new = {None: None, "n01": "n01", "n02": "n01", "an other": "AN OTHER", "None": "NONE"}
    assert [image.wnid for image in table] == [new[image.wnid] for image in images]
    table.append(RawImage("train", "late.jpg", "n01", "/raw/late.jpg", 0, 1))
    assert table[3000].wnid == "n01"
    assert sorted(table.wnids) == ["AN OTHER", "NONE", "n01"]


@pytest.mark.parametrize(
    ("classes", "share", "words"),
    [
        ({"a": 40, "b": 40}, 0.3, "training pictures (--holdout 0.3, by a hash of the key) are held out as one"),
        (
            {f"c{i}": 1 for i in range(40)},
            0.5,
            "no validation split: RAW has none, and none of 40 training pictures is held out "
            "(--holdout 0.5, by a hash of the key); 26 stay as the last of their class",
        ),
        ({"a": 30} | {f"c{i}": 2 for i in range(20)}, 0.5, " stay as the last of their class"),
        ({"a": 2}, 0.001, "none of 2 training pictures is held out (--holdout 0.001, by a hash of the key)"),
    ],
)
def test_a_hold_out_is_announced_and_never_takes_a_class_s_last_training_picture(
    classes: dict[str, int], share: float, words: str
):
    """Of those that would go, the one with the highest hash stays; else the key alone decides."""
    sources = Sources("made up")
    for name, count in classes.items():
        for i in range(count):
            sources.images.append(RawImage("train", f"{name}/{name}_{i}.jpg", name, f"/raw/{name}_{i}.jpg", 0, 1))
    sources.classes = tuple(ClassRecord(i, name, name, None) for i, name in enumerate(sorted(classes)))
    made = make_plan(sources, BuildRecipe(holdout=share))
    expected = set()
    for name, count in classes.items():
        hashes = {f"{name}_{i}": plan._hash("holdout", f"{name}_{i}") for i in range(count)}
        low = {key for key, value in hashes.items() if value < share * 2**64}
        expected |= low - {max(low, key=hashes.__getitem__)} if len(low) == count else low
    held_out = {image.key for image in made.part("val", 0, 999)} if "val" in made.splits else set()
    assert held_out == expected
    (note,) = made.notes
    if expected:
        assert note.startswith(f"no validation split in RAW: {len(expected)} of {sum(classes.values())} training pict")
    assert words in note


PROGRAM = """
import json, resource, sys
from pipeline.manifest import BuildRecipe, ClassRecord
from pipeline.offline.plan import make_plan
from pipeline.offline.raw import RawImage, Sources

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

images, synsets = int(sys.argv[1]), 21_841
before, sources, names = resident(), Sources("made up"), 0
for i in range(images):
    wnid = f"n{i % synsets:08d}"
    path = f"fall11_whole.tar/{wnid}.tar/{wnid}_{i // synsets}.JPEG"
    names += len(path)
    sources.images.append(RawImage("train", path, wnid, "/raw/fall11_whole.tar", 110_000 * i, 110_000))
sources.classes = tuple(ClassRecord(i, f"n{i:08d}", "made up", None) for i in range(synsets))
plan = make_plan(sources, BuildRecipe())
with open("/proc/self/status") as file:  # getrusage's peak is that of the process that started this one, too
    peak = int(file.read().partition("VmHWM:")[2].split()[0]) * 1024 - before
kept = resident() - before
print(json.dumps([(kept - names) / images, (peak - names) / images]))
"""


@pytest.mark.slow
def test_a_plan_takes_few_bytes_an_image():
    """Beside the paths themselves, in a process of its own. All of ImageNet has 14 million entries."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # else glibc keeps arrays that are freed for later use
    command = [sys.executable, "-c", PROGRAM, "1000000"]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    kept, peak = json.loads(process.stdout)
    assert 0 < kept < 72
    assert kept < peak < 95
