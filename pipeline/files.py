"""Files written whole or not at all: a temporary name, fsync, rename; for a store one upload. Locks of folders."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from pipeline import UserError, storage, volumes
from pipeline.storage import Location
from pipeline.volumes import is_junk, naming

ASIDE = ".tmp"  # ends the name of a file that is not yet whole
TAR_BLOCK = 512  # bytes; a tar is made of these
# Answers of a file system that does not have a call: CIFS, 9p, WSL's DrvFs and many FUSE ones cannot sync a folder;
# Lustre (without -o flock), NFS (without lockd) and many FUSE ones have no locks.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class HashingFile:
    """A binary file to write to, which counts and hashes the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes; the elements of a memoryview must be bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_aside(path: Location, write: Callable[[HashingFile], Any]) -> dict[str, Any]:
    """Let `write` fill a temporary file, fsync it, and rename it to `path`; return its {"bytes": …, "sha256": hex}.

    Several may write one path at a time: each has its own temporary file, and the last to end wins. For a remote path
    that file lies in TMPDIR, and is uploaded. On any error nothing of the file stays, and an older one is untouched.
    Raises UserError: `path` is in our container and on no volume; and what `write`, the system or the store raises.
    """
    remote = storage.is_remote(path)
    folder = Path(tempfile.gettempdir()) if remote else path.parent
    if not remote:
        volumes.require_kept(path)
        folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{path.name}.{secrets.token_hex(4)}{ASIDE}"
    try:
        with open(aside, "xb", buffering=2**20) as file:
            if remote:
                os.fchmod(file.fileno(), 0o600)  # TMPDIR may be shared with other users
            hashing = HashingFile(file)
            write(hashing)
            file.flush()
            if not remote:
                os.fsync(file.fileno())
        if remote:
            storage.upload(aside, path)
        else:
            os.rename(aside, path)
            sync_folder(folder)
    except OSError as error:
        if remote and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"{folder}: {error.strerror}, for a file on its way to {path}"
            raise UserError(f"{full}; make room, or set TMPDIR") from error
        own = not remote and str(error.filename) == str(aside) and error.errno not in (errno.EACCES, errno.EPERM)
        if error.filename is None or own:  # a full disk; a directory of the file's name
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)
    return {"bytes": hashing.bytes, "sha256": hashing.sha256()}


def write_bytes_aside(path: Location, data: bytes) -> dict[str, Any]:
    """Write bytes by `write_aside`."""
    return write_aside(path, lambda file: file.write(data))


def require_writable(folder: Path, size: int = 1) -> None:
    """Raise UserError or OSError if files of `size` bytes cannot be written to `folder`, which need not exist yet."""
    volumes.require_kept(folder)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UserError(f"{above}: is a file, not a directory; name another path")
    try:
        with tempfile.TemporaryFile(dir=above, buffering=0) as file:
            file.write(b"-")  # a full disk, or a quota, still lets a file be made
    except OSError as error:
        error.filename = str(above)  # and not the temporary file
        raise
    if (free := shutil.disk_usage(above).free) < size:
        raise UserError(f"{folder}: needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; make room")


@contextmanager
def full_disk_explained(root: Path) -> Iterator[None]:
    """Raise UserError where the block ends for want of room below `root`; what is finished there stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "what is finished stays; make room, and the same command goes on"
        raise UserError(f"{root}: {error.strerror}; {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that the names in it survive a loss of power, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def content(folder: Location) -> set[str]:
    """Return the names in a folder but for junk; none where it does not exist. Raises NotADirectoryError: a file."""
    with suppress(FileNotFoundError):
        return {entry.name for entry in storage.scan(folder) if not is_junk(entry.name)}
    return set()


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Lock a folder for this process alone. Raises UserError, `busy`, where another process has the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor, fcntl.LOCK_EX, folder)
        except BlockingIOError as error:
            raise UserError(f"{folder}: {busy}") from error
        yield
    finally:
        os.close(descriptor)


def lock(file: int | IO[str], kind: int, folder: Path) -> bool:
    """Take the lock of an open file, `fcntl.LOCK_EX` or `LOCK_SH`, without waiting; return False if there are no locks.

    Of those a line on stderr warns, once for each `folder`. Raises BlockingIOError where another process has the lock.
    """
    try:
        with naming(folder):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(folder)
        return False
    return True


@cache
def _warn_of_no_locks(folder: Path) -> None:
    problem = "its file system has no locks, and nothing keeps a second process from writing there"
    print(f"warning: {folder}: {problem}; start one at a time", file=sys.stderr, flush=True)


def sweep(folder: Location) -> int:
    """Delete what killed writers left in `folder` (remotely, below it too) while nobody writes; return how many."""
    if storage.is_remote(folder):
        return storage.abandon_uploads(folder)
    leftovers = [path for path in folder.glob(f"*{ASIDE}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def add_tar_member(out: HashingFile, name: str, data: bytes) -> int:
    """Append a regular file to a USTAR archive (mtime, uid, gid 0); return the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    out.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = out.bytes
    out.write(data)
    out.write(bytes(-len(data) % TAR_BLOCK))
    return offset
