"""Where RAW and DATASET may lie: a local folder, or an object store that fsspec knows (`s3://bucket/folder`).

A location is a `pathlib.Path`, or a remote `upath.UPath`. Both are put together with `/` and named with `.name` and
`str()`. To read, list, write and delete, use the functions below: locally they do what the operating system does;
remotely they try again what fails for a moment, and tell in one line of what fails for good.

Who we are and where the store is, the environment says, as to every program that uses AWS's library: AWS_PROFILE, or
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_DEFAULT_REGION; AWS_ENDPOINT_URL for a store that is not Amazon's. Any
other option of s3fs is FSSPEC_S3_<OPTION>, as FSSPEC_S3_ANON=true for a public bucket.
"""

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from pipeline import UserError
from pipeline.storage import objects
from pipeline.storage.objects import Entry
from pipeline.storage.readahead import read_ahead
from pipeline.storage.retries import StorageError

Location: TypeAlias = Path  # or a upath.UPath, which has the same methods and need not be installed

PIECE = 16 * 2**20  # bytes of one request for a whole file
FIRST_WINDOW, LAST_WINDOW = 128 * 2**10, 4 * 2**20  # bytes that `opened` fetches at once

Read = Callable[[int, int], bytes]  # (size, offset) → `size` bytes, fewer only where the file ends


def location(text: "str | os.PathLike[str] | Location") -> Location:
    """A path, or a URL as "s3://bucket/folder", as a location. "file:///folder" is a local path.

    Raises:
        UserError: a URL of an unknown kind, without a bucket, or whose package is not installed.
    """
    if not isinstance(text, (str, os.PathLike)):
        return text
    protocol = objects.protocol_of(text)
    if not protocol:
        return Path(text)
    url = urlsplit(str(text))
    if protocol == "file":
        if url.netloc not in ("", "localhost"):
            raise UserError(f"{text}: names another machine; a local URL is file:///FOLDER")
        return Path(unquote(url.path))
    if "::" in str(text):
        raise UserError(f"{text}: '::' joins two file systems in fsspec; name the store itself")
    if protocol in ("s3", "s3a") and not url.netloc:
        raise UserError(f"{text}: names no bucket; a location is s3://BUCKET/FOLDER")
    objects.filesystem(protocol)  # raises where it is unknown
    from upath import UPath

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a file system is "not explicitly implemented" in upath
        return UPath(text, **objects.options(protocol))


def is_remote(place: "str | os.PathLike[str] | Location") -> bool:
    if isinstance(place, str):
        return objects.protocol_of(place) not in ("", "file")
    return not isinstance(place, os.PathLike)


def exists(place: Location) -> bool:
    return place.exists() if isinstance(place, Path) else bool(objects.info(str(place)))


def is_dir(place: Location) -> bool:
    return place.is_dir() if isinstance(place, Path) else objects.info(str(place)).get("type") == "directory"


def is_file(place: Location) -> bool:
    return place.is_file() if isinstance(place, Path) else objects.info(str(place)).get("type") == "file"


def stamp(place: Location) -> tuple[int, str]:
    """A file's bytes, and words that change when it does: when it was changed last, or its ETag.

    Raises:
        FileNotFoundError: also for a remote folder.
        StorageError.
    """
    if isinstance(place, Path):
        status = place.stat()
        return status.st_size, str(status.st_mtime_ns)
    info = objects.info(str(place))
    if info.get("type") != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))
    return int(info["size"]), next((str(info[key]) for key in ("ETag", "etag", "mtime", "created") if key in info), "")


def scan(folder: Location) -> list[Entry]:
    """What a folder holds, sorted by the bytes of the names. Remotely one listing.

    Raises:
        FileNotFoundError, NotADirectoryError, StorageError.
    """
    if isinstance(folder, Path):
        with os.scandir(folder) as inside:
            found = [Entry(e.name, e.is_file(), e.is_dir(), e.stat().st_size if e.is_file() else 0) for e in inside]
    else:
        found = objects.listed(str(folder))
    return sorted(found, key=lambda entry: (os.fsencode(entry.name), entry.is_dir))


