"""What a layout finds in RAW: its images and classes, what it left out, and what it promises."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import SourceError, storage
from pipeline.manifest import ClassRecord
from pipeline.offline.table import RawImage, RawTable
from pipeline.storage import Location

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
NAMES_KEPT = 5  # of each reason; the rest is counted
REASONS_KEPT = 40  # a hostile folder can have a new extension for every file

__all__ = ["Entry", "Folder", "LeftOut", "Promise", "RawImage", "SourceError", "Sources", "pictures", "ranked"]

Entry = tuple[str, str, int, int]  # a picture: path below RAW, file, offset, size


class LeftOut(dict[str, int]):
    """How much was left out, by reason, with the first names of each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self.add_many(reason, [shown(name)], 1)

    def add_many(self, reason: str, names: list[str], count: int) -> None:
        if reason not in self and len(self) >= REASONS_KEPT:
            reason = "something else"
        self[reason] = self.get(reason, 0) + count
        kept = self.names.setdefault(reason, [])
        kept += names[: NAMES_KEPT - len(kept)]

    def add_kinds(self, names: Iterable[str], kind: str = "", below: str = "") -> None:
        """What is of no use to a layout, by its kind: the extension, where no other is given."""
        for name in names:
            self.add(kind or kind_of(name), f"{below}/{name}" if below else name)

    def merge(self, other: "LeftOut") -> None:
        for reason, count in other.items():
            self.add_many(reason, other.names[reason], count)

    def lines(self) -> list[str]:
        """`12 × .txt: a.txt, b.txt, c.txt, d.txt, e.txt and 7 more`, one line a reason."""
        found = []
        for reason, count in sorted(self.items()):
            names = self.names[reason]
            more = f" and {count - len(names):,} more" if count > len(names) else ""
            found.append(f"{count:,} × {reason}: {', '.join(names)}{more}")
        return found


@dataclass(frozen=True)
class Promise:
    """How many images a split must have. `by` says who says so: "the devkit promises"."""

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
    """What lies in a folder, hidden entries apart. Links count as what they lead to."""

    path: Location
    files: tuple[str, ...]
    folders: tuple[str, ...]
    others: tuple[str, ...] = ()  # links to nothing, pipes, devices

    @classmethod
    def of(cls, path: Location) -> "Folder":
        seen = [entry for entry in storage.scan(path) if not entry.name.startswith(".")]
        files = tuple(entry.name for entry in seen if entry.is_file)
        folders = tuple(entry.name for entry in seen if entry.is_dir)
        return cls(path, files, folders, tuple(e.name for e in seen if not (e.is_file or e.is_dir)))

    @property
    def tars(self) -> list[str]:
        return [name for name in self.files if name.lower().endswith(".tar")]

    def misfit(self, layout: str, missing: str) -> SourceError:
        return SourceError(f"{self.path}: not the layout {layout}: {missing}")

    def ignore(self, left_out: LeftOut, used: Iterable[str]) -> None:
        """Count and name what lies beside the parts of a layout, so that the user is told of it."""
        parts = set(used)
        left_out.add_kinds(name for name in self.files if name not in parts)
        left_out.add_kinds((name for name in self.folders if name not in parts), "folder")
        left_out.add_kinds(self.others, "link to nothing, pipe or device")


def pictures(folder: Location, below: str, left_out: LeftOut) -> Iterator[Entry]:
    """Each picture in `folder` and its folders; `folder` is `below` in RAW.

    Links to folders are followed, each folder once, and never back to where they came from.
    """
    return (_remote_pictures if storage.is_remote(folder) else _local_pictures)(folder, below, left_out)


def _remote_pictures(folder: Location, below: str, left_out: LeftOut) -> Iterator[Entry]:
    for inside, entries in storage.walk(folder):
        for entry in entries:
            place = f"{inside}/{entry.name}" if inside else entry.name
            path = f"{below}/{place}" if below else place
            if entry.is_file and is_picture(entry.name):
                yield path, f"{folder}/{place}", 0, entry.size
            elif entry.is_file:
                left_out.add(kind_of(entry.name), path)


def _local_pictures(folder: Location, below: str, left_out: LeftOut) -> Iterator[Entry]:
    seen: set[tuple[int, int]] = set()
    stack = [(str(folder), below)]
    while stack:
        directory, prefix = stack.pop()
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            left_out.add("second link to one folder", prefix)
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        for entry in inside:
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir():
                if entry.is_symlink() and _leads_back(entry.path, directory):
                    left_out.add("link that leads back", path)
                elif not entry.name.startswith("."):
                    stack.append((entry.path, path))
            elif not is_picture(entry.name):
                left_out.add(kind_of(entry.name), path)
            elif not entry.is_file():
                left_out.add("link to nothing, pipe or device", path)
            else:
                yield path, entry.path, 0, entry.stat().st_size


def ranked(wnids: Iterable[str], words: Mapping[str, str], ids: Mapping[str, int]) -> tuple[ClassRecord, ...]:
    """The classes in the order of their labels: the rank of the wnid in sorted order."""
    return tuple(
        ClassRecord(label, wnid, words.get(wnid, wnid), ids.get(wnid)) for label, wnid in enumerate(sorted(set(wnids)))
    )


def is_picture(name: str) -> bool:
    """Whether a path names a picture: by its extension, and not hidden (macOS leaves ._NAME beside NAME)."""
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def kind_of(name: str) -> str:
    return shown(Path(name).suffix[:20] or name.rpartition("/")[2][:20])


def shown(name: str) -> str:
    """A name fit to be printed: no control characters, at most 120 characters."""
    plain = name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= 120 else plain[:117] + "..."


def _leads_back(link: str, directory: str) -> bool:
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(directory)]) == target
