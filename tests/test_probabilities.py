"""Saved probabilities: what numpy reads of them, the same bytes each time, and damaged or lying files in one line."""

import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import one_line
from pipeline import UserError
from trainer.probabilities import Add, Origin, load, save

ORIGIN = Origin("0123abc", "val", "ten", ("runs/1, step 40", "runs/2, step 80"), ("blobs", "größe", "stripes"))
LABELS = np.array([0, 2, -1, 1])
VALUES = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4]])
ABOUT = {
    "format": 1, "dataset": "0123abc", "split": "val", "views": "ten", "from": ["runs/1, step 40", "runs/2, step 80"]
}  # fmt: skip


def in_batches(add: Add) -> None:
    """Three and one; of whatever order in memory."""
    add(LABELS[:3], np.asfortranarray(VALUES[:3]))
    add(LABELS[3:], VALUES[3:])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(tmp_path / "saved.npz", ORIGIN, 4, in_batches)
    return tmp_path / "saved.npz"


def arrays(**changed: object) -> dict[str, object]:
    """Those of a file as `save` writes it, but for some; None: there is none."""
    about = np.array(json.dumps(ABOUT))
    known = {"probabilities": VALUES, "labels": LABELS, "classes": np.array(ORIGIN.classes), "about": about}
    return {name: array for name, array in (known | changed).items() if array is not None}


def described(**changed: object) -> np.ndarray:
    return np.array(json.dumps(ABOUT | changed))


def packed(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def npy(array: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asanyarray(array), allow_pickle=True)
    return out.getvalue()


def made(**changed: object) -> bytes:
    """A file of ours by other means; bytes are a member's own."""
    found = arrays(**changed)
    return packed({f"{name}.npy": data if isinstance(data, bytes) else npy(data) for name, data in found.items()})


def lying(shape: tuple[int, ...], descr: str = "<f8", data: bytes = VALUES.tobytes()) -> bytes:
    """A member that says it is of some shape."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def headed(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def refused(file: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(file)
    text = one_line(caught, *words, "write it again with --save-probabilities")
    assert text.startswith(f"{file}: not saved probabilities, or damaged (")


def test_numpy_reads_it_without_us(file: Path):
    with np.load(file, allow_pickle=False) as found:
        assert sorted(found) == ["about", "classes", "labels", "probabilities"]
        assert (found["probabilities"] == VALUES).all()
        assert found["probabilities"].dtype == np.float64
        assert found["labels"].tolist() == LABELS.tolist()
        assert found["labels"].dtype == np.int64
        assert found["classes"].tolist() == list(ORIGIN.classes)
        assert json.loads(str(found["about"])) == ABOUT


def test_we_read_it_and_what_numpy_writes(file: Path, tmp_path: Path):
    np.savez(tmp_path / "numpy.npz", **arrays())  # type: ignore[arg-type]
    for path in (file, tmp_path / "numpy.npz"):
        found = load(path)
        assert found.origin == ORIGIN
        assert (found.labels == LABELS).all()
        assert (found.values == VALUES).all()


def test_the_same_probabilities_are_the_same_bytes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In other batches, and at another time: no clock is written."""
    monkeypatch.setattr("time.time", lambda: 10**9)
    save(tmp_path / "again.npz", ORIGIN, 4, lambda add: add(LABELS, VALUES))
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()


def test_a_failure_half_way_leaves_the_old_file(file: Path):
    before = file.read_bytes()

    def fails(add: Add) -> None:
        add(LABELS[:3], VALUES[:3])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(file, ORIGIN, 4, fails)
    with pytest.raises(AssertionError):
        save(file, ORIGIN, 5, in_batches)  # too few
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_it_is_never_all_in_memory(tmp_path: Path):
    n, batch = 20_000, np.full((100, 100), 0.01)  # 16 MB

    def fill(add: Add) -> None:
        for _ in range(n // 100):
            add(np.zeros(100, np.int64), batch)

    origin = Origin("d", "val", "ten", ("r",), tuple(map(str, range(100))))
    assert peak(lambda: save(tmp_path / "a.npz", origin, n, fill)) < 4 * 2**20
    assert load(tmp_path / "a.npz").values.shape == (n, 100)


def test_any_changed_bit_is_found_or_harmless(file: Path):
    """As fields of a zip that nobody reads are; a bit of an array or of its name never is."""
    good, known, found = file.read_bytes(), load(file), 0
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            again = load(file)
        except UserError as error:
            assert str(error).startswith(f"{file}: not saved probabilities, or damaged (")
            assert "\n" not in str(error)
            found += 1
            continue
        assert again.origin == known.origin
        assert (again.labels == known.labels).all()
        assert again.values.tobytes() == known.values.tobytes()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        assert found > sum(info.file_size for info in archive.infolist())


def test_files_that_are_cut_short(file: Path):
    good = file.read_bytes()
    for size in (*range(0, len(good), 7), len(good) - 1):
        file.write_bytes(good[:size])
        refused(file)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a zip file"),
        (b"\x93NUMPY", "not a zip file"),
        (packed({}), "about.npy"),
        (packed({"photo.jpg": b"a", "notes.txt": b"b"}), "about.npy"),
        (packed({f"{name}.npy": npy(each) for name, each in arrays().items()}, zipfile.ZIP_DEFLATED), "compressed"),
        (packed({f"{name}.npy": npy(each) for name, each in arrays().items()}, zipfile.ZIP_BZIP2), "compressed"),
        *((made(**{name: None}), f"{name}.npy") for name in arrays()),
        *((made(**{name: np.array([{}, 1, 2, 3], object)}), "Python objects") for name in ("labels", "probabilities")),
        *((made(**{name: np.array({}, object)}), "Python objects") for name in ("about", "classes")),
        (made(labels=b"4 plain bytes"), "magic string"),
        (made(about=b""), "EOF"),
        (made(about=headed(b"{'descr': '<f8', (\n")), ""),
        (made(about=headed(b"-" * 9000 + b"1\n")), "Header info length"),
        (made(about=headed(b"{'descr': '<f8'}\n")), "correct keys"),
        (made(labels=b"\x93NUMPY\x02\x00" + bytes(99)), "another version of .npy"),
    ],
)
def test_other_files(file: Path, data: bytes, words: str):
    file.write_bytes(data)
    refused(file, words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"about": described(format=2)}, "format 2, this version reads 1"),
        ({"about": described(format="1")}, "format is '1'"),
        ({"about": described(format=True)}, "format is True"),
        ({"about": described(views=None)}, "views is None"),
        ({"about": described(split=3)}, "split is 3"),
        ({"about": np.array("{}")}, "format"),
        ({"about": np.array("[1, 2]")}, "list"),
        ({"about": np.array("[" * 100_000)}, "recursion"),
        ({"about": np.array("not JSON")}, ""),
        ({"labels": LABELS.astype(np.int32)}, "types int32"),
        ({"labels": LABELS.astype(">i8")}, "types >i8"),
        ({"labels": LABELS.astype(float)}, "types float64"),
        ({"labels": LABELS[:3]}, "shapes (3,)"),
        ({"labels": LABELS[:, None]}, "shapes (4, 1)"),
        ({"labels": np.array([0, 1, 3, 0])}, "labels from 0 to 3, of 3 classes"),
        ({"labels": np.array([0, 1, -2, 0])}, "labels from -2 to 1, of 3 classes"),
        ({"classes": np.arange(3)}, "types"),
        ({"classes": np.array(["a", "b"])}, "shapes (4,), (2,), (4, 3)"),
        ({"probabilities": VALUES.astype(np.float32)}, "types int64, float32"),
        ({"probabilities": VALUES.astype(">f8")}, ">f8"),
        ({"probabilities": VALUES.ravel()}, "(12,)"),
        ({"probabilities": VALUES.T}, "(3, 4)"),
        ({"probabilities": VALUES[:0], "labels": LABELS[:0]}, "shapes (0,)"),
        ({"probabilities": np.where(VALUES == 1, np.nan, VALUES)}, "no probabilities"),
        ({"probabilities": np.where(VALUES == 1, np.inf, VALUES)}, "no probabilities"),
        ({"probabilities": VALUES * (1 + 2e-6)}, "not 1 in sum"),
        ({"probabilities": VALUES + np.array([1, -1, 0])}, "below 0"),
    ],
)
def test_values_that_are_not_as_they_must_be(file: Path, changed: dict[str, np.ndarray], words: str):
    file.write_bytes(made(**changed))
    refused(file, words)


