"""A table of raw images: columns of 33 bytes an image, and its path; all of ImageNet has 14.2 million."""

import copy
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.offline.reading import read_raw

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class RawImage:
    """One raw image: `size` bytes of `file` from `offset`. `path` names it below RAW, through archives."""

    split: str
    path: str
    wnid: str | None  # None: no label
    file: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        """The raw bytes, by one positioned read. Raises SourceError where the file became shorter since the plan."""
        return read_raw(self.file, self.offset, self.size)


class RawTable(Sequence[RawImage]):
    """Raw images in the order in which they were appended; each is made anew from its columns when asked for."""

    def __init__(self) -> None:
        self.wnids: list[str] = []  # by class number
        self._class_of: dict[str | None, int] = {None: -1}
        self._paths = bytearray()
        self._ends = array("Q")  # of each path in _paths
        self._files: list[str] = []
        self._file_of: dict[str, int] = {}
        self._file = array("i")  # f ≥ 0: the file _files[f]; f < 0: _files[~f] + path, as loose files have it
        self._offset = array("Q")
        self._size = array("Q")
        self._class = array("i")  # −1: no label
        self._split = array("B")

    def append(self, image: RawImage) -> None:
        self._paths += os.fsencode(image.path)
        self._ends.append(len(self._paths))
        loose = image.file.endswith(image.path)
        file = image.file[: -len(image.path)] if loose else image.file
        number = self._file_of.setdefault(file, len(self._files))
        if number == len(self._files):
            self._files.append(file)
        self._file.append(~number if loose else number)
        self._offset.append(image.offset)
        self._size.append(image.size)
        label = self._class_of.setdefault(image.wnid, len(self.wnids))
        if label == len(self.wnids):
            self.wnids.append(str(image.wnid))
        self._class.append(label)
        self._split.append(SPLITS.index(image.split))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> RawImage:  # type: ignore[override]  # no slices
        path, number, label = self.path(i), self._file[i], self._class[i]
        file = self._files[number] if number >= 0 else self._files[~number] + path
        wnid = self.wnids[label] if label >= 0 else None
        return RawImage(SPLITS[self._split[i]], path, wnid, file, self._offset[i], self._size[i])

    def __iter__(self) -> Iterator[RawImage]:
        return (self[i] for i in range(len(self)))

    def path(self, i: int) -> str:
        start = self._ends[i - 1] if i else 0
        return os.fsdecode(bytes(self._paths[start : self._ends[i]]))

    @property
    def paths(self) -> "Paths":
        return Paths(self)

    @property
    def split_numbers(self) -> np.ndarray:
        """(n,) uint8: places in SPLITS. A view: nothing can be appended while it lives."""
        return np.asarray(self._split)

    @property
    def class_numbers(self) -> np.ndarray:
        """(n,) int32: places in `wnids`, −1 without a label. A view, as above."""
        return np.asarray(self._class)

    @property
    def offsets(self) -> np.ndarray:
        """(n,) uint64: where each image begins in its file; the number of a parquet row until it is copied. A view."""
        return np.asarray(self._offset)

    @property
    def sizes(self) -> np.ndarray:
        """(n,) uint64: bytes of each image; about, of a parquet row until it is copied. A view, as above."""
        return np.asarray(self._size)

    def per_class(self, split: str) -> Counter[str | None]:
        """Images of a split by class; None: without a label."""
        classes = self.class_numbers[self.split_numbers == SPLITS.index(split)]
        counts = np.bincount(classes.astype(np.int64) + 1, minlength=1)
        names: list[str | None] = [None, *self.wnids]
        return Counter({names[i]: int(counts[i]) for i in np.flatnonzero(counts)})

    def has(self, split: str) -> bool:
        return SPLITS.index(split) in self._split

    def by_file(self, indices: np.ndarray, suffix: str) -> dict[str, np.ndarray]:
        """Return the indices of the images in each file with this suffix, (n,), in the order of their offsets."""
        if not any(file.endswith(suffix) for file in self._files):
            return {}
        numbers = np.asarray(self._file)[indices]
        order = np.lexsort((self.offsets[indices], numbers))
        groups = np.split(indices[order], np.flatnonzero(np.diff(numbers[order])) + 1)
        files = {self._files[self._file[int(group[0])]]: group for group in groups if len(group)}
        return {file: group for file, group in files.items() if file.endswith(suffix)}

    def moved(self, places: Iterable[tuple[np.ndarray, str, np.ndarray, np.ndarray]]) -> "RawTable":
        """Return this table with images elsewhere: their indices, file, offsets and sizes. The paths are shared."""
        table = copy.copy(self)
        table._files, table._file_of = [*self._files], {**self._file_of}
        table._file, table._offset, table._size = self._file[:], self._offset[:], self._size[:]
        for indices, file, offsets, sizes in places:
            np.asarray(table._file)[indices] = table._file_of.setdefault(file, len(table._files))
            table._files += [file] * (len(table._file_of) - len(table._files))
            np.asarray(table._offset)[indices], np.asarray(table._size)[indices] = offsets, sizes
        return table

    def rename_classes(self, rename: Callable[[str], str]) -> None:
        """Give classes other names; classes that get the same one become one."""
        names = [rename(wnid) for wnid in self.wnids]
        self.wnids = list(dict.fromkeys(names))
        self._class_of = {None: -1} | {wnid: number for number, wnid in enumerate(self.wnids)}
        renumbered = np.array([self._class_of[name] for name in names] + [-1], np.int32)  # −1 is the last place
        classes = np.asarray(self._class)
        classes[:] = renumbered[classes]


class Paths(Sequence[str]):
    """The paths of a table, each made when asked for."""

    def __init__(self, table: RawTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]  # no slices
        return self._table.path(i)
