"""The parquet layout: the shapes that Hugging Face gives it, labels and names, files that lie, and builds from them."""

import json
import random
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result

from conftest import LITTLE, build, digests, verify
from parquets import IMAGE, blobs, small
from pipeline import SourceError, manifest, storage
from pipeline.archives import ListingCache
from pipeline.offline import parquet
from pipeline.offline.raw import Folder, Sources
from s3 import Store, empty_bucket, running_server  # noqa: F401  # fixtures


def split(
    file: Path,
    rows: Iterable[tuple[bytes | None, str | None, object]],
    names: list[str] | None = None,
    **options: object,
) -> None:
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
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file, **options)


def listed(raw: Path) -> Sources:
    sources = parquet.read(Folder.of(raw), ListingCache(None), False)
    assert sources is not None
    return sources


def seen(sources: Sources, folder: Path) -> list[tuple[str, str, str | None, bytes]]:
    """Split, path, class and bytes of each image, read from copies in `folder`."""
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
            split(tmp_path / path, rows, names)
            expected += [("val" if word[0] == "v" else word, f"{path}/{n}", wnids[i], b) for b, n, i in rows]
    rows = [(b"t%d" % i, f"ILSVRC2012_test_0000000{i}.JPEG", -1) for i in range(3)]
    split(tmp_path / shape.format("test", 0), rows, names)
    expected += [("test", f"{shape.format('test', 0)}/{n}", None, b) for b, n, _ in rows]
    sources = listed(tmp_path)
    assert sorted(seen(sources, tmp_path / "copies")) == sorted(expected, key=lambda image: (image[0], image[1]))
    assert [(c.label, c.wnid, c.words) for c in sources.classes] == list(zip(range(4), wnids, names))
    assert sources.layout == "5 parquet files"
    assert not sources.ignored


def test_classes_without_wnids_are_numbered_and_both_cranes_stay_apart(tmp_path: Path):
    names = [f"class {i}" for i in range(9)] + ["crane", "crane", "maillot"]
    split(tmp_path / "train.parquet", [(b"a", "a.jpg", 9), (b"b", "b.jpg", 10), (b"c", None, 10)], names)
    sources = listed(tmp_path)
    path = "train.parquet/"
    assert seen(sources, tmp_path / "copies") == [
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
    assert [(c.wnid, c.words) for c in listed(tmp_path).classes] == [("0", "0"), ("1", "1")]


def test_missing_labels_and_images_are_left_out_with_a_reason(tmp_path: Path):
    rows = [(b"a", "a", 3), (b"b", "b", -1), (b"c", "c", None), (None, "d", 3), (None, "e", None), (b"", "f", 120)]
    split(tmp_path / "train.parquet", rows)
    split(tmp_path / "test.parquet", rows)
    (tmp_path / "notes.parquet").write_bytes(b"not looked at, for its name tells no split")
    sources = listed(tmp_path)
    assert Counter(image[:3] for image in seen(sources, tmp_path / "copies")) == Counter(
        [("train", f"train.parquet/{n}", w) for n, w in (("a", "003"), ("f", "120"))]
        + [("test", f"test.parquet/{n}", w) for n, w in (("a", "003"), ("b", None), ("c", None), ("f", "120"))]
    )
    assert sources.ignored == {parquet.NO_IMAGE: 4, parquet.NO_LABEL: 2, ".parquet": 1}
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "test.parquet")
    assert len(listed(tmp_path).images) == 3
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "train.parquet")
    with pytest.raises(
        SourceError,
        match=r"train.parquet: no column named label, labels, .* has one number or text a row; it has 'image'",
    ):
        listed(tmp_path)


def test_text_labels_are_the_classes(tmp_path: Path):
    words = ["señal", " crane ", "10", "9", "", "-1", "x" * 201, "a\nb", None]
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


