"""How a raw image's bytes are read: by one positioned read of its file, wherever that lies."""

from pipeline import storage
from pipeline.errors import SourceError


def read_raw(file: str, offset: int, size: int) -> bytes:
    """`size` bytes of `file`, a path or a URL, from `offset`.

    Raises:
        SourceError: the file has become shorter.
        OSError: as the file system says.
    """
    data = storage.read_range(file, offset, size)
    if len(data) != size:
        raise SourceError(f"{file}: changed since the build began; delete DATASET and start again")
    return data
