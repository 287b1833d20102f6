"""Files of an object store, by their URLs: fsspec's calls, tried again where they fail for a moment.

Nothing here trusts an answer's length, and no file is ever seen half written: an upload appears when it is complete.
fsspec and the store's own package are imported at the first call.
"""

import errno
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import UserError
from pipeline.storage.readahead import read_ahead
from pipeline.storage.retries import StorageError, answer, retried

INSTALL = "pip install 'penstock[s3]'"
PIECE = 16 * 2**20  # bytes of one part of an upload

# One request is tried by botocore, 3 times and a second or two apart, so that one bad answer does not cost a whole
# upload; what lasts longer, `retried` tries again. s3fs's own 5 tries would multiply with both.
S3_CLIENT: dict[str, Any] = {"retries": {"mode": "standard", "total_max_attempts": 3}, "max_pool_connections": 32}
S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # other machines write there too
    "max_concurrency": 4,  # parts of an upload at a time: 64 MiB
}


class Entry(NamedTuple):
    """What a folder holds. An object store may have a file and a folder of one name: two entries."""

    name: str
    is_file: bool
    is_dir: bool
    size: int  # bytes; 0 for a folder


def protocol_of(text: object) -> str:
    """The protocol of a URL; "" for a path."""
    match = re.match(r"([a-z][a-z0-9+.-]+)://", text) if isinstance(text, str) else None
    return match[1] if match else ""


@cache
def filesystem(protocol: str) -> Any:
    """The one file system of a protocol in this process: its threads share its connections.

    Raises:
        UserError: an unknown protocol, or a package is missing.
    """
    try:
        import fsspec
        import upath  # noqa: F401 – whoever lacks one of the two lacks the other

        fs = fsspec.filesystem(protocol, **options(protocol))
    except ImportError as error:
        more = "" if protocol in ("s3", "s3a") else f", and fsspec's package for {protocol}://"
        raise UserError(f"{protocol}://: a package is missing ({error}); {INSTALL}{more}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{protocol}://: {error}; use s3://BUCKET/FOLDER or a local path") from error
    if hasattr(fs, "call_s3"):
        fs.retries = 1  # see S3_CLIENT
    return fs


def options(protocol: str) -> dict[str, Any]:
    """What we set of a file system's options. The environment may add to the S3 client's: FSSPEC_S3='{…}'."""
    if protocol not in ("s3", "s3a"):
        return {}
    from fsspec.config import conf

    return {**S3_OPTIONS, "config_kwargs": {**S3_CLIENT, **conf.get("s3", {}).get("config_kwargs", {})}}


def info(url: str) -> dict[str, Any]:
    """What the store says of a file or folder: `type`, `size` and more; {} where there is none. Raises StorageError."""
    fs, path = _store(url)
    try:
        return retried(url, "look", lambda: fs.info(path))
    except FileNotFoundError:
        return {}


def listed(url: str) -> list[Entry]:
    """What a folder holds, by one listing. Raises FileNotFoundError, NotADirectoryError, StorageError."""
    fs, path = _store(url)
    found = []
    for each in retried(url, "list", lambda: _fresh(fs, path).ls(path, detail=True)):
        kind, full = each["type"], each["name"].rstrip("/")
        if full.lstrip("/") != path.strip("/"):
            found.append(Entry(full.rpartition("/")[2], kind == "file", kind == "directory", int(each["size"] or 0)))
        elif kind == "file" and not each["name"].endswith("/"):  # else an empty object that stands for the folder
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), url)
    return found


