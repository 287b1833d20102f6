"""Saved probabilities: one .npz of a network's, or several networks', for every image of a split."""

import errno
import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

from pipeline import UserError
from pipeline.files import HashingFile, write_aside

FORMAT = 1
ABOUT = {"format": int, "dataset": str, "split": str, "views": str, "from": list}
SLACK = 1e-6  # by which the sum of an image's probabilities may differ from 1
HEADER = 256  # bytes; ours are shorter
DAMAGE = (zipfile.BadZipFile, TokenError, ValueError, KeyError, TypeError, EOFError, RuntimeError, OSError)
Add = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Origin:
    """What probabilities are of."""

    dataset: str  # identity of the dataset directory
    split: str
    views: str
    networks: tuple[str, ...]  # run and step of each
    classes: tuple[str, ...]  # wnids, by label

    def about(self) -> dict[str, Any]:
        about = {"dataset": self.dataset, "split": self.split, "views": self.views}
        return {"format": FORMAT, **about, "from": list(self.networks)}


@dataclass(frozen=True)
class Probabilities:
    """For every image of a split, in the order of the ids."""

    origin: Origin
    labels: np.ndarray  # (n,) int64; −1: none
    values: np.ndarray  # (n, classes) float64


def save(path: Path, origin: Origin, samples: int, fill: Callable[[Add], None]) -> None:
    """Write PATH.npz, whole or not at all: `fill` is given a function that takes (labels, values) batch by batch.

    The arrays in it: `probabilities` (n, classes) float64, `labels` (n,) int64, −1: none, `classes` (wnids), `about`
    (JSON). It is never all in memory.

    Raises:
        OSError: the disk is full; or whatever `fill` raises.
    """
    labels: list[np.ndarray] = []

    def write(file: HashingFile) -> None:
        with zipfile.ZipFile(_Stream(file), "w", zipfile.ZIP_STORED) as archive:
            with archive.open("probabilities.npy", "w", force_zip64=True) as member:
                shape = {"descr": "<f8", "fortran_order": False, "shape": (samples, len(origin.classes))}
                np.lib.format.write_array_header_1_0(member, shape)

                def add(batch: np.ndarray, values: np.ndarray) -> None:
                    labels.append(batch.astype("<i8"))
                    member.write(np.ascontiguousarray(values, "<f8").data.cast("B"))

                fill(add)
            rest = {
                "labels": np.concatenate([*labels, np.zeros(0, "<i8")]),
                "classes": np.array(origin.classes, "U"),
                "about": np.array(json.dumps(origin.about())),
            }
            for name, array in rest.items():
                held = io.BytesIO()
                np.save(held, array, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), held.getvalue())  # which is of 1980, not of now
        assert sum(map(len, labels)) == samples

    write_aside(path, write)


class _Stream(io.RawIOBase):
    """What zipfile writes to."""

    def __init__(self, file: HashingFile) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        return len(data)


def load(path: Path) -> Probabilities:
    """Read what `save` wrote. Raises UserError where it is something else or damaged, or OSError."""
    with open(path, "rb") as file:
        try:
            return _read(file)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # as a seek to before the file is
                raise
            what = " ".join(str(error).split())
            raise UserError(
                f"{path}: not saved probabilities, or damaged ({what}); write it again with --save-probabilities"
            ) from error


def _read(file: BinaryIO) -> Probabilities:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in members):
            raise ValueError("a member is compressed")
        if archive.testzip():
            raise ValueError("the CRC-32 of a member differs")
        return _checked(*(_array(archive, name) for name in ("about", "classes", "labels", "probabilities")))


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One that is as large as its header says: no memory is taken for what is not there."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name}: another version of .npy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member, max_header_size=HEADER)
        if dtype.hasobject:
            raise ValueError(f"{name}: Python objects")
        if info.file_size - member.tell() != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: not as large as its header says")
        member.seek(0)
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        return array


def _checked(about: np.ndarray, classes: np.ndarray, labels: np.ndarray, values: np.ndarray) -> Probabilities:
    """Raises ValueError, KeyError or TypeError where something is not as `save` writes it."""
    plain = json.loads(str(about))
    for key, kind in ABOUT.items():
        if type(plain[key]) is not kind:
            raise ValueError(f"{key} is {plain[key]!r}")
    if plain["format"] != FORMAT:
        raise ValueError(f"format {plain['format']}, this version reads {FORMAT}")
    n, width = labels.size, classes.size
    if (labels.shape, classes.shape, values.shape) != ((n,), (width,), (n, width)) or n == 0:
        raise ValueError(f"shapes {labels.shape}, {classes.shape}, {values.shape}")
    if (labels.dtype, values.dtype, classes.dtype.kind) != (np.int64, np.float64, "U"):
        raise ValueError(f"types {labels.dtype}, {values.dtype}, {classes.dtype}")
    if labels.min() < -1 or labels.max() >= width:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, of {width} classes")
    if not (values >= 0).all() or not (np.abs(values.sum(1) - 1) <= SLACK).all():
        raise ValueError("values that are no probabilities: below 0, or not 1 in sum")
    networks, names = tuple(map(str, plain["from"])), tuple(classes.tolist())
    return Probabilities(Origin(plain["dataset"], plain["split"], plain["views"], networks, names), labels, values)
