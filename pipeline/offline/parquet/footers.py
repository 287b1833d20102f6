"""The footer of a parquet file: its columns, where the chunks of each lie, and what Hugging Face wrote beside them.

As https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift describes it. It is read here and
not by pyarrow, which ends the process at some damaged footers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline import SourceError
from pipeline.offline.parquet.encodings import Damaged, Unsupported
from pipeline.offline.parquet.thrift import Fields, number, read_struct, struct, structs, text
from pipeline.storage import Location, opened

MAGIC, ENCRYPTED = b"PAR1", b"PARE"
MAX_FOOTER = 64 * 2**20  # bytes; that of a file with 1,000 class names has some 100,000
MAX_JSON = 4 * 2**20  # characters; 21,841 names of classes have some 1.3 million
MAX_SCHEMA = 2**14  # structs and columns
MAX_NAME = 1000  # characters of a column with the structs around it
MAX_NESTING = 32  # of structs
IMAGE = ("image", "img", "image_bytes", "img_bytes", "bytes", "jpg", "jpeg", "png", "webp")  # what columns are called
LABEL = ("label", "labels", "fine_label", "class")
KINDS = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_REQUIRED, _REPEATED = 0, 2


@dataclass(frozen=True)
class Column:
    """One leaf of the schema; `name` is its path, "image.bytes" for a field of a struct."""

    name: str
    place: int  # among the columns
    kind: str  # one of KINDS
    text: bool  # marked as UTF-8
    levels: int  # the highest definition level: how many of it and the structs around it may be null
    repeated: bool  # a list, or in one


@dataclass(frozen=True)
class Chunk:
    """The pages of one column in one row group: bytes [start, stop) of the file."""

    start: int
    stop: int
    rows: int
    codec: int  # as the format numbers them
    nulls: int  # 0 also where the file does not say


@dataclass(frozen=True)
class Footer:
    file: str
    size: int  # bytes of the file
    rows: int
    columns: tuple[Column, ...]
    features: dict[str, Any]  # column → its description by Hugging Face's datasets; empty: there is none
    groups: list[Fields]  # of rows

    def image(self) -> Column:
        """The column with the bytes of the images. Raises SourceError where there is none, or a list of images."""
        lists = []
        for name in [*IMAGE, *self._told("Image")]:
            leaves = [column for column in self.columns if column.name.split(".")[0] == name]
            lists += [column.name for column in leaves if column.repeated]
            for column in leaves:
                good = column.kind == "BYTE_ARRAY" and not column.text and not column.repeated
                if good and column.name in (name, f"{name}.bytes"):
                    return column
        if lists:
            raise SourceError(f"{self.file}: the column {lists[0][:60]!a} is a list; only one image a row is supported")
        raise self.missing("image bytes", *IMAGE)

    def label(self) -> Column | None:
        """The column with the labels; None: there is none. Raises SourceError where it is neither number nor text."""
        for name in [*LABEL, *self._told("ClassLabel")]:
            for column in self.columns:
                if column.name.split(".")[0] != name:
                    continue
                if column.repeated or column.name != name or column.kind not in ("INT32", "INT64", "BYTE_ARRAY"):
                    raise SourceError(f"{self.file}: the column {column.name[:60]!a} has not one number or text a row")
                return column
        return None

    def beside(self, column: Column, name: str) -> Column | None:
        """The field `name`, text or bytes, of the struct that `column` is a field of; None: there is none."""
        above, dot, _ = column.name.rpartition(".")
        fields = {found.name: found for found in self.columns if found.kind == "BYTE_ARRAY" and not found.repeated}
        return fields.get(f"{above}.{name}") if dot else None

    def names(self, label: Column) -> tuple[str, ...]:
        """The names of the classes by number, as Hugging Face's ClassLabel has them; empty: it names none."""
        feature = self.features.get(label.name)
        names = feature.get("names") if isinstance(feature, dict) else None
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def chunks(self, column: Column) -> list[Chunk]:
        """The chunks of a column in the order of their rows. Raises SourceError where they cannot be."""
        with blame(f"{self.file}: its footer"):
            chunks = [self._chunk(group, column) for group in self.groups]
            if sum(chunk.rows for chunk in chunks) != self.rows:
                raise Damaged(f"the row groups have not the {self.rows:,} rows that the file claims")
        return chunks

    def missing(self, what: str, *names: str) -> SourceError:
        found = ", ".join(column.name for column in self.columns[:50])[:200]
        return SourceError(f"{self.file}: no column of {what}: none is called {', '.join(names)}; it has {found!a}")

    def _chunk(self, group: Fields, column: Column) -> Chunk:
        chunks = structs(group, 1)
        if len(chunks) != len(self.columns):
            raise Damaged(f"a row group has {len(chunks):,} columns, the schema {len(self.columns):,}")
        if 1 in chunks[column.place]:
            raise Unsupported("columns in other files are not supported")
        about = struct(chunks[column.place], 3)
        rows, start = number(group, 3), number(about, 9)
        if 11 in about and 0 < (dictionary := number(about, 11, -1)) < start:
            start = dictionary
        stop = start + number(about, 7)
        if not len(MAGIC) <= start <= stop <= self.size or KINDS.index(column.kind) != number(about, 1):
            raise Damaged("a row group has a column where it cannot be")
        if number(about, 5) != rows:
            raise Damaged(f"a row group has {rows:,} rows, a column in it {number(about, 5):,} values")
        nulls = number(struct(about, 12), 3) if 12 in about and 3 in struct(about, 12) else 0
        return Chunk(start, stop, rows, number(about, 4), nulls)

    def _told(self, kind: str) -> list[str]:
        return [name for name, about in self.features.items() if isinstance(about, dict) and about.get("_type") == kind]


