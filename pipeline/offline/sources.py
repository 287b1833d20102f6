"""Where raw images are: every layout that we know → split, class and locator of each image."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError
from pipeline.manifest import ClassRecord
from pipeline.offline.devkit import Devkit, read_devkit

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
WNID_NAME = re.compile(r"(n\d{8})_(.+)\.\w+")
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"


class SourceError(UserError):
    """RAW holds nothing that we know, or contradicts itself."""


@dataclass(frozen=True, slots=True)
class RawImage:
    """One raw image: `size` bytes of `file` from `offset`. `path` names it below RAW, through archives."""

    split: str
    path: str
    wnid: str | None  # None: no label
    file: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        """The raw bytes, by one positioned read. Raises SourceError where the file became shorter since the plan."""
        with open(self.file, "rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise SourceError(f"{self.file}: changed since the build began; delete DATASET and start again")
        return data


@dataclass
class Sources:
    """Every raw image below RAW, in no particular order, and its classes, in the order of their labels."""

    layout: str
    images: list[RawImage]
    classes: tuple[ClassRecord, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)  # what is no picture, by kind


def find_sources(raw: Path) -> Sources:
    """Recognise the layout of RAW and list its images.

    Raises:
        SourceError: RAW does not exist, is empty, or has no layout that we know.
    """
    if not raw.is_dir():
        raise SourceError(
            f"{raw}: {'not a directory' if raw.exists() else 'no such directory'}; "
            "RAW is the folder with the raw images or archives"
        )
    folders = sorted(entry.name for entry in os.scandir(raw) if entry.is_dir() and not entry.name.startswith("."))
    files = sorted(entry.name for entry in os.scandir(raw) if entry.is_file() and not entry.name.startswith("."))
    pictures = [name for name in files if _is_picture(name)]
    if TRAIN_TAR in files:
        return _official(raw, files, folders)
    if any(SPLIT_FOLDERS.get(name) == "train" for name in folders):
        return _split_folders(raw, files, folders)
    if pictures and all(WNID_NAME.fullmatch(name) for name in pictures):
        return _flat(raw, files, folders)
    if folders and not pictures:
        sources = Sources("one folder per class", [])
        _class_folders(sources, raw, "", "train")
        if sources.images:
            return _with_folder_classes(sources)
    found = f"{len(folders)} folders and {len(files)} files" if folders or files else "nothing"
    raise SourceError(
        f"{raw}: no layout that Penstock knows. Looked for {TRAIN_TAR} (with {VAL_TAR} and {DEVKIT_TAR}); "
        f"train/ and val/ with one folder per class; one folder per class; files named WNID_….JPEG. Found {found}."
    )


def _official(raw: Path, files: list[str], folders: list[str]) -> Sources:
    """The archives as they are downloaded: a tar of one tar per synset, a flat tar, the devkit."""
    if VAL_TAR in files and DEVKIT_TAR not in files:
        raise SourceError(f"{raw / VAL_TAR}: its labels are in {DEVKIT_TAR}, which is missing beside it")
    devkit = read_devkit(raw / DEVKIT_TAR) if DEVKIT_TAR in files else Devkit({}, {}, [])
    sources = Sources("the official ILSVRC2012 archives", [])
    _ignore(sources, [name for name in files if name not in (TRAIN_TAR, VAL_TAR, DEVKIT_TAR)], folders)
    with open(raw / TRAIN_TAR, "rb") as file:
        for synset, start, size in _members(file, sources, 0, os.fstat(file.fileno()).st_size):
            for name, offset, length in _members(file, sources, start, start + size):
                path = f"{TRAIN_TAR}/{synset}/{name}"
                sources.images.append(RawImage("train", path, Path(synset).stem, file.name, offset, length))
    if VAL_TAR in files:
        with open(raw / VAL_TAR, "rb") as file:
            members = sorted(_members(file, sources, 0, os.fstat(file.fileno()).st_size))
        if len(members) != len(devkit.validation):
            raise SourceError(
                f"{raw / VAL_TAR}: {len(members)} images, but the devkit has {len(devkit.validation)} labels; "
                "fetch it again"
            )
        for (name, offset, length), wnid in zip(members, devkit.validation):
            sources.images.append(RawImage("val", f"{VAL_TAR}/{name}", wnid, file.name, offset, length))
    wnids = sorted({image.wnid for image in sources.images if image.wnid})
    unknown = [wnid for wnid in wnids if devkit.ids and wnid not in devkit.ids]
    if unknown:
        raise SourceError(
            f"{raw / TRAIN_TAR}: synsets that the devkit lacks: {', '.join(unknown[:5])}; "
            "archive and devkit are of different years"
        )
    sources.classes = tuple(
        ClassRecord(label, wnid, devkit.words.get(wnid, wnid), devkit.ids.get(wnid)) for label, wnid in enumerate(wnids)
    )
    return sources


def _split_folders(raw: Path, files: list[str], folders: list[str]) -> Sources:
    sources = Sources("", [])
    used = {name: SPLIT_FOLDERS[name] for name in folders if name in SPLIT_FOLDERS}
    if len(set(used.values())) != len(used):
        raise SourceError(f"{raw}: {', '.join(used)}: two folders for one split; rename or remove one")
    for folder, split in used.items():
        _class_folders(sources, raw, folder, split)
    sources.layout = " and ".join(f"{folder}/" for folder in used) + " with one folder per class"
    _ignore(sources, files, [name for name in folders if name not in used])
    return _with_folder_classes(sources)


def _class_folders(sources: Sources, raw: Path, folder: str, split: str) -> None:
    """Add every picture of raw/folder/CLASS/…; one directly in raw/folder has no label (allowed for test only)."""
    for directory, names, files in os.walk(raw / folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        inner = Path(directory).relative_to(raw / folder)
        wnid = inner.parts[0] if inner.parts else None
        for name in sorted(files):
            if not _is_picture(name):
                sources.ignored[_kind(name)] += 1
                continue
            if wnid is None and split != "test":
                raise SourceError(
                    f"{raw / folder / name}: a picture outside the class folders has no label; move it into one"
                )
            path = (Path(folder) / inner / name).as_posix()
            file = os.path.join(directory, name)
            sources.images.append(RawImage(split, path, wnid, file, 0, os.stat(file).st_size))


def _with_folder_classes(sources: Sources) -> Sources:
    wnids = sorted({image.wnid for image in sources.images if image.wnid})
    sources.classes = tuple(ClassRecord(label, wnid, wnid, None) for label, wnid in enumerate(wnids))
    if not any(image.split == "train" for image in sources.images):
        raise SourceError("no training pictures: train/ has no class folder with pictures in it")
    return sources


def _flat(raw: Path, files: list[str], folders: list[str]) -> Sources:
    """Files named WNID_…; where the rest is words (n01440764_tench.JPEG) and not a number, it names the class."""
    sources = Sources("one flat folder of WNID_… files", [])
    _ignore(sources, [], folders)
    words: dict[str, str] = {}
    for name in files:
        match = WNID_NAME.fullmatch(name)
        if not match or not _is_picture(name):
            sources.ignored[_kind(name)] += 1
            continue
        wnid, rest = match.groups()
        sources.images.append(RawImage("train", name, wnid, str(raw / name), 0, (raw / name).stat().st_size))
        words.setdefault(wnid, wnid if rest[0].isdigit() else rest.replace("_", " "))
    sources.classes = tuple(ClassRecord(label, wnid, words[wnid], None) for label, wnid in enumerate(sorted(words)))
    return sources


def _members(file: BinaryIO, sources: Sources, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file of the tar at [start, end) of `file`: only headers are read."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset >= end:
                    break
                if not member.isfile():
                    sources.ignored["link or folder in an archive"] += 1
                    continue
                if member.offset_data + member.size > end:
                    raise SourceError(f"{file.name}: cut short inside {member.name}; fetch it again")
                yield member.name, member.offset_data, member.size
            else:  # tarfile ends silently at a header that it cannot read
                file.seek(tar.offset)
                if tar.offset < end and file.read(512).strip(b"\0"):
                    raise SourceError(f"{file.name}: damaged at byte {tar.offset}; fetch it again")
    except tarfile.TarError as error:
        raise SourceError(f"{file.name}: damaged ({error}); fetch it again") from error


def _ignore(sources: Sources, files: list[str], folders: list[str]) -> None:
    """Count what lies in RAW beside the layout, so that the user is told of it."""
    sources.ignored.update(_kind(name) for name in files)
    sources.ignored.update("folder" for _ in folders)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _kind(name: str) -> str:
    return Path(name).suffix or name