def below(url: str) -> dict[str, int]:
    """Path below a folder → bytes, of every file there, by one listing; {} where there is none. Raises StorageError."""
    fs, path = _store(url)
    start = path.rstrip("/") + "/"
    found = retried(url, "list", lambda: _fresh(fs, path).find(path, detail=True))
    return {name[len(start) :]: int(each["size"] or 0) for name, each in found.items() if name.startswith(start)}


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; fewer only where the file ends. Raises FileNotFoundError, StorageError."""
    fs, path = _store(url)
    return retried(url, "read", lambda: _range(fs, path, offset, size)) if size > 0 else b""


def _range(fs: Any, path: str, offset: int, size: int) -> bytes:
    try:
        data = fs.cat_file(path, start=offset, end=offset + size)
    except OSError as error:
        if answer(error)[1] != 416:  # the range begins where the file ends
            raise
        data = b""
    if len(data) != size:  # a store or a proxy may end an answer early without a word
        wanted = max(0, min(size, fs.info(path)["size"] - offset))
        if len(data) != wanted:
            raise OSError(errno.EIO, f"{len(data)} bytes came of {wanted}")
    return data


def upload(source: Path, url: str) -> None:
    """Put a local file there, where it appears whole or not at all. Raises StorageError."""
    fs, path = _store(url)
    size = source.stat().st_size
    more = {"chunksize": PIECE} if hasattr(fs, "call_s3") else {}

    def put() -> None:
        fs.put_file(str(source), path, **more)
        if (arrived := fs.info(path)["size"]) != size:
            raise OSError(errno.EIO, f"{arrived} bytes arrived of {size}")

    retried(url, "write", put)


def put_if_absent(url: str, data: bytes) -> bool:
    """Put `data` there unless something is there; of many who try at once, one does. Raises StorageError.

    Returns:
        Whether nothing was there. False may also be our own doing, if the answer to a first try was lost.
    """
    fs, path = _store(url)
    try:
        retried(url, "write", lambda: fs.pipe_file(path, data, mode="create"))
    except FileExistsError:
        return False
    return True


def remove(url: str) -> None:
    """Delete a file, if it is there. Raises StorageError."""
    fs, path = _store(url)
    _remove(fs, url, path)


def _remove(fs: Any, url: str, path: str) -> None:
    with suppress(FileNotFoundError):
        retried(url, "delete", lambda: fs.rm_file(path))


def remove_tree(url: str) -> None:
    """Delete a folder and all that is in it, if it is there. Raises StorageError.

    Not by fsspec's own recursive deletion: that takes [ and * in a name for a pattern.
    """
    fs, path = _store(url.rstrip("/"))
    found = retried(url, "list", lambda: _fresh(fs, path).find(path, withdirs=True, detail=True))
    folders = {path} | {name for name, each in found.items() if each["type"] == "directory"}
    files = [name for name in found if name.startswith(path + "/") and name not in folders]
    for _ in read_ahead(files, lambda name: _remove(fs, url, name)):
        pass
    if not hasattr(fs, "call_s3"):  # S3 has no folders, only names with slashes
        for folder in sorted(folders, reverse=True):
            with suppress(FileNotFoundError):
                retried(url, "delete", lambda folder=folder: fs.rmdir(folder))  # type: ignore[misc]


def abandon_uploads(url: str) -> int:
    """Delete the parts of uploads to a folder that a kill interrupted: S3 shows them to nobody, and bills them.

    Returns:
        How many uploads there were; 0 where the store does not tell us.
    """
    fs, path = _store(url)
    if not hasattr(fs, "call_s3"):
        return 0
    bucket, _, key = path.partition("/")
    where = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    try:
        found = retried(url, "list uploads", lambda: fs.call_s3("list_multipart_uploads", **where)).get("Uploads", [])
        for upload in found:
            which = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            retried(url, "abandon an upload", lambda which=which: _abort(fs, which))  # type: ignore[misc]
    except StorageError:  # some stores do not know these calls, and some users may not make them
        return 0
    return len(found)


def _abort(fs: Any, which: dict[str, str]) -> None:
    with suppress(FileNotFoundError):  # it was completed or deleted meanwhile
        fs.call_s3("abort_multipart_upload", **which)


def _store(url: str) -> tuple[Any, str]:
    """A URL's file system, and its path there."""
    fs = filesystem(protocol_of(url))
    return fs, fs._strip_protocol(url) + ("/" if url.endswith("/") else "")


def _fresh(fs: Any, path: str) -> Any:
    """The file system, once it has forgotten what it knew of a folder: others may have written there."""
    fs.invalidate_cache(path)
    return fs