@contextmanager
def blame(where: str) -> Iterator[None]:
    """Turn Damaged into a SourceError that says where."""
    try:
        yield
    except Damaged as error:
        raise SourceError(f"{where}: {error}; {error.remedy}") from error


def read_footer(path: Location) -> Footer:
    """The footer of a parquet file. Raises SourceError: it is none, or damaged or encrypted."""
    data, size = _footer_bytes(path)
    with blame(f"{path}: its footer"):
        fields, _ = read_struct(data)
        rows = number(fields, 3)
        if rows > size:
            raise Damaged(f"it claims {rows:,} rows in a file of {size:,} bytes")
        return Footer(str(path), size, rows, _columns(structs(fields, 2)), _features(fields), structs(fields, 4))


def _footer_bytes(path: Location) -> tuple[bytes, int]:
    """The footer, and the size of the file."""
    with opened(path) as (read, size):
        tail = read(8, max(size - 8, 0))
        if tail[4:] == ENCRYPTED:
            raise SourceError(f"{path}: encrypted; only plain parquet files are supported")
        if size < 12 or tail[4:] != MAGIC or read(4, 0) != MAGIC:
            raise SourceError(f"{path}: not a parquet file, or cut short; fetch it again")
        length, most = int.from_bytes(tail[:4], "little"), min(MAX_FOOTER, size - 12)
        if length > most:
            raise SourceError(f"{path}: its footer claims {length:,} bytes, at most {most:,} may be; fetch it again")
        return read(length, size - 8 - length), size


def _columns(schema: list[Fields]) -> tuple[Column, ...]:
    """The leaves of the schema, which lists each struct before its fields."""
    if not schema or len(schema) > MAX_SCHEMA:
        raise Unsupported(f"a schema of {len(schema):,} columns, at most {MAX_SCHEMA:,} are supported")
    columns: list[Column] = []
    open_ = [_Struct("", number(schema[0], 5), 0, False)]
    for element in schema[1:]:
        while open_ and not open_[-1].left:
            open_.pop()
        if not open_ or len(open_) > MAX_NESTING:
            raise Damaged("the schema has columns outside it, or too far inside")
        above = open_[-1]
        above.left -= 1
        repetition = number(element, 3, 0, _REPEATED)
        inner = _Struct(
            above.prefix + text(element, 4),
            number(element, 5) if 5 in element else 0,
            above.levels + (repetition != _REQUIRED),
            above.repeated or repetition == _REPEATED,
        )
        if len(inner.prefix) > MAX_NAME:
            raise Unsupported(f"a column's name of more than {MAX_NAME:,} characters is not supported")
        if inner.left:
            inner.prefix += "."
            open_.append(inner)
        else:
            columns.append(_column(element, inner, len(columns)))
    return tuple(columns)


@dataclass
class _Struct:
    prefix: str
    left: int  # fields that are still to come
    levels: int
    repeated: bool


def _column(element: Fields, inner: _Struct, place: int) -> Column:
    logical = element.get(10)
    utf8 = element.get(6) == 0 or (isinstance(logical, dict) and 1 in logical)
    kind = KINDS[number(element, 1, 0, len(KINDS) - 1)]
    return Column(inner.prefix, place, kind, utf8, inner.levels, inner.repeated)


def _features(fields: Fields) -> dict[str, Any]:
    """info.features of what Hugging Face's datasets writes; empty where it is not as expected."""
    told = [text(item, 2) for item in structs(fields, 5) if item.get(1) == b"huggingface"]
    try:
        features = json.loads(told[0] if told and len(told[0]) <= MAX_JSON else "")["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}
