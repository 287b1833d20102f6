"""Layouts of folders and synset tars against os.walk, tarfile and csv; the choice of a layout, and refusals."""

import csv
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import build, picture
from pipeline import UserError, manifest
from pipeline.offline.sources import LAYOUTS, find_sources
from tars import contents, tar_bytes, tree
from trees import NFD, plant


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


WORDS = "bear,cat,cat and dog,dog,polar_bear,c #1,x,y"
WNIDS = "n01440764,n01443537,n01484850"


@pytest.mark.parametrize(
    ("names", "text", "kept"),
    [
        (WORDS, "cat and dog # not cat\nc #1", ["c #1", "cat and dog"]),
        (WORDS, "x,y", ["x", "y"]),
        (WORDS, "0 cat and dog\n1 bear", ["bear", "cat and dog"]),
        (WORDS, "cat and dog 2\nx 0", ["cat and dog", "x"]),
        (WORDS, "name;id\ncat;0", ["cat"]),
        (WORDS, "cat,animal\nx,letter", ["cat", "x"]),
        (WORDS, '{"classes": ["cat", "x"]}', ["cat", "x"]),
        (WORDS, '[{"name": "cat", "id": 0}, {"name": "x", "id": null}]', ["cat", "x"]),
        (WORDS, "polar bear", "polar bear: not among the 8 classes of the raw data"),
        (WORDS, "cat,wolf", "wolf: not among the 8 classes of the raw data"),
        (WORDS, "cat,pet\nwolf,wild", "wolf: not among the 8 classes of the raw data"),
        (WORDS, "cat,dog\nx,y", "cat and dog stand in one line, and both are classes; write one a line"),
        (WORDS, '["cat", "x"', '["cat: not among the 8 classes of the raw data'),
        (WORDS, "wnid,name\n", "names no class; write one wnid or folder name a line"),
        (WNIDS, "n01440764 n01484850", ["n01440764", "n01484850"]),
        (WNIDS, "n01440764 tench, Tinca tinca", ["n01440764"]),
        (WNIDS, "0 n01440764", ["n01440764"]),
        (WNIDS, "n01440764 n99999999", "n99999999: not among the 3 classes of the raw data"),
        ("3,5,10,12", "03\n5", ["3", "5"]),
        ("3,5,10,12", "3, 5", ["3", "5"]),
        ("3,5,10,12", "0,10\n1,12", ["10", "12"]),
        ("a,caf\u00e9", "cafe\u0301", ["caf\u00e9"]),
    ],
)
def test_a_list_of_classes_is_read_in_one_way_or_refused(names: str, text: str, kept: list[str] | str, tmp_path: Path):
    tree(tmp_path / "raw", {f"{name}/1.png": b"" for name in names.split(",")})
    (tmp_path / "list").write_text(text)
    try:
        sources = find_sources(tmp_path / "raw", classes=tmp_path / "list")
    except UserError as error:
        assert str(error) == f"--classes {tmp_path / 'list'}: {kept}"
        return
    assert [(record.label, record.wnid) for record in sources.classes] == [*enumerate(kept)]
    assert sorted(image.path for image in sources.images) == sorted(f"{name}/1.png" for name in kept)


@pytest.mark.parametrize(
    ("names", "result"),
    [
        ("3,5,10", "0,1,2,3,4,5,6,7,8,9,10"),
        ("03,05", "00,01,02,03,04,05"),
        ("0,1,2", "0,1,2"),
        ("3,03", "--keep-labels: 03 and 3 are one number"),
        ("-2,3", "--keep-labels: the label -2 is no number from 0 to 99,999"),
        ("3,cat", "--keep-labels: the label cat is no number from 0 to 99,999"),
        ("3,2000000", "--keep-labels: the label 2000000 is no number from 0 to 99,999"),
    ],
)
def test_numbers_of_folders_are_kept_on_demand(names: str, result: str, tmp_path: Path):
    tree(tmp_path, {f"{name}/1.png": b"" for name in names.split(",")})
    try:
        sources = find_sources(tmp_path, keep_labels=True)
    except UserError as error:
        assert str(error).partition("; ")[0] == result
        return
    assert [(record.label, record.wnid) for record in sources.classes] == [*enumerate(result.split(","))]
    assert {image.path: image.wnid for image in sources.images} == {f"{name}/1.png": name for name in names.split(",")}
    (tmp_path / "list").write_text("3")
    if "3" in names.split(","):
        chosen = find_sources(tmp_path, keep_labels=True, classes=tmp_path / "list")
        assert [(record.label, record.wnid) for record in chosen.classes] == [(0, "0"), (1, "1"), (2, "2"), (3, "3")]