def test_names_are_plain_and_unlike_one_another(tmp_path: Path):
    paths = ["a.jpg", "a.jpg", "a_01.jpg", "/etc/passwd", "../up.jpg", "b/../c.jpg", "b/c.jpg", "b//c.jpg", "x\0.jpg"]
    paths += ["", "b/a", "b/a", "n\n.jpg", "07.jpg", "13.jpg", "y" * 5000]
    split(tmp_path / "train.parquet", [(b"", path, 0) for path in paths])
    names = [image.path.removeprefix("train.parquet/") for image in listed(tmp_path).images]
    assert names == [
        "a.jpg", "a_01.jpg", "a_01_02.jpg", "03.jpg", "04.jpg", "05.jpg", "b/c.jpg", "07.jpg", "08.jpg", "09.jpg",
        "b/a", "b/a_11", "12.jpg", "07_13.jpg", "13.jpg", "15.jpg",
    ]  # fmt: skip


def test_files_that_contradict_one_another(tmp_path: Path):
    split(tmp_path / "train.parquet", [(b"", "a", 2)], ["tench", "crane"])
    with pytest.raises(SourceError, match=r"train.parquet: names the classes 0 to 1, but an image has the label 2"):
        listed(tmp_path)
    split(tmp_path / "train.parquet", [(b"", "a", 1)], ["tench", "crane"])
    split(tmp_path / "val.parquet", [(b"", "a", 1)], ["crane", "tench"])
    with pytest.raises(
        SourceError, match=r"train.parquet and .*val.parquet: .* other names of classes; RAW must hold one"
    ):
        listed(tmp_path)


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
        assert parquet.read(Folder.of(tmp_path / name), ListingCache(None), False) is None, name
    assert parquet.read(Folder.of(tmp_path / "none"), ListingCache(None), True) is None


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"image": pa.array([[b"a"], [b"b", b"c"]])},
            "image, .* the bytes of one image a row; .* 'image.list.element'",
        ),
        ({"image": ["a.jpg", "b.jpg"]}, "no column named image, img, .* the bytes of one image a row; it has 'image'"),
        ({"pixels": [b"a", b"b"]}, "no column named image, img, .* the bytes of one image a row; it has 'pixels'"),
        ({"image": [b"a", b"b"], "label": [0.5, 1.5]}, "label, .* one number or text a row; it has 'image, label'"),
        ({"image": [b"a", b"b"], "label": [[1], [2]]}, "label, .* one number or text a row; .*, label.list.element'"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, column: dict[str, pa.Array], message: str):
    pq.write_table(pa.table(column), tmp_path / "train.parquet")
    with pytest.raises(SourceError, match=message):
        parquet.read(Folder.of(tmp_path), ListingCache(None), True)


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'penstock-imagenet\[parquet\]'"):
        parquet.read(Folder.of(tmp_path), ListingCache(None), True)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_any_rows_are_copied_in_their_order_into_a_plain_tar(tmp_path: Path, codec: str, version: str):
    draw = random.Random(codec + version)
    pictures: list[bytes | None] = [*blobs(150)]
    pictures[20:40] = [None] * 20
    options = {"compression": codec, "data_page_version": version, "row_group_size": 40, "data_page_size": 40_000}
    options |= {"use_dictionary": version == "1.0", "write_batch_size": 5, "write_page_checksum": True}
    split(tmp_path / "train.parquet", [(data, None, i) for i, data in enumerate(pictures)], **options)
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


