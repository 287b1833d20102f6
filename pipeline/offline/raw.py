"""Raw images, the table of them, and the folders and archives that a layout finds them in."""

import copy
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline import SourceError, storage
from pipeline.archives import ListingCache
from pipeline.cli import printable
from pipeline.manifest import ClassRecord
from pipeline.storage import Entry, Location

SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
NAMES_KEPT = 5  # of each reason; the rest is counted
REASONS_KEPT = 40  # a hostile folder can have a new extension for every file
NO_FILE = "link to nothing, pipe or device"


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
        self.wnids: list[str] = []
        self._class_of: dict[str | None, int] = {None: -1}
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
        self.class_numbers.append(-1 if wnid is None else _index(self._class_of, self.wnids, wnid))
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
        self._class_of = {None: -1} | {wnid: number for number, wnid in enumerate(self.wnids)}
        renumbered = np.array([self._class_of[name] for name in names] + [-1], np.int32)  # the last: no label
        classes = np.asarray(self.class_numbers)
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
    images: RawTable = field(default_factory=RawTable)
    classes: tuple[ClassRecord, ...] = ()
    ignored: LeftOut = field(default_factory=LeftOut)  # what is no picture of this layout, by kind or reason
    promises: list[Promise] = field(default_factory=list)
    promised_classes: int = 0  # 0: none promised
    name: str = ""  # of the layout, as --layout takes it
    notes: list[str] = field(default_factory=list)  # what the user should know, and did allow


@dataclass(frozen=True)
class Folder:
    """The content of a folder, hidden entries apart. Links count as what they lead to."""

    path: Location
    files: tuple[str, ...]
    folders: tuple[str, ...]
    others: tuple[str, ...] = ()  # links to nothing, pipes, devices

    @classmethod
    def of(cls, path: Location) -> "Folder":
        entries = [entry for entry in storage.scan(path) if not entry.name.startswith(".")]
        files = tuple(entry.name for entry in entries if entry.is_file)
        folders = tuple(entry.name for entry in entries if entry.is_dir)
        return cls(path, files, folders, tuple(e.name for e in entries if not (e.is_file or e.is_dir)))

    def ending(self, suffix: str) -> list[str]:
        """Return the names of the files with this suffix, in small letters or capitals."""
        return [name for name in self.files if name.lower().endswith(suffix)]

    def ignore(self, left_out: LeftOut, used: Iterable[str]) -> None:
        """Count and name what lies beside the files and folders `used`, paths below this folder."""
        inside: dict[str, list[str]] = {}
        for path in used:
            name, slash, rest = path.partition("/")
            inside.setdefault(name, []).extend([rest] if slash else [])
        for name, parts in inside.items():
            if parts:
                Folder.of(self.path / name).ignore(left_out, parts)
        beside = [(kind_of(name), name) for name in self.files] + [("folder", name) for name in self.folders]
        for kind, name in beside + [(NO_FILE, name) for name in self.others]:
            if name not in inside:
                left_out.add(kind, name)


def pictures(folder: Location, below: str, left_out: LeftOut, split: str = "train") -> Iterator[RawImage]:
    """Yield each picture in `folder` and its folders, without a label; `folder` is `below` in RAW."""
    for directory, prefix, entries in _folders(folder, below, left_out):
        for entry in entries:
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            if is_picture(entry.name) and entry.is_file:
                yield RawImage(split, path, None, f"{directory}/{entry.name}", 0, entry.size)
            elif not entry.is_dir:
                left_out.add(NO_FILE if is_picture(entry.name) else kind_of(entry.name), path)


def part_pictures(
    folder: Folder, name: str, path: str, listings: ListingCache, left_out: LeftOut, split: str = "train"
) -> Iterator[RawImage]:
    """Yield every picture of the archive or folder `name`, which is `path` below RAW, without a label."""
    if name not in folder.files:
        yield from pictures(folder.path / name, path, left_out, split)
        return
    for member, offset, size, _ in listings.members(folder.path / name, left_out.add):
        if is_picture(member):
            yield RawImage(split, f"{path}/{member}", None, str(folder.path / name), offset, size)
        else:
            left_out.add(kind_of(member), f"{path}/{member}")


def has_pictures(folder: Location) -> bool:
    return next(pictures(folder, "", LeftOut()), None) is not None


def _folders(folder: Location, below: str, left_out: LeftOut) -> Iterator[tuple[str, str, list[Entry]]]:
    """Yield `folder` and each folder in it, unless hidden: its path, its path below RAW, and its entries.

    Links to folders are followed, each folder once, and never back to where they came from.
    """
    if storage.is_remote(folder):
        for inside, entries in storage.walk(folder):
            yield f"{folder}/{inside}".rstrip("/"), f"{below}/{inside}".strip("/"), entries
        return
    seen: set[str] = set()
    stack = [(str(folder), below)]
    while stack:
        directory, prefix = stack.pop()
        real = os.path.realpath(directory)
        if real in seen:
            left_out.add("second link to one folder", prefix)
            continue
        seen.add(real)
        entries = storage.scan(Path(directory))
        yield directory, prefix, entries
        for name in [entry.name for entry in entries if entry.is_dir and not entry.name.startswith(".")]:
            link, path = os.path.join(directory, name), f"{prefix}/{name}".strip("/")
            target = os.path.realpath(link)
            if os.path.commonpath([target, real]) == target:
                left_out.add("link that leads back", path)
            else:
                stack.append((link, path))


def ranked(wnids: Iterable[str], words: Mapping[str, str], ids: Mapping[str, int]) -> tuple[ClassRecord, ...]:
    """Return the classes in the order of their labels: the rank of the wnid in sorted order."""
    names = enumerate(sorted(set(wnids)))
    return tuple(ClassRecord(label, wnid, words.get(wnid, wnid), ids.get(wnid)) for label, wnid in names)


def is_picture(name: str) -> bool:
    """Return whether a path names a picture: by its extension, and not hidden (macOS leaves ._NAME beside NAME)."""
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def kind_of(name: str) -> str:
    return printable(Path(name).suffix[:20] or name.rpartition("/")[2][:20])
