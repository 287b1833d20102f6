"""Raw images, the table of them, and what a layout makes of RAW."""

import copy
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline import SourceError, UserError, storage
from pipeline.cli import printable
from pipeline.manifest import ClassRecord, Manifest
from pipeline.offline.names import SPLITS, normal
from pipeline.storage import Location

NAMES_KEPT = 5  # of each reason; the rest is counted
REASONS_KEPT = 40  # a hostile folder can have a new extension for every file


@dataclass(frozen=True, slots=True)
class RawImage:
    """One raw image: `size` bytes of `file` from `offset`. `path` names it below RAW, through archives."""

    split: str
    path: str
    wnid: str | None  # None: no label, or none yet
    file: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        """Return the raw bytes, by one positioned read. Raises SourceError if the file has become shorter; OSError."""
        data = storage.read_range(self.file, self.offset, self.size)
        if len(data) != self.size:
            raise SourceError(f"{self.file}: changed since the build began; delete DATASET and start again")
        return data


class Paths(Sequence[str]):
    """Paths in one buffer, each made when asked for."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("Q")

    def append(self, path: str) -> None:
        self._bytes += os.fsencode(path)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]  # no slices
        start = self._ends[i - 1] if i else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[i]]))


class RawTable(Sequence[RawImage]):
    """Raw images in the order in which they were appended: 33 bytes each and the path. ImageNet has 14.2 million."""

    def __init__(self) -> None:
        self.paths = Paths()
        self.offsets = array("Q")  # of each image in its file; the number of a parquet row until it is copied
        self.sizes = array("Q")  # bytes of each image; about, of a parquet row until it is copied
        self.split_numbers = array("B")  # indices in SPLITS
        self.class_numbers = array("i")  # indices in `wnids`; −1: no label
        self.wnids: list[str] = []  # as `normal` has them
        self.spellings: dict[str, set[str]] = {}  # class → its names in RAW
        self._class_of: dict[str | None, int] = {None: -1}  # by the names in RAW
        self._number_of: dict[str, int] = {}  # by the names in `wnids`
        self._files: list[str] = []  # "" and what ends with a slash: the folder to which the path is to be appended
        self._file_of: dict[str, int] = {}
        self._file = array("i")  # index in _files

    def append(self, image: RawImage, wnid: str | None = None) -> None:
        """Append an image; `wnid` is its class, where `image` has none yet."""
        self.paths.append(image.path)
        # A file of its own has no name in _files: the names of 14 million files would be as long as the paths again.
        self._file.append(_index(self._file_of, self._files, image.file.removesuffix(image.path)))
        self.offsets.append(image.offset)
        self.sizes.append(image.size)
        wnid = wnid or image.wnid
        if wnid is not None and wnid not in self._class_of:
            name = normal(wnid)
            self.spellings.setdefault(name, set()).add(wnid)
            self._class_of[wnid] = _index(self._number_of, self.wnids, name)
        self.class_numbers.append(self._class_of[wnid])
        self.split_numbers.append(SPLITS.index(image.split))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> RawImage:  # type: ignore[override]  # no slices
        path, file, label = self.paths[i], self._files[self._file[i]], self.class_numbers[i]
        file += path if file[-1:] in ("", "/") else ""
        wnid = self.wnids[label] if label >= 0 else None
        return RawImage(SPLITS[self.split_numbers[i]], path, wnid, file, self.offsets[i], self.sizes[i])

    def per_class(self, split: str) -> Counter[str | None]:
        """Return the number of images of a split by class; None: without a label."""
        classes = np.asarray(self.class_numbers)[np.asarray(self.split_numbers) == SPLITS.index(split)]
        counts = np.bincount(classes.astype(np.int64) + 1, minlength=1)
        names: list[str | None] = [None, *self.wnids]
        return Counter({names[i]: int(counts[i]) for i in np.flatnonzero(counts)})

    def has(self, split: str) -> bool:
        return SPLITS.index(split) in self.split_numbers

    def by_file(self, indices: np.ndarray, suffix: str) -> dict[str, np.ndarray]:
        """Return the indices of the images in each file with this suffix, (n,), in the order of their offsets."""
        files = {number: file for number, file in enumerate(self._files) if file.lower().endswith(suffix)}
        numbers, offsets = np.asarray(self._file)[indices if files else indices[:0]], np.asarray(self.offsets)
        groups = {file: indices[numbers == number] for number, file in files.items()}
        return {file: group[np.argsort(offsets[group])] for file, group in groups.items() if len(group)}

    def moved(self, extents: Iterable[tuple[np.ndarray, str, np.ndarray, np.ndarray]]) -> "RawTable":
        """Return this table with images elsewhere: their indices, file, offsets and sizes. The paths are shared."""
        table = copy.copy(self)
        table._files, table._file_of = [*self._files], {**self._file_of}
        table._file, table.offsets, table.sizes = self._file[:], self.offsets[:], self.sizes[:]
        for indices, file, offsets, sizes in extents:
            np.asarray(table._file)[indices] = _index(table._file_of, table._files, file)
            np.asarray(table.offsets)[indices], np.asarray(table.sizes)[indices] = offsets, sizes
        return table

    def rename_classes(self, rename: Callable[[str], str]) -> None:
        """Give classes other names; classes that get the same one become one."""
        names = [rename(wnid) for wnid in self.wnids]
        self.wnids = list(dict.fromkeys(names))
        self._number_of = {wnid: number for number, wnid in enumerate(self.wnids)}
        self._class_of = {None: -1} | self._number_of
        renumbered = np.array([self._class_of[name] for name in names] + [-1], np.int32)  # the last: no label
        classes = np.asarray(self.class_numbers)
        classes[:] = renumbered[classes]

    def join_splits(self, split: str) -> None:
        """Put all images that have a label into one split; those without one are of test."""
        labelled = np.asarray(self.class_numbers) >= 0
        np.asarray(self.split_numbers)[:] = np.where(labelled, SPLITS.index(split), SPLITS.index("test"))

    def forget_classes(self, split: str) -> None:
        """Take the classes from the images of a split; a class that then has no image is gone."""
        classes = np.asarray(self.class_numbers)
        classes[np.asarray(self.split_numbers) == SPLITS.index(split)] = -1
        kept = {number: self.wnids[number] for number in np.unique(classes).tolist() if number >= 0}
        self.wnids = [*kept.values()]
        self._number_of = {wnid: number for number, wnid in enumerate(self.wnids)}
        self._class_of = {None: -1} | self._number_of
        renumbered = np.full(max(kept, default=-1) + 2, -1, np.int32)  # the last: no label
        renumbered[[*kept]] = range(len(kept))
        classes[:] = renumbered[classes]


def _index(index_of: dict, names: list[str], name: str) -> int:
    """Return the index of `name` in `names`, to which it is appended if it is new."""
    index: int = index_of.setdefault(name, len(names))
    if index == len(names):
        names.append(name)
    return index


class LeftOut(Counter[str]):
    """Number of files, folders and members that are left out by reason, with the first names of each."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[str, list[str]] = {}
        self.pictures = 0  # that RAW has, and a user would miss: --max-skipped counts them

    def lose(self, reason: str, name: str) -> None:
        """Add a picture that a user would miss."""
        self.pictures += 1
        self.add(reason, name)

    def add(self, reason: str, name: str) -> None:
        if reason not in self and len(self) >= REASONS_KEPT:
            reason = "something else"
        self[reason] += 1
        if self[reason] <= NAMES_KEPT:
            self._names.setdefault(reason, []).append(printable(name, 120))

    def lines(self) -> list[str]:
        """Return `12 × .txt: a.txt, b.txt, c.txt, d.txt, e.txt and 7 more`, one line a reason."""
        lines = []
        for reason, count in sorted(self.items()):
            more = f" and {count - NAMES_KEPT:,} more" if count > NAMES_KEPT else ""
            lines.append(f"{count:,} × {reason}: {', '.join(self._names[reason])}{more}")
        return lines


