"""Files and folders on this machine, in an object store that fsspec knows (`s3://bucket/folder`), or of an HTTP server.

A location is a `pathlib.Path` or a remote `upath.UPath`: join it with `/`, and for all but its name call the functions
below. Locally they raise the operating system's errors. Remotely they check the length of each answer, retry what fails
for a moment, and raise StorageError, one line, for the rest. Credentials and endpoint come from the environment, as for
every program that uses AWS's library (AWS_PROFILE, AWS_ENDPOINT_URL …); s3fs's other options are FSSPEC_S3_<OPTION>.
"""

import errno
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from pipeline import UserError
from pipeline.stores import S3, STORES, WEB, StorageError, filesystem, protocol_of, retried
from pipeline.volumes import is_junk, mode_and_size, naming, open_regular

# For mypy a Path, as it knows the methods of both. At run time a remote UPath is no Path, but a local UPath is one.
Location: TypeAlias = Path
Read = Callable[[int, int], bytes]  # (size, offset) → `size` bytes, fewer only at the end of the file
T = TypeVar("T")
R = TypeVar("R")
PIECE = 16 * 2**20  # bytes of one request for a whole file, and of one part of an upload
BLOCK = 2 * 2**20  # bytes that `opened` fetches beyond those asked for: 19 headers in a tar of ImageNet's images
THREADS = 16  # at some 20 ms a request, 800 requests a second; s3fs needs 1 ms of one core's time for each
AHEAD_BYTES = 64 * 2**20


class Entry(NamedTuple):
    """An entry of a folder. An object store may hold a file and a folder of one name: two entries."""

    name: str
    is_file: bool
    is_dir: bool
    size: int  # bytes; 0 for a folder


def location(text: "str | os.PathLike[str] | Location") -> Location:
    """Return the location that a path or a URL names; "file:///folder" is a local path. Raises UserError."""
    if not isinstance(text, str):
        return Path(text) if isinstance(text, os.PathLike) else text
    protocol, url = protocol_of(text), urlsplit(text)
    if not protocol:
        return Path(text)
    if "::" in text or protocol not in ("file", *STORES) or bool(url.netloc) == (protocol == "file"):
        raise UserError(f"{text}: names no folder or file; a location is FOLDER, file:///FOLDER or s3://BUCKET/FOLDER")
    if protocol == "file":
        return Path(unquote(url.path))
    if protocol in WEB and (url.query or url.fragment or "@" in url.netloc):
        raise UserError(f"{url.scheme}://{url.hostname}{url.path}: ?, # and USER@ name no folder of an HTTP server")
    filesystem(protocol)  # raises if it is unknown
    from upath import UPath  # with fsspec 0.07 s, which local work need not wait for

    return UPath(text)  # type: ignore[return-value]


def is_remote(path: "str | os.PathLike[str] | Location") -> bool:
    """Return True for a location in an object store, and for its URL."""
    return protocol_of(path) not in ("", "file") if isinstance(path, str) else not isinstance(path, os.PathLike)


def is_served(path: Location) -> bool:
    """Return True for a location at an HTTP server, which can only be read."""
    return protocol_of(str(path)) in WEB


def exists(path: Location) -> bool:
    return path.exists() if isinstance(path, Path) else bool(_info(path))


def is_dir(path: Location) -> bool:
    if isinstance(path, Path):
        return path.is_dir()
    return _info(path / "" if is_served(path) else path).get("type") == "directory"


def is_file(path: Location) -> bool:
    return path.is_file() if isinstance(path, Path) else _info(path).get("type") == "file"


def stamp(path: Location) -> tuple[int, str]:
    """Return a file's bytes, and its time of change or ETag. Raises FileNotFoundError, also for a remote folder."""
    if isinstance(path, Path):
        status = path.stat()
        return status.st_size, str(status.st_mtime_ns)
    info = _info(path)
    if info.get("type") != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return int(info["size"]), next((str(info[key]) for key in ("ETag", "etag", "mtime", "created") if key in info), "")


def _info(path: Location) -> dict[str, Any]:
    """Return fsspec's record of a remote file or folder, with `type` and `size`; {} if there is none."""
    with suppress(FileNotFoundError):
        return retried(path, "look", lambda fs, name: fs.info(name))
    return {}


def scan(folder: Location) -> list[Entry]:
    """Return a folder's entries in the order of their names' bytes. Raises FileNotFoundError, NotADirectoryError."""
    if isinstance(folder, Path):
        with os.scandir(folder) as inside:
            kinds = [(entry.name, *mode_and_size(entry)) for entry in inside]
        entries = [Entry(name, stat.S_ISREG(mode), stat.S_ISDIR(mode), size) for name, mode, size in kinds]
    else:
        entries, own = [], folder.path.strip("/")
        for info in retried(folder, "list", lambda fs, path: fs.ls(path, detail=True)):
            file, path = info["type"] == "file", info["name"].strip("/")
            if path != own:
                entries.append(Entry(path.rpartition("/")[2], file, not file, int(info["size"] or 0)))
            elif file and not info["name"].endswith("/"):  # else an empty object that stands for the folder
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return sorted(entries, key=lambda entry: (os.fsencode(entry.name), entry.is_dir))


def walk(folder: Location) -> Iterator[tuple[str, list[Entry]]]:
    """Yield the path of each folder below `folder` ("" for itself), unless hidden or junk, and its entries."""
    level = [""]  # the folders of a level are listed at once: with 1,000 classes that takes seconds, not minutes
    while level:
        deeper = []
        for below, entries in read_ahead(level, lambda below: scan(folder / below if below else folder)):
            yield below, entries
            names = [e.name for e in entries if e.is_dir and not (e.name.startswith(".") or is_junk(e.name))]
            deeper += [f"{below}/{name}" if below else name for name in names]
        level = deeper


