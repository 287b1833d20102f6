"""The parquet layout: the shapes that Hugging Face gives it, labels and names, and files that lie."""

import json
import os
import random
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import build
from pipeline import SourceError
from pipeline.archives import ListingCache
from pipeline.offline import parquet
from pipeline.offline.raw import Options, Sources
from pipeline.offline.sources import find_sources
from pipeline.offline.tree import Folder
from tars import tree

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Row = tuple[bytes | None, str | None, object]  # of a file: bytes, path, label


def blobs(count: int, seed: int = 0) -> list[bytes]:
    """Return random bytes, some compressible: none, few, or up to 60,000; every seventh as an earlier one."""
    draw = random.Random(seed)
    values: list[bytes] = []
    for i in range(count):
        size = draw.choice([0, 1, 7, 300, 3000, draw.randrange(60_000)])
        fresh = draw.randbytes(size) if i % 3 else draw.randbytes(3) * (size // 3)
        values.append(draw.choice(values) if i % 7 == 6 else fresh)
    return values


def write_small(file: Path, **options: object) -> bytes:
    """Write a file of 2,000 or so bytes with every kind of page, and return its content."""
    images = [{"bytes": blob[:200], "path": f"{i}.jpg"} for i, blob in enumerate(blobs(30))]
    images[4:25:5] = [None] * 5
    columns = {"image": pa.array(images, IMAGE), "label": list(range(30))}
    pq.write_table(pa.table(columns), file, row_group_size=20, data_page_size=500, write_batch_size=3, **options)
    return file.read_bytes()


def write_split(file: Path, rows: Iterable[Row], names: Sequence[str] = (), **options: object) -> None:
    """Write a file as Hugging Face does: (bytes, path, label) a row, and the names of the classes."""
    images, paths, labels = zip(*rows)
    structs = pa.array([{"bytes": b, "path": p} for b, p in zip(images, paths)], IMAGE)
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"} if names else {}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": structs, "label": list(labels)}).replace_schema_metadata(metadata)
    pq.write_table(table, file, **options)


def listed(raw: Path, **options: bool) -> Sources:
    return parquet.read(Folder.of(raw), ListingCache(None), Options(**options))


def seen(sources: Sources, folder: Path) -> list[tuple[str, str, str | None, bytes]]:
    """Return split, path, class and bytes of each image, read from copies in `folder`."""
    images = parquet.spool(sources.images, np.arange(len(sources.images)), folder)
    assert [*images.paths] == [*sources.images.paths]
    return [(image.split, image.path, image.wnid, image.read()) for image in images]


@pytest.mark.parametrize("shape", ["data/{}-0000{}-of-00002.parquet", "{}-{}.parquet", "{}/000{}.parquet"])
def test_imagenet_as_hugging_face_has_it(tmp_path: Path, shape: str):
    names = ["tench, Tinca tinca", "crane", "crane", "maillot"]
    wnids = ["n01440764", "n02012849", "n03126707", "n03710637"]
    expected: list[tuple[str, str, str | None, bytes]] = []
    for word, name in (("train", "{0}_{1}_{0}.JPEG"), ("validation", "ILSVRC2012_val_0000000{1}_{0}.JPEG")):
        for part in range(2):
            path = shape.format(word, part)
            rows = [(f"{word}{part}{i}".encode(), name.format(wnids[i], i), i) for i in range(4)]
            write_split(tmp_path / path, rows, names)
            expected += [("val" if word[0] == "v" else word, f"{path}/{n}", wnids[i], b) for b, n, i in rows]
    for part in range(2):
        path = shape.format("test", part)
        rows = [(b"t%d%d" % (part, i), f"ILSVRC2012_test_0000000{i}.JPEG", -1) for i in range(3)]
        write_split(tmp_path / path, rows, names)
        expected += [("test", f"{path}/{n}", None, b) for b, n, _ in rows]
    sources = listed(tmp_path)
    assert sorted(seen(sources, tmp_path / "copies")) == sorted(expected, key=lambda image: (image[0], image[1]))
    assert [(c.label, c.wnid, c.words) for c in sources.classes] == list(zip(range(4), wnids, names))
    assert sources.layout == "6 parquet files"
    assert not sources.ignored


