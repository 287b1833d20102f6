"""tools/make_raw.py: the layout by plain readers, the promises about bytes and oddities, and no leak through colour."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from conftest import digests
from tools import make_raw

SEED, CLASSES, TRAIN, VAL = 7, 10, 24, 6
NAMES = ["ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]


def invoke(out: Path, *options: object) -> Result:
    return CliRunner().invoke(make_raw.main, [str(out), *map(str, options)])


def members(data: bytes) -> dict[str, bytes]:
    """Return the files of a tar by name; mtime, uid and gid must be 0, and the format USTAR."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.pax_headers) == (0, 0, 0, {})
            files[member.name] = archive.extractfile(member).read()
    return files


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small set, and the line that the command printed."""
    out = tmp_path_factory.mktemp("raw") / "imagenet"
    result = invoke(out, "--classes", CLASSES, "--train", TRAIN, "--val", VAL, "--seed", SEED)
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.fixture(scope="module")
def train(drawn: tuple[Path, str]) -> dict[str, dict[str, bytes]]:
    """WNID → file name → bytes."""
    assert sorted(path.name for path in drawn[0].iterdir()) == NAMES
    outer = members((drawn[0] / "ILSVRC2012_img_train.tar").read_bytes())
    return {name.removesuffix(".tar"): members(data) for name, data in outer.items()}


@pytest.fixture(scope="module")
def val(drawn: tuple[Path, str]) -> dict[str, bytes]:
    return members((drawn[0] / "ILSVRC2012_img_val.tar").read_bytes())


@pytest.fixture(scope="module")
def devkit(drawn: tuple[Path, str]) -> dict[str, bytes]:
    """File name → bytes, of what lies in the devkit's data folder."""
    files = members((drawn[0] / "ILSVRC2012_devkit_t12.tar.gz").read_bytes())  # tarfile unpacks the gzip itself
    return {name.removeprefix("ILSVRC2012_devkit_t12/data/"): data for name, data in files.items()}


def test_training_pictures_lie_in_a_tar_of_tars_and_validation_pictures_flat(
    train: dict[str, dict[str, bytes]], val: dict[str, bytes]
) -> None:
    assert list(train) == sorted(c.wnid for c in make_raw.CLASSES[:CLASSES])
    for wnid, pictures in train.items():
        numbers = [int(name.removesuffix(".JPEG").split("_")[1]) for name in pictures]
        assert list(pictures) == [f"{wnid}_{n}.JPEG" for n in numbers]  # no leading zeros
        assert len(numbers) == TRAIN
        assert len({len(str(n)) for n in numbers}) > 1
        assert sorted(numbers) != list(range(min(numbers), min(numbers) + TRAIN))
    assert list(val) == [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, CLASSES * VAL + 1)]


def test_synsets_are_as_the_published_ones_and_leaves_come_first(devkit: dict[str, bytes]) -> None:
    table = loadmat(io.BytesIO(devkit["meta.mat"]))["synsets"]
    assert table.shape == (CLASSES + 2, 1)
    synsets = [{name: row[name] for name in table.dtype.names} for row in table[:, 0]]
    numbers = ["ILSVRC2012_ID", "num_children", "wordnet_height", "num_train_images"]
    assert list(synsets[0]) == [numbers[0], "WNID", "words", "gloss", numbers[1], "children", *numbers[2:]]
    for number, row in enumerate(synsets, start=1):
        assert all(row[name].shape == (1, 1) and row[name].dtype.kind == "u" for name in numbers)
        assert all(row[name].shape == (1,) and row[name].dtype.kind == "U" for name in ("WNID", "words", "gloss"))
        assert row["children"].shape == (1, row["num_children"].item())
        assert row["ILSVRC2012_ID"].item() == number
    wnids = [row["WNID"].item() for row in synsets]
    assert wnids[:CLASSES] == [c.wnid for c in make_raw.CLASSES[:CLASSES]] != sorted(wnids[:CLASSES])
    assert len(set(wnids)) == len(synsets)
    leaves, inner = synsets[:CLASSES], synsets[CLASSES:]
    assert all(row["num_children"].item() == 0 and row["num_train_images"].item() == TRAIN for row in leaves)
    assert all(row["num_children"].item() > 0 and row["num_train_images"].item() == 0 for row in inner)
    reached = np.concatenate([row["children"].ravel() for row in inner])
    assert sorted(reached) == [*range(1, CLASSES + 1), CLASSES + 2]  # all but the root, once


def test_pictures_are_of_the_classes_in_their_names_and_in_the_ground_truth(
    devkit: dict[str, bytes], train: dict[str, dict[str, bytes]], val: dict[str, bytes]
) -> None:
    """Drawn again as of that class, one of the class's pictures has the very same bytes."""
    truth = [int(line) for line in devkit["ILSVRC2012_validation_ground_truth.txt"].decode().splitlines()]
    assert len(truth) == CLASSES * VAL
    assert set(truth) == set(range(1, CLASSES + 1))
    assert truth != sorted(truth)
    again = {c: {make_raw.picture(SEED, "val", c, i) for i in range(VAL)} for c in range(3)}
    for data, identity in zip(val.values(), truth):
        for c, pictures in again.items():
            assert (data in pictures) == (identity == c + 1)
    odd = make_raw.odd_pictures(SEED, CLASSES, TRAIN)
    for c in range(CLASSES):
        wnid, numbers = make_raw.CLASSES[c].wnid, make_raw.training_numbers(SEED, c, TRAIN)
        for i in (0, TRAIN - 1):
            assert train[wnid][f"{wnid}_{numbers[i]}.JPEG"] == make_raw.picture(SEED, "train", c, i, odd.get((c, i)))


