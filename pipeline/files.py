"""How our files appear: whole or not at all."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


class HashingFile:
    """A binary file to write to, that counts and hashes what it is given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_aside(path: Path, write: Callable[[HashingFile], Any]) -> dict[str, Any]:
    """Let `write` fill a temporary file; fsync it, rename it to `path`, fsync the folder.

    Returns:
        {"bytes": its size, "sha256": hex}.
    Raises:
        Whatever `write` or the file system raises; then nothing of the file stays, and an older `path` is untouched.
    """
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "wb") as file:
            hashing = HashingFile(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return {"bytes": hashing.bytes, "sha256": hashing.sha256()}


def write_bytes_aside(path: Path, data: bytes) -> dict[str, Any]:
    """`write_aside` of bytes at hand."""
    return write_aside(path, lambda file: file.write(data))
