"""Saved probabilities: what numpy reads of them, the same bytes each time, and damaged or lying files in one line."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conftest import one_line
from pipeline import UserError
from trainer.probabilities import Origin, Probabilities, load, save, top

ORIGIN = Origin("0123abc", "val", "ten", ("runs/1, step 40", "runs/2, step 80"), ("blobs", "größe", "stripes"))
LABELS = np.array([0, 2, -1, 1])
VALUES = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4]])
ABOUT = {"format": 1, "dataset": "0123abc", "split": "val", "views": "ten", "from": list(ORIGIN.networks)}
EVERY = 5  # bytes, of which one has a bit changed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(tmp_path / "saved.npz", Probabilities(ORIGIN, LABELS, VALUES))
    return tmp_path / "saved.npz"


def made(compressed: bool = False, **changed: object) -> bytes:
    """Return a file as `save` writes it, but for some arrays; None: there is none, bytes: the member's own."""
    arrays = {"probabilities": VALUES, "labels": LABELS, "classes": np.array(ORIGIN.classes), "about": about()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in (arrays | changed).items():
            member = io.BytesIO(array if isinstance(array, bytes) else b"")
            if not isinstance(array, bytes):
                np.save(member, np.asanyarray(array), allow_pickle=True)
            if array is not None:
                archive.writestr(f"{name}.npy", member.getvalue())
    return out.getvalue()


def about(**changed: object) -> np.ndarray:
    return np.array(json.dumps(ABOUT | changed))


def lying(shape: tuple[int, ...], descr: str = "<f8", data: bytes = VALUES.tobytes()) -> bytes:
    """Return a member whose header claims a shape."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def refused(file: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(file)
    text = one_line(caught, *words, "write it again with --save-probabilities")
    assert text.startswith(f"{file}: not saved probabilities, or damaged (")


def test_numpy_reads_ours_and_we_read_numpys(file: Path, tmp_path: Path):
    with np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["about", "classes", "labels", "probabilities"]
        assert (arrays["probabilities"] == VALUES).all()
        assert (arrays["probabilities"].dtype, arrays["labels"].dtype) == (np.float64, np.int64)
        assert arrays["labels"].tolist() == LABELS.tolist()
        assert arrays["classes"].tolist() == list(ORIGIN.classes)
        assert json.loads(str(arrays["about"])) == ABOUT
    (tmp_path / "numpy.npz").write_bytes(made())
    for path in (file, tmp_path / "numpy.npz"):
        loaded = load(path)
        assert loaded.origin == ORIGIN
        assert (loaded.labels == LABELS).all()
        assert (loaded.values == VALUES).all()


def test_the_most_probable_labels():
    values = np.array([0.1, 0.3, 0.1, 0.2, 0.05, 0.25, 0.0])
    assert top(values).tolist() == [1, 5, 3, 0, 2]  # equal ones by label
    assert top(values[:2]).tolist() == [1, 0]
    assert top(np.stack([values, values[::-1]]), 1).tolist() == [[1], [5]]


def test_the_same_probabilities_are_the_same_bytes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No clock is written."""
    monkeypatch.setattr("time.time", lambda: 10**9)
    save(tmp_path / "again.npz", Probabilities(ORIGIN, LABELS, VALUES))
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()


def test_any_changed_bit_is_refused_or_harmless(file: Path):
    """As fields of a zip that nobody reads are; a bit of an array or of its name never is."""
    good, known, refusals = file.read_bytes(), load(file), 0
    for position in range(0, len(good), EVERY):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        file.write_bytes(changed)
        try:
            again = load(file)
        except UserError as error:
            assert str(error).startswith(f"{file}: not saved probabilities, or damaged (")
            assert "\n" not in str(error)
            refusals += 1
            continue
        assert again.origin == known.origin
        assert (again.labels == known.labels).all()
        assert again.values.tobytes() == known.values.tobytes()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        assert refusals > sum(info.file_size for info in archive.infolist()) / EVERY
    for size in (*range(0, len(good), 7), len(good) - 1):
        file.write_bytes(good[:size])
        refused(file)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a zip file"),
        (made(compressed=True), "compressed"),
        (made(labels=None), "labels"),
        (made(labels=b"4 plain bytes"), "labels is no array of <i8"),
        (made(probabilities=lying((2**40, 3))), ""),  # no memory is taken for it
        (made(about=about(format=2)), "format 2, this version reads 1"),
        (made(about=np.array("[1, 2]")), "expected object, got array"),
        (made(about=about(**{"from": [1]})), "from[0]: expected str, got int"),
        (made(about=np.array("not JSON")), ""),
        (made(about=np.array("[" * 100_000)), "recursion"),
        (made(probabilities=VALUES[:0], labels=LABELS[:0]), "shapes (0,)"),
        (made(probabilities=np.where(VALUES == 1, np.nan, VALUES)), "probabilities holds numbers that are not finite"),
        (made(labels=np.array([0, 1, 3, 0])), "labels from 0 to 3, of 3 classes"),
        (made(labels=np.array([0, 1, -2, 0])), "labels from -2 to 1, of 3 classes"),
        (made(classes=np.array(["a", "b"])), "shapes (4,), (2,), (4, 3)"),
        (made(probabilities=VALUES.astype(np.float32)), "probabilities is no array of <f8"),
        (made(probabilities=VALUES * (1 + 2e-6)), "not 1 in sum"),
        (made(probabilities=VALUES + np.array([1, -1, 0])), "below 0"),
    ],
)
def test_other_and_damaged_files(file: Path, data: bytes, words: str):
    file.write_bytes(data)
    refused(file, words)


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_is_never_opened(file: Path):
    opened = file.with_name("opened")
    for name in ("about", "classes", "labels", "probabilities"):
        file.write_bytes(made(**{name: np.array([Bomb(opened)], object)}))
        refused(file, "allow_pickle")
    assert not opened.exists()


def test_a_directory_is_the_systems_own_error(tmp_path: Path):
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
