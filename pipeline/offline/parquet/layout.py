"""Hugging Face's parquet files as raw images: a row is an image, its place is the number of the row."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat

from pipeline.archives import ListingCache
from pipeline.offline.folders import split_folders
from pipeline.offline.parquet import pages
from pipeline.offline.parquet.footers import LABEL, Column, Footer, read_footer
from pipeline.offline.raw import (
    SPLIT_FOLDERS,
    Folder,
    LeftOut,
    RawImage,
    SourceError,
    Sources,
    is_picture,
    pictures,
    ranked,
    shown,
)
from pipeline.offline.webdataset import MAX_LABEL, split_of

DATA = "data"  # where a repository of Hugging Face's has its files
MAX_NAME = 4096  # bytes, as PATH_MAX
NO_IMAGE, NO_LABEL = "row without a picture", "picture without a label in its row"
_WNID = re.compile(r"(?<![A-Za-z0-9])n[0-9]{8}(?![0-9])")


def recognise(folder: Folder) -> bool:
    """train/ and the like hold parquet files and no folders; or data/ holds some; or RAW, and no pictures."""
    inner = [Folder.of(folder.path / name) for name in folder.folders if SPLIT_FOLDERS.get(name) == "train"]
    if inner:
        return any(_parquets(train) and not train.folders for train in inner)
    if DATA in folder.folders and _parquets(Folder.of(folder.path / DATA)):
        return True
    loose = _parquets(folder)
    if not loose or any(map(is_picture, folder.files)):
        return False
    told = any(map(split_of, loose))
    return told or not any(next(pictures(folder.path / name, "", LeftOut()), None) for name in folder.folders)


def read(folder: Folder, listings: ListingCache) -> Sources:
    """Every labelled image of the files; in a test split, those without a label too.

    Numbered classes are called by the WNID in the names of their images, where all images of each class have one of its
    own; else by the number. The words are those of Hugging Face's ClassLabel. Text labels are the classes.

    Raises:
        SourceError: no parquet files, a damaged one, one of an unsupported kind, or labels that contradict its names.
    """
    files = _files(folder)
    if not files:
        raise folder.misfit("parquet", "no .parquet is in it, nor in data/, train/, val/ or test/")
    sources = Sources(f"{len(files)} parquet files")
    classes = _Classes()
    for path, split in files.items():
        _add_file(sources, read_footer(folder.path / path), path, split, classes)
    used = {path.partition("/")[0] for path in files}
    for name in sorted(used - files.keys()):
        inside = [path.partition("/")[2] for path in files if path.startswith(f"{name}/")]
        Folder.of(folder.path / name).ignore(sources.ignored, inside)
    folder.ignore(sources.ignored, used)
    _name_classes(sources, classes)
    return sources


@dataclass
class _Classes:
    """What the files say of the classes."""

    text: bool | None = None  # whether labels are text; None: not known yet
    names: tuple[str, ...] = ()  # of class 0, 1, …
    named_by: str = ""  # the file that has the names
    wnids: dict[str, str] = field(default_factory=dict)  # label → the WNID in its images' names; empty: none or many

    def add_file(self, footer: Footer, label: Column) -> None:
        """Note the kind and the names of its labels. Raises SourceError where another file has others."""
        text = label.kind == "BYTE_ARRAY"
        if self.text not in (None, text):
            raise SourceError(f"{footer.file}: its labels are {_kind(text)}, those of other files {_kind(not text)}")
        self.text = text
        names = () if text else footer.names(label)
        if names and self.names and names != self.names:
            raise SourceError(f"{footer.file}: names other classes than {self.named_by}; RAW must hold one data set")
        if names and not self.names:
            self.names, self.named_by = names, footer.file

    def label(self, value: bytes | None) -> str | None:
        """The label as text; None where there is none that can be used (−1 is Hugging Face's word for none)."""
        if value is None:
            return None
        if not self.text:
            number = int.from_bytes(value, "little", signed=True)
            return str(number) if number >= 0 else None
        text = _decoded(value, 4 * MAX_LABEL).strip()
        return text if 0 < len(text) <= MAX_LABEL and text != "-1" else None

    def add_image(self, label: str, name: str, where: str) -> None:
        """Note the WNID in an image's name. Raises SourceError where the label has no name, though others have."""
        if not self.text and self.names and int(label) >= len(self.names):
            raise SourceError(
                f"{where} has the label {label}, but {self.named_by} names the classes 0 to {len(self.names) - 1}; "
                "fetch both again"
            )
        found = set(_WNID.findall(name.rpartition("/")[2]))
        wnid = found.pop() if len(found) == 1 else ""
        if self.wnids.setdefault(label, wnid) != wnid:
            self.wnids[label] = ""

    def called(self) -> dict[str, str]:
        """Label → name of the class: its WNID, else its number, as wide as the largest."""
        wnids = set(self.wnids.values())
        if self.wnids and all(wnids) and len(wnids) == len(self.wnids):
            return self.wnids
        labels = {str(n) for n in range(len(self.names))} | self.wnids.keys()
        width = max(map(len, labels), default=1)
        return {label: label.zfill(width) for label in labels}


def _parquets(folder: Folder) -> list[str]:
    return [name for name in folder.files if name.lower().endswith(".parquet")]


def _files(folder: Folder) -> dict[str, str]:
    """Path of each file below RAW → its split: that of its folder, or the one that its name tells, else train."""
    inside = {
        f"{name}/{file}": split
        for name, split in split_folders(folder).items()
        for file in _parquets(Folder.of(folder.path / name))
    }
    if inside:
        return inside
    told = {name: split_of(name) for name in _parquets(folder)}
    if DATA in folder.folders:
        told |= {f"{DATA}/{name}": split_of(name) for name in _parquets(Folder.of(folder.path / DATA))}
    if not any(told.values()):
        return dict.fromkeys(told, "train")
    return {path: split for path, split in told.items() if split}


def _add_file(sources: Sources, footer: Footer, path: str, split: str, classes: _Classes) -> None:
    image, label = footer.image(), footer.label()
    if label:
        classes.add_file(footer, label)
    elif split != "test":
        raise footer.missing("labels", *LABEL)
    beside = footer.beside(image, "path")
    labels = pages.values(footer, label) if label else repeat(None)
    names = _names(pages.values(footer, beside) if beside else repeat(None), footer.rows)
    for row, (null, value, name) in enumerate(zip(pages.nulls(footer, image), labels, names)):
        text = classes.label(value)
        if null:
            sources.ignored.add(NO_IMAGE, f"{path}/{name}")
        elif text is None and split != "test":
            sources.ignored.add(NO_LABEL, f"{path}/{name}")
        else:
            if text is not None:
                classes.add_image(text, name, f"{footer.file}: row {row}")
            sources.images.append(RawImage(split, f"{path}/{name}", text, footer.file, row, 0))


def _names(values: Iterator[bytes | None], rows: int) -> Iterator[str]:
    """A name for each row, unlike all before it: the path beside the image where it is a plain one, else the row."""
    width = len(str(max(rows - 1, 0)))
    seen: set[str] = set()
    for row, value in zip(range(rows), values):
        name = _plain(value) or f"{row:0{width}d}.jpg"
        while name in seen:
            stem, _, suffix = name.rpartition(".")
            name = f"{stem}_{row:0{width}d}.{suffix}" if stem and "/" not in suffix else f"{name}_{row:0{width}d}"
        seen.add(name)
        yield name


def _plain(value: bytes | None) -> str:
    """A path as it stands, if it is printable, relative and leads to a name; else nothing."""
    name = _decoded(value or b"", MAX_NAME)
    parts = name.split("/")
    return name if not any(part in ("", ".", "..") for part in parts) else ""


def _decoded(value: bytes, most: int) -> str:
    """UTF-8 text; empty where it has more than `most` bytes, is not printable, or is no text."""
    try:
        text = value.decode("utf-8") if len(value) <= most else ""
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() else ""


def _kind(text: bool) -> str:
    return "text" if text else "numbers"


def _name_classes(sources: Sources, classes: _Classes) -> None:
    if classes.text:
        sources.classes = ranked(sources.images.wnids, {}, {})
        return
    called = classes.called()
    sources.images.rename_classes(called.__getitem__)
    words = {called[str(n)]: shown(name) for n, name in enumerate(classes.names) if str(n) in called and name}
    sources.classes = ranked(called.values(), words, {})