def walk(folder: Location) -> Iterator[tuple[str, list[Entry]]]:
    """Each folder's path below a remote `folder` ("" for itself) and what it holds, level by level; not hidden folders.

    Many folders are listed at a time: with 1,000 classes that is seconds, not minutes.

    Raises:
        FileNotFoundError, NotADirectoryError, StorageError.
    """
    level = [""]
    while level:
        deeper = []
        for below, entries in read_ahead(level, lambda below: scan(folder / below if below else folder)):
            yield below, entries
            names = [entry.name for entry in entries if entry.is_dir and not entry.name.startswith(".")]
            deeper += [f"{below}/{name}" if below else name for name in names]
        level = deeper


def sizes(root: Location, names: Iterable[str]) -> dict[str, int]:
    """The bytes of those of the files `names` (paths below `root`) that are there. Remotely one listing."""
    if isinstance(root, Path):
        return {name: (root / name).stat().st_size for name in names if (root / name).is_file()}
    found = objects.below(str(root))
    return {name: found[name] for name in names if name in found}


@contextmanager
def opened(place: Location) -> Iterator[tuple[Read, int]]:
    """Positioned reads of a file, for one thread, and its bytes. Remote reads fetch ahead: see `_Window`."""
    if isinstance(place, Path):
        with open(place, "rb") as file:
            number = file.fileno()
            yield lambda size, at: os.pread(number, size, at), os.fstat(number).st_size
    else:
        total, _ = stamp(place)
        yield _Window(str(place), total).read, total


def read_range(file: str, offset: int, size: int) -> bytes:
    """`size` bytes of a local file or a URL from `offset`; fewer only where the file ends. Threads may call it.

    Raises:
        FileNotFoundError; locally any OSError.
        StorageError: the store fails, or its answers stay too short.
    """
    if objects.protocol_of(file):
        return objects.read_range(file, offset, size)
    with open(file, "rb") as local:
        try:
            return os.pread(local.fileno(), size, offset)
        except OSError as error:
            error.filename = file  # os.pread knows a number alone
            raise


def read_bytes(place: Location) -> bytes:
    """A whole file. Raises as `read_range`."""
    if isinstance(place, Path):
        return place.read_bytes()
    total, _ = stamp(place)
    starts = range(0, total, PIECE)
    data = b"".join(piece for _, piece in read_ahead(starts, lambda at: read_range(str(place), at, PIECE), threads=4))
    if len(data) != total:
        raise StorageError(f"{place}: changed while it was read; run the same command again")
    return data


def put_if_absent(place: Location, data: bytes) -> bytes:
    """Put `data` at a remote location unless something is there; of many who try at once, one does.

    Returns:
        What is there now: `data`, or what another put there.
    Raises:
        StorageError.
    """
    return data if objects.put_if_absent(str(place), data) else read_bytes(place)


def remove(place: Location) -> None:
    """Delete a file, if it is there."""
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
    else:
        objects.remove(str(place))


def remove_tree(folder: Location) -> None:
    """Delete a folder and all that is in it, if it is there."""
    if not isinstance(folder, Path):
        objects.remove_tree(str(folder))
    elif folder.exists():
        shutil.rmtree(folder)


class _Window:
    """Positioned reads of a remote file through one block, fetched ahead.

    The headers of a tar of ImageNet's images lie 110 kB apart. A request for each takes some 20 ms and 1 ms of CPU; a
    block of 4 MiB brings 38 of them. So the block doubles while reads follow each other closely, and falls back to its
    first size where they leap, as over the tars inside a tar.
    """

    def __init__(self, file: str, total: int) -> None:
        self._file, self._total = file, total
        self._start, self._block, self._ahead = 0, b"", FIRST_WINDOW

    def read(self, size: int, at: int) -> bytes:
        size = min(size, self._total - at)
        if size <= 0:
            return b""
        end = self._start + len(self._block)
        if at < self._start or at + size > end:
            near = self._start <= at <= end + len(self._block)
            self._ahead = min(2 * self._ahead, LAST_WINDOW) if near else FIRST_WINDOW
            self._block = read_range(self._file, at, min(max(size, self._ahead), self._total - at))
            self._start = at
        return self._block[at - self._start : at - self._start + size]
