"""Listings of archives, remembered beside the output: the headers of an archive are read once, not once a run."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from pipeline import storage
from pipeline.files import HashingFile, write_aside
from pipeline.manifest import FILE_NAME
from pipeline.offline.archives import Member, members
from pipeline.offline.raw import LeftOut
from pipeline.storage import Location

SCANS_FILE = "scans"
FORMAT = 2
DIGEST_BYTES = 32  # SHA-256 of everything before it ends the file

Key = tuple[str, int, str, bool]  # absolute path or URL, bytes, `storage.stamp`, whether tars inside were listed too


@dataclass
class Listing:
    """The regular files of one archive, 16 bytes and the name each; those of a tar inside as TAR/NAME."""

    names: bytearray = field(default_factory=bytearray)  # each ends with a zero byte
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    sizes: "array[int]" = field(default_factory=lambda: array("Q"))
    left_out: LeftOut = field(default_factory=LeftOut)

    def add(self, name: str, offset: int, size: int) -> None:
        self.names += name.encode("utf-8", "surrogateescape") + b"\0"
        self.offsets.append(offset)
        self.sizes.append(size)

    def extend(self, other: "Listing") -> None:
        self.names += other.names
        self.offsets.extend(other.offsets)
        self.sizes.extend(other.sizes)
        self.left_out.merge(other.left_out)

    def __iter__(self) -> Iterator[Member]:
        start = 0
        for offset, size in zip(self.offsets, self.sizes):
            stop = self.names.index(0, start)
            yield self.names[start:stop].decode("utf-8", "surrogateescape"), offset, size
            start = stop + 1


def scan(archive: Location, nested: bool) -> Listing:
    """Read the headers of an archive and, if `nested`, of the tars in it. Raises SourceError where it is damaged."""
    outer = Listing()
    with storage.opened(archive) as (read, size):
        for member in members(read, 0, size, str(archive), outer.left_out):
            outer.add(*member)
    if not nested:
        return outer
    listing = Listing()
    listing.left_out.merge(outer.left_out)
    threads = 16 if storage.is_remote(archive) else 1  # a tar on disk is read in one direction
    inner = storage.read_ahead(outer, lambda member: _scan_inner(archive, member), threads=threads)
    with closing(inner):
        for member, found in inner:
            if found is None:
                listing.add(*member)
            else:
                listing.extend(found)
    return listing


def _scan_inner(archive: Location, member: Member) -> Listing | None:
    """The listing of a tar inside; None for a member that is none."""
    tar, offset, length = member
    if not tar.endswith(".tar"):
        return None
    listing = Listing()
    with storage.opened(archive) as (read, _):
        for name, start, size in members(read, offset, offset + length, f"{archive}/{tar}", listing.left_out):
            listing.add(f"{tar}/{name}", start, size)
    return listing


class Scans:
    """Listings by archive. What an earlier run left in `folder` is used where path, size and mtime are the same."""

    def __init__(self, folder: Location | None) -> None:
        self._path = folder / SCANS_FILE if folder else None
        self._known = _load(self._path) if self._path else {}
        self._used: dict[Key, Listing] = {}

    def listing(self, archive: Location, nested: bool = False) -> Listing:
        """The listing of an archive, from memory or by a scan. Raises SourceError where the archive is damaged."""
        place = str(archive) if storage.is_remote(archive) else os.path.abspath(archive)
        key = (place, *storage.stamp(archive), nested)
        if key not in self._used:
            self._used[key] = self._known[key] if key in self._known else scan(archive, nested)
        return self._used[key]

    def save(self) -> None:
        """Remember the listings of this run, unless all were known or DATASET is no place to begin a build in."""
        if not self._path or self._used.keys() <= self._known.keys() or not _may_begin(self._path.parent):
            return
        write_aside(self._path, self._write)

    def _write(self, file: HashingFile) -> None:
        """One line of JSON; offsets, sizes and names of each archive; the SHA-256 of all that."""
        index = []
        for key, listing in self._used.items():
            left_out = [[reason, count, listing.left_out.names[reason]] for reason, count in listing.left_out.items()]
            index.append([key, len(listing.offsets), len(listing.names), left_out])
        file.write(json.dumps({"format": FORMAT, "index": index}).encode() + b"\n")
        for listing in self._used.values():
            for block in (listing.offsets, listing.sizes, listing.names):
                file.write(bytes(block))
        file.write(bytes.fromhex(file.sha256()))


def _may_begin(folder: Location) -> bool:
    """Whether DATASET/.build may be written: it is there, or DATASET is absent or empty, and not finished."""
    root = folder.parent
    if storage.is_dir(folder):
        return not storage.exists(root / FILE_NAME)
    return not storage.exists(root) or (storage.is_dir(root) and not storage.scan(root))


def _load(path: Location) -> dict[Key, Listing]:
    """What an earlier run remembered; nothing where the file is missing, damaged or of another format."""
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    body = memoryview(data)[:-DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        return {}
    head, at = json.loads(data[: data.index(b"\n")]), data.index(b"\n") + 1
    if head["format"] != FORMAT:
        return {}
    known: dict[Key, Listing] = {}
    for (archive, size, mtime, nested), count, name_bytes, left_out in head["index"]:
        listing = Listing()
        listing.offsets.frombytes(body[at : at + 8 * count])
        listing.sizes.frombytes(body[at + 8 * count : at + 16 * count])
        at += 16 * count + name_bytes
        listing.names += body[at - name_bytes : at]
        for reason, times, names in left_out:
            listing.left_out.add_many(reason, names, times)
        known[archive, size, mtime, nested] = listing
    return known
