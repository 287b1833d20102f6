"""Shards of webdataset as raw data: numbers, words, or a dataset directory of ours, against the lists made here."""

import io
import json
import re
import tarfile
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
    assert sources.ignored.pictures == 6
    assert "labels 3, 11, 100 are classes 0, 1, 2 (--keep-labels keeps the numbers)" in sources.notes
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


def test_labels_are_text_as_names_of_folders(tmp_path: Path):
    """Beside dots in names: webdataset ends KEY at the first, but a.1.cls can be the label of a.1.jpg alone."""
    labels = {
        "a.1.cls": "\u3000金毛\u3000犬\r\n".encode(),
        "a.2.cls": b"\xef\xbb\xbfcaf\xe9",
        "a.2.5.json": json.dumps({"label": "tab\tbed"}).encode(),
        "b.cls": "e\u0301".encode(),
        "c.json": b'{"label": "\\ud83d."}',
        "d.cls": b"x" * 4096,
        "none.cls": b"x" * 4097,
        "lines.cls": b"cat\ndog",
        "blank.cls": b" \n",
        "nul.json": b'{"label": null}',
    }
    pictures = [f"{name.rpartition('.')[0]}.jpg" for name in labels]
    members = {name: name.encode() for name in [*pictures, "b.mask.png", "e.left.jpg"]} | labels
    tree(tmp_path, {"train-0.tar": tar_bytes(members)})
    sources = find_sources(tmp_path)
    assert sources.images.spellings["é"] == {"e\u0301"}  # of which `finish` notes those that look the same
    names = ["\u3000金毛\u3000犬", "caf\\xe9", "tab\tbed", "é", "\\xed\\xa0\\xbd.", "x" * 4096]
    assert [(image.name, image.wnid) for image in sources.images] == [*zip(pictures, names)]
    assert sources.ignored == {"picture without a label in .cls or .json": 5, "second picture of one sample": 1}
    assert sources.ignored.pictures == 6