@dataclass(frozen=True)
class Options:
    """Settings by which a user says how RAW is to be read, as build_shards.py has them."""

    layout: str | None = None  # forced: used whatever RAW looks like
    classes: Location | None = None  # a file of the classes to keep
    classes_of: Location | None = None  # a dataset directory whose classes and labels hold
    labels: Location | None = None  # a table of file names and labels
    class_depth: int = 0  # the folder below RAW or a split that names the class: 1, 2, …; 0: not said, −1: the last
    keep_labels: bool = False  # numbers stay the labels that they are
    allow_incomplete: bool = False

    def __post_init__(self) -> None:
        """Raise UserError where two of them contradict each other."""
        given = {"--classes": self.classes, "--keep-labels": self.keep_labels}
        for option, value in given.items():
            if self.classes_of and value:
                raise UserError(f"{option} and --classes-of {self.classes_of}: both say which labels hold; choose one")
        if self.labels and self.layout not in (None, "labels"):
            raise UserError(
                f"--labels {self.labels} and --layout {self.layout}: the table makes the layout; choose one"
            )
        if self.labels and self.class_depth:
            raise UserError(f"--class-depth and --labels {self.labels}: a folder's class, or the table's? choose one")


@dataclass(frozen=True)
class Reading:
    """One layout's reading of RAW, by a look at names alone."""

    text: str  # for a message: "train/ and val/ are splits, the folders in them classes"
    evidence: frozenset[str]  # paths below RAW that the reading accounts for
    doubt: str = ""  # why it may be wrong, and what to do: RAW is then refused


@dataclass(frozen=True)
class Promise:
    """The number of images that a split must have. `by` says who says so: "the devkit promises"."""

    split: str
    part: str  # the archive or folder
    images: int
    by: str
    unit: str = "images"
    per_class: Mapping[str, int] = field(default_factory=dict)  # wnid → images; empty: not known


@dataclass
class Sources:
    """Every raw image below RAW, in no particular order, and its classes, in the order of their labels."""

    layout: str  # in words
    gives: str = ""  # the folder, file or column that gives the class, in words
    order: str = ""  # in words, once the classes have their final labels
    images: RawTable = field(default_factory=RawTable)
    classes: tuple[ClassRecord, ...] = ()
    ignored: LeftOut = field(default_factory=LeftOut)  # what is no picture of this layout, by kind or reason
    promises: list[Promise] = field(default_factory=list)
    promised_classes: int = 0  # 0: none promised
    name: str = ""  # of the layout, as --layout takes it
    notes: list[str] = field(default_factory=list)  # what the user should know, and did allow
    evaluation_of: Manifest | None = None  # of the classes and the statistics; all images are then of "val"
