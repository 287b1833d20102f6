"""Each layout is labelled as it should be, by its devkit or its folders; anything else is one clear line."""

import io
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from conftest import build, picture
from pipeline import UserError
from pipeline.offline.ilsvrc import DEVKIT_TAR, TRAIN_TAR, VAL_TAR, parse_devkit
from pipeline.offline.sources import find_sources
from tars import tar_bytes
from tools.make_raw import meta_mat


def test_official_archives_against_tarfile(official: Path):
    sources = find_sources(official)
    with tarfile.open(official / TRAIN_TAR) as outer:
        for synset in outer:
            with tarfile.open(fileobj=outer.extractfile(synset)) as inner:
                for member in inner:
                    path = f"{TRAIN_TAR}/{synset.name}/{member.name}"
                    (found,) = (image for image in sources.images if image.path == path)
                    assert found.read() == inner.extractfile(member).read()
                    assert (found.split, found.wnid) == ("train", synset.name[:9])
    assert sum(image.split == "train" for image in sources.images) == 24
    assert sum(image.split == "val" for image in sources.images) == 12


def test_validation_labels_come_from_devkit_ids_not_from_sorted_wnids(official: Path):
    sources = find_sources(official)
    by_id = {record.devkit_id: record for record in sources.classes}
    assert sorted(by_id) == [1, 2, 3, 4]
    assert [by_id[i].label for i in sorted(by_id)] != sorted(by_id[i].label for i in by_id)  # the trap is there
    assert [record.wnid for record in sources.classes] == sorted(record.wnid for record in sources.classes)
    with tarfile.open(official / DEVKIT_TAR) as tar:
        name = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
        truth = [int(line) for line in tar.extractfile(name).read().split()]
    validation = sorted((image.name, image.wnid) for image in sources.images if image.split == "val")
    assert [wnid for _, wnid in validation] == [by_id[number].wnid for number in truth]


def test_the_real_devkit(shared: Path):
    meta = shared / "imagenet-meta"
    kit = parse_devkit(
        (meta / "meta.mat").read_bytes(), (meta / "ILSVRC2012_validation_ground_truth.txt").read_bytes(), "devkit"
    )
    sorted_wnids = [line.split()[0] for line in (meta / "LOC_synset_mapping.txt").read_text().splitlines()]
    assert sorted(kit.ids) == sorted_wnids
    assert sorted(kit.ids.values()) == list(range(1, 1001))
    rows = [line.split(",") for line in (meta / "val_synsets.csv").read_text().splitlines()]
    known = {row[0].removesuffix(".JPEG"): row[1] for row in rows if row[0].startswith("ILSVRC2012_val")}
    assert len(known) == 50000
    assert [known[f"ILSVRC2012_val_{i:08d}"] for i in range(1, 50001)] == kit.validation
    assert kit.words["n02012849"] == kit.words["n03126707"] == "crane"


def test_train_and_val_folders(raw: Path):
    sources = find_sources(raw)
    assert [record.wnid for record in sources.classes] == ["blobs", "checks", "stripes"]
    assert len(sources.images) == 51
    assert sources.ignored == {".txt": 1}
    assert {image.path.split("/")[0] for image in sources.images} == {"train", "val"}


def test_class_folders_flat_files_and_an_unlabelled_test_folder(raw: Path, tmp_path: Path):
    assert len(find_sources(raw / "train").images) == 42
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("n00000002_blue_heron.JPEG", "n00000001_17.JPEG", "n00000001_5.JPEG"):
        picture(name, 40, 40).save(flat / name, "JPEG")
    classes = find_sources(flat).classes
    assert [(record.wnid, record.words) for record in classes] == [
        ("n00000001", "n00000001"),
        ("n00000002", "blue heron"),
    ]
    split = tmp_path / "split"
    (split / "train" / "a").mkdir(parents=True)
    (split / "test").mkdir()
    picture("a", 40, 40).save(split / "train" / "a" / "1.png")
    picture("b", 40, 40).save(split / "test" / "2.png")
    images = {image.split: image.wnid for image in find_sources(split).images}
    assert images == {"train": "a", "test": None}


def test_ground_truth_of_another_year_is_refused():
    synsets = np.array(
        [(1, "n00000001", "a", 0)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")],
    )
    out = io.BytesIO()
    savemat(out, {"synsets": np.repeat(synsets, 2)})
    with pytest.raises(UserError, match=r"class ids that meta.mat lacks: \[7\]"):
        parse_devkit(out.getvalue(), b"1\n7\n", "devkit")


def test_a_folder_of_no_layout_is_refused_with_exit_code_2_and_nothing_written(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    for name, message in (
        ("missing", "no such directory"),
        ("empty", "empty: is the volume mounted?"),
        ("texts", "Found 0 folders and 1 files"),
        ("texts/a.txt", "not a directory"),
    ):
        result = build(tmp_path / name, tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_raw_that_is_one_level_off_is_refused(raw: Path, tmp_path: Path):
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / "Train").symlink_to(raw / "train")
    (tmp_path / "upper" / "Val").symlink_to(raw / "val")
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "set").symlink_to(raw)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "val").symlink_to(raw / "val")
    for name, message in (
        ("upper", "Train, Val: named as a split"),
        ("alone", "val: named as a split"),
        ("above", "only one folder with pictures, set"),
    ):
        result = build(tmp_path / name, tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "out").exists()
    assert len(find_sources(tmp_path / "above", "class-folders").images) == 51


