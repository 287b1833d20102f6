"""WebDataset shards as raw images: tars of KEY.jpg beside KEY.cls or KEY.json, read by offset."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.manifest import FILE_NAME, ClassRecord
from pipeline.offline.classfolders import recognise_classes, split_folders
from pipeline.offline.raw import (
    SPLIT_FOLDERS,
    SUFFIXES,
    Folder,
    LeftOut,
    RawImage,
    SourceError,
    Sources,
    is_picture,
    ranked,
)
from pipeline.offline.scans import Listing, Scans
from pipeline.offline.synsets import WNID_TAR
from pipeline.offline.words import CLASSES, read_class_list, read_text
from pipeline.storage import Location

MAX_LABEL = 200  # characters
MAX_JSON = 2**20  # bytes
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(slots=True)
class _Sample:
    """The members of one KEY: (name, offset, size) of its picture, (offset, size) of its label."""

    picture: tuple[str, int, int] | None = None
    cls: tuple[int, int] | None = None
    json: tuple[int, int] | None = None


def recognise(folder: Folder) -> bool:
    """train/ and the like hold tars and no folders; or tars lie in RAW, and no pictures or class folders."""
    inner = [Folder.of(folder.path / name) for name in folder.folders if SPLIT_FOLDERS.get(name) == "train"]
    if inner:
        return any(_shards(train) and not train.folders for train in inner)
    return bool(_shards(folder)) and not any(map(is_picture, folder.files)) and not recognise_classes(folder)


def read(folder: Folder, scans: Scans) -> Sources:
    """Every labelled picture of the shards; in a test split, those without a label too.

    Where all labels are numbers, dataset.json or classes.txt in RAW names the classes, else the number itself does.

    Raises:
        SourceError: no shards, a damaged one, or a label that the list of classes does not reach.
    """
    tars = files_by_split(folder, _shards)
    if not tars:
        raise folder.misfit("webdataset", "no .tar is in it, nor in train/, val/ or test/")
    sources = Sources(f"{len(tars)} WebDataset shards")
    labels: dict[str, str] = {}  # so that the images of a class share one string
    for path, split in tars.items():
        listing = scans.listing(folder.path / path)
        sources.ignored.merge(listing.left_out)
        _add_shard(sources, folder.path / path, path, split, listing, labels)
    lists = [name for name in (FILE_NAME, CLASSES) if name in folder.files]
    ignore_unused(folder, [*tars, *lists], sources.ignored)
    _name_classes(sources, folder.path, lists)
    return sources


def _shards(folder: Folder) -> list[str]:
    return [name for name in folder.tars if not WNID_TAR.fullmatch(name)]


def files_by_split(folder: Folder, select: Callable[[Folder], list[str]], inner: str = "") -> dict[str, str]:
    """Return the path below RAW and the split of each selected file: of its folder, or told by its name, or train.

    Files lie in train/ and the like; else in RAW itself or its folder `inner`.
    """
    splits = {
        f"{name}/{file}": split
        for name, split in split_folders(folder).items()
        for file in select(Folder.of(folder.path / name))
    }
    if splits:
        return splits
    splits = {name: split_of(name) for name in select(folder)}
    if inner in folder.folders:
        splits |= {f"{inner}/{name}": split_of(name) for name in select(Folder.of(folder.path / inner))}
    return {path: split for path, split in splits.items() if split} or dict.fromkeys(splits, "train")


def ignore_unused(folder: Folder, files: Iterable[str], left_out: LeftOut) -> None:
    """Count and name what lies beside these files, paths below RAW, in RAW and in the folders that hold them."""
    inside: dict[str, list[str]] = {}
    for path in files:
        name, _, rest = path.partition("/")
        inside.setdefault(name, []).extend([rest] if rest else [])
    for name, used in sorted(inside.items()):
        if used:
            Folder.of(folder.path / name).ignore(left_out, used)
    folder.ignore(left_out, inside)


def split_of(name: str) -> str:
    """imagenet1k-validation-00.tar → val; empty where the name tells none."""
    words = re.findall("[a-z]+", name.lower())
    told = [SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS]
    begins = [split for word, split in SPLIT_FOLDERS.items() if name.lower().startswith(word)]
    return (told + begins + [""])[0]


def _add_shard(
    sources: Sources, file: Location, path: str, split: str, listing: Listing, labels: dict[str, str]
) -> None:
    samples = _samples(listing, path, sources.ignored)
    with storage.opened(file) as (read, _):
        for sample in samples.values():
            if sample.picture is None:
                continue
            name, offset, size = sample.picture
            label = _label(sample, read)
            if label is None and split != "test":
                sources.ignored.add("picture without a label in .cls or .json", f"{path}/{name}")
                continue
            wnid = None if label is None else labels.setdefault(label, label)
            sources.images.append(RawImage(split, f"{path}/{name}", wnid, str(file), offset, size))


def _samples(listing: Listing, path: str, left_out: LeftOut) -> dict[str, _Sample]:
    """By KEY: the name up to the first dot of its last part, as WebDataset has it."""
    samples: dict[str, _Sample] = {}
    for name, offset, size in listing:
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


def _label(sample: _Sample, read: Callable[[int, int], bytes]) -> str | None:
    """The label as text; None where there is none that can be used (−1 is WebDataset's word for none)."""
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
    if not text.isprintable() or not 0 < len(text) <= MAX_LABEL or text == "-1":
        return None
    return text


def _name_classes(sources: Sources, raw: Location, lists: list[str]) -> None:
    """Labels as they stand → class names."""
    labels = sources.images.wnids
    named = list(_listed(raw, lists))
    if not all(_NUMBER.fullmatch(label) for label in labels):
        words = {record.wnid: record.words for record in named}
        sources.classes = ranked(labels, words, {})
        return
    numbers = {label: int(label) for label in labels}
    width = len(str(max(numbers.values(), default=0)))
    by_number = {record.label: record for record in named}
    if by_number and (beyond := sorted(set(numbers.values()) - by_number.keys())):
        raise SourceError(
            f"{raw / lists[0]}: names the classes 0 to {max(by_number)}, but a shard has the label {beyond[0]}; "
            f"correct {lists[0]} or remove it"
        )
    names = {label: by_number[n].wnid if by_number else f"{n:0{width}d}" for label, n in numbers.items()}
    sources.images.rename_classes(names.__getitem__)
    words = {record.wnid: record.words for record in named}
    ids = {record.wnid: record.devkit_id for record in named if record.devkit_id is not None}
    sources.classes = ranked(words or names.values(), words, ids)


def _listed(raw: Location, lists: list[str]) -> Iterator[ClassRecord]:
    """The classes that dataset.json (a dataset directory of ours) or else classes.txt names, by number."""
    if FILE_NAME in lists:
        try:
            for record in json.loads(read_text(raw / FILE_NAME))["classes"]:
                yield ClassRecord(int(record["label"]), str(record["wnid"]), str(record["words"]), record["devkit_id"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise SourceError(f"{raw / FILE_NAME}: has no list of classes as ours have; remove it") from error
    elif CLASSES in lists:
        for number, (name, words) in enumerate(read_class_list(raw / CLASSES)):
            yield ClassRecord(number, name, words, None)
