"""ILSVRC2012 and 2010, packed and unpacked, against tarfile, csv and scipy; the devkit's labels and its promises."""

import gzip
import io
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from conftest import build
from pipeline import UserError
from pipeline.offline.ilsvrc import DEVKIT_TAR, TRAIN_TAR, VAL_TAR, parse_devkit
from pipeline.offline.sources import find_sources
from tars import contents, tar_bytes, tree
from tools.make_raw import meta_mat

CRANES, MAILLOTS = ("n02012849", "n03126707"), ("n03710637", "n03710721")


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def unpack(official: Path, out: Path, train: str, val: str, synset_tars: bool, devkit: bool) -> Path:
    """Unpack the archives by tarfile in one of the usual shapes."""
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


def test_official_archives_against_tarfile_and_the_ground_truth(official: Path):
    sources = find_sources(official)
    assert (sources.name, sources.layout) == ("ilsvrc2012", "the official ILSVRC2012 archives")
    by_id = {record.devkit_id: record for record in sources.classes}
    assert sorted(by_id) == [1, 2, 3, 4]
    assert [by_id[i].label for i in sorted(by_id)] != sorted(by_id[i].label for i in by_id)  # the trap is there
    assert [record.wnid for record in sources.classes] == sorted(record.wnid for record in sources.classes)
    expected: Counter[tuple[str, str, str | None, bytes]] = Counter()
    for synset, tar in members((official / TRAIN_TAR).read_bytes()).items():
        expected.update(("train", name, synset[:9], data) for name, data in members(tar).items())
    with tarfile.open(official / DEVKIT_TAR) as tar:
        name = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
        truth = [int(line) for line in tar.extractfile(name).read().split()]
    validation = sorted(members((official / VAL_TAR).read_bytes()).items())
    expected.update(("val", name, by_id[number].wnid, data) for (name, data), number in zip(validation, truth))
    assert contents(sources.images) == expected
    assert expected.total() == 24 + 12


@pytest.mark.parametrize("synset_tars", [False, True])
@pytest.mark.parametrize("devkit", [False, True])
@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val")])
def test_ilsvrc2012_unpacked(official: Path, tmp_path: Path, train: str, val: str, synset_tars: bool, devkit: bool):
    packed = find_sources(official)
    loose = find_sources(unpack(official, tmp_path, train, val, synset_tars, devkit))
    assert loose.name == "ilsvrc2012"
    assert train in loose.layout
    assert val in loose.layout
    assert loose.classes == packed.classes
    assert contents(loose.images) == contents(packed.images)


def test_ilsvrc2012_with_test_images_and_validation_folders_per_class(official: Path, tmp_path: Path):
    expected = contents(find_sources(official).images)
    wnids = {image.name: image.wnid for image in find_sources(official).images if image.split == "val"}
    unpack(official, tmp_path, "train", "val", False, True)
    for path in list((tmp_path / "val").iterdir()):  # as a well-known script sorts them
        (tmp_path / "val" / str(wnids[path.name])).mkdir(exist_ok=True)
        path.rename(tmp_path / "val" / str(wnids[path.name]) / path.name)
    test = [(f"test/ILSVRC2012_test_{i:08d}.JPEG", bytes([i])) for i in (2, 1)]
    tree(tmp_path, {"ILSVRC2012_img_test_v10102019.tar": tar_bytes(test)})
    expected.update(("test", name.removeprefix("test/"), None, data) for name, data in test)
    assert contents(find_sources(tmp_path).images) == expected


def test_flat_validation_without_its_devkit_names_the_remedy(official: Path, tmp_path: Path):
    unpack(official, tmp_path, "train", "val", False, False)
    (tmp_path / DEVKIT_TAR).unlink()
    with pytest.raises(UserError, match=rf"00000001.JPEG: its label is in {DEVKIT_TAR}, which is missing beside val"):
        find_sources(tmp_path)


@pytest.mark.parametrize(("packed", "truth_inside"), [(False, True), (True, True), (True, False)])
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
    train = {wnid: {f"{wnid}_{i}.JPEG": wnid.encode() for i in (7, 12)} for wnid in wnids}
    outer = {f"{wnid}.tar": tar_bytes(files) for wnid, files in train.items()}
    train[wnids[0]][f"{wnids[0]}_7.JPEG"] = b"corrected"
    expected.update(("train", name, wnid, data) for wnid, files in train.items() for name, data in files.items())
    patch = tar_bytes({f"patch_images/train/{wnids[0]}_7.JPEG": b"corrected"})
    tree(tmp_path, {"ILSVRC2010_images_train.tar": tar_bytes(outer), "patch_images.tar": patch})
    sources = find_sources(tmp_path)
    assert (sources.name, sources.ignored) == ("ilsvrc2010", {})
    assert contents(sources.images) == expected
    ids = [(0, "n00000001", "crane", 2), (1, "n00000002", "crane", 3), (2, "n00000003", "crane", 1)]
    assert [(c.label, c.wnid, c.words, c.devkit_id) for c in sources.classes] == ids


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


