"""Pictures in folders named by their class, with or without train/, val/ and test/; and flat files named WNID_…."""

import re
import sys

from pipeline import storage
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
from pipeline.offline.scans import Scans
from pipeline.offline.words import MAPPING, read_mapping

WNID_NAME = re.compile(r"(n\d{8})_(.+)\.\w+")


def recognise_splits(folder: Folder) -> bool:
    return any(SPLIT_FOLDERS.get(name) == "train" for name in folder.folders)


def read_splits(folder: Folder, scans: Scans) -> Sources:
    """train/, val/ and test/ with one folder per class; pictures directly in test/ have no label."""
    used = split_folders(folder)
    if "train" not in used.values():
        raise folder.misfit("split-folders", "it has no train/")
    sources = Sources(" and ".join(f"{name}/" for name in used) + " with one folder per class")
    for name, split in used.items():
        _add_classes(sources, folder, name, split)
    folder.ignore(sources.ignored, [*used, MAPPING])
    if not sources.images.has("train"):
        raise SourceError("no training pictures: train/ has no class folder with pictures in it")
    return _with_classes(sources, folder)


def split_folders(folder: Folder) -> dict[str, str]:
    """Folder name → split. Raises SourceError for two folders of one split."""
    used = {name: SPLIT_FOLDERS[name] for name in folder.folders if name in SPLIT_FOLDERS}
    if len(set(used.values())) != len(used):
        raise SourceError(f"{folder.path}: {', '.join(used)}: two folders for one split; rename or remove one")
    return used


def recognise_classes(folder: Folder) -> bool:
    """Folders with pictures and no picture beside them. Raises SourceError where RAW seems one level off."""
    if any(is_picture(name) for name in folder.files):
        return False
    named = [name for name in folder.folders if next(pictures(folder.path / name, "", LeftOut()), None)]
    hint = "(--layout class-folders takes the folders as classes all the same)"
    if splits := [name for name in named if name.casefold() in SPLIT_FOLDERS]:
        raise SourceError(
            f"{folder.path}: {', '.join(splits)}: named as a split, not as a class, and there is no train/; "
            f"rename or name another RAW {hint}"
        )
    if len(named) == 1:
        raise SourceError(
            f"{folder.path}: only one folder with pictures, {shown(named[0])}, hence one class; "
            f"is RAW one level too high? {hint}"
        )
    return bool(named)


def read_classes(folder: Folder, scans: Scans) -> Sources:
    """One folder per class, all for training."""
    sources = Sources("one folder per class")
    for name in folder.folders:
        for entry in pictures(folder.path / name, name, sources.ignored):
            sources.images.append(RawImage("train", entry[0], name, *entry[1:]))
    if not sources.images:
        raise folder.misfit("class-folders", f"no picture is in its {len(folder.folders)} folders")
    folder.ignore(sources.ignored, [*folder.folders, MAPPING])
    return _with_classes(sources, folder)


def recognise_flat(folder: Folder) -> bool:
    names = [name for name in folder.files if is_picture(name)]
    return bool(names) and all(WNID_NAME.fullmatch(name) for name in names)


def read_flat(folder: Folder, scans: Scans) -> Sources:
    """Files named WNID_…; where the rest is words (n01440764_tench.JPEG) and not a number, it names the class."""
    sources = Sources("one flat folder of WNID_… files")
    words: dict[str, str] = {}
    used = {name: match for name in folder.files if is_picture(name) and (match := WNID_NAME.fullmatch(name))}
    sizes = storage.sizes(folder.path, used)
    for name, match in used.items():
        wnid, rest = match.groups()
        size = sizes[name]
        sources.images.append(RawImage("train", name, wnid, str(folder.path / name), 0, size))
        words.setdefault(wnid, wnid if rest[0].isdigit() else rest.replace("_", " "))
    if not used:
        raise folder.misfit("flat", "no file in it is named WNID_….JPEG, such as n01440764_10026.JPEG")
    folder.ignore(sources.ignored, [*used, MAPPING])
    sources.classes = ranked(words, words | read_mapping(folder.path / MAPPING), {})
    return sources


def _add_classes(sources: Sources, folder: Folder, name: str, split: str) -> None:
    """Add every picture of NAME/CLASS/…; one directly in NAME/ has no label (allowed for test only)."""
    for path, file, offset, size in pictures(folder.path / name, name, sources.ignored):
        _, wnid, *rest = path.split("/")
        if not rest and split != "test":
            raise SourceError(f"{file}: a picture outside the class folders has no label; move it into one")
        sources.images.append(RawImage(split, path, sys.intern(wnid) if rest else None, file, offset, size))


def _with_classes(sources: Sources, folder: Folder) -> Sources:
    sources.classes = ranked(sources.images.wnids, read_mapping(folder.path / MAPPING), {})
    return sources