def test_a_dataset_inside_raw_is_refused(raw: Path):
    result = build(raw, raw / "out")
    assert result.exit_code == 2
    assert "lies inside RAW" in result.output
    assert not (raw / "out").exists()


def test_a_class_without_training_images_is_named(raw: Path, tmp_path: Path):
    (tmp_path / "raw" / "train").mkdir(parents=True)
    (tmp_path / "raw" / "train" / "blobs").symlink_to(raw / "train" / "blobs")
    (tmp_path / "raw" / "val").symlink_to(raw / "val")
    result = build(tmp_path / "raw", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "note: classes without a training image: checks, stripes" in result.output


def test_a_picture_outside_the_class_folders_is_an_error(raw: Path, tmp_path: Path):
    (tmp_path / "raw" / "train" / "a").mkdir(parents=True)
    picture("a", 40, 40).save(tmp_path / "raw" / "train" / "a" / "1.png")
    picture("b", 40, 40).save(tmp_path / "raw" / "train" / "2.png")
    result = build(tmp_path / "raw", tmp_path / "out")
    assert result.exit_code == 2
    assert "train/2.png: a picture outside the class folders has no label" in result.output


def contents(archive: Path | io.BytesIO) -> dict[str, bytes]:
    stream = io.BytesIO(archive.read_bytes()) if isinstance(archive, Path) else archive
    with tarfile.open(fileobj=stream) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_missing_images_are_refused_with_their_classes_or_allowed(official: Path, tmp_path: Path):
    shutil.copytree(official, tmp_path / "raw")
    outer = contents(official / TRAIN_TAR)
    short, lost = sorted(outer)[:2]
    inner = contents(io.BytesIO(outer[short]))
    outer[short] = tar_bytes(dict(list(inner.items())[1:]))
    del outer[lost]
    val = contents(official / VAL_TAR)
    del val["ILSVRC2012_val_00000003.JPEG"]
    (tmp_path / "raw" / TRAIN_TAR).write_bytes(tar_bytes(outer))
    (tmp_path / "raw" / VAL_TAR).write_bytes(tar_bytes(val))
    whole = find_sources(official)
    words = {c.wnid: c.words for c in whole.classes}
    result = build(tmp_path / "raw", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{TRAIN_TAR}: 17 images, but the devkit promises 24 images" in result.output
    assert f"({short[:9]} ({words[short[:9]]}) 5 of 6, {lost[:9]} ({words[lost[:9]]}) 0 of 6)" in result.output
    assert f"{VAL_TAR}: 11 images, but the devkit has 12 labels" in result.output
    assert result.output.count("\n") == 1
    sources = find_sources(tmp_path / "raw", allow_incomplete=True)
    assert [note.partition(":")[0] for note in sources.notes] == [TRAIN_TAR, VAL_TAR]
    assert sources.classes == whole.classes  # labels do not move
    labels = {image.name: image.wnid for image in whole.images}
    assert all(image.wnid == labels[image.name] for image in sources.images)
    assert len(sources.images) == len(whole.images) - 8


def test_chosen_classes_have_ranks_among_themselves(official: Path, tmp_path: Path):
    whole, chosen = find_sources(official), tmp_path / "classes.txt"
    second, last = whole.classes[1], whole.classes[3]
    chosen.write_text(f"# two of four\n\n{last.wnid}  # the last\n{second.wnid}\n")
    sources = find_sources(official, classes=chosen)
    assert [(c.label, c.wnid, c.words, c.devkit_id) for c in sources.classes] == [
        (0, second.wnid, second.words, second.devkit_id),
        (1, last.wnid, last.words, last.devkit_id),
    ]
    wanted = {second.wnid, last.wnid}
    assert list(sources.images) == [image for image in whole.images if image.wnid in wanted]
    assert sources.ignored["picture of no class in --classes"] == 18
    chosen.write_text(f"{last.wnid}\nn00000000\ntench\n")
    result = build(official, tmp_path / "out", "--classes", chosen)
    assert result.exit_code == 2
    assert "n00000000, tench: not among the 4 classes of the raw data" in result.output
    chosen.write_text("# none\n")
    assert "names no class" in build(official, tmp_path / "out", "--classes", chosen).output


def test_a_damaged_meta_mat_is_one_clear_line():
    """Compressed, as the real one is: a checksum stands before scipy's reader, which can crash on other bytes."""
    out = io.BytesIO()
    savemat(out, {"synsets": loadmat(io.BytesIO(meta_mat(3, 5)))["synsets"]}, do_compression=True)
    small, random = out.getvalue(), np.random.default_rng(2012)
    refused = 0
    for _ in range(200):
        bad = bytearray(small)
        for place in random.integers(128, len(bad), 6):
            bad[place] = int(random.integers(256))
        try:
            parse_devkit(bytes(bad), b"1\n2\n", "devkit")
        except UserError as error:
            refused += "meta.mat or the ground truth is damaged" in str(error)
    assert refused > 190
    bomb = zlib.compress(bytes(200 * 2**20))
    for bad in (b"", small[:200], small[:128] + struct.pack("<II", 15, len(bomb)) + bomb):
        with pytest.raises(UserError, match=r"meta.mat or the ground truth is damaged"):
            parse_devkit(bad, b"", "devkit")
