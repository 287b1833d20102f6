"""WebDataset shards as raw images: tars of KEY.jpg beside KEY.cls or KEY.json, read by offset."""

import json
import re
from collections.abc import Callable, Iterable

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, Member
from pipeline.manifest import FILE_NAME
from pipeline.offline.folders import WNID_LINE, WNID_TAR, read_text, recognise_classes, split_folders
from pipeline.offline.raw import (
    SPLIT_FOLDERS,
    SUFFIXES,
    Folder,
    LeftOut,
    RawImage,
    Sources,
    is_picture,
    ranked,
)
from pipeline.storage import Location, Read

CLASSES = "classes.txt"
MAX_LABEL = 200  # characters
MAX_SIZES = {"cls": 4 * MAX_LABEL, "json": 2**20}  # bytes
NUMBER = re.compile(r"[0-9]{1,9}")

Named = tuple[str, str, int | None]  # a class's name, words, devkit id


_Sample = dict[str, Member]  # the members of one KEY: "picture", "cls" and "json"


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
    tars = files_by_split(folder, _shards)
    if not tars:
        raise folder.misfit("webdataset", "no .tar is in it, nor in train/, val/ or test/")
    sources = Sources(f"{len(tars)} WebDataset shards")
    for path, split in tars.items():
        _add_shard(sources, folder, path, split, listings)
    lists = [name for name in (FILE_NAME, CLASSES) if name in folder.files]
    folder.ignore(sources.ignored, [*tars, *lists])
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
    """Return the split that a name tells: imagenet1k-validation-00.tar → val; empty where it tells none."""
    words = [word for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_FOLDERS]
    words += [word for word in SPLIT_FOLDERS if name.lower().startswith(word)]
    return SPLIT_FOLDERS[words[0]] if words else ""


def _add_shard(sources: Sources, folder: Folder, path: str, split: str, listings: ListingCache) -> None:
    file = folder.path / path
    samples = _samples(listings.members(file, sources.ignored.add), path, sources.ignored)
    with storage.opened(file) as (read, _):
        for sample in samples.values():
            if picture := sample.get("picture"):
                name = f"{path}/{picture.name}"
                label = _label(sample, read)
                if label is None and split != "test":
                    sources.ignored.add("picture without a label in .cls or .json", name)
                else:
                    sources.images.append(RawImage(split, name, label, str(file), picture.offset, picture.size))


def _samples(members: Iterable[Member], path: str, left_out: LeftOut) -> dict[str, _Sample]:
    """Return the samples by KEY: the name up to the first dot of its last part, as WebDataset has it."""
    samples: dict[str, _Sample] = {}
    for member in members:
        above, slash, last = member.name.rpartition("/")
        stem, _, extension = last.partition(".")
        extension = extension.lower()
        sample = samples.setdefault(above + slash + stem, {})
        if member.size <= MAX_SIZES.get(extension, -1):
            sample[extension] = member
        elif f".{extension}" not in SUFFIXES or not stem:
            left_out.add(f".{extension}"[:20] + " in a shard", f"{path}/{member.name}")
        elif "picture" in sample:
            left_out.add("second picture of one sample", f"{path}/{member.name}")
        else:
            sample["picture"] = member
    return samples


def _label(sample: _Sample, read: Read) -> str | None:
    """Return the label as text; None where there is none that can be used (−1 is WebDataset's word for none)."""
    member = sample.get("cls") or sample.get("json")
    if member is None:
        return None
    try:
        data = read(member.size, member.offset)
        if "cls" in sample:
            text = data.decode("utf-8").strip()
        else:
            body = json.loads(data)
            label = body.get("label") if isinstance(body, dict) else None
            text = str(label).strip() if isinstance(label, (int, str)) and not isinstance(label, bool) else ""
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
