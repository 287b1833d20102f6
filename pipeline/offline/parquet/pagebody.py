"""The body of one parquet page: decompressed, and decoded to the values in it and the rows that are null."""

from typing import NamedTuple, Protocol

import numpy as np

from pipeline.offline.parquet import encodings
from pipeline.offline.parquet.encodings import Cut, Damaged, Unsupported, Values
from pipeline.offline.parquet.footers import Column
from pipeline.offline.parquet.pagetable import CODECS, DELTA_LENGTH, DELTA_PACKED, PLAIN, SNAPPY, Page, load_pyarrow

WIDTHS = {"INT32": 4, "INT64": 8}  # bytes of a number


class HasValues(Protocol):
    """Values by number, in memory or in the file."""

    def value(self, i: int) -> bytes: ...

    @property
    def size(self) -> int: ...


class Decoded(NamedTuple):
    """The values of a page, nulls left out, and the place among them of each row's; None: no row is null."""

    values: "HasValues"
    places: np.ndarray | None  # (rows,) int64; −1: null

    def value(self, i: int) -> bytes | None:
        place = i if self.places is None else int(self.places[i])
        return None if place < 0 else self.values.value(place)

    def is_null(self, i: int) -> bool:
        return self.places is not None and bool(self.places[i] < 0)

    @property
    def size(self) -> int:
        """Bytes in memory, those of the dictionary included."""
        return self.values.size + (0 if self.places is None else self.places.nbytes)


def decompressed(body: bytes, size: int, codec: int) -> bytes:
    """`size` bytes: never more, whatever the compressed ones make of themselves."""
    if not codec:
        if len(body) != size:
            raise Damaged(f"a page of {size:,} bytes has {len(body):,}")
        return body
    if not size:
        return b""
    if codec == SNAPPY and encodings.varint(body, 0)[0] != size:
        raise Damaged(f"a page of {size:,} bytes has another length inside")
    arrow = load_pyarrow()
    try:
        return bytes(arrow.Codec(CODECS[codec]).decompress(body, size, asbytes=True))
    except (arrow.ArrowException, OSError) as error:
        raise Damaged("a page cannot be decompressed") from error


def decode(body: bytes, page: Page, column: Column, dictionary: Values | None) -> Decoded:
    """The values of a data page, and which rows are null."""
    if page.levels >= 0:
        levels = body[: page.levels]
        data, at = decompressed(body[page.levels :], page.size - page.levels, page.codec), 0
    else:
        data, at = decompressed(body, page.size, page.codec), 0
        levels = b""
        if column.levels:
            at = 4 + int.from_bytes(data[:4], "little")
            levels = data[4:at]
            if at > len(data):
                raise Cut("the definition levels are cut short")
    places, count = _places(levels, page.rows, column.levels)
    return Decoded(_values(data, at, count, page, column, dictionary), places)


def _places(levels: bytes, rows: int, most: int) -> tuple[np.ndarray | None, int]:
    """The place of each row's value, −1 for null, or None where none is null; and how many values there are."""
    if not most:
        return None, rows
    defined = encodings.hybrid(levels, 0, most.bit_length(), rows)
    if defined.max() > most:
        raise Damaged(f"a definition level beyond {most}")
    present = defined == most
    if present.all():
        return None, rows
    return np.where(present, np.cumsum(present) - 1, -1), int(present.sum())


def _values(data: bytes, at: int, count: int, page: Page, column: Column, dictionary: Values | None) -> Values:
    if dictionary is not None:
        places = encodings.hybrid(data, at + 1, data[at] if at < len(data) else 0, count)
        if count and places.max() >= len(dictionary.starts):
            raise Damaged(f"a place beyond the {len(dictionary.starts):,} entries of the dictionary")
        return Values(dictionary.data, dictionary.starts[places], dictionary.stops[places])
    if page.encoding == PLAIN:
        return plain(data, at, count, column)
    if page.encoding == DELTA_LENGTH:
        return encodings.delta_bytes(data, at, count)
    if page.encoding == DELTA_PACKED:
        numbers = encodings.delta_numbers(data, at, count)[0].astype(f"<i{WIDTHS[column.kind]}").tobytes()
        return encodings.plain_numbers(numbers, 0, count, WIDTHS[column.kind])
    raise Unsupported(f"the encoding {page.encoding} is not supported")


def plain(data: bytes, at: int, count: int, column: Column) -> Values:
    if column.kind in WIDTHS:
        return encodings.plain_numbers(data, at, count, WIDTHS[column.kind])
    return encodings.plain_bytes(data, at, count)
