"""WebDataset shards as raw images: tars of KEY.jpg beside KEY.cls or KEY.json, read by offset."""

import json
import re
from dataclasses import dataclass

from pipeline import storage
from pipeline.archives import Listing, ListingCache
from pipeline.errors import SourceError
from pipeline.manifest import FILE_NAME
from pipeline.offline.folders import WNID_TAR, recognise_classes, split_folders
from pipeline.offline.raw import (
    SPLIT_FOLDERS,
    SUFFIXES,
    WNID_LINE,
    Folder,
    LeftOut,
    RawImage,
    Sources,
    is_picture,
    ranked,
    read_text,
)
from pipeline.storage import Location, Read

CLASSES = "classes.txt"
MAX_LABEL = 200  # characters
MAX_JSON = 2**20  # bytes
NUMBER = re.compile(r"[0-9]{1,9}")

Named = tuple[str, str, int | None]  # a class's name, words, devkit id


@dataclass(slots=True)
class _Sample:
    """The members of one KEY: (name, offset, size) of its picture, (offset, size) of its label."""

    picture: tuple[str, int, int] | None = None
    cls: tuple[int, int] | None = None
    json: tuple[int, int] | None = None


def recognise(folder: Folder) -> bool:
    """Return whether train/ and the like hold tars and no folders; or RAW tars, and no pictures or class folders."""
    inner = [Folder.of(folder.path / name) for name in folder.folders if SPLIT_FOLDERS.get(name) == "train"]
    if inner:
        return any(_shards(train) and not train.folders for train in inner)
    return bool(_shards(folder)) and not any(map(is_picture, folder.files)) and not recognise_classes(folder)


def read(folder: Folder, listings: ListingCache) -> Sources:
    """Return every labelled picture of the shards; in a test split, those without a label too.

    Where all labels are numbers, dataset.json or classes.txt in RAW names the classes, else the number itself does.

    Raises:
        SourceError: no shards, a damaged one, or a label that the list of classes does not reach.
    """
    tars = _tars(folder)
    if not tars:
        raise folder.misfit("webdataset", "no .tar is in it, nor in train/, val/ or test/")
    sources = Sources(f"{len(tars)} WebDataset shards")
    for path, split in tars.items():
        _add_shard(sources, folder.path / path, path, split, listings.listing(folder.path / path))
    used = {path.partition("/")[0] for path in tars}
    for name in sorted(used - tars.keys()):
        Folder.of(folder.path / name).ignore(sources.ignored, [path.removeprefix(f"{name}/") for path in tars])
    lists = [name for name in (FILE_NAME, CLASSES) if name in folder.files]
    folder.ignore(sources.ignored, [*used, *lists])
    _name_classes(sources, folder.path, lists)
    return sources


def _shards(folder: Folder) -> list[str]:
    return [name for name in folder.tars if not WNID_TAR.fullmatch(name)]


def _tars(folder: Folder) -> dict[str, str]:
    """Return path of each shard below RAW → split: its folder's, or the one that its name tells, else train."""
    inside = {
        f"{name}/{tar}": split
        for name, split in split_folders(folder).items()
        for tar in _shards(Folder.of(folder.path / name))
    }
    splits = {name: split_of(name) for name in _shards(folder)}
    named = {name: split for name, split in splits.items() if split}
    return inside or named or dict.fromkeys(splits, "train")


def split_of(name: str) -> str:
    """Return the split that a name tells: imagenet1k-validation-00.tar → val; empty where it tells none."""
    words = [word for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_FOLDERS]
    words += [word for word in SPLIT_FOLDERS if name.lower().startswith(word)]
    return SPLIT_FOLDERS[words[0]] if words else ""


def _add_shard(sources: Sources, file: Location, path: str, split: str, listing: Listing) -> None:
    for reason, name in listing.left_out:
        sources.ignored.add(reason, name)
    samples = _samples(listing, path, sources.ignored)
    with storage.opened(file) as (read, _):
        for sample in samples.values():
            if sample.picture is None:
                continue
            name, offset, size = sample.picture
            label = _label(sample, read)
            if label is None and split != "test":
                sources.ignored.add("picture without a label in .cls or .json", f"{path}/{name}")
            else:
                sources.images.append(RawImage(split, f"{path}/{name}", label, str(file), offset, size))