def test_classes_without_wnids_are_numbered_and_both_cranes_stay_apart(tmp_path: Path):
    names = [f"class {i}" for i in range(9)] + ["crane", "crane", "maillot"]
    write_split(tmp_path / "train.parquet", [(b"a", "a.jpg", 9), (b"b", "b.jpg", 10), (b"c", None, 10)], names)
    sources = listed(tmp_path)
    assert [(image[1], image[2]) for image in seen(sources, tmp_path / "copies")] == [
        ("train.parquet/a.jpg", "09"), ("train.parquet/b.jpg", "10"), ("train.parquet/2.jpg", "10")
    ]  # fmt: skip
    assert [(c.label, c.wnid, c.words) for c in sources.classes] == [(i, f"{i:02d}", n) for i, n in enumerate(names)]


@pytest.mark.parametrize(
    "path", ["n00000001_2.jpg", "x.jpg", "n00000002_n00000003.jpg", "n000000022.jpg", "n00000002/1.jpg"]
)
def test_wnids_count_where_every_class_has_its_own(tmp_path: Path, path: str):
    write_split(tmp_path / "a.parquet", [(b"a", "n00000001_1.jpg", 0), (b"a", path, 1)])
    assert [(c.wnid, c.words) for c in listed(tmp_path).classes] == [("0", "0"), ("1", "1")]


def test_missing_labels_and_images_are_left_out_with_a_reason(tmp_path: Path):
    rows = [(b"a", "a", 3), (b"b", "b", -1), (b"c", "c", None), (None, "d", 3), (None, "e", None), (b"", "f", 120)]
    write_split(tmp_path / "train.parquet", rows)
    write_split(tmp_path / "test.parquet", rows)
    (tmp_path / "notes.parquet").write_bytes(b"not looked at, for its name tells no split")
    sources = listed(tmp_path, allow_incomplete=True)
    assert Counter(image[:3] for image in seen(sources, tmp_path / "copies")) == Counter(
        [("train", f"train.parquet/{n}", w) for n, w in (("a", "003"), ("f", "120"))]
        + [("test", f"test.parquet/{n}", w) for n, w in (("a", "003"), ("b", None), ("c", None), ("f", "120"))]
    )
    assert sources.ignored == {parquet.NO_IMAGE: 4, parquet.NO_LABEL: 2, ".parquet": 1}
    assert sources.ignored.pictures == 6
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "test.parquet")
    assert len(listed(tmp_path, allow_incomplete=True).images) == 3


