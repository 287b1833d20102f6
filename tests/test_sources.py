"""Every layout is recognised, labelled as it should be, read without unpacking; anything else is one clear line."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.io import savemat

from conftest import build, picture
from pipeline.errors import UserError
from pipeline.offline.devkit import parse_devkit
from pipeline.offline.sources import DEVKIT_TAR, TRAIN_TAR, VAL_TAR, find_sources
from tools.make_raw import main as make_raw


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "raw"
    result = CliRunner().invoke(make_raw, [str(folder), "--classes", "4", "--train", "6", "--val", "3"])
    assert result.exit_code == 0, result.output
    return folder


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


def tar_bytes(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN_TAR, b"not a tar" * 100, "damaged"),
        (TRAIN_TAR, tar_bytes({"n00000001.tar": b"x" * 2000}), "damaged"),
        (TRAIN_TAR, tar_bytes({"n00000001.tar": tar_bytes({"a.JPEG": bytes(9000)})})[:6000], "damaged|cut short"),
        (DEVKIT_TAR, b"not gzip", "damaged"),
        (DEVKIT_TAR, gzip.compress(tar_bytes({"other": b""})), "has no .*meta.mat"),
        (DEVKIT_TAR, gzip.compress(bytes(65 * 2**20)), "unpacks to more than"),
        (VAL_TAR, tar_bytes({"ILSVRC2012_val_00000001.JPEG": b"x"}), "1 images, but the devkit has 12 labels"),
    ],
)
def test_damaged_archives_are_named(official: Path, tmp_path: Path, name: str, content: bytes, message: str):
    for file in official.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        find_sources(tmp_path)
    assert name in str(caught.value)


def test_ground_truth_of_another_year_is_refused():
    synsets = np.array(
        [(1, "n00000001", "a", 0)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")],
    )
    out = io.BytesIO()
    savemat(out, {"synsets": np.repeat(synsets, 2)})
    with pytest.raises(UserError, match=r"class ids that meta.mat lacks: \[7\]"):
        parse_devkit(out.getvalue(), b"1\n7\n", "devkit")


def test_what_is_no_layout_is_refused_with_exit_code_2_and_nothing_written(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    for name, message in (
        ("missing", "no such directory"),
        ("empty", "Found nothing"),
        ("texts", "Found 0 folders and 1 files"),
        ("texts/a.txt", "not a directory"),
    ):
        result = build(tmp_path / name, tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_picture_outside_the_class_folders_is_an_error(raw: Path, tmp_path: Path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    picture("a", 40, 40).save(tmp_path / "train" / "a" / "1.png")
    picture("b", 40, 40).save(tmp_path / "train" / "2.png")
    result = build(tmp_path, tmp_path / "out")
    assert result.exit_code == 2
    assert "train/2.png: a picture outside the class folders has no label" in result.output
