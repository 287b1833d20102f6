"""The pages of parquet files, read one by one: the image of one row, or a small column from end to end.

A column chunk can be entered only at a page. So an image costs one read of the page that it lies in, and one more where
the page holds places in a dictionary; the last pages are kept, for rows that are read one after the other.

Pages can be large: pyarrow's have up to 1,024 images, Hugging Face's 100. Of a large one whose values can be found in
the file, their places are kept longer than the page; from then on an image costs a read of little more than itself.
"""

import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from pipeline import SourceError
from pipeline.offline.parquet import snappy
from pipeline.offline.parquet.encodings import Cut, Damaged, Values
from pipeline.offline.parquet.footers import Column, Footer, blame, read_footer
from pipeline.offline.parquet.pagebody import Decoded, decode, decompressed, plain
from pipeline.offline.parquet.pagetable import INDICES, SNAPPY, UNCOMPRESSED, Page, scan
from pipeline.storage import location, read_range, stamp

CACHE = 32 * 2**20  # bytes of decoded pages that a process keeps, and of dictionaries; or one of each
TABLES = 64 * 2**20  # bytes of tables of pages that a process keeps, and of places in large ones
LARGE = 4 * 2**20  # decompressed bytes

T = TypeVar("T")
Version = tuple[str, int, str]  # of a file: its name, bytes, and what changes when it does


class Stored(NamedTuple):
    """Values of a large page that stay in the file: value i is bytes [starts[i], stops[i]) of what is decompressed."""

    file: str
    body: int  # where that begins in the file
    whole: int  # bytes of it, decompressed
    blocks: np.ndarray | None  # of snappy, as `snappy.blocks` gives them; None: it is not compressed
    starts: np.ndarray
    stops: np.ndarray

    def value(self, i: int) -> bytes:
        """By one read. Raises Damaged, OSError."""
        start, stop = int(self.starts[i]), int(self.stops[i])
        if self.blocks is None:
            return _read(self.file, self.body + start, stop - start)
        first, last = start // snappy.BLOCK, -(-stop // snappy.BLOCK)
        base = first * snappy.BLOCK
        size = min(last * snappy.BLOCK, self.whole) - base
        at, end = int(self.blocks[first]), int(self.blocks[last])
        stream = snappy.run(_read(self.file, self.body + at, end - at), size)
        return decompressed(stream, size, SNAPPY)[start - base : stop - base]

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        return 500 + self.starts.nbytes + self.stops.nbytes + (0 if self.blocks is None else self.blocks.nbytes)


class Cache(Generic[T]):
    """What was used last, up to `limit` bytes; always what was put in last. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._lock = limit, 0, Lock()
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, thing: T, size: int) -> None:
        """Keep a thing of `size` bytes, in place of those that were not used for longest."""
        with self._lock:
            self._size += size - self._kept.pop(key, (thing, 0))[1]
            self._kept[key] = thing, size
            while self._size > self._limit and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1][1]


class Host(NamedTuple):
    """The page with the values, which may be a dictionary, and how it is entered."""

    page: Page
    values: Values | None  # of a dictionary
    blocks: np.ndarray | None
    enterable: bool


_pages: Cache[Decoded] = Cache(CACHE)
_dictionaries: Cache[Host] = Cache(CACHE)
_tables: Cache[tuple[Column, np.ndarray]] = Cache(TABLES)
_places: Cache[Decoded] = Cache(TABLES)


def read_row(file: str, row: int) -> bytes:
    """The image in a row of a parquet file; empty where it is null.

    Raises:
        SourceError: the file is damaged or not supported, or has no such row.
        OSError: as the file system says.
    """
    version = _version(file)
    column, table = _tables.get(version) or _scanned(version)
    line = int(np.searchsorted(table["first"], row, "right")) - 1
    page = Page(*table[line].tolist()) if line >= 0 else None
    if page is None or row - page.first >= page.rows:
        raise SourceError(f"{file}: has no row {row}; it changed since the build began; delete DATASET and start again")
    with blame(f"{file}: row {row}"):
        return _decoded(version, column, table, page).value(row - page.first) or b""


def values(footer: Footer, column: Column) -> Iterator[bytes | None]:
    """The value of a column in each row, None for null; numbers little-endian, as they are in the file.

    Raises:
        SourceError: the file is damaged or not supported.
        OSError: as the file system says.
    """
    version, table = _version(footer.file), scan(footer, column)
    for page in (Page(*line) for line in table.tolist()):
        if page.dictionary != -2:
            with blame(f"{footer.file}: row {page.first} and following"):
                yield from map(_decoded(version, column, table, page).value, range(page.rows))


def nulls(footer: Footer, column: Column) -> Iterator[bool]:
    """Whether each row is null. Reads only pages that have nulls, as the file says; raises as `values` does."""
    version, table = _version(footer.file), scan(footer, column)
    for page in (Page(*line) for line in table.tolist()):
        if page.dictionary == -2:
            continue
        if page.nulls == 0:
            yield from (False for _ in range(page.rows))
            continue
        with blame(f"{footer.file}: row {page.first} and following"):
            decoded = _decoded(version, column, table, page)
        yield from (decoded.is_null(i) for i in range(page.rows))


def _version(file: str) -> Version:
    return (file, *stamp(location(file)))


def _scanned(version: Version) -> tuple[Column, np.ndarray]:
    footer = read_footer(location(version[0]))
    column = footer.image()
    table = scan(footer, column)
    _tables.put(version, (column, table), table.nbytes)
    return column, table


def _decoded(version: Version, column: Column, table: np.ndarray, page: Page) -> Decoded:
    """A page from memory; or its places, where they are known; or read from the file."""
    key = (version, page.start)
    if kept := _pages.get(key) or _places.get(key):
        return kept
    body = _body(version[0], page)
    host = _dictionary(version, column, table, page) if page.encoding in INDICES else _host(page, body, column)
    found = decode(body, page, column, host.values)
    _pages.put(key, found, found.size)
    if host.enterable and isinstance(found.values, Values):
        head = max(host.page.levels, 0)
        _, starts, stops = found.values
        stored = Stored(version[0], host.page.start + head, host.page.size - head, host.blocks, starts, stops)
        places = Decoded(stored, found.places)
        _places.put(key, places, places.size)
    return found


def _dictionary(version: Version, column: Column, table: np.ndarray, page: Page) -> Host:
    key = (version, page.dictionary, column.place)
    if kept := _dictionaries.get(key):
        return kept
    of = Page(*table[page.dictionary].tolist())
    body = _body(version[0], of)
    values = plain(decompressed(body, of.size, of.codec), 0, of.rows, column)
    host = _host(of, body, column)._replace(values=values)
    _dictionaries.put(key, host, values.size)
    return host


def _host(page: Page, body: bytes, column: Column) -> Host:
    """Whether and how the values of a page can be read one by one."""
    if page.size < LARGE or column.kind != "BYTE_ARRAY" or page.codec not in (UNCOMPRESSED, SNAPPY):
        return Host(page, None, None, False)
    blocks = snappy.blocks(body[max(page.levels, 0) :]) if page.codec == SNAPPY else None
    return Host(page, None, blocks, page.codec == UNCOMPRESSED or blocks is not None)


def _body(file: str, page: Page) -> bytes:
    body = _read(file, page.start, page.stored)
    if page.crc >= 0 and zlib.crc32(body) != page.crc:
        raise Damaged("the page is not what its checksum says")
    return body


def _read(file: str, start: int, size: int) -> bytes:
    data = read_range(file, start, size) if size else b""
    if len(data) != size:
        raise Cut("the page is cut short")
    return data
