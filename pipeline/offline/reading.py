"""How a raw image's bytes are read: by one positioned read of its file."""

import os

from pipeline.errors import SourceError


def read_raw(file: str, offset: int, size: int) -> bytes:
    """`size` bytes of `file` from `offset`.

    Raises:
        SourceError: the file has become shorter.
        OSError: as the file system says.
    """
    with open(file, "rb") as opened:
        data = os.pread(opened.fileno(), size, offset)
    if len(data) != size:
        raise SourceError(f"{file}: changed since the build began; delete DATASET and start again")
    return data