def test_oddities_are_there_and_the_command_counts_them(
    drawn: tuple[Path, str], train: dict[str, dict[str, bytes]], val: dict[str, bytes]
) -> None:
    kinds, sizes = Counter[str](), set()
    for files in (val, *train.values()):
        for data in files.values():
            with Image.open(io.BytesIO(data)) as image:
                kind = {"L": "grayscale", "CMYK": "cmyk"}.get(image.mode, "rgb") if image.format == "JPEG" else "png"
                assert (image.mode == "CMYK") == ("adobe" in image.info)
                sizes.add(image.size)
                try:
                    image.load()
                except OSError as error:
                    assert "truncated" in str(error)
                    kind = "truncated"
            kinds[kind] += 1
            assert kind in ("rgb", "grayscale", "cmyk") or files is not val
    assert (kinds["png"], kinds["truncated"]) == (1, 1)
    total = CLASSES * (TRAIN + VAL)
    assert 0.02 * total <= kinds["grayscale"] <= 0.09 * total
    assert 0 < kinds["cmyk"] <= 0.05 * total
    assert drawn[1] == (
        f"wrote {drawn[0]}: {CLASSES * TRAIN} training and {CLASSES * VAL} validation pictures of {CLASSES} classes, "
        f"{kinds['grayscale']} grayscale, {kinds['cmyk']} CMYK, 1 PNG named .JPEG, 1 truncated\n"
    )
    sides = np.array(sorted(sizes))
    assert len(sides) > total / 2
    assert 200 <= sides.min() <= sides.max() <= 520
    assert (sides[:, 0] > sides[:, 1]).any()
    assert (sides[:, 0] < sides[:, 1]).any()


def test_bytes_depend_on_the_seed_alone(tmp_path: Path, drawn: tuple[Path, str], devkit: dict[str, bytes]) -> None:
    for out, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert invoke(tmp_path / out, "--classes", 2, "--train", 2, "--val", 2, "--seed", seed).exit_code == 0
    first, second, third = (digests(tmp_path / out) for out in "abc")
    assert first == second
    assert all(third[name] != first[name] for name in NAMES[1:])
    assert b"Created on" not in devkit["meta.mat"][:128]  # scipy's header has the time and the platform
    packed = (drawn[0] / "ILSVRC2012_devkit_t12.tar.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # no flags, so no file name, and mtime 0
    keys = [(3, "train", 4, 5), (4, "train", 4, 5), (3, "val", 4, 5), (3, "train", 5, 5), (3, "train", 4, 6)]
    assert len({make_raw.pixels(*key).tobytes() for key in keys}) == len(keys)


def test_mean_colours_do_not_give_the_class_away() -> None:
    """Regression on mean colours and their squares stays near chance, and would not if the classes were tinted."""
    keys = [(split, c, i) for split, count in (("train", 30), ("val", 15)) for c in range(10) for i in range(count)]
    classes, trained = np.array([c for _, c, _ in keys]), 300

    def colour(split: str, c: int, i: int) -> NDArray[np.float64]:
        with Image.open(io.BytesIO(make_raw.picture(SEED, split, c, i))) as image:
            return np.asarray(image.convert("RGB")).reshape(-1, 3)[::7].mean(0)

    def accuracy(colours: NDArray[np.float64]) -> float:
        z = (colours - colours[:trained].mean(0)) / colours[:trained].std(0)
        x, targets = np.hstack([z, z**2, np.ones((len(z), 1))]), np.eye(10)[classes]
        weights = np.linalg.lstsq(x[:trained], targets[:trained], rcond=None)[0]
        return float(((x[trained:] @ weights).argmax(1) == classes[trained:]).mean())

    colours = np.array([colour(*key) for key in keys])
    assert abs(accuracy(colours) - 0.1) < 0.10
    assert accuracy(colours + 200 * np.random.default_rng(0).random((10, 3))[classes]) > 0.3  # the control: a leak


def test_refusals_are_one_line_and_leave_everything_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many classes, an --out in use, and a file that cannot get its official name once it is complete."""

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    notes = tmp_path / "notes.txt"
    notes.write_text("notes")
    monkeypatch.setattr(os, "rename", full)
    few = ("--train", 1, "--val", 1, "--classes")
    for out, classes, words in (
        (tmp_path / "out", 12, "2<=x<=11"),
        (tmp_path, 2, f"{tmp_path} exists and is not an empty directory"),
        (notes, 2, f"{notes} exists and is not an empty directory"),
        (tmp_path / "out", 2, "No space left on device"),
    ):
        result = invoke(out, *few, classes)
        assert result.exit_code == 2
        assert words in result.output.splitlines()[-1]
    assert notes.read_text() == "notes"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]