@pytest.mark.parametrize(
    "changed",
    [
        {"probabilities": lying((2**40, 3))},
        {"probabilities": lying((2**62, 2**62))},
        {"probabilities": lying((4, 3), data=bytes(8))},
        {"probabilities": lying((4, 2))},  # too much of it
        {"probabilities": lying((-4, -3))},
        {"labels": lying((2**33,), "<i8")},
        {"classes": lying((2**61,), "<U0", b"")},
        {"classes": lying((3,), "<U500000000")},
        {"about": lying((), "<U500000000")},
    ],
)
def test_no_memory_is_taken_for_what_is_not_there(file: Path, changed: dict[str, bytes]):
    file.write_bytes(made(**changed))
    assert peak(lambda: refused(file)) < 4 * 2**20


def test_a_pickle_is_never_opened(file: Path):
    """Not even one whose size is what its header says."""
    opened = file.with_name("opened")
    bomb = pickle.dumps(Bomb(opened))
    bomb += b"." * (-len(bomb) % 8)
    for name in arrays():
        file.write_bytes(made(**{name: lying((len(bomb) // 8,), "|O", bomb)}))
        refused(file, f"{name}: Python objects")
    assert not opened.exists()
    pickle.loads(bomb)
    assert opened.exists()


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_a_size_that_only_the_zip_claims(file: Path):
    """The directory says 2³¹ bytes, and so does the header: there are 96."""
    member = lying((2**28 - 16,), data=VALUES.tobytes())
    data = bytearray(made(probabilities=member))
    entry = data.index(b"PK\x01\x02")
    for _ in arrays():
        if data[entry + 46 :].startswith(b"probabilities"):
            data[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
        entry = data.index(b"PK", entry + 46)
    file.write_bytes(data)
    assert peak(lambda: refused(file)) < 4 * 2**20


def test_a_directory_and_no_file_are_the_systems_own_errors(tmp_path: Path):
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")


def peak(run: Callable[[], None]) -> int:
    """Bytes, those of numpy among them."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
