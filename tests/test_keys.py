"""Keys are unique, safe in a tar and in WebDataset, and as near the file's name as they can be."""

import re

from pipeline.offline.keys import assign_keys


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