def test_the_real_words_and_promises(shared: Path, tmp_path: Path):
    """Two cranes and two maillots stay apart; the images that are missing are named with their classes."""
    meta = shared / "imagenet-meta"
    pictures = {f"train/{wnid}/{wnid}_1.JPEG": b"x" for wnid in (*CRANES, *MAILLOTS)}
    tree(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC", pictures)
    shutil.copy(meta / "LOC_synset_mapping.txt", tmp_path / "kaggle")
    tree(tmp_path / "kit", pictures)
    kit = tmp_path / "kit/ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
        shutil.copy(meta / name, kit)
    kaggle, ours = (find_sources(tmp_path / name, allow_incomplete=True) for name in ("kaggle", "kit"))
    assert [(c.label, c.wnid) for c in kaggle.classes] == [(c.label, c.wnid) for c in ours.classes]
    by_wnid = {c.wnid: c for c in ours.classes}
    assert [by_wnid[wnid].words.split(",")[0] for wnid in (*CRANES, *MAILLOTS)] == ["crane"] * 2 + ["maillot"] * 2
    assert len({by_wnid[wnid].label for wnid in (*CRANES, *MAILLOTS)}) == 4
    with pytest.raises(UserError, match="4 images, but ILSVRC2012 promises 1,281,167") as caught:
        find_sources(tmp_path / "kit")
    assert "n01440764 (tench, Tinca tinca) 0 of 1,300" in str(caught.value)
    assert "995 classes more" in str(caught.value)
    with pytest.raises(UserError, match="4 classes have images, 1,000 are promised"):
        find_sources(tmp_path / "kaggle")


def test_missing_images_are_refused_with_their_classes_or_allowed(official: Path, tmp_path: Path):
    complete = find_sources(official)
    outer, val = (members((official / name).read_bytes()) for name in (TRAIN_TAR, VAL_TAR))
    short, lost = sorted(outer)[:2]
    outer[short] = tar_bytes([*members(outer[short]).items()][1:])
    del outer[lost]
    del val["ILSVRC2012_val_00000003.JPEG"]
    raw = Path(shutil.copytree(official, tmp_path / "raw"))
    tree(raw, {TRAIN_TAR: tar_bytes(outer), VAL_TAR: tar_bytes(val)})
    words = {c.wnid: c.words for c in complete.classes}
    result = build(raw, tmp_path / "out")
    assert result.exit_code == 2
    assert f"{TRAIN_TAR}: 17 images, but the devkit promises 24 images" in result.output
    assert f"({short[:9]} ({words[short[:9]]}) 5 of 6, {lost[:9]} ({words[lost[:9]]}) 0 of 6)" in result.output
    assert f"{VAL_TAR}: 11 images, but the devkit has 12 labels" in result.output
    assert result.output.count("\n") == 1
    sources = find_sources(raw, allow_incomplete=True)
    assert [note.partition(":")[0] for note in sources.notes] == [TRAIN_TAR, VAL_TAR]
    assert sources.classes == complete.classes  # labels do not move
    left = contents(complete.images) - contents(sources.images)
    assert contents(sources.images) == contents(complete.images) - left
    assert left.total() == 8


def test_a_damaged_devkit_is_one_clear_line(official: Path, tmp_path: Path):
    """Compressed, as the real one is: a checksum stands before scipy's reader, which can crash on other bytes."""
    for name in (TRAIN_TAR, VAL_TAR):
        (tmp_path / name).symlink_to(official / name)
    for content, message in (
        (b"not gzip", "damaged"),
        (gzip.compress(tar_bytes({"other": b""})), "has no .*meta.mat"),
        (gzip.compress(bytes(65 * 2**20)), "unpacks to more than"),
    ):
        (tmp_path / DEVKIT_TAR).write_bytes(content)
        with pytest.raises(UserError, match=f"{DEVKIT_TAR}: .*{message}"):
            find_sources(tmp_path)
    out = io.BytesIO()
    savemat(out, {"synsets": loadmat(io.BytesIO(meta_mat(3, 5)))["synsets"]}, do_compression=True)
    good, random = out.getvalue(), np.random.default_rng(2012)
    bomb = zlib.compress(bytes(200 * 2**20))
    damaged = [b"", good[:200], good[:128] + struct.pack("<II", 15, len(bomb)) + bomb]
    for _ in range(200):
        bad = bytearray(good)
        for position in random.integers(128, len(bad), 6):
            bad[position] = int(random.integers(256))
        damaged.append(bytes(bad))
    refused = 0
    for bad in damaged:
        try:
            parse_devkit(bad, b"1\n2\n", "devkit")
        except UserError as error:
            refused += "meta.mat or the ground truth is damaged" in str(error)
    assert refused > 193
    with pytest.raises(UserError, match=r"class ids that meta.mat lacks: \[7\]"):  # those of another year
        parse_devkit(good, b"1\n7\n", "devkit")
