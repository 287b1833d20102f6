"""Hugging Face's parquet files: each row is a raw image.

One image costs the reading of the row group around it, and a build reads images in shuffled order. So a build first
copies the rows that it needs, in their order, into plain tars beside its state.
"""

import hashlib
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline import SourceError, UserError, storage
from pipeline.archives import ListingCache
from pipeline.cli import printable
from pipeline.files import TAR_BLOCK, HashingFile, add_tar_member, write_aside
from pipeline.manifest import ClassRecord
from pipeline.offline.classes import name_classes
from pipeline.offline.columns import LABEL, LABELS, File, opened
from pipeline.offline.raw import Options, RawImage, RawTable, Reading, Sources
from pipeline.offline.tree import Folder
from pipeline.offline.webdataset import file_evidence, files_by_split, usable_label
from pipeline.storage import Location

NO_IMAGE, NO_LABEL = "row without a picture", "picture without a label in its row"
_WNID = re.compile(r"(?<![A-Za-z0-9])n[0-9]{8}(?![0-9])")


def evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's parquet files as tables of pictures."""
    return file_evidence(folder, ".parquet", "Hugging Face's parquet files")


def read(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """List every labelled image of the files; in a test split, also those without a label.

    Numbered classes are named by the WNID in the names of their images if all images of each class share one of its
    own; else by the number. Their words are those of Hugging Face's ClassLabel, or of a column of NAME. Text labels
    are the class names. Files without a row are passed over.

    Raises:
        SourceError: a damaged file, one of an unsupported kind, or labels that contradict its names.
    """
    sources = Sources("parquet files")
    files = files_by_split(folder, ".parquet", options, sources.notes)
    sources.layout = f"{len(files)} parquet files"
    labels = _Labels()
    for path, split in files.items():
        with opened(folder.path / path) as file:
            if file.rows:
                _add_file(sources, file, path, split, labels)
    folder.ignore(sources.ignored, files)
    if len(labels.kinds) > 1 or len(labels.lists) > 1:
        others = " and ".join((labels.kinds if len(labels.kinds) > 1 else labels.lists).values())
        raise SourceError(
            f"{others}: have labels of two kinds or columns, or other names of classes; RAW must hold one data set"
        )
    sources.gives = " or ".join(labels.gives)
    first = next(iter((labels.lists or labels.kinds).values()), "")
    name_classes(sources, labels.named(), first, options)
    note = "a build first copies the pictures of the parquet files to DATASET/.build, and deletes the copy at its end"
    sources.notes.append(f"{note}: up to {sum(sources.images.sizes) / 1e6:,.0f} MB")
    return sources


class _Labels:
    """The labels of all files: of which kind and columns they are, and which words and WNIDs belong to them."""

    def __init__(self) -> None:
        self.gives: dict[str, None] = {}  # in words
        self.kinds: dict[tuple[str, str], str] = {}  # "text", "number" … and column → the first file with such labels
        self.lists: dict[tuple[str, ...], str] = {}  # names of the classes 0, 1, … → the first file with them
        self.words: dict[int, str] = {}  # of a column beside the numbers
        self.wnids: dict[str, set[str]] = {}  # label → those in its images' names; "" for none in one

    def add_file(self, file: File) -> None:
        self.gives[file.gives()] = None
        self.kinds.setdefault((file.kind(), file.label.path), file.name)
        if names := file.class_names():
            self.lists.setdefault(names, file.name)

    def add(self, file: File, label: str, name: str, words: Any) -> None:
        """Add a row: its label, the name of its image, and what the column of words has. Raises SourceError."""
        self.wnids.setdefault(label, set()).update(_WNID.findall(name.rpartition("/")[2]) or [""])
        text = usable_label(words) if file.words else None
        if text and self.words.setdefault(int(label), text) != text:
            both = f"{printable(self.words[int(label)], 60)} and {printable(text, 60)}"
            raise SourceError(f"{file.name}: column {file.words.path}: the label {label} has two names, {both}")

    def named(self) -> dict[int, ClassRecord]:
        """Return the WNID of each number if each has one of its own; else the numbers that have words."""
        if "number" not in {kind for kind, _ in self.kinds}:
            return {}
        listed = next(iter(self.lists), ())
        words = {n: printable(name, 120) for n, name in ([*enumerate(listed)] or [*self.words.items()])}
        own = {int(label): min(inside) for label, inside in self.wnids.items() if len(inside) == 1}
        if not (all(own.values()) and 0 < len(self.wnids) == len(set(own.values()))):
            numbers = {*words} if listed or not words else {*words, *map(int, self.wnids)}
            own = {number: f"{number:0{len(str(max(numbers)))}d}" for number in numbers}
        inside = {number: name for number, name in own.items() if not listed or number < len(listed)}
        return {number: ClassRecord(number, name, words.get(number) or name, None) for number, name in inside.items()}


def _add_file(sources: Sources, file: File, path: str, split: str, labels: _Labels) -> None:
    if file.label:
        labels.add_file(file)
    elif split != "test":
        raise file.missing("one number or text", LABEL)
    nulls = 0
    values = file.values(file.label, LABELS) if file.label else repeat(None)
    beside = file.values(file.words, LABELS) if file.words else repeat(None)
    for row, (null, value, words, name) in enumerate(zip(file.nulls(), values, beside, file.names())):
        label = usable_label(file.require_label(value))
        nulls += null
        if null or (label is None and split != "test"):
            sources.ignored.lose(NO_IMAGE if null else NO_LABEL, f"{path}/{name}")
            continue
        if label is not None:
            labels.add(file, label, name, words)
        sources.images.append(RawImage(split, f"{path}/{name}", label, file.name, row, file.mean_bytes))
    if nulls == file.rows:
        problem = "null in every row, so the pictures are not in the file"
        remedy = "save it with embed_external_files=True, or name the folder of the pictures as RAW"
        raise SourceError(f"{file.name}: column {file.image.path}: {problem}; {remedy}")


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
        with opened(self.source) as file:
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
