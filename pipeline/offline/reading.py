"""How a raw image's bytes are read: by one positioned read of its file, wherever that lies."""

from pipeline import SourceError, storage
from pipeline.offline.parquet import pages

PARQUET = ".parquet"  # a row of such a file; its `offset` is the number of the row


def read_raw(file: str, offset: int, size: int) -> bytes:
    """`size` bytes of `file`, a path or a URL, from `offset`.

    Raises:
        SourceError: the file has become shorter.
        OSError: as the file system says.
    """
    if file.endswith(PARQUET):
        return pages.read_row(file, offset)
    data = storage.read_range(file, offset, size)
    if len(data) != size:
        raise SourceError(f"{file}: changed since the build began; delete DATASET and start again")
    return data
