"""The pictures in a tar, read in order with one in memory at a time; nothing is unpacked to a path.

The standard library reads the headers, from a file object that gives it no more than those.
"""

import io
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, cast

from pipeline import UserError, manifest, storage
from pipeline.manifest import BuildRecipe
from pipeline.storage import Location, Read, StorageError
from trainer.raw.raws import Failure, LeftOut, Raw, no_picture, unreadable, useless

BLOCK = 512  # bytes
MAX_EXTENDED = 2**20  # bytes of an extended header; a real one has some hundred
_PARSER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)  # of what stands in bad headers


def tarred(tar: Location, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """The members that should be pictures; and why there are no more, where the tar is damaged. `left_out` as in
    `places.pictures`.

    Raises:
        StorageError: the object store fails.
    """
    stored = is_shard(tar)
    try:
        with storage.opened(tar) as (read, _):
            yield from _members(read, str(tar), stored, rules, left_out)
    except StorageError:
        raise
    except OSError as error:
        yield unreadable(tar, error)
    except _PARSER_ERRORS as error:
        yield Failure(
            str(tar), "bad_tar", f"not a whole, plain tar ({error}); unpack it if it is compressed, else fetch it again"
        )


def _members(read: Read, tar: str, stored: bool, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """Raises tarfile.TarError where the tar is none, damaged or cut short; and whatever tarfile raises."""
    archive = tarfile.TarFile(fileobj=cast(IO[bytes], _Headers(read)))
    before = 0
    while (member := archive.next()) is not None:
        if archive.offset <= before:
            raise tarfile.ReadError(f"a member of {member.size:,} bytes before byte {before:,}")
        before = archive.offset
        archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
        name = f"{tar}/{member.name}"
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            left_out.kinds["link, device or sparse file in a tar"] += 1
        elif kind := no_picture(member.name):
            left_out.kinds[kind] += 1
        elif member.size > rules.max_bytes:  # it is not even read
            yield useless(name, "too_many_bytes")
        else:  # read now: other threads would leap about in the tar
            yield Raw(name, member.size, partial(bytes, _whole(read, member)), stored)
    end = read(BLOCK, archive.offset)
    if len(end) < BLOCK or end.strip(b"\0"):
        raise tarfile.ReadError(f"damaged or cut short at byte {archive.offset:,}")


def _whole(read: Read, member: tarfile.TarInfo) -> bytes:
    data = read(member.size, member.offset_data)
    if len(data) < member.size:
        raise tarfile.ReadError(f"cut short inside {member.name!a}")
    return data


class _Headers(io.RawIOBase):
    """A tar, to read its headers only: what claims to be a longer one is refused."""

    def __init__(self, read: Read) -> None:
        self._read, self._at = read, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_EXTENDED or self._at < 0:
            raise tarfile.ReadError(f"a header claims {size:,} bytes at byte {self._at:,}")
        data = self._read(size, self._at)
        self._at += len(data)
        return data


def is_shard(tar: Location) -> bool:
    """Whether the manifest of a dataset directory lists a tar: then the builder has rescaled its pictures already.

    Where a picture comes from decides, not how it looks. For a raw picture may well be a JPEG of size × size, and the
    builder would encode that again.
    """
    place = tar.resolve() if isinstance(tar, Path) else tar
    root = place.parent.parent
    try:
        found = manifest.parse(storage.read_bytes(root / manifest.FILE_NAME), root)
    except (OSError, UserError):  # none, or not one of ours: then it vouches for nothing
        return False
    names = {shard.name for split in found.splits.values() for shard in split.shards}
    return f"{place.parent.name}/{place.name}" in names
