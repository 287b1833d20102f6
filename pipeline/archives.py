"""Tar archives by their headers: members and where their data lie, and a cache of such listings."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO, NamedTuple, cast

from pipeline import LFS_POINTER, SourceError, storage
from pipeline.files import TAR_BLOCK, HashingFile, content, write_aside
from pipeline.storage import Location, Read

MAX_HEADERS = 2**16  # bytes of all headers of one member; real ones have some hundred
MAX_NAME = 4096  # characters, as PATH_MAX
PARSER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)  # of what stands in bad headers
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

# reasons why a member is left out
FOLDER, LINK, DEVICE = "folder in an archive", "link in an archive", "device or pipe in an archive"
KINDS = {tarfile.DIRTYPE: FOLDER, tarfile.LNKTYPE: LINK, tarfile.SYMTYPE: LINK}
KINDS |= {tarfile.CHRTYPE: DEVICE, tarfile.BLKTYPE: DEVICE, tarfile.FIFOTYPE: DEVICE}
UNSAFE_NAME = "absolute, dotted or overlong name in an archive"
SECOND_OF_NAME = "second member of one name in an archive"
DATA_AFTER_END = "data after the end of an archive"
NO_END = "archive without an end mark, perhaps cut short"

CACHE_FILE, FORMAT = "listings", 5
RECORD = re.compile(rb"(?P<offset>\d+) (?P<size>\d+) (?P<reason>[^\t]*)\t(?P<name>[^\0]*)\0")  # of a member
DIGEST_BYTES = 32  # SHA-256 of everything before it ends the file


class Member(NamedTuple):
    """A member of an archive: a regular file with a name of its own, unless `reason` says why it is none.

    A hard link to an earlier one is a regular file, too: it has the bytes of that.
    """

    name: str  # as a plain relative path; with a reason: as it stands in the header, "" for the archive itself
    offset: int  # of the data in the file
    size: int  # bytes
    reason: str = ""


def members(read: Read, start: int, end: int, archive: str) -> Iterator[Member]:
    """Yield the members of the tar at [start, end) in order. `archive` is its name in messages.

    Raises SourceError: a header that is damaged, or claims more bytes than there are.
    """
    if start == end:
        raise SourceError(f"{archive}: empty, not even an archive's end; fetch it again")
    head = read(min(len(LFS_POINTER), end - start), start)
    require_content(archive, head)
    if head.startswith(COMPRESSED):
        raise SourceError(f"{archive}: is compressed, so that no image can be found alone; unpack it to a plain tar")
    headers = _Headers(read, end)
    # A TarFile for reading would read a header here, and would not say later why one is damaged. Nothing is written.
    tar = tarfile.TarFile(fileobj=cast(IO[bytes], headers), mode="w", encoding="utf-8", errors="surrogateescape")
    extents: dict[str, tuple[int, int]] = {}  # name → offset and size of a regular member
    at = start
    while at < end:
        headers.start = headers.at = at
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
            if info.size < 0 or tar.offset <= at or not info.pax_headers.get("size", "0").isdecimal():
                raise tarfile.ReadError("a header has an invalid number")
        except PARSER_ERRORS as error:
            tail = read(min(128 * TAR_BLOCK, end - at), at)
            if tail[:TAR_BLOCK].strip(b"\0"):
                raise SourceError(f"{archive}: damaged at byte {at}: {error}; fetch it again") from error
            if tail.strip(b"\0"):
                yield Member("", at, 0, DATA_AFTER_END)
            return
        name, left, reason = _plain(info.name), end - info.offset_data, ""
        extent = (info.offset_data, info.size)
        linked = extents.get(_plain(info.linkname)) if info.islnk() else None
        if info.issparse():
            reason = "sparse file in an archive"
        elif not (info.isreg() or linked):
            reason = KINDS.get(info.type, "unknown kind of member in an archive")
        elif not linked and info.size > left:
            sizes = f"claims {info.size:,} bytes where {left:,} are left"
            raise SourceError(f"{archive}: cut short inside {info.name[:120]!r}, which {sizes}; fetch it again")
        elif not name or name in extents:
            reason = SECOND_OF_NAME if name else UNSAFE_NAME
        else:
            extent = extents[name] = linked or extent
        yield Member(info.name if reason else name, *extent, reason)
        at = tar.offset
    yield Member("", end, 0, NO_END)


def require_content(file: object, head: bytes) -> None:
    """Raise SourceError where the first bytes of a file are those of a Git LFS pointer to its content."""
    if head.startswith(LFS_POINTER):
        raise SourceError(f"{file}: a Git LFS pointer; run git lfs pull")


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


class ListingCache:
    """Listings of archives. Those that an earlier run left in `folder` hold while path, size and mtime are the same.

    A listing has a RECORD for each member. The file is a line of JSON, the listings, and the SHA-256 of all that.
    """

    def __init__(self, folder: Location | None) -> None:
        self._path = folder / CACHE_FILE if folder else None
        self._known = _load(self._path) if self._path else {}
        self._used: dict[tuple[object, ...], bytes | bytearray] = {}

    def members(self, archive: Location, leave_out: Callable[[str, str], None]) -> Iterator[Member]:
        """Yield the regular members of an archive; for a tar in it, the tar's own, named TAR/NAME.

        `leave_out` is called with the reason and the name of every other. Raises SourceError: damage.
        """
        path = str(archive) if storage.is_remote(archive) else os.path.abspath(archive)
        key = (path, *storage.stamp(archive))
        if key not in self._used:
            self._used[key] = self._known.get(key) or _listing(archive)
        for match in RECORD.finditer(self._used[key]):
            name, reason = match["name"].decode("utf-8", "surrogateescape"), match["reason"].decode()
            if reason:
                leave_out(reason, name.rstrip("/"))
            else:
                yield Member(name, int(match["offset"]), int(match["size"]))

    def save(self) -> None:
        """Write the listings of this run, unless all were known or DATASET holds what is no build of ours."""
        if self._path is None or self._used.keys() <= self._known.keys():
            return
        root = self._path.parent.parent
        if storage.is_dir(self._path.parent) or not (storage.is_file(root) or content(root)):
            write_aside(self._path, self._write)

    def _write(self, file: HashingFile) -> None:
        index = [[key, len(listing)] for key, listing in self._used.items()]
        file.write(json.dumps({"format": FORMAT, "index": index}).encode() + b"\n")
        for listing in self._used.values():
            file.write(memoryview(listing))
        file.write(bytes.fromhex(file.sha256()))


def _load(path: Location) -> dict[tuple[object, ...], bytes | bytearray]:
    """Return the listings of an earlier run; none where the file is missing, damaged or of another format."""
    data = storage.read_bytes(path) if storage.is_file(path) else b""
    if hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        return {}
    body = io.BytesIO(data)
    head = json.loads(body.readline())
    return {tuple(key): body.read(size) for key, size in head["index"]} if head["format"] == FORMAT else {}


def _listing(archive: Location) -> bytearray:
    """Return a RECORD for each member of an archive and of the tars in it. Raises SourceError where one is damaged."""

    def inside(tar: Member) -> list[Member]:
        with storage.opened(archive) as (read, _):
            return [*members(read, tar.offset, tar.offset + tar.size, f"{archive}/{tar.name}")]

    def add(member: Member, folder: str) -> None:
        record = f"{member.offset} {member.size} {member.reason}\t{folder}{member.name}\0"
        listing.extend(record.encode("utf-8", "surrogateescape"))

    listing, tars = bytearray(), []
    with storage.opened(archive) as (read, size):
        for member in members(read, 0, size, str(archive)):
            if not member.reason and member.name.endswith(".tar"):
                tars.append(member)
            else:
                add(member, f"{archive.name}/" if member.reason else "")
    threads = 16 if storage.is_remote(archive) else 1  # a tar on disk is read in one direction
    with closing(storage.read_ahead(tars, inside, threads=threads)) as ahead:
        for tar, inner in ahead:
            for member in inner:
                add(member, f"{tar.name}/")
    return listing
