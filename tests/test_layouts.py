"""Layouts against an independent reading of the same files: tarfile, os.walk, csv, and the lists made here."""

import csv
import gzip
import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.io import savemat

from conftest import build
from pipeline import UserError
from pipeline.offline.ilsvrc import DEVKIT_TAR, TRAIN_TAR, VAL_TAR
from pipeline.offline.raw import RawImage
from pipeline.offline.sources import LAYOUTS, find_sources
from tars import tar_bytes, tree
from tools.make_raw import main as make_raw

CRANES, MAILLOTS = ("n02012849", "n03126707"), ("n03710637", "n03710721")


def seen(images: Iterable[RawImage]) -> Counter[tuple[str, str, str | None, bytes]]:
    """What a layout found: split, file name, class and bytes of each image."""
    return Counter((image.split, image.name, image.wnid, image.read()) for image in images)


def on_disk(root: Path) -> dict[str, bytes]:
    """Every file below `root` by os.walk: path → bytes."""
    found = {}
    for directory, _, files in os.walk(root):
        for name in files:
            path = Path(directory, name)
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "raw"
    result = CliRunner().invoke(make_raw, [str(folder), "--classes", "3", "--train", "4", "--val", "2"])
    assert result.exit_code == 0, result.output
    return folder


def unpacked(official: Path, out: Path, train: str, val: str, synset_tars: bool, devkit: bool) -> Path:
    """The archives, unpacked by tarfile in one of the usual shapes."""
    with tarfile.open(official / TRAIN_TAR) as tar:
        tar.extractall(out / train, filter="data")
    for path in () if synset_tars else sorted((out / train).iterdir()):
        with tarfile.open(path) as tar:
            tar.extractall(path.with_suffix(""), filter="data")
        path.unlink()
    with tarfile.open(official / VAL_TAR) as tar:
        tar.extractall(out / val, filter="data")
    if devkit:
        with tarfile.open(official / DEVKIT_TAR) as tar:
            tar.extractall(out, filter="data")
    else:
        shutil.copy(official / DEVKIT_TAR, out)
    return out


@pytest.mark.parametrize("synset_tars", [False, True])
@pytest.mark.parametrize("devkit", [False, True])
@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val")])
def test_ilsvrc2012_unpacked(official: Path, tmp_path: Path, train: str, val: str, synset_tars: bool, devkit: bool):
    packed = find_sources(official)
    loose = find_sources(unpacked(official, tmp_path, train, val, synset_tars, devkit))
    assert (packed.name, loose.name) == ("ilsvrc2012", "ilsvrc2012")
    assert packed.layout == "the official ILSVRC2012 archives"
    assert train in loose.layout
    assert val in loose.layout
    assert loose.classes == packed.classes
    assert seen(loose.images) == seen(packed.images)
    files = {path.rpartition("/")[2]: data for path, data in on_disk(tmp_path).items() if path.endswith(".JPEG")}
    assert {image.name: image.read() for image in loose.images if image.name in files} == files


def test_ilsvrc2012_with_test_images_and_validation_folders_per_class(official: Path, tmp_path: Path):
    expected = seen(find_sources(official).images)
    wnids = {image.name: image.wnid for image in find_sources(official).images if image.split == "val"}
    unpacked(official, tmp_path, "train", "val", False, True)
    for path in list((tmp_path / "val").iterdir()):  # as a well-known script sorts them
        (tmp_path / "val" / str(wnids[path.name])).mkdir(exist_ok=True)
        path.rename(tmp_path / "val" / str(wnids[path.name]) / path.name)
    members = [(f"test/ILSVRC2012_test_{i:08d}.JPEG", bytes([i])) for i in (2, 1)]
    (tmp_path / "ILSVRC2012_img_test_v10102019.tar").write_bytes(tar_bytes(members))
    sources = find_sources(tmp_path)
    test = Counter({("test", f"ILSVRC2012_test_{i:08d}.JPEG", None, bytes([i])): 1 for i in (1, 2)})
    assert seen(sources.images) == expected + test


