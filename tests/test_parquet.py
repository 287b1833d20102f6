"""The parquet layout: the shapes that Hugging Face gives it, labels and names, and files that lie or are damaged."""

import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parquets import IMAGE, small
from pipeline.archives import ListingCache
from pipeline.errors import SourceError
from pipeline.offline.parquet import layout, pages, pagetable
from pipeline.offline.raw import Folder, Sources


def split(file: Path, rows: Iterable[tuple[bytes | None, str | None, object]], names: list[str] | None = None) -> None:
    """A file as Hugging Face writes it: (bytes, path, label) a row, and the names of the classes."""
    images, paths, labels = zip(*rows)
    columns = {
        "image": pa.array([{"bytes": b, "path": p} for b, p in zip(images, paths)], IMAGE),
        "label": list(labels),
    }
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)


def found(raw: Path) -> Sources:
    assert layout.recognise(Folder.of(raw))
    return layout.read(Folder.of(raw), ListingCache(None))


def seen(sources: Sources) -> list[tuple[str, str, str | None, bytes]]:
    """Split, path, class and bytes of each image."""
    return [(i.split, i.path, i.wnid, pages.read_row(i.file, i.offset)) for i in sources.images]


@pytest.mark.parametrize("shape", ["data/{}-0000{}-of-00002.parquet", "{}-{}.parquet", "{}/000{}.parquet"])
def test_imagenet_as_hugging_face_has_it(tmp_path: Path, shape: str):
    names = ["tench, Tinca tinca", "crane", "crane", "maillot"]
    wnids = ["n01440764", "n02012849", "n03126707", "n03710637"]
    expected: list[tuple[str, str, str | None, bytes]] = []
    for word, name in (("train", "{0}_{1}_{0}.JPEG"), ("validation", "ILSVRC2012_val_0000000{1}_{0}.JPEG")):
        for part in range(2):
            path = shape.format(word, part)
            rows = [(f"{word}{part}{i}".encode(), name.format(wnids[i], i), i) for i in range(4)]
            split(tmp_path / path, rows, names)
            expected += [("val" if word[0] == "v" else word, f"{path}/{n}", wnids[i], b) for b, n, i in rows]
    rows = [(b"t%d" % i, f"ILSVRC2012_test_0000000{i}.JPEG", -1) for i in range(3)]
    split(tmp_path / shape.format("test", 0), rows, names)
    expected += [("test", f"{shape.format('test', 0)}/{n}", None, b) for b, n, _ in rows]
    sources = found(tmp_path)
    assert sorted(seen(sources)) == sorted(expected, key=lambda image: (image[0], image[1]))
    assert [(c.label, c.wnid, c.words) for c in sources.classes] == list(zip(range(4), wnids, names))
    assert sources.layout == "5 parquet files"
    assert not sources.ignored


def test_classes_without_wnids_are_numbered_and_both_cranes_stay_apart(tmp_path: Path):
    names = [f"class {i}" for i in range(9)] + ["crane", "crane", "maillot"]
    split(tmp_path / "train.parquet", [(b"a", "a.jpg", 9), (b"b", "b.jpg", 10), (b"c", None, 10)], names)
    sources = found(tmp_path)
    path = "train.parquet/"
    assert seen(sources) == [
        ("train", path + "a.jpg", "09", b"a"),
        ("train", path + "b.jpg", "10", b"b"),
        ("train", path + "2.jpg", "10", b"c"),
    ]
    assert [(c.label, c.wnid, c.words) for c in sources.classes] == [(i, f"{i:02d}", n) for i, n in enumerate(names)]


@pytest.mark.parametrize(
    "paths",
    [
        ("n00000001_1.jpg", "n00000001_2.jpg"),  # two classes of one WNID
        ("n00000001_1.jpg", "x.jpg"),
        ("n00000001_1.jpg", "n00000002_n00000003.jpg"),
        ("n00000001_1.jpg", "n000000022.jpg"),
        ("n00000001_1.jpg", "n00000002/1.jpg"),
    ],
)
def test_wnids_count_where_every_class_has_its_own(tmp_path: Path, paths: tuple[str, str]):
    split(tmp_path / "a.parquet", [(b"a", path, label) for label, path in enumerate(paths)])
    assert [(c.wnid, c.words) for c in found(tmp_path).classes] == [("0", "0"), ("1", "1")]


def test_missing_labels_and_images_are_left_out_with_a_reason(tmp_path: Path):
    rows = [(b"a", "a", 3), (b"b", "b", -1), (b"c", "c", None), (None, "d", 3), (None, "e", None), (b"", "f", 120)]
    split(tmp_path / "train.parquet", rows)
    split(tmp_path / "test.parquet", rows)
    (tmp_path / "notes.parquet").write_bytes(b"not looked at, for its name tells no split")
    sources = found(tmp_path)
    assert Counter(image[:3] for image in seen(sources)) == Counter(
        [("train", f"train.parquet/{n}", w) for n, w in (("a", "003"), ("f", "120"))]
        + [("test", f"test.parquet/{n}", w) for n, w in (("a", "003"), ("b", None), ("c", None), ("f", "120"))]
    )
    assert sources.ignored == {layout.NO_IMAGE: 4, layout.NO_LABEL: 2, ".parquet": 1}
    assert {image.size for image in sources.images} == {0}
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "test.parquet")
    assert len(found(tmp_path).images) == 3
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "train.parquet")
    with pytest.raises(
        SourceError, match=r"train.parquet: no column of labels: none is called label, labels, .* 'image'"
    ):
        found(tmp_path)


