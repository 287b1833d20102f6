"""Layouts of folders and synset tars against os.walk, tarfile and csv; the choice of a layout, and refusals."""

import csv
import os
from collections import Counter
from pathlib import Path

import pytest

from conftest import build
from pipeline import UserError
from pipeline.offline.sources import LAYOUTS, find_sources
from tars import contents, tar_bytes, tree


def test_fall_2011_as_a_folder_in_one_tar_and_as_that_tar(tmp_path: Path):
    pictures = {i: {f"n0000000{i}_{j}.JPEG": bytes([i, j]) for j in range(i)} for i in (3, 1, 2)}
    tars = {f"n0000000{i}.tar": tar_bytes(files) for i, files in pictures.items()}
    tree(tmp_path, {f"folder/{name}": data for name, data in tars.items()})
    tree(tmp_path, {"one/fall11_whole.tar": tar_bytes(tars)})
    expected = Counter(
        ("train", name, f"n0000000{i}", data) for i, files in pictures.items() for name, data in files.items()
    )
    for raw in (tmp_path / "folder", tmp_path / "one", tmp_path / "one" / "fall11_whole.tar"):
        sources = find_sources(raw)
        assert sources.name == "fall2011"
        assert contents(sources.images) == expected
        assert [(c.label, c.wnid) for c in sources.classes] == [(i, f"n0000000{i + 1}") for i in range(3)]


def test_kaggle_from_above_and_from_inside(tmp_path: Path):
    data, solution = "ILSVRC/Data/CLS-LOC", tmp_path / "LOC_val_solution.csv"
    files = {f"{data}/train/n0000000{i}/n0000000{i}_{j}.JPEG": bytes([i, j]) for i in (1, 2) for j in (3, 44)}
    files |= {f"{data}/val/ILSVRC2012_val_0000000{i}.JPEG": bytes([i]) for i in (1, 2)}
    files |= {f"{data}/test/ILSVRC2012_test_0000000{i}.JPEG": bytes([9, i]) for i in (1, 2, 3)}
    files |= {"LOC_synset_mapping.txt": b"n00000001 tench, Tinca tinca\nn00000002 crane\n"}
    tree(tmp_path, files | {"ILSVRC/ImageSets/x.txt": b""})
    truth = {"ILSVRC2012_val_00000002": "n00000001 1 2 3 4 n00000001 5 6 7 8 "}
    truth |= {"ILSVRC2012_val_00000001": "n00000002 85 1 499 272 "}
    with open(solution, "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *truth.items()])
    expected: Counter[tuple[str, str, str | None, bytes]] = Counter()
    for path, _, names in os.walk(tmp_path / data):
        for name in names:
            split, _, folder = Path(path).relative_to(tmp_path / data).as_posix().partition("/")
            wnid = {"train": folder, "val": truth.get(Path(name).stem, "").split(" ")[0], "test": None}[split]
            expected[split, name, wnid, Path(path, name).read_bytes()] += 1
    for raw in (tmp_path, tmp_path / "ILSVRC"):
        sources = find_sources(raw)
        assert sources.name == "kaggle"
        assert contents(sources.images) == expected
        words = [(c.wnid, c.words) for c in sources.classes]
        assert words == [("n00000001", "tench, Tinca tinca"), ("n00000002", "crane")]
    solution.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
    with pytest.raises(UserError, match=r"LOC_val_solution.csv: row 2 has no ImageId and wnid"):
        find_sources(tmp_path)
    solution.unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution.csv: missing; it has the labels of val/"):
        find_sources(tmp_path)


def test_train_and_val_folders(raw: Path):
    sources = find_sources(raw)
    assert sources.name == "split-folders"
    paths = [path.relative_to(raw).as_posix() for path in raw.rglob("*.jpg")]
    assert {(i.path, i.split, i.wnid) for i in sources.images} == {(p, *p.split("/")[:2]) for p in paths}
    assert len(sources.images) == len(paths) == 51
    assert [(c.label, c.wnid) for c in sources.classes] == [(0, "blobs"), (1, "checks"), (2, "stripes")]
    assert sources.ignored == {".txt": 1}


def test_an_unlabelled_test_folder(tmp_path: Path):
    tree(tmp_path, {"train/a/1.png": b"", "test/2.png": b""})
    assert {image.split: image.wnid for image in find_sources(tmp_path).images} == {"train": "a", "test": None}


def test_flat_files(tmp_path: Path):
    tree(tmp_path, dict.fromkeys(("n00000002_blue_heron.JPEG", "n00000001_17.JPEG", "n00000001_5.JPEG"), b""))
    sources = find_sources(tmp_path)
    assert {image.path[:9] == image.wnid for image in sources.images} == {True}
    words = [(record.wnid, record.words) for record in sources.classes]
    assert words == [("n00000001", "n00000001"), ("n00000002", "blue heron")]


def test_links_to_class_folders_are_followed_and_never_back(tmp_path: Path):
    tree(tmp_path / "far", {"a/1.png": b"1", "a/deep/2.png": b"2"})
    tree(tmp_path / "raw", {"b/3.png": b"3", "LOC_synset_mapping.txt": b"n00000001 tench\n"})
    (tmp_path / "raw" / "a").symlink_to(tmp_path / "far" / "a")
    (tmp_path / "raw" / "b" / "up").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "raw" / "b" / "pipe.png")
    sources = find_sources(tmp_path / "raw", class_depth=1)
    assert {image.path: image.wnid for image in sources.images} == {"a/1.png": "a", "a/deep/2.png": "a", "b/3.png": "b"}
    assert sources.ignored == {"link that leads back": 1, "link to nothing, pipe or device": 2}
    assert "1 × link that leads back: b/up" in sources.ignored.lines()