def sizes(root: Location, names: Iterable[str]) -> dict[str, int]:
    """Return the bytes of those of the files `names` (paths below `root`) that exist. Remotely by a listing, if any."""
    if isinstance(root, Path):
        return {name: (root / name).stat().st_size for name in names if (root / name).is_file()}
    try:
        start, infos = retried(root, "list", lambda fs, path: (path.rstrip("/"), fs.find(path, detail=True)))
    except (FileNotFoundError, UserError):
        if not is_served(root):
            raise
        with closing(read_ahead(names, lambda name: _info(root / name))) as asked:  # a server that lists no files
            return {name: info["size"] for name, info in asked if info}
    return {name: int(infos[f"{start}/{name}"]["size"] or 0) for name in names if f"{start}/{name}" in infos}


@contextmanager
def opened(path: Location) -> Iterator[tuple[Read, int]]:
    """Yield positioned reads of a file, for one thread, and its bytes. Remote reads fetch `BLOCK` bytes ahead."""
    if isinstance(path, Path):
        with open_regular(path) as file:
            yield lambda size, at: _pread(file, size, at), os.fstat(file.fileno()).st_size
    else:
        from fsspec.caching import ReadAheadCache

        total, _ = stamp(path)
        ahead = ReadAheadCache(BLOCK, lambda start, stop: read_range(str(path), start, stop - start), total)
        yield lambda size, at: ahead._fetch(at, at + size), total


def read_range(file: str, offset: int, size: int) -> bytes:
    """Return `size` bytes from `offset`, fewer only at the end of the file. Threads may call it."""

    def ranged(fs: Any, path: str) -> bytes:
        data: bytes = fs.cat_file(path, start=offset, end=offset + size)
        if len(data) != size and len(data) != min(size, fs.info(path)["size"] - offset):  # stores may cut it silently
            raise OSError(errno.EIO, f"{len(data)} bytes came of {size}")
        return data

    if protocol_of(file):
        return retried(file, "read", ranged) if size > 0 else b""
    with open_regular(file) as local:
        return _pread(local, size, offset)


def _pread(file: BinaryIO, size: int, offset: int) -> bytes:
    with naming(file.name):
        return os.pread(file.fileno(), size, offset)


def read_bytes(path: Location) -> bytes:
    """Return a whole file. Raises FileNotFoundError."""
    if isinstance(path, Path):
        with naming(path), open_regular(path) as file:
            return file.read()
    total, _ = stamp(path)
    pieces = read_ahead(range(0, total, PIECE), lambda at: read_range(str(path), at, min(PIECE, total - at)), 4)
    return b"".join(piece for _, piece in pieces)


def read_ahead(
    tasks: Iterable[T], read: Callable[[T], R], threads: int = THREADS, size: Callable[[T], int] = lambda task: 0
) -> Generator[tuple[T, R], None, None]:
    """Yield each task and `read(task)`, or raise its exception, in order; up to `threads` reads run ahead of use.

    Results not yet taken stay within 2 · `threads` and, with `size` their bytes, within `AHEAD_BYTES` or one result.
    Closing the generator waits for the reads that run.
    """
    pool = ThreadPoolExecutor(threads, "read-ahead")
    running: deque[tuple[T, int, Future[R]]] = deque()
    ahead = 0
    try:
        for task in tasks:
            cost = size(task)
            while running and (ahead + cost > AHEAD_BYTES or len(running) >= 2 * threads):
                yield running[0][0], running[0][2].result()
                ahead -= running.popleft()[1]
            running.append((task, cost, pool.submit(read, task)))
            ahead += cost
        for task, _, result in running:
            yield task, result.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def upload(source: Path, target: Location) -> None:
    """Put a local file at a remote location, where it appears whole or not at all."""
    options = {"chunksize": PIECE} if protocol_of(str(target)) in S3 else {}
    retried(target, "write", lambda fs, path: fs.put_file(str(source), path, **options))


def put_if_absent(path: Location, data: bytes) -> bytes:
    """Put `data` at a remote location unless something is there; return what is there, the same to all who try."""
    with suppress(FileExistsError):  # by another, or by our own first try whose answer was lost
        retried(path, "write", lambda fs, name: fs.pipe_file(name, data, mode="create"))
        return data
    return read_bytes(path)


def remove(path: Location) -> None:
    """Delete a file, if it exists."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    else:
        with suppress(FileNotFoundError):
            retried(path, "delete", lambda fs, name: fs.rm_file(name))


def remove_tree(folder: Location) -> None:
    """Delete a folder and all that is in it, if it exists."""
    with suppress(FileNotFoundError):
        if isinstance(folder, Path):
            return shutil.rmtree(folder)
        entries = scan(folder)
        for _ in read_ahead(entries, lambda entry: (remove_tree if entry.is_dir else remove)(folder / entry.name)):
            pass  # not by fs.rm: it takes [ and * in a name for a pattern
        if protocol_of(str(folder)) not in S3:  # which has no folders
            retried(folder, "delete", lambda fs, path: fs.rmdir(path))


def abandon_uploads(folder: Location) -> int:
    """Delete the parts of interrupted uploads to a folder, which S3 shows to nobody and bills; return their number."""

    def abandon(fs: Any, path: str) -> int:
        bucket, _, key = path.partition("/")
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/" if key else "")
        uploads = answer.get("Uploads", [])
        for item in uploads:
            with suppress(FileNotFoundError):  # it was completed or deleted meanwhile
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=item["Key"], UploadId=item["UploadId"])
        return len(uploads)

    with suppress(StorageError):  # some stores do not know these calls, and some users may not make them
        return retried(folder, "abandon uploads", abandon) if protocol_of(str(folder)) in S3 else 0
    return 0
