"""Hugging Face's parquet files: each row is a raw image.

One image costs the reading of the row group around it, and a build reads images in shuffled order. So a build first
copies the rows that it needs, in their order, into plain tars beside its state.
"""

import hashlib
import io
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline import SourceError, UserError, storage
from pipeline.archives import MAX_NAME, ListingCache
from pipeline.cli import printable
from pipeline.files import TAR_BLOCK, HashingFile, add_tar_member, write_aside
from pipeline.manifest import ClassRecord
from pipeline.offline.classes import name_classes
from pipeline.offline.raw import Options, RawImage, RawTable, Reading, Sources
from pipeline.offline.tree import Folder
from pipeline.offline.webdataset import file_evidence, files_by_split, usable_label
from pipeline.storage import Location, Read

IMAGE = ("image", "img", "image_bytes", "img_bytes", "bytes", "jpg", "jpeg", "png", "webp")  # names of columns
LABEL = ("label", "labels", "fine_label", "class")
NO_IMAGE, NO_LABEL = "row without a picture", "picture without a label in its row"
LABELS, IMAGES = 1024, 32  # rows in memory at a time
# 1 MiB is read at a time, and not a row group's whole column; checksums are verified where a file has some
OPTIONS = {"buffer_size": 2**20, "pre_buffer": False, "page_checksum_verification": True}
_WNID = re.compile(r"(?<![A-Za-z0-9])n[0-9]{8}(?![0-9])")


def evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's parquet files as tables of pictures."""
    return file_evidence(folder, ".parquet", "Hugging Face's parquet files")


