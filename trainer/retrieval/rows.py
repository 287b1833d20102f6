"""A .npy file of many rows: written one batch after the other, mapped for scans, read row by row for a few."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pipeline import UserError


class RowWriter:
    """Writes a new .npy file of `shape`, whose rows come in batches.

    By plain writes, not through a map: of a full disk, a map learns by a signal that ends the process.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._file = open(path, "xb")  # noqa: SIM115
        self._shape, self._dtype, self.rows = shape, dtype, 0
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, batch: np.ndarray) -> None:
        """The next rows, (n, columns) of the file's dtype."""
        assert batch.dtype == self._dtype
        assert batch.shape[1:] == self._shape[1:]
        self._file.write(np.ascontiguousarray(batch).data)
        self.rows += len(batch)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        assert error is not None or self.rows == self._shape[0]


class Rows:
    """The rows of a .npy file, (n, columns). The file stays open, so that replacing it does not change them.

    Raises:
        UserError: the file is none of that shape and dtype, or is cut short; the message names it.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            version = np.lib.format.read_magic(self._file)
            found = np.lib.format.read_array_header_1_0(self._file) if version == (1, 0) else None
        except ValueError:
            found = None
        self._at = self._file.tell()
        size = self._at + int(np.prod(shape)) * dtype.itemsize
        if found != (shape, False, dtype) or os.fstat(self._file.fileno()).st_size != size:
            self._file.close()
            raise UserError(f"{path}: damaged (not {shape[0]:,} rows of {shape[1]:,} {dtype})")
        self.mapped = np.memmap(self._file, dtype, "r", self._at, shape)

    def gathered(self, ids: np.ndarray) -> np.ndarray:
        """The rows of `ids` (k,), in that order: (k, columns). A disk is asked for all of them at once."""
        found = np.empty((len(ids), self.mapped.shape[1]), self.mapped.dtype)
        size, number = found.itemsize * found.shape[1], self._file.fileno()
        places = np.argsort(ids, kind="stable").tolist()  # in the order of the disk
        for place in places:
            os.posix_fadvise(number, self._at + int(ids[place]) * size, size, os.POSIX_FADV_WILLNEED)
        for place in places:
            _fill(number, memoryview(found[place]).cast("B"), self._at + int(ids[place]) * size)
        return found

    def close(self) -> None:
        """Close the file; the map goes with the last who uses it."""
        self._file.close()


def _fill(number: int, part: memoryview, offset: int) -> None:
    """Fill `part` from `offset` of a file that is long enough, unless somebody cuts it."""
    done = 0
    while done < len(part):
        if not (count := os.preadv(number, [part[done:]], offset + done)):
            raise UserError("the index was cut while it was read; make it again: python -m trainer index")
        done += count