def test_text_labels_are_the_classes(tmp_path: Path):
    words = ["señal", " crane ", "10", "9", "", "-1", "x" * 4097, "a\nb", None]
    pq.write_table(pa.table({"img": [b"%d" % i for i in range(9)], "class": words}), tmp_path / "a.parquet")
    sources = listed(tmp_path)
    assert [(image[1], image[2]) for image in seen(sources, tmp_path / "copies")] == [
        ("a.parquet/0.jpg", "señal"), ("a.parquet/1.jpg", "crane"), ("a.parquet/2.jpg", "10"), ("a.parquet/3.jpg", "9"),
    ]  # fmt: skip
    assert [c.wnid for c in sources.classes] == ["10", "9", "crane", "señal"]
    assert sources.ignored == {parquet.NO_LABEL: 5}
    pq.write_table(pa.table({"img": [b"1"], "class": [1]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"a.parquet and .*b.parquet: have labels of two kinds"):
        listed(tmp_path)
    pq.write_table(pa.table({"img": [b"1"], "label": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match="have labels of two kinds or columns"):
        listed(tmp_path)


def test_names_are_plain_and_unlike_one_another(tmp_path: Path):
    paths = ["a.jpg", "a.jpg", "a_01.jpg", "/etc/passwd", "../up.jpg", "b/../c.jpg", "b/c.jpg", "b//c.jpg", "x\0.jpg"]
    paths += ["", "b/a", "b/a", "n\n.jpg", "07.jpg", "13.jpg", "y" * 5000]
    write_split(tmp_path / "train.parquet", [(b"", path, 0) for path in paths])
    names = [image.path.removeprefix("train.parquet/") for image in listed(tmp_path).images]
    assert names == [
        "a.jpg", "a_01.jpg", "a_01_02.jpg", "03.jpg", "04.jpg", "05.jpg", "b/c.jpg", "07.jpg", "08.jpg", "09.jpg",
        "b/a", "b/a_11", "12.jpg", "07_13.jpg", "13.jpg", "15.jpg",
    ]  # fmt: skip


def test_files_that_contradict_one_another_are_refused(tmp_path: Path):
    write_split(tmp_path / "train.parquet", [(b"", "a", 2)], ["tench", "crane"])
    with pytest.raises(SourceError, match=r"train.parquet: names the classes 0 to 1, but an image has the label 2"):
        listed(tmp_path)
    write_split(tmp_path / "train.parquet", [(b"", "a", 1)], ["tench", "crane"])
    write_split(tmp_path / "val.parquet", [(b"", "a", 1)], ["crane", "tench"])
    with pytest.raises(SourceError, match=r"train.parquet and .*val.parquet: .* other names of classes; RAW must"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("files", "layout"),
    [("{}/1.jpg", "class-folders"), ("n0000000{}_1.JPEG", "flat"), ("train/{}/1.jpg", "split-folders")],
)
def test_files_beside_another_layout_are_refused_with_both_readings(tmp_path: Path, files: str, layout: str):
    tree(tmp_path, {files.format(n): b"" for n in range(2)})
    write_split(tmp_path / "notes.parquet", [(b"", "a", 2)])
    with pytest.raises(SourceError, match="can be read in more than one way") as refusal:
        find_sources(tmp_path)
    assert all(f"(--layout {name})" in str(refusal.value) for name in ("parquet", layout))


def test_the_column_of_the_labels_is_said(tmp_path: Path):
    """Of fine and coarse labels the fine ones hold; a column of names beside numbers gives the words."""
    columns = {"img": [b"a", b"b", b"c"], "coarse_label": [0, 0, 1], "fine_label": [2, 1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    sources = listed(tmp_path)
    assert sources.gives == "the column fine_label (not coarse_label)"
    assert [image.wnid for image in sources.images] == ["2", "1", "2"]
    columns = {"img": [b"a", b"b", b"c"], "label_id": [12, 3, 12], "label_name": ["owl", "cat", "owl"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    sources = listed(tmp_path)
    assert sources.gives == "the column label_id, with words from label_name"
    assert [(c.label, c.wnid, c.words) for c in sources.classes] == [(0, "03", "cat"), (1, "12", "owl")]
    assert "labels 3, 12 are classes 0, 1 (--keep-labels keeps the numbers)" in sources.notes
    kept = listed(tmp_path, keep_labels=True)
    assert [c.label for c in kept.classes] == [*range(13)]
    assert [c.words for c in kept.classes] == ["00", "01", "02", "cat", *(f"{n:02d}" for n in range(4, 12)), "owl"]
    pq.write_table(pa.table(columns | {"label_name": ["owl", None, None]}), tmp_path / "a.parquet")
    assert [(c.wnid, c.words) for c in listed(tmp_path).classes] == [("03", "03"), ("12", "owl")]
    pq.write_table(pa.table(columns | {"label_name": ["owl", "cat", "emu"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="column label_name: the label 12 has two names, owl and emu"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([1.0, 10.0, float("nan"), None, 2.0], ["01", "10", "02"], ["01", "02", "10"]),
        ([True, None, True, False, True], ["true", "true", "false", "true"], ["false", "true"]),
        (["-2", "10", "9", "-1", "2"], ["-2", "10", "09", "02"], ["-2", "02", "09", "10"]),
        (pa.array([2**63, 5, None, 5, 0], pa.uint64()), [f"{n:019d}" for n in (2**63, 5, 5, 0)],
         [f"{n:019d}" for n in (0, 5, 2**63)]),
        (["\u3000a\tb ", "x" * 4096, "e\u0301", "\u00e9", "\ufeff\n"], ["\u3000a\tb", "x" * 4096, "\u00e9", "\u00e9"],
         ["x" * 4096, "\u00e9", "\u3000a\tb"]),
    ],
    ids=["floats", "booleans", "text of numbers", "uint64", "text"],
)  # fmt: skip
def test_labels_of_other_types(tmp_path: Path, labels: list[object], names: list[str], classes: list[str]):
    pq.write_table(pa.table({"image": [b"%d" % i for i in range(5)], "label": labels}), tmp_path / "a.parquet")
    sources = listed(tmp_path)
    assert [image.wnid for image in sources.images] == names
    assert [c.wnid for c in sources.classes] == classes
    assert sources.ignored.pictures == 5 - len(names)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [[b"a"], [b"b", b"c"]]}, "image, .* the bytes of one image a row; .* 'image.list.element'"),
        ({"image": ["a.jpg", "b.jpg"]}, r"image, img, .* one image a row; it has 'image' \(image is text\)"),
        ({"image": pa.array([{"bytes": None, "path": "a"}], IMAGE), "label": [1]}, "bytes: null .* embed_external_"),
        ({"image": [b"a", b"b"], "label": [0.5, 1.5]}, "column label: 0.5 is no label; write whole numbers or text"),
        ({"image": [b"a", b"b"], "label": [1.0, float("inf")]}, "column label: inf is no label"),
        ({"image": [None, b""], "text": ["a", "b"]}, "named label, .* one number or text a row; it has 'image, text'"),
        ({"image": [b"a", b"b"], "label": [[1], [2]]}, "label, .* one number or text a row; .*, label.list.element'"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path: Path, columns: dict[str, list[object]], message: str):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(SourceError, match=message):
        listed(tmp_path)


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_small(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'penstock-imagenet\[parquet\]'"):
        listed(tmp_path)


@pytest.mark.parametrize(("codec", "version"), [("none", "1.0"), ("zstd", "2.0")])
def test_any_rows_are_copied_in_their_order_into_a_plain_tar(tmp_path: Path, codec: str, version: str):
    draw = random.Random(codec + version)
    pictures: list[bytes | None] = [*blobs(150)]
    pictures[20:40] = [None] * 20
    options = {"compression": codec, "data_page_version": version, "row_group_size": 40, "data_page_size": 40_000}
    options |= {"use_dictionary": version == "1.0", "write_batch_size": 5, "write_page_checksum": True}
    write_split(tmp_path / "train.parquet", [(data, None, i) for i, data in enumerate(pictures)], **options)
    images = listed(tmp_path).images
    assert [images[i].offset for i in range(130)] == [row for row in range(150) if pictures[row] is not None]
    for count in (1, 30, 130):
        chosen = np.array(draw.sample(range(130), count))
        copied = parquet.spool(images, chosen, tmp_path / str(count))
        assert [copied[i].read() for i in chosen.tolist()] == [pictures[images[i].offset] for i in chosen.tolist()]
        (tar,) = (tmp_path / str(count)).iterdir()
        with tarfile.open(tar) as members:
            rows = {member.name: members.extractfile(member).read() for member in members if member.name != "places"}
        assert rows == {str(images[i].offset): pictures[images[i].offset] for i in chosen.tolist()}
        assert [*rows] == sorted(rows, key=int)
        others = sorted(set(range(130)) - set(chosen.tolist()))
        assert [copied[i] for i in others] == [images[i] for i in others]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_columns_of_every_kind(tmp_path: Path, kind: pa.DataType):
    values: list[bytes | None] = [*blobs(70)]
    values[3:50:4] = [None] * 12
    labels = pa.array([f"c{i % 3}" for i in range(70)]).dictionary_encode()
    pq.write_table(pa.table({"image": pa.array(values, kind), "label": labels}), tmp_path / "a.parquet")
    expected = [(f"c{i % 3}", value) for i, value in enumerate(values) if value is not None]
    assert [image[2:] for image in seen(listed(tmp_path), tmp_path / "copies")] == expected


def test_a_file_that_lost_rows_since_it_was_listed_is_refused(tmp_path: Path):
    write_split(tmp_path / "a.parquet", [(b"%d" % i, None, i) for i in range(20)])
    images = listed(tmp_path).images
    write_split(tmp_path / "a.parquet", [(b"", None, i) for i in range(9)])
    with pytest.raises(SourceError, match=r"a.parquet: has no row 9; it changed since the build began; delete DATASET"):
        parquet.spool(images, np.arange(20), tmp_path / "copies")
    assert not [*(tmp_path / "copies").iterdir()]


def test_a_damaged_file_is_named_by_the_command(tmp_path: Path):
    file = tmp_path / "raw" / "train.parquet"
    file.parent.mkdir()
    many = pa.table({"image": pa.array([None] * 10**6, pa.binary()), "label": [1] * 10**6})
    for size, reason in (
        (-1, "claims 1,000,000 rows in "),
        (1000, "damaged, or of an unsupported kind (Parquet magic bytes not found in footer"),
        (0, "damaged, or of an unsupported kind (Parquet file size is 0 bytes)"),
    ):
        pq.write_table(many, file)
        if size >= 0:
            os.truncate(file, size)
        (line,) = build(file.parent, tmp_path / "dataset").output.splitlines()
        assert line.startswith(f"Error: {file}: {reason}")
        assert line.endswith("; fetch it again")


def read_or_refused(file: Path, bad: bytes) -> str:
    """Read a folder with this file; assert that a refusal is one line that names it."""
    file.write_bytes(bad)
    try:
        seen(listed(file.parent), file.parent / "copies")
    except SourceError as error:
        assert str(error).startswith(f"{file.parent}")
        assert "\n" not in str(error)
        return "refused"
    return "read"


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path, codec: str):
    file = tmp_path / "train.parquet"
    good = write_small(file, compression=codec, data_page_version="2.0" if codec == "zstd" else "1.0")
    draw, outcomes = random.Random(codec), Counter[str]()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    broken = [good[:-4] + b"PARE", good[:-8] + b"\xff\xff\xff\xffPAR1", good.replace(b"image", b"\xff\xfeage")]
    assert [read_or_refused(file, bad) for bad in broken] == ["refused"] * 3  # encrypted; no footer; no UTF-8
    for turn in range(150):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.randrange(footer if turn % 2 else 0, len(bad))
            bad[at] = draw.choice([bad[at] ^ 1 << draw.randrange(8), draw.randrange(256), 0, 255, 127])
        outcomes[read_or_refused(file, bytes(bad))] += 1
    assert outcomes["read"] > 10
    assert outcomes["refused"] > 40


@pytest.mark.proof
def test_no_changed_bit_of_a_footer_ends_the_process(tmp_path: Path):
    """pyarrow ends it where a column's statistics or histograms contradict its type, unless that is met before."""
    file = tmp_path / "train.parquet"
    images = [{"bytes": b"a", "path": "a.jpg"}, None, {"bytes": b"c", "path": "c.jpg"}]
    pq.write_table(pa.table({"image": pa.array(images, IMAGE), "label": [1, 2, 3]}), file, store_schema=False)
    good = file.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    changed = [(at, good[at] ^ 1 << bit) for at in range(footer, len(good)) for bit in (0, 2, 4)]
    outcomes = Counter(read_or_refused(file, good[:at] + bytes([byte]) + good[at + 1 :]) for at, byte in changed)
    assert outcomes["read"] > 100
    assert outcomes["refused"] > 100
