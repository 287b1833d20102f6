"""Tar archives by their headers: members and where their data lie, and a cache of such listings. Nothing is unpacked.

The standard library reads the headers, from a file object that gives it no more than those.
"""

import hashlib
import json
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import IO, NamedTuple, cast

from pipeline import SourceError, storage
from pipeline.files import HashingFile, write_aside
from pipeline.manifest import FILE_NAME
from pipeline.storage import Location, Read

BLOCK = 512  # bytes
MAX_HEADERS = 2**16  # bytes of all headers of one member; real ones have some hundred
MAX_NAME = 4096  # characters, as PATH_MAX
PARSER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)  # of what stands in bad headers
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

FOLDER = "folder in an archive"
UNSAFE_NAME = "absolute, dotted or overlong name in an archive"
SECOND_OF_NAME = "second member of one name in an archive"
DATA_AFTER_END = "data after the end of an archive"
NO_END = "archive without an end mark, perhaps cut short"

CACHE_FILE = "listings"
FORMAT = 3
DIGEST_BYTES = 32  # SHA-256 of everything before it ends the file


class Member(NamedTuple):
    """A member of an archive: a regular file with a name of its own, unless `reason` says why it is none."""

    name: str  # as a plain relative path; with a reason: as it stands in the header
    offset: int  # of the data in the file
    size: int  # bytes
    reason: str = ""


def members(read: Read, start: int, end: int, archive: str) -> Iterator[Member]:
    """Yield the members of the tar at [start, end) in order. `archive` is its name in messages, and in NO_END.

    Raises:
        SourceError: a header that is damaged, or claims more bytes than there are.
    """
    if start == end:
        raise SourceError(f"{archive}: empty, not even an archive's end; fetch it again")
    if read(min(6, end - start), start).startswith(COMPRESSED):
        raise SourceError(f"{archive}: is compressed, so that no image can be found alone; unpack it to a plain tar")
    headers = _Headers(read, end)
    # A TarFile for reading would read a header here, and would not say later why one is damaged. Nothing is written.
    tar = tarfile.TarFile(fileobj=cast(IO[bytes], headers), mode="w", encoding="utf-8", errors="surrogateescape")
    names: set[str] = set()
    at = start
    while at < end:
        headers.start = headers.at = at
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
            if info.size < 0 or tar.offset <= at or not info.pax_headers.get("size", "0").isdecimal():
                raise tarfile.ReadError("a header has an invalid number")
        except PARSER_ERRORS as error:
            tail = read(min(128 * BLOCK, end - at), at)
            if tail[:BLOCK].strip(b"\0"):
                raise SourceError(f"{archive}: damaged at byte {at}: {error}; fetch it again") from error
            if tail.strip(b"\0"):
                yield Member(archive, at, 0, DATA_AFTER_END)
            return
        reason, plain, left = _kind(info), _plain(info.name), end - info.offset_data
        if not reason and info.size > left:
            raise SourceError(
                f"{archive}: cut short inside {info.name[:120]!r}, which claims {info.size:,} bytes where {left:,} are "
                "left; fetch it again"
            )
        reason = reason or (UNSAFE_NAME if not plain else SECOND_OF_NAME if plain in names else "")
        if not reason:
            names.add(plain)
        yield Member(info.name if reason else plain, info.offset_data, info.size, reason)
        at = tar.offset
    yield Member(archive, end, 0, NO_END)


def _kind(info: tarfile.TarInfo) -> str:
    """Return why a member is no regular file; empty: it is one."""
    if info.issparse():
        return "sparse file in an archive"
    if info.isreg():
        return ""
    special = "link in an archive" if info.issym() or info.islnk() else "device or pipe in an archive"
    return FOLDER if info.isdir() else special if info.type in b"12346" else "unknown kind of member in an archive"


def _plain(name: str) -> str:
    """Return a name as a plain relative path; empty where it leads out of the archive or is too long."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    safe = not name.startswith("/") and ".." not in parts and "\0" not in name and len(name) <= MAX_NAME
    return "/".join(parts) if safe else ""


class _Headers:
    """File object of a tar for one member's headers, from `start`. It refuses what would fill the memory."""

    def __init__(self, read: Read, end: int) -> None:
        self._read, self._end = read, end
        self.start = self.at = 0

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADERS - (self.at - self.start):
            raise tarfile.ReadError(f"an extended header claims {size:,} bytes, at most {MAX_HEADERS:,} may be")
        if size > self._end - self.at:
            raise tarfile.ReadError("a header is cut short")
        self.at += size
        return self._read(size, self.at - size)