def read(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """List every labelled image of the files; in a test split, also those without a label.

    Numbered classes are named by the WNID in the names of their images if all images of each class share one of its
    own; else by the number. Their words are those of Hugging Face's ClassLabel. Text labels are the class names.

    Raises:
        SourceError: a damaged file, one of an unsupported kind, or labels that contradict its names.
    """
    sources = Sources("parquet files", gives="the label column")
    files = files_by_split(folder, ".parquet", options, sources.notes)
    sources.layout = f"{len(files)} parquet files"
    kinds: dict[tuple[str, tuple[str, ...]], str] = {}  # kind of label and names of classes → the first file with them
    wnids: dict[str, set[str]] = {}  # label → those in its images' names; "" for none in one
    for path, split in files.items():
        with _opened(folder.path / path) as file:
            _add_file(sources, file, path, split, wnids)
            if file.label:
                kinds.setdefault(("text" if _is_bytes(file.label) else "number", file.class_names()), file.name)
    folder.ignore(sources.ignored, files)
    if len({kind for kind, _ in kinds}) > 1 or len({names for _, names in kinds if names}) > 1:
        others = " and ".join(kinds.values())
        raise SourceError(f"{others}: have labels of two kinds, or other names of classes; RAW must hold one data set")
    kind, names = max(kinds, default=("text", ()))
    name_classes(sources, _named(wnids, names) if kind == "number" else None, kinds.get((kind, names), ""))
    note = "a build first copies the pictures of the parquet files to DATASET/.build, and deletes the copy at its end"
    sources.notes.append(f"{note}: up to {sum(sources.images.sizes) / 1e6:,.0f} MB")
    return sources


def _add_file(sources: Sources, file: "_File", path: str, split: str, wnids: dict[str, set[str]]) -> None:
    if not file.label and split != "test":
        raise file.missing("one number or text", LABEL)
    labels = file.values(file.label, LABELS) if file.label else repeat(None)
    for row, (null, value, name) in enumerate(zip(file.nulls(), labels, file.names())):
        label = usable_label(_text(value))
        if null or (label is None and split != "test"):
            sources.ignored.add(NO_IMAGE if null else NO_LABEL, f"{path}/{name}")
            continue
        if label is not None:
            wnids.setdefault(label, set()).update(_WNID.findall(name.rpartition("/")[2]) or [""])
        sources.images.append(RawImage(split, f"{path}/{name}", label, file.name, row, file.mean_bytes))


def _text(value: Any) -> str:
    """Return a text, or a number from −1 on, as printable text; empty if it is neither, or too long."""
    if isinstance(value, int):
        return str(max(value, -1))
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    usable = isinstance(text, str) and text.isprintable() and len(text) <= MAX_NAME  # surrogates are not printable
    return text if usable else ""


def _named(wnids: dict[str, set[str]], names: tuple[str, ...]) -> dict[int, ClassRecord]:
    """Return the WNID of each number if each has one of its own; else the numbers of `names`."""
    own = {int(label): min(inside) for label, inside in wnids.items() if len(inside) == 1}
    if not (all(own.values()) and 0 < len(wnids) == len(set(own.values()))):
        own = {number: f"{number:0{len(str(len(names) - 1))}d}" for number in range(len(names))}
    words = dict(enumerate(printable(name, 120) for name in names))
    inside = {number: name for number, name in own.items() if not names or number < len(names)}
    return {number: ClassRecord(number, name, words.get(number) or name, None) for number, name in inside.items()}


@contextmanager
def temporary_copy(images: RawTable, indices: np.ndarray) -> Iterator[RawTable]:
    """Yield the table that `spool` returns for a temporary folder."""
    with TemporaryDirectory(prefix="penstock-") as folder:
        yield spool(images, indices, Path(folder))


def spool(images: RawTable, indices: np.ndarray, folder: Location) -> RawTable:
    """Copy the parquet rows among the images at `indices` into tars in `folder`; return a table that points there.

    Each parquet file becomes one tar, written aside. One that is there already is used: an earlier run, or another part
    of the build, has written the same bytes. A table without parquet rows is returned as it is.

    Raises:
        UserError: the disk has too little room.
        SourceError: a parquet file is damaged, or has other rows than when it was listed.
        OSError: as the file system says.
    """
    copies = [_Copy(images, file, chosen, folder) for file, chosen in images.by_file(indices, ".parquet").items()]
    missing = [copy for copy in copies if not storage.is_file(copy.tar)]
    if missing and isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = sum(copy.bytes for copy in missing), shutil.disk_usage(folder).free
        if needed > free:
            figures = f"{needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
            raise UserError(f"{folder}: a copy of RAW's pictures takes {figures}; make room or name another DATASET")
    random.shuffle(missing)  # parts of a build that begin at once do not all copy the same file
    for copy in missing:
        if not storage.is_file(copy.tar):  # another part may have written it in the meantime
            write_aside(copy.tar, copy.write)
    return images.moved((copy.indices, str(copy.tar), *copy.extents()) for copy in copies) if copies else images


class _Copy:
    """Rows of a parquet file as a tar: a member for each, and in the last the offsets and sizes of all."""

    def __init__(self, images: RawTable, file: str, indices: np.ndarray, folder: Location) -> None:
        self.source = storage.location(file)
        self.indices = indices  # (n,) in the table
        self.rows = np.asarray(images.offsets)[indices]  # (n,) uint64, ascending
        self.bytes = int(np.asarray(images.sizes)[indices].sum()) + 2 * TAR_BLOCK * len(indices)  # about
        # the name has all that the bytes depend on, so that the copy of a file that has changed since is not used
        version = repr((str(self.source.absolute()), storage.stamp(self.source), self.rows.tobytes()))
        self.tar = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}.tar"

    def write(self, out: HashingFile) -> None:
        extents = []
        with _opened(self.source) as file:
            for row, data in zip(self.rows.tolist(), file.images(self.rows)):
                extents.append((add_tar_member(out, str(row), data), len(data)))
        if len(extents) != len(self.rows):
            problem = f"has no row {self.rows[len(extents)]}; it changed since the build began"
            raise SourceError(f"{self.source}: {problem}; delete DATASET and start again")
        add_tar_member(out, "places", np.array(extents, "<u8").tobytes())
        out.write(bytes(2 * TAR_BLOCK))

    def extents(self) -> np.ndarray:
        """Return the offset and the size of each row in the tar, (2, n) uint64, from its last member."""
        length = 16 * len(self.rows)
        start = storage.stamp(self.tar)[0] - 2 * TAR_BLOCK - length - -length % TAR_BLOCK
        return np.frombuffer(storage.read_range(str(self.tar), start, length), "<u8").reshape(-1, 2).T


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
def _opened(path: Location) -> Iterator["_File"]:
    """Open a parquet file. All that pyarrow raises inside the block becomes a SourceError that names the file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SourceError("parquet files need pyarrow: pip install 'penstock-imagenet[parquet]'") from error
    with storage.opened(path) as (read, size):
        try:
            yield _File(str(path), size, ParquetFile(_Stream(read, size), **OPTIONS))
        except (ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the operating system's; those of pyarrow have no number
            reason = printable(str(error).partition("\n")[0], 120)
            raise SourceError(f"{path}: damaged, or of an unsupported kind ({reason}); fetch it again") from error


class _File:
    """An open parquet file: its columns of images and labels, and their values."""

    def __init__(self, name: str, size: int, reader: Any) -> None:
        self.name, self._reader, self.rows = name, reader, reader.metadata.num_rows
        self._columns = [reader.schema.column(i) for i in range(len(reader.schema))]  # leaves, such as image.bytes
        try:
            features = json.loads(reader.metadata.metadata[b"huggingface"])["info"]["features"].items()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            features = ()  # not written by Hugging Face's library
        self._features = {name: about for name, about in features if isinstance(about, dict)}
        images = [c for c in self._named(IMAGE, "Image") if _is_bytes(c) and c.logical_type.type != "STRING"]
        self.image: Any = next((c for c in images if c.path.partition(".")[2] in ("", "bytes")), None)
        if self.image is None:
            raise self.missing("the bytes of one image", IMAGE)
        labels = [c for c in self._named(LABEL, "ClassLabel") if "." not in c.path and not c.max_repetition_level]
        self.label: Any = next((c for c in labels if c.physical_type in ("INT32", "INT64") or _is_bytes(c)), None)
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
        columns = ", ".join(column.path for column in self._columns[:50])[:200]
        return SourceError(f"{self.name}: no column named {', '.join(names)} has {content} a row; it has {columns!a}")

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes 0, 1, …, if the file has them and its labels are numbers."""
        names = self._features.get(self.label.path, {}).get("names")
        return tuple(map(str, names)) if isinstance(names, list) and not _is_bytes(self.label) else ()

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


def _is_bytes(column: Any) -> bool:
    return column.physical_type == "BYTE_ARRAY" and not column.max_repetition_level
