"""One parquet file: its columns of images and of labels, and their values row by row."""

import io
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, repeat
from types import NoneType
from typing import Any

import numpy as np

from pipeline import LFS_POINTER, SourceError, storage
from pipeline.archives import MAX_NAME, require_content
from pipeline.cli import printable
from pipeline.storage import Location, Read

IMAGE = ("image", "img", "image_bytes", "img_bytes", "bytes", "jpg", "jpeg", "png", "webp")  # names of columns
LABEL = ("label", "labels", "fine_label", "coarse_label", "class", "target", "label_id", "label_name")
NAME = ("label_name", "class_name", "label_text")  # of the words beside a numbered label
LABEL_TYPES = ("INT32", "INT64", "FLOAT", "DOUBLE", "BOOLEAN", "BYTE_ARRAY")
LABELS, IMAGES = 1024, 32  # rows in memory at a time
# 1 MiB is read at a time, and not a row group's whole column; checksums are verified where a file has some
OPTIONS = {"buffer_size": 2**20, "pre_buffer": False, "page_checksum_verification": True}


class _Stream(io.RawIOBase):
    """Positioned reads as the file object that pyarrow reads from."""

    def __init__(self, read: Read, size: int) -> None:
        self._pread, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._pread(self._size if size < 0 else size, self._position)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position