def test_hard_links_are_what_they_lead_to(tmp_path: Path):
    """As tar writes files of one inode; links to what comes later, or to nothing, and symbolic ones are left out."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data, link, kind in (
            ("./1.jpg", b"one", "", tarfile.REGTYPE),
            ("1.cls", b"7", "", tarfile.REGTYPE),
            ("2.jpg", b"", "1.jpg", tarfile.LNKTYPE),
            ("2.cls", b"", "./1.cls", tarfile.LNKTYPE),
            ("3.jpg", b"", "2.jpg", tarfile.LNKTYPE),
            ("3.cls", b"8", "", tarfile.REGTYPE),
            ("4.jpg", b"", "9.jpg", tarfile.LNKTYPE),
            ("5.jpg", b"", "1.jpg", tarfile.SYMTYPE),
            ("9.jpg", b"nine", "", tarfile.REGTYPE),
            ("9.cls", b"", "../1.cls", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.linkname, info.type = len(data), link, kind
            tar.addfile(info, io.BytesIO(data))
    tree(tmp_path, {"train-0.tar": out.getvalue()})
    sources = find_sources(tmp_path)
    assert [(image.name, image.wnid, image.read()) for image in sources.images] == [
        ("1.jpg", "7", b"one"), ("2.jpg", "7", b"one"), ("3.jpg", "8", b"one")
    ]  # fmt: skip
    assert sources.ignored == {"link in an archive": 3, "picture without a label in .cls or .json": 1}


def test_numbers_of_two_spellings_are_one_class_and_noted(tmp_path: Path):
    labels = {"1.cls": b"07", "2.cls": b"7\n", "3.cls": b"-2"}
    tree(tmp_path, {"a-0.tar": tar_bytes({f"{i}.jpg": b"" for i in range(1, 4)} | labels)})
    sources = find_sources(tmp_path)
    assert [image.wnid for image in sources.images] == ["7", "7", "-2"]
    assert [c.wnid for c in sources.classes] == ["-2", "7"]
    assert sources.notes == ["labels that are one number are one class: 07 and 7", "labels -2, 7 are classes 0, 1"]


@pytest.mark.parametrize(
    ("lists", "classes"),
    [
        ({}, [(n, f"{n:02d}", f"{n:02d}") for n in range(11)]),
        ({"classes.txt": b"zebra\nyak\nowl\ncat\n"}, "names the classes 0 to 3, but an image has the label 10"),
        (
            {"classes.txt": "".join(f"{chr(122 - n)}\n" for n in range(12)).encode()},
            [(n, chr(122 - n), chr(122 - n)) for n in range(12)],
        ),
    ],
)
def test_kept_labels_are_the_numbers_of_the_shards(tmp_path: Path, lists: dict[str, bytes], classes: list | str):
    tree(tmp_path, {"a-0.tar": tar_bytes({"1.jpg": b"1", "1.cls": b"3", "2.jpg": b"2", "2.cls": b"10"}), **lists})
    if isinstance(classes, str):
        with pytest.raises(UserError, match=classes):
            find_sources(tmp_path, keep_labels=True)
        return
    sources = find_sources(tmp_path, keep_labels=True)
    assert [(c.label, c.wnid, c.words) for c in sources.classes] == classes
    assert [image.wnid for image in sources.images] == [classes[3][1], classes[10][1]]
    assert not any("--keep-labels" in note for note in sources.notes)


@pytest.mark.parametrize("label", ["-3", "100000", "7.5", "cat"])
def test_kept_labels_are_numbers_from_0(tmp_path: Path, label: str):
    tree(tmp_path, {"a-0.tar": tar_bytes({"1.jpg": b"1", "1.cls": b"3", "2.jpg": b"2", "2.cls": label.encode()})})
    with pytest.raises(UserError, match=f"^--keep-labels: the label {label} is no number from 0 to 99,999; without"):
        find_sources(tmp_path, keep_labels=True)


LABELLED = tar_bytes({"1.jpg": b"1", "1.cls": b"0"})


def ours(*classes: tuple[object, object]) -> bytes:
    """Return a dataset.json of labels and wnids."""
    records = [{"label": label, "wnid": wnid, "words": "", "devkit_id": None} for label, wnid in classes]
    return json.dumps({"classes": records}).encode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (ours((0, "cat"), (1, "cat")), "the class cat has the labels 0 and 1; correct that list or remove it"),
        (ours((0, "e\u0301"), (3, "é")), "the class é has the labels 0 and 3; correct that list or remove it"),
        (ours((0, "cat"), (0, "dog")), "the label 0 is of cat and of dog; correct that list or remove it"),
        (ours((0, "cat"), (10**5, "dog")), "--keep-labels: the label 100000 is no number from 0 to 99,999"),
        *(
            (data, f"has no list of classes as ours have ({reason}); remove it")
            for data, reason in [
                (ours((0, "cat")).replace(b"0", b"1e400"), "[0].label: expected int, got float"),
                (ours((float("nan"), "cat")), "[0].label: expected int, got float"),
                (ours((2**64, "cat")), "[0].label: expected int <= 9223372036854775807"),
                (ours((True, "cat")), "[0].label: expected int, got bool"),
                (ours((0, None)), "[0].wnid: expected str, got null"),
                (b"[]", "list indices must be integers or slices, not str"),
                (b"{}", "'classes'"),
                (b'{"classes": {}}', "expected array, got object"),
            ]
        ),
    ],
)
def test_a_list_of_classes_that_contradicts_itself_is_refused(tmp_path: Path, content: bytes, problem: str):
    tree(tmp_path, {"a-0.tar": LABELLED, "dataset.json": content})
    with pytest.raises(UserError) as refusal:
        find_sources(tmp_path, keep_labels=True)
    assert problem in str(refusal.value)


@pytest.mark.parametrize("label", [b"1e400", b"-Infinity", b"NaN", b"[1]", b"0.5", b"9" * 5000])
def test_a_label_that_can_be_none_leaves_its_picture_out(tmp_path: Path, label: bytes):
    members = {"1.jpg": b"1", "1.cls": b"0", "2.jpg": b"2", "2.json": b'{"label": %s}' % label}
    tree(tmp_path, {"a-0.tar": tar_bytes(members)})
    sources = find_sources(tmp_path)
    assert [image.name for image in sources.images] == ["1.jpg"]
    assert sources.ignored == {"picture without a label in .cls or .json": 1}


@pytest.mark.parametrize("target", ["loop.tar", "a-0.tar/x", "x" * 300, "nothing"])
def test_a_link_to_itself_or_to_nothing_is_left_out(tmp_path: Path, target: str):
    tree(tmp_path, {"a-0.tar": LABELLED, "images/cat/1.jpg": b"1"})
    for link in ("loop.tar", "images/loop.tar", "images/cat/loop.tar"):
        (tmp_path / link).symlink_to(target)
    sources = find_sources(tmp_path, "webdataset")
    assert [image.name for image in sources.images] == ["1.jpg"]
    assert sources.ignored["link to nothing, pipe or device"] == 1
    folders = find_sources(tmp_path / "images", "class-folders")
    assert [image.wnid for image in folders.images] == ["cat"]
    assert folders.ignored == {"link to nothing, pipe or device": 2}


PLAIN = tar_bytes({f"{name}/{i}.jpg": b"" for name in ("cat", "dog") for i in range(3)})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/data/x.tar": LABELLED, "b/1.txt": b""}, "^RAW: a: the first folder with .tar files; name RAW/a as RAW$"),
        ({"data/x.tar": PLAIN}, "^RAW: data/x.tar: pictures without labels, no .cls .* --layout webdataset reads all"),
        ({"x.tar": b"no tar" * 100, "cat/1.jpg": b"", "dog/1.jpg": b""}, "--layout class-folders.*--layout webdataset"),
        ({"x.tar": b"no tar" * 100}, "^RAW: x.tar: damaged at byte 0"),
        ({"train-test-0.tar": LABELLED}, "train-test-0.tar: of test or of train, or of no split?"),
    ],
)
def test_tars_that_may_be_no_shards_are_refused(tmp_path: Path, files: dict[str, bytes], message: str):
    tree(tmp_path, files)
    with pytest.raises(UserError) as refusal:
        find_sources(tmp_path)
    assert re.search(message, str(refusal.value).replace(str(tmp_path), "RAW"))


def test_shards_whose_labels_follow_all_pictures_are_read_by_name(tmp_path: Path):
    pictures = {f"{i}.jpg": b"" for i in range(300)}
    tree(tmp_path, {"a.tar": tar_bytes(pictures | {f"{i}.cls": b"%d" % (i % 2) for i in range(300)})})
    with pytest.raises(UserError, match="among its first 256 members"):
        find_sources(tmp_path)
    assert len(find_sources(tmp_path, "webdataset").images) == 300


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