def test_text_labels_are_the_classes(tmp_path: Path):
    words = ["señal", " crane ", "10", "9", "", "-1", "x" * 201, "a\nb", None]
    pq.write_table(pa.table({"img": [b"%d" % i for i in range(9)], "class": words}), tmp_path / "a.parquet")
    sources = found(tmp_path)
    assert [(image[1], image[2]) for image in seen(sources)] == [
        ("a.parquet/0.jpg", "señal"), ("a.parquet/1.jpg", "crane"), ("a.parquet/2.jpg", "10"), ("a.parquet/3.jpg", "9"),
    ]  # fmt: skip
    assert [c.wnid for c in sources.classes] == ["10", "9", "crane", "señal"]
    assert sources.ignored == {layout.NO_LABEL: 5}
    pq.write_table(pa.table({"img": [b"1"], "class": [1]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"b.parquet: its labels are numbers, those of other files text"):
        found(tmp_path)


def test_names_are_plain_and_unlike_one_another(tmp_path: Path):
    paths = ["a.jpg", "a.jpg", "a_01.jpg", "/etc/passwd", "../up.jpg", "b/../c.jpg", "b/c.jpg", "b//c.jpg", "x\0.jpg"]
    paths += ["", "b/a", "b/a", "n\n.jpg", "07.jpg", "13.jpg", "y" * 5000]
    split(tmp_path / "train.parquet", [(b"", path, 0) for path in paths])
    names = [image.path.removeprefix("train.parquet/") for image in found(tmp_path).images]
    assert names == [
        "a.jpg", "a_01.jpg", "a_01_02.jpg", "03.jpg", "04.jpg", "05.jpg", "b/c.jpg", "07.jpg", "08.jpg", "09.jpg",
        "b/a", "b/a_11", "12.jpg", "07_13.jpg", "13.jpg", "15.jpg",
    ]  # fmt: skip


def test_files_that_contradict_one_another(tmp_path: Path):
    split(tmp_path / "train.parquet", [(b"", "a", 2)], ["tench", "crane"])
    with pytest.raises(SourceError, match=r"train.parquet: row 0 has the label 2, but .* names the classes 0 to 1"):
        found(tmp_path)
    split(tmp_path / "train.parquet", [(b"", "a", 1)], ["tench", "crane"])
    split(tmp_path / "val.parquet", [(b"", "a", 1)], ["crane", "tench"])
    with pytest.raises(SourceError, match=r"val.parquet: names other classes than .*train.parquet; RAW must hold one"):
        found(tmp_path)


def test_what_is_another_layout(tmp_path: Path):
    split(tmp_path / "flat" / "notes.parquet", [(b"", "a", 2)])
    (tmp_path / "flat" / "n00000001_1.JPEG").write_bytes(b"")
    split(tmp_path / "splits" / "train" / "notes.parquet", [(b"", "a", 2)])
    (tmp_path / "splits" / "train" / "a").mkdir()
    split(tmp_path / "classes" / "notes.parquet", [(b"", "a", 2)])
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir()
        (tmp_path / "classes" / name / "1.jpg").write_bytes(b"")
    (tmp_path / "none").mkdir()
    for name in ("flat", "splits", "classes", "none"):
        assert not layout.recognise(Folder.of(tmp_path / name)), name
    with pytest.raises(SourceError, match=r"not the layout parquet: no \.parquet is in it"):
        layout.read(Folder.of(tmp_path / "none"), ListingCache(None))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"image": pa.array([[b"a"], [b"b", b"c"]])},
            "the column 'image.list.element' is a list; only one image a row",
        ),
        ({"image": ["a.jpg", "b.jpg"]}, "no column of image bytes: none is called image, img, .* it has 'image'"),
        ({"pixels": [b"a", b"b"]}, "no column of image bytes: none is called image, img, .* it has 'pixels'"),
        ({"image": [b"a", b"b"], "label": [0.5, 1.5]}, "the column 'label' has not one number or text a row"),
        ({"image": [b"a", b"b"], "label": [[1], [2]]}, "'label.list.element' has not one number or text a row"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, column: dict[str, pa.Array], message: str):
    pq.write_table(pa.table(column), tmp_path / "train.parquet")
    with pytest.raises(SourceError, match=message):
        layout.read(Folder.of(tmp_path), ListingCache(None))


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'penstock\[parquet\]'"):
        layout.read(Folder.of(tmp_path), ListingCache(None))


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_damaged_files_are_refused_or_read_within_bounds(tmp_path: Path, codec: str, version: str):
    good = small(tmp_path / "train.parquet", compression=codec, data_page_version=version)
    draw = random.Random(codec + version)
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    outcomes: Counter[str] = Counter()
    footer_from = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for turn in range(400):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.randrange(len(bad)) if turn % 2 else draw.randrange(footer_from, len(bad))
            bad[at] = draw.choice([bad[at] ^ 1 << draw.randrange(8), draw.randrange(256), 0, 255, 127])
        if turn % 8 == 0:
            del bad[draw.randrange(len(bad)) :]
        outcomes[outcome(tmp_path / "train.parquet", bytes(bad))] += 1
    assert outcomes["read"] > 20
    assert outcomes["refused"] > 100
    assert time.monotonic() - begin < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20  # KiB


def outcome(file: Path, data: bytes) -> str:
    """Plan and read a folder with this file: whether it was read, or refused with a line that names the file."""
    file.write_bytes(data)
    result = "read"
    try:
        rows = [image.offset for image in layout.read(Folder.of(file.parent), ListingCache(None)).images]
    except SourceError as error:
        assert str(error).startswith(str(file.parent))
        assert "\n" not in str(error)
        rows, result = list(range(31)), "refused"
    for row in rows:
        try:
            assert len(pages.read_row(str(file), row)) <= pagetable.MAX_PAGE
        except SourceError as error:
            assert str(error).startswith(f"{file}: ")
            assert "\n" not in str(error)
            result = "refused"
    return result