def test_flat_validation_without_its_devkit_names_the_remedy(official: Path, tmp_path: Path):
    unpacked(official, tmp_path, "train", "val", False, False)
    (tmp_path / DEVKIT_TAR).unlink()
    with pytest.raises(UserError, match=rf"val: its labels are in {DEVKIT_TAR}, which is missing beside it"):
        find_sources(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("truth_inside", [False, True])
def test_ilsvrc2010(tmp_path: Path, packed: bool, truth_inside: bool):
    wnids = ["n00000003", "n00000001", "n00000002"]  # devkit ids 1, 2, 3
    fields = ["ILSVRC2010_ID", "WNID", "words", "num_children", "num_train_images"]
    rows = [(i + 1, wnid, "crane", 0, 2) for i, wnid in enumerate(wnids)] + [(4, "n00000009", "all", 3, 0)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, [(name, object) for name in fields])[:, None]}, do_compression=True)
    truths = {"validation": [3, 1, 1], "test": [2, 2, 3, 1]}
    texts = {s: ("\n".join(map(str, numbers)) + "\n").encode() for s, numbers in truths.items()}
    kit = {"data/meta.mat": mat.getvalue(), "data/ILSVRC2010_validation_ground_truth.txt": texts["validation"]}
    test_truth = "ILSVRC2010_test_ground_truth.txt"
    if truth_inside:
        kit["data/" + test_truth] = texts["test"]
    else:
        tree(tmp_path, {test_truth: texts["test"]})
    inside = [(f"devkit-1.0/{name}", data) for name, data in kit.items()]
    tree(tmp_path, {"ILSVRC2010_devkit-1.0.tar.gz": gzip.compress(tar_bytes(inside))} if packed else dict(inside))
    expected: Counter[tuple[str, str, str | None, bytes]] = Counter()
    for split, name in (("val", "validation"), ("test", "test")):
        names = [(f"{split}/ILSVRC2010_{split}_{i:08d}.JPEG", b"%d" % i) for i in range(1, len(truths[name]) + 1)]
        expected.update((split, n[len(split) + 1 :], wnids[truths[name][int(d) - 1] - 1], d) for n, d in names)
        tree(tmp_path, {f"ILSVRC2010_images_{split}.tar": tar_bytes(names[::-1])})
    train = {wnid: [(f"{wnid}_{i}.JPEG", wnid.encode()) for i in (7, 12)] for wnid in wnids}
    patched = f"{wnids[0]}_7.JPEG"
    expected.update(
        ("train", name, wnid, b"corrected" if name == patched else data)
        for wnid, pairs in train.items()
        for name, data in pairs
    )
    outer = [(f"{wnid}.tar", tar_bytes(pairs)) for wnid, pairs in train.items()]
    tree(tmp_path, {"ILSVRC2010_images_train.tar": tar_bytes(outer)})
    tree(tmp_path, {"patch_images.tar": tar_bytes([(f"patch_images/train/{patched}", b"corrected")])})
    sources = find_sources(tmp_path)
    assert sources.name == "ilsvrc2010"
    assert seen(sources.images) == expected
    assert [(c.label, c.wnid, c.words, c.devkit_id) for c in sources.classes] == [
        (0, "n00000001", "crane", 2),
        (1, "n00000002", "crane", 3),
        (2, "n00000003", "crane", 1),
    ]
    assert not sources.ignored


def test_fall_2011_as_a_folder_in_one_tar_and_as_that_tar(tmp_path: Path):
    tars = {
        f"n0000000{i}.tar": tar_bytes((f"n0000000{i}_{j}.JPEG", bytes([i, j])) for j in range(i)) for i in (3, 1, 2)
    }
    whole = tar_bytes(tars.items())
    tree(tmp_path, {**{f"folder/{name}": data for name, data in tars.items()}, "one/fall11_whole.tar": whole})
    expected: Counter[tuple[str, str, str | None, bytes]] = Counter()
    for name, data in tars.items():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                expected["train", member.name, name[:9], tar.extractfile(member).read()] += 1
    for raw in (tmp_path / "folder", tmp_path / "one", tmp_path / "one" / "fall11_whole.tar"):
        sources = find_sources(raw)
        assert sources.name == "fall2011"
        assert seen(sources.images) == expected
        assert [c.wnid for c in sources.classes] == sorted(name[:9] for name in tars)
        assert [c.label for c in sources.classes] == [0, 1, 2]


def kaggle(folder: Path) -> Path:
    rows = [["ImageId", "PredictionString"], ["ILSVRC2012_val_00000002", "n00000001 1 2 3 4 n00000001 5 6 7 8 "]]
    rows += [["ILSVRC2012_val_00000001", "n00000002 85 1 499 272 "]]
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    data = "ILSVRC/Data/CLS-LOC"
    files = {f"{data}/train/n0000000{i}/n0000000{i}_{j}.JPEG": bytes([i, j]) for i in (1, 2) for j in (3, 44)}
    files |= {f"{data}/val/ILSVRC2012_val_0000000{i}.JPEG": bytes([i]) for i in (1, 2)}
    files |= {f"{data}/test/ILSVRC2012_test_0000000{i}.JPEG": bytes([9, i]) for i in (1, 2, 3)}
    files |= {"LOC_synset_mapping.txt": b"n00000001 tench, Tinca tinca\nn00000002 crane\n"}
    return tree(folder, files | {"LOC_val_solution.csv": out.getvalue().encode(), "ILSVRC/ImageSets/x.txt": b""})