def test_a_forced_layout_is_used_and_one_that_does_not_fit_names_what_is_missing(raw: Path, tmp_path: Path):
    forced = find_sources(raw / "train", "class-folders")
    assert (forced.name, len(forced.images)) == ("class-folders", 42)
    forced = find_sources(raw, "class-folders", class_depth=1)
    assert {image.wnid for image in forced.images} == {"train", "val"}
    (tmp_path / "notes").mkdir()
    for name in LAYOUTS:
        with pytest.raises(UserError, match=f"not the layout {name}: ") as caught:
            find_sources(tmp_path, name)
        assert "\n" not in str(caught.value)
    result = build(raw, tmp_path / "out", "--layout", "imagenet")
    assert result.exit_code == 2
    assert f"--layout imagenet: no such layout; there are: {', '.join(LAYOUTS)}" in result.output
    result = build(raw, tmp_path / "out", "--layout", "split-folders", "--limit", 9)
    assert result.exit_code == 0, result.output
    assert "train/ and val/ with one folder per class (split-folders)" in result.output


def test_chosen_classes_have_ranks_among_themselves(official: Path, tmp_path: Path):
    every, chosen = find_sources(official), tmp_path / "classes.txt"
    second, last = every.classes[1], every.classes[3]
    chosen.write_text(f"# two of four\n\n{last.wnid}  # the last\n{second.wnid}\n")
    sources = find_sources(official, classes=chosen)
    assert [(c.label, c.wnid, c.words, c.devkit_id) for c in sources.classes] == [
        (0, second.wnid, second.words, second.devkit_id),
        (1, last.wnid, last.words, last.devkit_id),
    ]
    assert list(sources.images) == [image for image in every.images if image.wnid in (second.wnid, last.wnid)]
    assert sources.ignored["picture of no class in --classes"] == 18
    for text, message in (
        (f"{last.wnid}\nn00000000\ntench\n", "n00000000, tench: not among the 4 classes of the raw data"),
        ("# none\n", "names no class"),
    ):
        chosen.write_text(text)
        assert message in build(official, tmp_path / "out", "--classes", chosen).output


def test_a_class_without_training_images_is_named(raw: Path, tmp_path: Path):
    (tmp_path / "raw" / "train").mkdir(parents=True)
    (tmp_path / "raw" / "train" / "blobs").symlink_to(raw / "train" / "blobs")
    (tmp_path / "raw" / "val").symlink_to(raw / "val")
    result = build(tmp_path / "raw", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "note: classes without a training image: checks, stripes" in result.output


@pytest.mark.parametrize(
    ("files", "raw", "message"),
    [
        ((), "missing", "no such directory"),
        ((), "", "empty: is the volume mounted?"),
        (("a.txt",), "", "Found 0 folders and 1 files"),
        (("a.txt",), "a.txt", "not a directory"),
        (("val/a/1.png", "val/b/1.png"), "", "val/: named as a split"),
        (("train/a/1.txt", "val/a/1.png"), "", "train: no picture in it; left out: 1 × .txt: train/a/1.txt"),
        (("set/train/a/1.png", "set/val/a/1.png"), "", "only one folder with pictures, set"),
        (("train/1.png", "train/2.png"), "", "train: its pictures lie in no class folder (train/1.png, train/2.png"),
    ],
)
def test_raw_that_is_no_layout_or_one_level_off_is_refused(
    tmp_path: Path, files: tuple[str, ...], raw: str, message: str
):
    (tmp_path / "empty").mkdir()
    tree(tmp_path / "empty", dict.fromkeys(files, b""))
    result = build(tmp_path / "empty" / raw, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_inside_raw_is_refused(raw: Path):
    result = build(raw, raw / "out")
    assert result.exit_code == 2
    assert "lies inside RAW" in result.output
    assert not (raw / "out").exists()