@contextmanager
def opened(path: Location) -> Iterator["File"]:
    """Open a parquet file. All that pyarrow raises inside the block becomes a SourceError that names the file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SourceError("parquet files need pyarrow: pip install 'penstock-imagenet[parquet]'") from error
    with storage.opened(path) as (read, size):
        require_content(path, read(min(size, len(LFS_POINTER)), 0))
        try:
            yield File(str(path), size, ParquetFile(_Stream(read, size), **OPTIONS))
        except (ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the operating system's; those of pyarrow have no number
            reason = printable(str(error).partition("\n")[0], 120)
            raise SourceError(f"{path}: damaged, or of an unsupported kind ({reason}); fetch it again") from error


class File:
    """An open parquet file: its columns of images and labels, and their values."""

    def __init__(self, name: str, size: int, reader: Any) -> None:
        self.name, self._reader, self.rows = name, reader, reader.metadata.num_rows
        self._columns = [reader.schema.column(i) for i in range(len(reader.schema))]  # leaves, such as image.bytes
        try:
            features = json.loads(reader.metadata.metadata[b"huggingface"])["info"]["features"].items()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            features = ()  # not written by Hugging Face's library
        self._features = {name: about for name, about in features if isinstance(about, dict)}
        if not self.rows:
            return
        images = [c for c in self._named(IMAGE, "Image") if _is_bytes(c) and c.logical_type.type != "STRING"]
        self.image: Any = next((c for c in images if c.path.partition(".")[2] in ("", "bytes")), None)
        if self.image is None:
            raise self.missing("the bytes of one image", IMAGE)
        self._labels = [c for c in self._named(LABEL, "ClassLabel") if _is_label(c)]
        self.label: Any = next(iter(self._labels), None)
        texts = [c for c in self._named(NAME, "") if _is_label(c) and _is_bytes(c)]
        numbered = self.label and not _is_bytes(self.label) and self.label.physical_type != "BOOLEAN"
        self.words: Any = next(iter(texts), None) if numbered and not self.class_names() else None
        number = [column.path for column in self._columns].index(self.image.path)
        for group in range(reader.num_row_groups):
            # raises what is wrong with a column's description, at which column() would end the process
            list(reader.reader.iter_batches(0, row_groups=[group], column_indices=[number], use_threads=False))
        self._chunks = [reader.metadata.row_group(i).column(number) for i in range(reader.num_row_groups)]
        total = sum(chunk.total_uncompressed_size for chunk in self._chunks)  # as the file says
        self.mean_bytes = min(max(total, 0) // max(self.rows, 1), 2**31)  # of an image
        if self.rows > size or self.rows != sum(chunk.num_values for chunk in self._chunks):
            raise SourceError(f"{name}: claims {self.rows:,} rows in {size:,} bytes; fetch it again")

    def _named(self, names: Iterable[str], feature: str) -> list[Any]:
        """Return the columns with these names, and those that are described as such a feature."""
        described = [name for name, about in self._features.items() if about.get("_type") == feature]
        return [c for name in (*names, *described) for c in self._columns if c.path.partition(".")[0] == name]

    def missing(self, content: str, names: Iterable[str]) -> SourceError:
        """Return the refusal of a file without a usable column of these names."""
        columns = ", ".join(column.path for column in self._columns[:50])[:200]
        unused = next((f" ({c.path} is {_kind(c)})" for c in self._named(names, "")), "")
        remedy = "rename a column, or write one with one value a row: a picture as bytes, a label as number or text"
        problem = f"no column named {', '.join(names)} has {content} a row; it has {columns!a}{unused}"
        return SourceError(f"{self.name}: {problem}; {remedy}")

    def kind(self) -> str:
        """Return the kind of the labels: those of one data set are alike."""
        return "text" if _is_bytes(self.label) else "boolean" if self.label.physical_type == "BOOLEAN" else "number"

    def gives(self) -> str:
        """Return the column of the labels, and those beside it that may be others, in words."""
        beside = f", with words from {self.words.path}" if self.words else ""
        used = [column.path for column in (self.label, self.words) if column]  # columns cannot be compared with None
        others = ", ".join(dict.fromkeys(c.path for c in self._labels if c.path not in used))
        return f"the column {self.label.path}{beside}{f' (not {others})' if others else ''}"

    def require_label(self, value: Any) -> Any:
        """Return a row's label; NaN means none. Raises SourceError where it can be none, such as 0.5 or infinity."""
        fraction = isinstance(value, float) and not value.is_integer()
        if (fraction and not math.isnan(value)) or not isinstance(value, (bool, int, float, str, bytes, NoneType)):
            problem = f"{printable(str(value), 60)} is no label; write whole numbers or text"
            raise SourceError(f"{self.name}: column {self.label.path}: {problem}")
        return value

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes 0, 1, …, if the file has them and its labels are numbers."""
        names = self._features.get(self.label.path, {}).get("names")
        return tuple(map(str, names)) if isinstance(names, list) and self.kind() == "number" else ()

    def names(self) -> Iterator[str]:
        """Yield a name for each row, unlike all before: the path beside its image, if plain, or its number."""
        path = self.image.path.rpartition(".")[0] + ".path"
        beside = next((column for column in self._columns if column.path == path and _is_bytes(column)), None)
        width = len(str(max(self.rows - 1, 0)))
        seen: set[str] = set()
        for row, value in zip(range(self.rows), self.values(beside, LABELS) if beside else repeat(None)):
            name = _text(value)
            if any(part in ("", ".", "..") for part in name.split("/")):
                name = f"{row:0{width}d}.jpg"
            while name in seen:
                stem, _, suffix = name.rpartition(".")
                name = f"{stem}_{row:0{width}d}.{suffix}" if stem and "/" not in suffix else f"{name}_{row:0{width}d}"
            seen.add(name)
            yield name

    def nulls(self) -> Iterator[bool]:
        """Yield for each row True if its image is null. Reads only row groups that have nulls, as the file says."""
        for group, chunk in enumerate(self._chunks):
            # statistics of another type would end the process; the file is refused when the column is read
            has_nulls = chunk.physical_type == "BYTE_ARRAY" and chunk.statistics and chunk.statistics.null_count
            values = self.values(self.image, IMAGES, group) if has_nulls else repeat(b"", chunk.num_values)
            yield from (value is None for value in values)

    def images(self, rows: np.ndarray) -> Iterator[bytes]:
        """Yield the images in these rows, (n,) ascending; fewer if the file has not so many. Null becomes empty."""
        first = 0
        for group, chunk in enumerate(self._chunks):
            wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + chunk.num_values)]
            values, row = self.values(self.image, IMAGES, group), first
            for number in wanted.tolist():
                yield next(islice(values, number - row, None)) or b""
                row = number + 1
            first += chunk.num_values

    def values(self, column: Any, rows: int, group: int | None = None) -> Iterator[Any]:
        """Yield a column's value in each row of the file or of one row group, None for null; so many are in memory."""
        groups, count = None if group is None else [group], 0
        for batch in self._reader.iter_batches(rows, groups, [column.path], use_threads=False):
            for row in batch.to_pylist():  # {"image": {"bytes": …}} or {"label": …}
                for name in column.path.split("."):
                    row = row and row[name]
                yield row
            count += len(batch)
        if count != (self.rows if group is None else self._chunks[group].num_values):
            raise SourceError(f"{self.name}: {column.path[:60]!a} ends after {count:,} rows; fetch it again")


def _is_label(column: Any) -> bool:
    return column.max_repetition_level == 0 and "." not in column.path and column.physical_type in LABEL_TYPES


def _kind(column: Any) -> str:
    """Return the kind of a column's values, in words."""
    if column.max_repetition_level:
        return "a list"
    logical = column.logical_type.type
    return "text" if logical == "STRING" else (column.physical_type if logical == "NONE" else logical).lower()


def _is_bytes(column: Any) -> bool:
    return column.physical_type == "BYTE_ARRAY" and not column.max_repetition_level


def _text(value: Any) -> str:
    """Return a name of an image as printable text; empty if it is none, or too long."""
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    usable = isinstance(text, str) and text.isprintable() and len(text) <= MAX_NAME  # surrogates are not printable
    return text if usable else ""