def test_kaggle_from_above_and_from_inside(tmp_path: Path):
    kaggle(tmp_path)
    with open(tmp_path / "LOC_val_solution.csv", newline="") as file:
        truth = {row["ImageId"]: row["PredictionString"].split(" ")[0] for row in csv.DictReader(file)}
    expected: Counter[tuple[str, str, str | None, bytes]] = Counter()
    for path, data in on_disk(tmp_path / "ILSVRC/Data/CLS-LOC").items():
        split, *inner = path.split("/")
        wnid = {"train": inner[0], "val": truth.get(Path(path).stem), "test": None}[split]
        expected[split, inner[-1], wnid, data] += 1
    for raw in (tmp_path, tmp_path / "ILSVRC"):
        sources = find_sources(raw)
        assert sources.name == "kaggle"
        assert seen(sources.images) == expected
        assert [(c.wnid, c.words) for c in sources.classes] == [
            ("n00000001", "tench, Tinca tinca"),
            ("n00000002", "crane"),
        ]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
    with pytest.raises(UserError, match=r"LOC_val_solution.csv: row 2 has no ImageId and wnid"):
        find_sources(tmp_path)
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution.csv: missing; it has the labels of val/"):
        find_sources(tmp_path)


def test_the_real_words_keep_both_cranes_and_both_maillots_apart(shared: Path, tmp_path: Path):
    meta = shared / "imagenet-meta"
    both = {wnid: f"train/{wnid}/{wnid}_1.JPEG" for wnid in (*CRANES, *MAILLOTS)}
    tree(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC", dict.fromkeys(both.values(), b"x"))
    shutil.copy(meta / "LOC_synset_mapping.txt", tmp_path / "kaggle")
    kit = tmp_path / "kit/ILSVRC2012_devkit_t12/data"
    tree(tmp_path / "kit", dict.fromkeys(both.values(), b"x"))
    kit.mkdir(parents=True)
    for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
        shutil.copy(meta / name, kit)
    with open(meta / "val_synsets.csv", newline="") as file:
        truth = {row["file"]: row["wnid"] for row in csv.DictReader(file)}
    tree(tmp_path / "kit/val", dict.fromkeys(list(truth)[100:50000:999], b"y"))
    kaggle, ours = (find_sources(tmp_path / name, allow_incomplete=True) for name in ("kaggle", "kit"))
    assert [c.wnid for c in kaggle.classes] == [c.wnid for c in ours.classes]
    pairs = {k.wnid: (k.words, o.words) for k, o in zip(kaggle.classes, ours.classes)}
    assert {wnid: words for wnid, words in pairs.items() if words[0] != words[1]} == {
        "n02012849": ("crane bird", "crane")  # somebody told the cranes apart in this copy of the mapping
    }
    for sources in (kaggle, ours):
        by_wnid = {c.wnid: c for c in sources.classes}
        assert {by_wnid[wnid].words.split(",")[0] for wnid in MAILLOTS} == {"maillot"}
        assert len({by_wnid[wnid].label for wnid in (*CRANES, *MAILLOTS)}) == 4
    assert {by_wnid[wnid].words for wnid in CRANES} == {"crane"}
    assert {image.name: image.wnid for image in ours.images if image.split == "val"} == {
        name: truth[name] for name in list(truth)[100:50000:999]
    }
    with pytest.raises(UserError, match="4 images, but ILSVRC2012 promises 1,281,167") as caught:
        find_sources(tmp_path / "kit")
    assert "n01440764 (tench, Tinca tinca) 0 of 1,300" in str(caught.value)
    assert "995 classes more" in str(caught.value)
    with pytest.raises(UserError, match="4 classes have images, 1,000 are promised"):
        find_sources(tmp_path / "kaggle")


def test_links_to_class_folders_are_followed_and_never_back(tmp_path: Path):
    tree(tmp_path / "far", {"a/1.png": b"1", "a/deep/2.png": b"2"})
    tree(tmp_path / "raw", {"b/3.png": b"3", "LOC_synset_mapping.txt": b"n00000001 tench\n"})
    (tmp_path / "raw" / "a").symlink_to(tmp_path / "far" / "a")
    (tmp_path / "raw" / "b" / "up").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "raw" / "b" / "pipe.png")
    sources = find_sources(tmp_path / "raw")
    assert {image.path: image.wnid for image in sources.images} == {"a/1.png": "a", "a/deep/2.png": "a", "b/3.png": "b"}
    assert sources.ignored == {"link that leads back": 1, "link to nothing, pipe or device": 2}
    assert "1 × link that leads back: b/up" in sources.ignored.lines()


def test_a_forced_layout_is_used_and_one_that_does_not_fit_says_what_is_missing(raw: Path, tmp_path: Path):
    forced = find_sources(raw / "train", "class-folders")
    assert (forced.name, len(forced.images)) == ("class-folders", 42)
    assert {image.wnid for image in find_sources(raw, "class-folders").images} == {"train", "val"}
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
