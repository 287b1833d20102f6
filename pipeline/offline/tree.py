"""Folders and archives with pictures in them: what counts as a picture, what as litter, and the walk through both."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.archives import ListingCache
from pipeline.cli import printable
from pipeline.offline.raw import LeftOut, RawImage
from pipeline.storage import Entry, Location
from pipeline.volumes import is_junk

SUFFIXES = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
UNREAD = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".pnm", ".svg", ".psd", ".raw", ".dng")  # pictures
NO_FILE = "link to nothing, pipe or device"


def junk(name: str) -> str:
    """Return the kind of junk or hidden entry that a file or folder of this name is; "" for none."""
    if name.startswith(("._", ".Trash")):
        return "._*" if name.startswith("._") else ".Trash*"
    return name if is_junk(name) else "hidden entry" if name.startswith(".") else ""


@dataclass(frozen=True)
class Folder:
    """The content of a folder, junk and hidden entries apart. Links count as what they lead to."""

    path: Location
    files: tuple[str, ...]
    folders: tuple[str, ...]
    others: tuple[str, ...] = ()  # links to nothing, pipes, devices
    junk: tuple[str, ...] = ()
    alone: bool = False  # RAW is one file: the others of its series are not meant

    @classmethod
    def of(cls, path: Location) -> "Folder":
        every = storage.scan(path)
        entries = [entry for entry in every if not junk(entry.name)]
        files = tuple(entry.name for entry in entries if entry.is_file)
        folders = tuple(entry.name for entry in entries if entry.is_dir)
        others = tuple(entry.name for entry in entries if not (entry.is_file or entry.is_dir))
        return cls(path, files, folders, others, tuple(entry.name for entry in every if junk(entry.name)))

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
        beside += [(NO_FILE, name) for name in self.others] + [(junk(name), name) for name in self.junk]
        for kind, name in beside:
            if name not in inside:
                left_out.add(kind, name)


def pictures(
    folder: Location, below: str, left_out: LeftOut, split: str = "train", used: str = ""
) -> Iterator[RawImage]:
    """Yield each picture in `folder` and its folders, without a label; `folder` is `below` in RAW.

    The file `used`, a path below RAW, is not counted as left out.
    """
    for directory, prefix, entries in walk(folder, below, left_out):
        if used.startswith(prefix):
            entries = [entry for entry in entries if f"{prefix}/{entry.name}".strip("/") != used]
        yield from pictures_among(entries, directory, prefix, left_out, split)


def pictures_among(
    entries: Iterable[Entry], directory: str, prefix: str, left_out: LeftOut, split: str
) -> Iterator[RawImage]:
    """Yield the pictures among the entries of a folder, `prefix` below RAW; count its other files."""
    for entry in entries:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_file and is_picture(entry.name):
            yield RawImage(split, path, None, f"{directory}/{entry.name}", 0, entry.size)
        elif entry.is_file and entry.name.lower().endswith(UNREAD):
            left_out.lose(kind_of(entry.name), path)
        elif not entry.is_dir:
            (left_out.lose if is_picture(entry.name) else left_out.add)(
                NO_FILE if not entry.is_file else kind_of(entry.name), path
            )


def part_pictures(
    folder: Folder,
    name: str,
    path: str,
    listings: ListingCache,
    left_out: LeftOut,
    split: str = "train",
    used: str = "",
) -> Iterator[RawImage]:
    """Yield every picture of the archive or folder `name`, `path` below RAW, without a label; see `pictures`."""
    if name not in folder.files:
        yield from pictures(folder.path / name, path, left_out, split, used)
        return
    for member, offset, size, _ in listings.members(folder.path / name, left_out.add):
        if kind := next(filter(None, map(junk, member.split("/"))), ""):
            left_out.add(kind, f"{path}/{member}")
        elif is_picture(member):
            yield RawImage(split, f"{path}/{member}", None, str(folder.path / name), offset, size)
        else:
            left_out.add(kind_of(member), f"{path}/{member}")


def has_pictures(folder: Location) -> bool:
    return next(pictures(folder, "", LeftOut()), None) is not None


def walk(folder: Location, below: str, left_out: LeftOut) -> Iterator[tuple[str, str, list[Entry]]]:
    """Yield `folder` and each folder in it: its path, its path below RAW, and its entries; count junk and pass it by.

    Links to folders are followed, each folder once, and never back to where they came from.
    """

    def sound(entries: list[Entry], prefix: str) -> list[Entry]:
        for entry in entries:
            if kind := junk(entry.name):
                left_out.add(kind, f"{prefix}/{entry.name}".strip("/"))
        return [entry for entry in entries if not junk(entry.name)]

    if storage.is_remote(folder):
        for inside, entries in storage.walk(folder):
            prefix = f"{below}/{inside}".strip("/")
            yield f"{folder}/{inside}".rstrip("/"), prefix, sound(entries, prefix)
        return
    seen: set[str] = set()
    stack = [(str(folder), below)]
    while stack:
        directory, prefix = stack.pop()
        real = os.path.realpath(directory)
        if real in seen:
            left_out.add("second link to one folder", prefix)
            yield directory, prefix, []  # a class folder must not be gone without a word
            continue
        seen.add(real)
        entries = sound(storage.scan(Path(directory)), prefix)
        yield directory, prefix, entries
        for name in [entry.name for entry in entries if entry.is_dir]:
            link, path = os.path.join(directory, name), f"{prefix}/{name}".strip("/")
            target = os.path.realpath(link)
            if os.path.commonpath([target, real]) == target:
                left_out.add("link that leads back", path)
            else:
                stack.append((link, path))


def is_picture(name: str) -> bool:
    """Return whether a path names a picture: by its extension, and not hidden (macOS leaves ._NAME beside NAME)."""
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def kind_of(name: str) -> str:
    return printable(Path(name).suffix[:20]) or "without extension"
