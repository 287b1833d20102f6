"""Keys are unique, safe in a tar and in WebDataset, and as near the file's name as they can be."""

import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.offline.plan import MAX_KEY, _escape, assign_keys


def plain_keys(paths: Sequence[str]) -> list[str]:
    """The rule of `assign_keys` in sets of whole strings."""
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


def nasty_paths(count: int, letters: Sequence[str], longest: int) -> list[str]:
    """Different paths of few letters, so that many meet in every spelling."""
    random = np.random.default_rng(count + longest)
    paths = dict.fromkeys("".join(random.choice(letters, random.integers(1, longest))) for _ in range(count))
    return [path for path in paths if not path.endswith("/")]


@pytest.mark.parametrize(
    ("count", "letters", "longest"),
    [
        (4000, ["a", "/", ".", "_"], 8),
        (4000, ["a", "b", "/", ".jpg", "_", "-2", "-", "-2E"], 7),
        (2000, ["-2Ejpg", "/", "_", "a", ".jpg", "-2", "-3", "\udcff", "-FF"], 6),
        (1500, ["x" * 60, "y" * 45, "/", ".", "_", "-2"], 6),
        (3000, [chr(c) for c in range(1, 256)], 40),
    ],
)
def test_keys_are_those_of_the_plain_rule(count: int, letters: list[str], longest: int):
    paths = nasty_paths(count, letters, longest)
    keys = list(assign_keys(paths))
    assert keys == plain_keys(paths)
    assert len(set(keys)) == len(paths)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)


def test_unique_stems_are_the_keys():
    assert list(assign_keys(["train/n01/n01_10.JPEG", "train/n02/n02_7.JPEG"])) == ["n01_10", "n02_7"]


def test_equal_stems_take_the_path_then_the_extension_then_a_number():
    paths = ["test/cat/1.jpg", "train/cat/1.jpg", "train/cat/1.png", "train/dog/2.jpg", "a/b_1.gif", "a_b/1.gif"]
    assert list(assign_keys(paths)) == [
        "test_cat_1",
        "train_cat_1-2Ejpg",
        "train_cat_1-2Epng",
        "2",
        "b_1",
        "a_b_1",
    ]
    assert list(assign_keys(["a/b/c.x", "a_b/c.x", "a/b_c.x"])) == ["a_b_c-2Ex", "a_b_c-2Ex-2", "b_c"]


def test_other_bytes_are_escaped_and_long_names_cut():
    keys = list(assign_keys(["a b.c.jpg", "ü.jpg", "x" * 200 + "1.jpg", "x" * 200 + "2.jpg", "bad\udcff.jpg"]))
    assert keys[0] == "a-20b-2Ec"
    assert keys[1] == "-C3-BC"
    assert keys[4] == "bad-FF"
    assert len(set(keys)) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)


def test_keys_stay_unique_when_an_escape_meets_its_own_spelling():
    paths = ["a.b.jpg", "a-2Eb.jpg", "d/a.b.jpg", "d_a-2Eb.jpg"]
    assert len(set(assign_keys(paths))) == 4


def test_the_order_of_the_listing_does_not_matter():
    paths = [f"{c}/{i}.jpg" for c in "ab" for i in range(5)] + ["a_0.jpg", "a/0.jpeg"]
    forward = dict(zip(paths, assign_keys(paths)))
    backward = dict(zip(paths[::-1], assign_keys(paths[::-1])))
    assert forward == backward
    assert len(set(forward.values())) == len(paths)
