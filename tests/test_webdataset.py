"""Shards of webdataset as raw data: numbers, words, or a dataset directory of ours, against the lists made here."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline import UserError, manifest
from pipeline.offline.sources import find_sources
from tars import tar_bytes, tree


@pytest.mark.parametrize("shape", ["{}-{}.tar", "{}/{}.tar", "imagenet1k-{}-{}.tar"])
def test_webdataset_with_numbers(tmp_path: Path, shape: str):
    labels = {("train", 0): [11, 3, 3], ("train", 1): [100], ("validation", 0): [3]}
    expected = Counter()
    for (split, shard), numbers in labels.items():
        members: list[tuple[str, bytes]] = []
        for i, number in enumerate(numbers):
            picture = f"{split}{shard}{i}".encode()
            label = (".cls", b"%d\n" % number) if i % 2 else (".json", json.dumps({"label": number, "w": 5}).encode())
            members += [(f"a/k{i}.7.JPG" if i == 9 else f"a/k{i}.{'webp' if i else 'JPEG'}", picture)]
            members += [(f"a/k{i}{label[0]}", label[1])]
            expected["val" if split == "validation" else "train", f"{number:03d}", picture] += 1
        members += [("a/k0.png", b"second"), ("a/free.jpg", b"no label"), ("a/k0.txt", b"tench")]
        tree(tmp_path, {shape.format(split, shard): tar_bytes(members)})
    sources = find_sources(tmp_path)
    assert sources.name == "webdataset"
    assert Counter((image.split, image.wnid, image.read()) for image in sources.images) == expected
    assert [(c.label, c.wnid) for c in sources.classes] == [(0, "003"), (1, "011"), (2, "100")]
    assert sources.ignored == {
        "second picture of one sample": 3,
        "picture without a label in .cls or .json": 3,
        ".txt in a shard": 3,
    }
    lines = [f"{wnid} crane" for wnid in (f"n{i:08d}" for i in range(101))]
    tree(tmp_path, {"classes.txt": "\n".join(lines).encode()})
    named = find_sources(tmp_path)
    assert {image.wnid for image in named.images} == {"n00000003", "n00000011", "n00000100"}
    assert [c.label for c in named.classes] == list(range(101))
    assert {c.words for c in named.classes} == {"crane"}
    tree(tmp_path, {"classes.txt": b"tench\ncrane\ncrane\nshark\n"})
    with pytest.raises(UserError, match=r"classes.txt: names the classes 0 to 3, but an image has the label 11"):
        find_sources(tmp_path)


def test_webdataset_with_words(tmp_path: Path):
    members = [("1.jpg", b"1"), ("1.cls", "señal\n".encode()), ("2.jpg", b"2"), ("2.json", b'{"label": "7"}')]
    members += [("3.jpg", b"3"), ("3.cls", b"\xff"), ("4.jpg", b"4"), ("4.json", b"[" * 10**5), ("5.jpg", b"5")]
    tree(tmp_path, {"shard-000.tar": tar_bytes([*members, ("5.json", b'{"label": true}')])})
    sources = find_sources(tmp_path)
    assert {image.name: image.wnid for image in sources.images} == {"1.jpg": "señal", "2.jpg": "7", "3.jpg": "\\xff"}
    assert [c.wnid for c in sources.classes] == ["7", "\\xff", "señal"]
    assert sources.ignored == {"picture without a label in .cls or .json": 2}
    assert sources.ignored.pictures == 2


def test_a_dataset_directory_of_ours_is_a_layout_too(dataset: Path):
    sources = find_sources(dataset)
    built = manifest.load(dataset)
    assert sources.name == "webdataset"
    assert sources.classes == built.classes
    labels = {c.wnid: c.label for c in sources.classes}
    found = Counter((image.split, labels[image.wnid], image.size) for image in sources.images if image.wnid)
    expected: Counter[tuple[str, int, int]] = Counter()
    for split in built.splits:
        expected.update((split, int(row["label"]), int(row["size"])) for row in built.samples(split))
    assert found == expected
