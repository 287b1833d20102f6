"""Where the pages of a parquet column lie, by their headers alone: a table with a line for each.

As https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift describes the headers.
"""

from types import ModuleType
from typing import NamedTuple

import numpy as np

from pipeline import SourceError
from pipeline.offline.parquet.encodings import Cut, Damaged, Unsupported
from pipeline.offline.parquet.footers import Chunk, Column, Footer, blame
from pipeline.offline.parquet.thrift import Fields, number, read_struct, struct
from pipeline.storage import Read, location, opened

MAX_PAGE = 256 * 2**20  # bytes, compressed or not; a dictionary page of pyarrow's can have 1,024 images
MAX_ROWS = 2**22  # of a page; pyarrow puts at most 2²⁰ rows into a row group
MAX_PAGES = 2**20  # of a column
FIRST_HEADER, MAX_HEADER = 2**9, 2**20  # bytes read at first, at most; a header without statistics has some 30
UNCOMPRESSED, SNAPPY = 0, 1
CODECS = {
    0: "",
    1: "snappy",
    2: "gzip",
    4: "brotli",
    6: "zstd",
    7: "lz4_raw",
}  # by the format's numbers; pyarrow's names
PLAIN, PLAIN_DICTIONARY, RLE, DELTA_PACKED, DELTA_LENGTH, RLE_DICTIONARY = 0, 2, 3, 5, 6, 8
INDICES = (PLAIN_DICTIONARY, RLE_DICTIONARY)  # the values are places in a dictionary
SUPPORTED = {
    "BYTE_ARRAY": (PLAIN, *INDICES, DELTA_LENGTH),
    "INT32": (PLAIN, *INDICES, DELTA_PACKED),
    "INT64": (PLAIN, *INDICES, DELTA_PACKED),
}
ENCODINGS = ("PLAIN", "GROUP_VAR_INT", "PLAIN_DICTIONARY", "RLE", "BIT_PACKED", "DELTA_BINARY_PACKED",
             "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT")  # fmt: skip
_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)  # kinds of pages


class Page(NamedTuple):
    """One page: `stored` bytes of the file from `start`."""

    start: int
    stored: int
    size: int  # bytes, decompressed
    first: int  # row
    rows: int  # nulls included; of a dictionary: its entries
    encoding: int
    levels: int  # bytes of definition levels before what is compressed; −1: they are in it (version 1)
    codec: int  # one of CODECS
    crc: int  # of the stored bytes; −1: none
    nulls: int  # −1: not known
    dictionary: int  # line of its dictionary; −1: none; −2: it is a dictionary


PAGE = np.dtype([(name, "<i8") for name in Page._fields])


def scan(footer: Footer, column: Column) -> np.ndarray:
    """The pages of a column: (n,) PAGE, a dictionary before the pages that need it.

    Raises:
        SourceError: a header is damaged or contradicts the footer, or a page is too large or of an unsupported kind.
    """
    if column.repeated or column.kind not in SUPPORTED:
        raise SourceError(f"{footer.file}: the column {column.name[:60]!a} is neither bytes, text nor whole numbers")
    found: list[Page] = []
    first, chunks = 0, footer.chunks(column)
    if any(chunk.codec for chunk in chunks):
        load_pyarrow()  # now, not at the first image
    with opened(location(footer.file)) as (read, _):
        for chunk in chunks:
            with blame(f"{footer.file}: row {first} and following"):
                _scan_chunk(read, chunk, column, first, found)
            first += chunk.rows
    return np.array(found, PAGE)


def load_pyarrow() -> ModuleType:
    """The library that decompresses pages. Raises SourceError where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise SourceError("compressed parquet files need pyarrow: pip install 'penstock-imagenet[parquet]'") from error
    return pyarrow


def _scan_chunk(read: Read, chunk: Chunk, column: Column, first: int, found: list[Page]) -> None:
    if chunk.codec not in CODECS:
        raise Unsupported(f"the compression {'LZO' if chunk.codec == 3 else 'LZ4 of Hadoop'} is not supported")
    at, done, dictionary = chunk.start, 0, -1
    while done < chunk.rows:
        fields, at = _header(read, at, chunk.stop)
        stored = number(fields, 3, 0, MAX_PAGE)
        if stored > chunk.stop - at:
            raise Damaged(f"a page claims {stored:,} bytes where {chunk.stop - at:,} are left")
        kind = number(fields, 1, 0)
        if kind != _INDEX:
            page = _page(fields, kind, at, first + done, column, dictionary, chunk.codec)
            if kind == _DICTIONARY:
                dictionary = len(found)
            else:
                done += page.rows
                page = page if page.nulls >= 0 or chunk.nulls else page._replace(nulls=0)
            found.append(page)
        at += stored
        if len(found) > MAX_PAGES:
            raise Unsupported(f"more than {MAX_PAGES:,} pages in a column are not supported")
    if done != chunk.rows:
        raise Damaged(f"the pages have {done:,} rows where the footer claims {chunk.rows:,}")


def _header(read: Read, at: int, stop: int) -> tuple[Fields, int]:
    """The page header at `at`, and where it ends."""
    window = FIRST_HEADER
    while True:
        data = read(min(window, stop - at), at)
        try:
            fields, length = read_struct(data)
        except Cut:
            if window >= min(MAX_HEADER, stop - at):
                raise
            window *= 8
        else:
            return fields, at + length


def _page(fields: Fields, kind: int, at: int, first: int, column: Column, dictionary: int, codec: int) -> Page:
    """A page by its header, whose body begins at `at`."""
    size, stored = number(fields, 2, 0, MAX_PAGE), number(fields, 3, 0, MAX_PAGE)
    crc = number(fields, 4, -(2**31)) % 2**32 if 4 in fields else -1
    levels = nulls = -1
    if kind == _DICTIONARY:
        about = struct(fields, 7)
        supported: tuple[int, ...] = (PLAIN, PLAIN_DICTIONARY)
        if dictionary >= 0:
            raise Damaged("a second dictionary for the same pages")
        dictionary = -2
    elif kind in (_DATA, _DATA_V2):
        about = struct(fields, 5 if kind == _DATA else 8)
        supported = SUPPORTED[column.kind]
    else:
        raise Damaged(f"a page of the unknown kind {kind}")
    if kind == _DATA and isinstance(about.get(5), dict) and 3 in about[5]:
        nulls = number(about[5], 3, 0)  # by its statistics
    rows = number(about, 1, 0 if kind == _DICTIONARY else 1, MAX_ROWS)
    encoding = number(about, 4 if kind == _DATA_V2 else 2, 0)
    if kind == _DATA_V2:
        levels, nulls = number(about, 5, 0, min(size, stored)), number(about, 2, 0, rows)
        codec = codec if about.get(7, True) else 0
        if number(about, 3) != rows or number(about, 6):
            raise Damaged("a page of repeated values in a column without such")
    elif kind == _DATA and column.levels and number(about, 3) != RLE:
        raise Unsupported(f"definition levels as {_named(number(about, 3))} are not supported")
    if encoding not in supported:
        raise Unsupported(f"the encoding {_named(encoding)} of a {column.kind} page is not supported")
    if kind != _DICTIONARY and encoding in INDICES and dictionary < 0:
        raise Damaged("a page needs a dictionary, and there is none")
    return Page(at, stored, size, first, rows, encoding, levels, codec, crc, nulls, dictionary)


def _named(encoding: int) -> str:
    return ENCODINGS[encoding] if encoding < len(ENCODINGS) else str(encoding)
