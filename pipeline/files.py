"""How our files appear: whole or not at all."""

import errno
import hashlib
import os
import secrets
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError
from pipeline.storage import Location, objects, volumes

ASIDE = ".tmp"  # how the name of a file that is not yet whole ends
TAR_BLOCK = 512  # bytes; a tar is made of these


class HashingFile:
    """A binary file to write to, that counts and hashes what it is given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Of a memoryview, the elements are bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_aside(path: Location, write: Callable[[HashingFile], Any]) -> dict[str, Any]:
    """Let `write` fill a temporary file; fsync it, rename it to `path`, fsync the folder.

    Several may write one path at a time: each has a temporary file of its own, and the last to end wins. For a remote
    path the temporary file is a local one, in TMPDIR, which is uploaded.

    Returns:
        {"bytes": its size, "sha256": hex}.
    Raises:
        UserError: `path` is in a container of ours and on no volume.
        Whatever `write`, the file system or the store raises; then nothing of the file stays, and an older `path` is
        untouched.
    """
    if not isinstance(path, Path):
        return _write_remote(str(path), write)
    volumes.require_kept(path)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{ASIDE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "wb", buffering=2**20) as file:
            hashing = HashingFile(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)
    return {"bytes": hashing.bytes, "sha256": hashing.sha256()}


def require_writable(folder: Path) -> None:
    """Meet now what would keep files from being written to `folder`, which may not be there yet.

    Raises:
        UserError: it is in a container of ours and on no volume.
        OSError: the operating system's refusal.
    """
    volumes.require_kept(folder)
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if above.is_dir():
        with tempfile.TemporaryFile(dir=above):
            pass


def sync_folder(folder: Path) -> None:
    """fsync: the names in it are as they are now, even after a loss of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _write_remote(url: str, write: Callable[[HashingFile], Any]) -> dict[str, Any]:
    try:
        with tempfile.NamedTemporaryFile(prefix="penstock-", suffix=ASIDE) as file:
            hashing = HashingFile(file)  # type: ignore[arg-type]
            write(hashing)
            file.flush()
            objects.upload(Path(file.name), url)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{tempfile.gettempdir()}: {error.strerror}, for a file on its way to {url}; make room, or set TMPDIR"
        ) from error
    return {"bytes": hashing.bytes, "sha256": hashing.sha256()}


def write_bytes_aside(path: Location, data: bytes) -> dict[str, Any]:
    """`write_aside` of bytes at hand."""
    return write_aside(path, lambda file: file.write(data))


def sweep(folder: Location) -> int:
    """Delete what writers that were killed left in `folder`, not below it; remotely, below it too.

    Only for whoever knows that nobody writes there now.

    Returns:
        How many temporary files, or uploads without an end, there were.
    """
    if not isinstance(folder, Path):
        return objects.abandon_uploads(str(folder))
    found = [path for path in folder.glob(f"*{ASIDE}") if path.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def add_tar_member(out: HashingFile, name: str, data: bytes) -> int:
    """Append a regular file to a USTAR archive (mtime, uid, gid 0); return the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    out.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = out.bytes
    out.write(data)
    out.write(bytes(-len(data) % TAR_BLOCK))
    return offset