@pytest.mark.parametrize(
    "files",
    [
        "{train_station,blobs}/1.jpg > val 0",
        "val/{blobs,stripes}/1.jpg > val 1",
        "test/{blobs,stripes}/1.jpg > val 1; val/blobs/2.jpg > val 1",
        "val/blobs/1.jpg > val 1; test/1.jpg > test -",
        "train/{blobs,stripes}/1.jpg > train 1",
        "{train,val}/{blobs,stripes}/1.jpg > * 1",
        "Blue/1.jpg > val =blobs; Red/1.jpg > val =stripes",
        "imagenet-v2-00.tar: 1.jpg=blobs 2.jpg=stripes > val",
        "imagenet-train-00.tar: 1.jpg=blobs 2.jpg=stripes > train",
        "00/1.jpg > val =blobs; 1/1.jpg > val =stripes",
    ],
)
def test_classes_and_labels_are_another_data_set_s(files: str, small: Path, tmp_path: Path):
    """Without a training split, all that has a label is to evaluate it."""
    of = _with_classes(small, tmp_path / "of", {"blobs": "Blue", "stripes": "Red", "train_station": "Green"})
    truth = plant(tmp_path / "raw", files)
    sources = find_sources(tmp_path / "raw", classes_of=of)
    assert {image.path: (image.split, image.wnid) for image in sources.images} == truth
    assert sources.classes == manifest.load(of).classes
    evaluates = "train" not in {split for split, _ in truth.values()}
    assert (sources.evaluation_of is not None) == evaluates
    number = len({name for _, name in truth.values()} - {None})
    note = f"{number} of 3 classes of {of} have pictures"
    evaluation = "; there is no training split, so all pictures are for its evaluation (val)"
    assert sources.notes == [note + evaluation * evaluates]


def _with_classes(dataset: Path, copy: Path, words: dict[str, str]) -> Path:
    """Return a copy of a data set, with links to its files, and classes of these wnids and words."""
    copy.mkdir()
    for path in dataset.iterdir():
        if path.name != "dataset.json":
            (copy / path.name).symlink_to(path)
    classes = tuple(manifest.ClassRecord(i, name, text, None) for i, (name, text) in enumerate(words.items()))
    (copy / "dataset.json").write_bytes(replace(manifest.load(dataset), classes=classes).to_json())
    return copy


@pytest.mark.parametrize(
    ("words", "files", "message"),
    [
        ({"a": "crane", "b": "crane", "c": "owl"}, "{crane,owl}/1.jpg", "crane: not among the names and words"),
        ({"a": "A", "b": "B", "c": "C"}, "{0,3}/1.jpg", "3: not among the labels"),
        ({"3": "A", "5": "B", "10": "C"}, "{0,3}/1.jpg", "0: not among the numbers"),
        ({"a": "A", "b": "B", "c": "C"}, "{a,B,d}/1.jpg", "B, d: not among the wnids"),
    ],
)
def test_a_class_that_another_data_set_has_not_is_refused(
    words: dict[str, str], files: str, message: str, small: Path, tmp_path: Path
):
    of = _with_classes(small, tmp_path / "of", words)
    plant(tmp_path / "raw", files)
    with pytest.raises(UserError) as caught:
        find_sources(tmp_path / "raw", classes_of=of)
    remedy = "of its 3 classes; remove or rename what it cannot know"
    assert str(caught.value) == f"--classes-of {of}: {message} {remedy}"


@pytest.mark.parametrize("option", ["--keep-labels", "--classes"])
def test_two_options_that_both_say_which_labels_hold(option: str, raw: Path, tmp_path: Path):
    more = [tmp_path] if option == "--classes" else []
    result = build(raw, tmp_path / "out", "--classes-of", raw, option, *more)
    assert result.stderr == f"Error: {option} and --classes-of {raw}: both say which labels hold; choose one\n"


@pytest.mark.parametrize(
    ("files", "notes"),
    [
        (f"café/1.jpg; {NFD}/2.jpg", ["names that look the same but for their Unicode are one class: café"]),
        (f"{NFD}/2.jpg; tea/1.jpg", []),
        (
            "{Cat,cat,CAT,dog}/1.jpg",
            ["names that differ by case, blanks or zeros alone are classes of their own: CAT and Cat and cat"],
        ),
    ],
)
def test_names_that_look_alike_are_noted(files: str, notes: list[str], tmp_path: Path):
    plant(tmp_path, f"{files}; tea/3.jpg")
    assert find_sources(tmp_path).notes == notes


def test_the_first_and_last_classes_are_shown(tmp_path: Path):
    names = ["n00000001", "[red]x", ":cat:", "a", "b", "c", "d" * 60]
    for i, name in enumerate(names):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for j in range(i + 1):
            picture(f"{name}{j}", 48, 40).save(tmp_path / "raw" / name / f"{j}.jpg")
    (tmp_path / "raw" / "LOC_synset_mapping.txt").write_text("n00000001 tench, Tinca tinca\n")
    lines = build(tmp_path / "raw", tmp_path / "out", "--holdout", 0, "--dry-run").output.splitlines()
    assert lines[1] == "class: the folder below RAW; labels are ranks of the class names, by code points"
    cut = "d" * 37 + "..."
    assert [line.split() for line in lines[2:10]] == [
        ["label", "class", "words", "train"],
        ["0", ":cat:", ":cat:", "3"],
        ["1", "[red]x", "[red]x", "2"],
        ["2", "a", "a", "4"],
        ["…"],
        ["4", "c", "c", "6"],
        ["5", cut, cut, "7"],
        ["6", "n00000001", "tench,", "Tinca", "tinca", "1"],
    ]


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