def test_copies_are_used_again_unless_their_file_has_changed(tmp_path: Path):
    for name in ("a", "b"):
        split(tmp_path / f"{name}.parquet", [(b"%d" % i, None, i) for i in range(20)])
    folder = tmp_path / "copies"
    first = seen(listed(tmp_path), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 2
    assert seen(listed(tmp_path), folder) == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    split(tmp_path / "b.parquet", [(b"%d" % -i, None, i) for i in range(20)])
    assert [image[3] for image in seen(listed(tmp_path), folder)][20:] == [b"%d" % -i for i in range(20)]
    assert len([*folder.iterdir()]) == 3
    images = listed(tmp_path).images
    split(tmp_path / "a.parquet", [(b"", None, i) for i in range(9)])
    with pytest.raises(SourceError, match=r"a.parquet: has no row 9; it changed since the build began; delete DATASET"):
        parquet.spool(images, np.arange(40), tmp_path / "other")
    assert not [*(tmp_path / "other").glob("*.tmp")]


# Builds, by the command

BY_NAME = ("skipped.jsonl", "dataset.json")  # name the files of RAW


@pytest.fixture(scope="module")
def rows(little: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `little` in parquet files: two for training, one for validation. Read only."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("train", "val"):
        files = sorted((little / name).rglob("*.jpg"))
        table = [(path.read_bytes(), path.name, path.parent.name) for path in files]
        random.Random(name).shuffle(table)
        parts = [table[:100], table[100:]] if name == "train" else [table]
        for number, part in enumerate(parts):
            split(folder / "data" / f"{name}-{number}.parquet", part, row_group_size=30)
    return folder


def pictures_of(root: Path) -> dict[str, str]:
    assert not (root / ".build").exists()
    return {name: digest for name, digest in digests(root).items() if name not in BY_NAME}


@pytest.fixture(scope="module")
def expected(little_dataset: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in little_dataset.items() if name not in BY_NAME}


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result, *words: str) -> None:
    """One line, exit code 2."""
    assert result.exit_code == 2, result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("Error: ")
    for word in words:
        assert word in last


def test_a_build_has_the_bytes_of_a_build_from_folders(rows: Path, expected: dict[str, str], tmp_path: Path):
    output = done(build(rows, tmp_path / "dataset", *LITTLE, "--workers", 2))
    assert pictures_of(tmp_path / "dataset") == expected
    assert "note: a build first copies the pictures of the parquet files to DATASET/.build" in output


def test_an_interrupted_build_goes_on_with_the_copies_that_are_there(
    rows: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, written = tmp_path / "dataset", []

    def interrupt(path: Path, write: Callable[..., Any]) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_aside(path, write)

    write_aside = parquet.write_aside
    monkeypatch.setattr(parquet, "write_aside", interrupt)
    assert build(rows, root, *LITTLE, "--workers", 1).exit_code == 130
    assert [*(root / ".build").glob("*.tar")] == written
    before = written[0].stat().st_mtime_ns
    (root / ".build" / f"{written[0].name}.12345678.tmp").write_bytes(b"what a kill left")
    again = []
    monkeypatch.setattr(parquet, "write_aside", lambda path, write: again.append(path.name) or write_aside(path, write))
    done(build(rows, root, *LITTLE, "--part", "1/2"))
    assert len(again) == 2
    assert written[0].stat().st_mtime_ns == before
    assert len([*(root / ".build").glob("*.tar*")]) == 3
    done(build(rows, root, *LITTLE, "--part", "2/2"))
    done(build(rows, root, *LITTLE, "--merge"))
    assert len(again) == 2
    assert pictures_of(root) == expected


def test_raw_that_changed_since_the_first_shards_is_noticed(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw, root = Path(shutil.copytree(rows, tmp_path / "raw")), tmp_path / "dataset"
    done(build(raw, root, *LITTLE, "--part", "1/2"))
    file = raw / "data" / "train-0.parquet"
    table = pq.read_table(file).to_pylist()
    table[0]["image"]["bytes"] += b"longer"
    split(file, [(row["image"]["bytes"], row["image"]["path"], row["label"]) for row in table])
    refused(
        build(raw, root, *LITTLE, "--workers", 1), "had other sizes or other places", "restore RAW, or delete DATASET"
    )


def test_a_dry_run_writes_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    output = done(build(rows, tmp_path / "dataset", *LITTLE, "--dry-run"))
    assert "144 train, 24 val, 3 classes" in output
    assert "from 64 images tried here" in output
    assert not [*tmp_path.iterdir()]


def test_without_room_for_the_copy_a_build_does_not_begin(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    refused(
        build(rows, tmp_path / "dataset", *LITTLE),
        "dataset/.build: a copy of RAW's pictures takes", " MB, and 0 MB are free; make room or name another DATASET",
    )  # fmt: skip
    assert not [*tmp_path.rglob("*.tar")]


def test_repair_and_retry_read_the_rows_that_they_need(rows: Path, little: Path, tmp_path: Path):
    raw, root = Path(shutil.copytree(rows, tmp_path / "raw")), tmp_path / "dataset"
    options = ("--size", 32, "--samples-per-shard", 40, "--workers", 1)
    done(build(raw, root, *options))
    before = digests(root)
    (root / "train" / "train-000001.tar").write_bytes(b"damaged")
    (root / "val" / "samples.npy").unlink()
    assert verify(root, "--repair", raw, "--workers", 1).exit_code == 0
    assert digests(root) == before
    twice = (little / "train" / "checks" / "checks_train8.jpg").read_bytes()
    for path in (raw / "data").glob("train-*"):
        table = [(row["image"]["bytes"], row["image"]["path"], row["label"]) for row in pq.read_table(path).to_pylist()]
        split(path, [(twice if name == "checks_train7.jpg" else data, name, label) for data, name, label in table])
    output = done(build(raw, root, *options, "--retry-skipped"))
    assert "1 images that were skipped are samples now; 1 are skipped still" in output
    done(build(raw, tmp_path / "fresh", *options))
    assert digests(root) == digests(tmp_path / "fresh")
    duplicates = verify(root).output
    assert "duplicates (no failure): 1 raw images in 2 samples; 1 within a class of a split" in duplicates


@pytest.mark.proof
def test_copies_lie_in_a_store_where_the_dataset_does(s3: Store, rows: Path, expected: dict[str, str]):
    for path in rows.rglob("*.parquet"):
        storage.put_if_absent(storage.location(f"{s3.url}/raw/data/{path.name}"), path.read_bytes())
    urls = f"{s3.url}/raw", f"{s3.url}/out"
    s3.faults(0.1, seed=1)
    done(build(*urls, *LITTLE, "--part", "1/2"))
    s3.faults(0.0)
    inside = [entry.name for entry in storage.scan(storage.location(f"{s3.url}/out/.build"))]
    assert sum(name.endswith(".tar") for name in inside) == 3
    done(build(*urls, *LITTLE, "--workers", 1))
    assert not storage.exists(storage.location(f"{s3.url}/out/.build"))
    built = manifest.load(f"{s3.url}/out")
    assert {name: file.sha256 for name, file in built.files.items() if name not in BY_NAME} == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda good: b"", "damaged, or of an unsupported kind (Parquet file size is 0 bytes); fetch it again"),
        (lambda good: good[: len(good) // 2], "Parquet magic bytes not found in footer"),
        (lambda good: good[:-4] + b"PARE", "encrypt"),
        (lambda good: good[:-8] + b"\xff\xff\xff\xffPAR1", "; fetch it again"),
        (lambda good: good.replace(b"image", b"\xff\xfeage"), "train.parquet"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, bad: Callable[[bytes], bytes], message: str):
    (tmp_path / "raw").mkdir()
    file = tmp_path / "raw" / "train.parquet"
    file.write_bytes(bad(small(file)))
    refused(build(tmp_path / "raw", tmp_path / "dataset", *LITTLE), str(file), message)


def test_a_file_that_claims_more_rows_than_bytes(tmp_path: Path):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": pa.array([None] * 10**6, pa.binary()), "label": [1] * 10**6}), file)
    with pytest.raises(SourceError, match=f"claims 1,000,000 rows in {file.stat().st_size:,} bytes; fetch it again"):
        listed(tmp_path)


def read_or_refused(file: Path, bad: bytes) -> str:
    """Read a folder with this file: a refusal is one line that names it."""
    file.write_bytes(bad)
    try:
        seen(parquet.read(Folder.of(file.parent), ListingCache(None), True), file.parent / "copies")
    except SourceError as error:
        assert str(error).startswith(f"{file.parent}")
        assert "\n" not in str(error)
        return "refused"
    return "read"


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path, codec: str):
    file = tmp_path / "train.parquet"
    good = small(file, compression=codec, data_page_version="2.0" if codec == "zstd" else "1.0")
    draw, outcomes = random.Random(codec), Counter[str]()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
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
    for at in range(footer, len(good)):
        for bit in (0, 2, 4):
            read_or_refused(file, good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