def _samples(listing: Listing, path: str, left_out: LeftOut) -> dict[str, _Sample]:
    """Return the samples by KEY: the name up to the first dot of its last part, as WebDataset has it."""
    samples: dict[str, _Sample] = {}
    for name, offset, size, _ in listing:
        above, slash, last = name.rpartition("/")
        stem, _, extension = last.partition(".")
        extension = extension.lower()
        sample = samples.setdefault(above + slash + stem, _Sample())
        if extension == "cls" and size <= 4 * MAX_LABEL:
            sample.cls = (offset, size)
        elif extension == "json" and size <= MAX_JSON:
            sample.json = (offset, size)
        elif f".{extension}" not in SUFFIXES or not stem:
            left_out.add(f".{extension}"[:20] + " in a shard", f"{path}/{name}")
        elif sample.picture:
            left_out.add("second picture of one sample", f"{path}/{name}")
        else:
            sample.picture = (name, offset, size)
    return samples


def _label(sample: _Sample, read: Read) -> str | None:
    """Return the label as text; None where there is none that can be used (−1 is WebDataset's word for none)."""
    text = ""
    try:
        if sample.cls:
            offset, size = sample.cls
            text = read(size, offset).decode("utf-8").strip()
        elif sample.json:
            offset, size = sample.json
            body = json.loads(read(size, offset))
            value = body.get("label") if isinstance(body, dict) else None
            if isinstance(value, (int, str)) and not isinstance(value, bool):
                text = str(value).strip()
    except (ValueError, RecursionError):
        return None
    usable = text.isprintable() and 0 < len(text) <= MAX_LABEL and text != "-1"
    return text if usable else None


def _name_classes(sources: Sources, raw: Location, lists: list[str]) -> None:
    """Give the classes, so far named by the labels as they stand, the names that a file in RAW has for them."""
    labels, named = sources.images.wnids, _read_class_list(raw / lists[0]) if lists else {}
    words = {name: text for name, text, _ in named.values()}
    ids = {name: number for name, _, number in named.values() if number is not None}
    if not all(NUMBER.fullmatch(label) for label in labels):
        sources.classes = ranked(labels, words, {})
        return
    numbers = {label: int(label) for label in labels}
    if named and (beyond := sorted(set(numbers.values()) - named.keys())):
        raise SourceError(
            f"{raw / lists[0]}: names the classes 0 to {max(named)}, but a shard has the label {beyond[0]}; "
            f"correct {lists[0]} or remove it"
        )
    width = len(str(max(numbers.values(), default=0)))
    names = {label: named[n][0] if named else f"{n:0{width}d}" for label, n in numbers.items()}
    sources.images.rename_classes(names.__getitem__)
    sources.classes = ranked(words or names.values(), words, ids)


def _read_class_list(file: Location) -> dict[int, Named]:
    """Return the classes of dataset.json (a dataset directory of ours) or of classes.txt, by number.

    In classes.txt, line i names class i − 1: a wnid, with words or without; else the words are the name. Where two
    classes have the same words ("crane"), their numbers keep the names apart.
    """
    if file.name == FILE_NAME:
        try:
            records = json.loads(read_text(file))["classes"]
            return {int(r["label"]): (str(r["wnid"]), str(r["words"]), r["devkit_id"]) for r in records}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise SourceError(f"{file}: has no list of classes as ours have; remove it") from error
    lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    if "" in lines:
        raise SourceError(f"{file}: line {lines.index('') + 1} is blank; line i must name class i − 1")
    classes: dict[int, Named] = {}
    for number, line in enumerate(lines):
        if match := WNID_LINE.fullmatch(line):
            classes[number] = (match[1], match[2] or match[1], None)
        else:
            classes[number] = (f"{line} ({number})" if lines.count(line) > 1 else line, line, None)
    if len({name for name, *_ in classes.values()}) != len(classes):
        raise SourceError(f"{file}: names one wnid twice; each line must name a class of its own")
    return classes