@dataclass
class Listing:
    """The members of one archive, 16 bytes and the name each. Those of a tar inside are named TAR/NAME."""

    names: bytearray = field(default_factory=bytearray)  # each ends with a zero byte
    extents: "array[int]" = field(default_factory=lambda: array("Q"))  # offset and size of each
    left_out: list[list[str]] = field(default_factory=list)  # [reason, name] of each member with a reason

    @classmethod
    def read(cls, read: Read, start: int, end: int, archive: str, above: str = "") -> "Listing":
        """Read the headers of the tar at [start, end); `above` is put before its names. Raises SourceError."""
        listing = cls()
        for name, offset, size, reason in members(read, start, end, archive):
            if reason:
                inside = name if name == archive else f"{os.path.basename(archive)}/{name}"
                listing.left_out.append([reason, inside])
            else:
                listing.names += f"{above}{name}\0".encode("utf-8", "surrogateescape")
                listing.extents.extend((offset, size))
        return listing

    def extend(self, other: "Listing") -> None:
        self.names += other.names
        self.extents += other.extents
        self.left_out += other.left_out

    def __iter__(self) -> Iterator[Member]:
        for name, offset, size in zip(re.finditer(rb"[^\0]+", self.names), self.extents[::2], self.extents[1::2]):
            yield Member(name[0].decode("utf-8", "surrogateescape"), offset, size)


def list_members(archive: Location, nested: bool) -> Listing:
    """Read the headers of an archive and, if `nested`, of the tars in it. Raises SourceError where it is damaged."""
    with storage.opened(archive) as (read, size):
        outer = Listing.read(read, 0, size, str(archive))
    if not nested:
        return outer
    listing = Listing(left_out=outer.left_out)
    threads = 16 if storage.is_remote(archive) else 1  # a tar on disk is read in one direction
    with closing(storage.read_ahead(outer, partial(_list_inner, archive), threads=threads)) as inner:
        for _, found in inner:
            listing.extend(found)
    return listing


def _list_inner(archive: Location, member: Member) -> Listing:
    """Return the listing of a tar inside; of another member, that member alone."""
    if not member.name.endswith(".tar"):
        name = member.name.encode("utf-8", "surrogateescape") + b"\0"
        return Listing(bytearray(name), array("Q", (member.offset, member.size)))
    end, path = member.offset + member.size, f"{archive}/{member.name}"
    with storage.opened(archive) as (read, _):
        return Listing.read(read, member.offset, end, path, f"{member.name}/")


class ListingCache:
    """Listings by archive. Those that an earlier run left in `folder` hold while path, size and mtime are the same."""

    def __init__(self, folder: Location | None) -> None:
        self._path = folder / CACHE_FILE if folder else None
        self._known = _load(self._path) if self._path else {}
        self._used: dict[tuple[object, ...], Listing] = {}

    def listing(self, archive: Location, leave_out: Callable[[str, str], None], nested: bool = False) -> Listing:
        """Return the listing of an archive; `leave_out` is called with the reason and name of what is not in it.

        Raises:
            SourceError: the archive is damaged.
        """
        path = str(archive) if storage.is_remote(archive) else os.path.abspath(archive)
        key = (path, *storage.stamp(archive), nested)  # nested: of the tars inside too
        if key not in self._used:
            self._used[key] = self._known[key] if key in self._known else list_members(archive, nested)
        for reason, name in self._used[key].left_out:
            leave_out(reason, name)
        return self._used[key]

    def save(self) -> None:
        """Write the listings of this run, unless all were known or DATASET is no place to begin a build in."""
        if self._path and not self._used.keys() <= self._known.keys() and _may_begin(self._path.parent):
            write_aside(self._path, self._write)

    def _write(self, file: HashingFile) -> None:
        """Write a line of JSON, the extents and names of each archive, and the SHA-256 of all that."""
        index = [[key, len(x.extents), len(x.names), x.left_out] for key, x in self._used.items()]
        file.write(json.dumps({"format": FORMAT, "index": index}).encode() + b"\n")
        for listing in self._used.values():
            file.write(bytes(listing.extents))
            file.write(bytes(listing.names))
        file.write(bytes.fromhex(file.sha256()))


def _may_begin(folder: Location) -> bool:
    """Return whether DATASET/.build may be written: it is there, or DATASET is absent or empty; and no manifest is."""
    root = folder.parent
    if storage.is_dir(folder):
        return not storage.exists(root / FILE_NAME)
    return not storage.exists(root) or (storage.is_dir(root) and not storage.scan(root))


def _load(path: Location) -> dict[tuple[object, ...], Listing]:
    """Return the listings of an earlier run; none where the file is missing, damaged or of another format."""
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    body = memoryview(data)[:-DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        return {}
    head, at = json.loads(data[: data.index(b"\n")]), data.index(b"\n") + 1
    known = {}
    for key, count, name_bytes, left_out in head["index"] if head["format"] == FORMAT else ():
        middle, stop = at + 8 * count, at + 8 * count + name_bytes
        known[tuple(key)] = Listing(bytearray(body[middle:stop]), array("Q", bytes(body[at:middle])), left_out)
        at = stop
    return known
