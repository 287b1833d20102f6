"""WebDataset shards as raw images: tars of KEY.jpg beside KEY.cls or KEY.json, read by offset."""

import json
import re
from collections.abc import Mapping

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, Member
from pipeline.manifest import FILE_NAME, ClassRecord
from pipeline.offline.folders import WNID_LINE, read_text, split_folders
from pipeline.offline.raw import SPLIT_FOLDERS, SUFFIXES, Folder, RawImage, Sources, has_pictures, is_picture, ranked
from pipeline.storage import Location, Read

CLASSES = "classes.txt"
MAX_LABEL = 200  # characters
MAX_SIZES = {"cls": 4 * MAX_LABEL, "json": 2**20}  # bytes
NUMBER = re.compile(r"[0-9]{1,9}")


def read(folder: Folder, listings: ListingCache, forced: bool) -> Sources | None:
    """Return every labelled picture of the shards; in a test split, those without a label too.

    Where all labels are numbers, dataset.json or classes.txt in RAW names the classes, else the number itself does.

    Raises:
        SourceError: a damaged shard, or a label that the list of classes does not reach.
    """
    tars = files_by_split(folder, ".tar") if forced or are_alone(folder, ".tar") else {}
    if not tars:
        return None
    sources = Sources(f"{len(tars)} WebDataset shards")
    for path, split in tars.items():
        _add_shard(sources, folder, path, split, listings)
    folder.ignore(sources.ignored, [*tars, FILE_NAME, CLASSES])
    lists = [folder.path / name for name in (FILE_NAME, CLASSES) if name in folder.files]
    named = _read_class_list(lists[0]) if lists else {}
    name_classes(sources, named, str(lists[0]) if lists else "")
    return sources


def are_alone(folder: Folder, suffix: str, hub: str = "") -> bool:
    """Return True if train/ holds files with this suffix and no folders; without train/, if RAW does and no pictures.

    In a repository of Hugging Face the files lie in the folder `hub`, or beside pictures where they tell their splits.
    """
    trains = [Folder.of(folder.path / name) for name in folder.folders if SPLIT_FOLDERS.get(name) == "train"]
    if trains:
        return any(train.ending(suffix) and not train.folders for train in trains)
    if hub in folder.folders and Folder.of(folder.path / hub).ending(suffix):
        return True
    loose = folder.ending(suffix)
    if not loose or any(map(is_picture, folder.files)):
        return False
    return bool(hub and any(map(split_of, loose))) or not any(has_pictures(folder.path / x) for x in folder.folders)


def files_by_split(folder: Folder, suffix: str, hub: str = "") -> dict[str, str]:
    """Return path below RAW → split of the files with this suffix: that of its folder, or the one in its name.

    Files lie in train/ and the like; else in RAW itself or its folder `hub`, for training if no name tells a split.
    """
    inside = [(f"{name}/", split) for name, split in split_folders(folder).items()]
    splits = {above + name: split for above, split in inside for name in Folder.of(folder.path / above).ending(suffix)}
    if not splits:
        splits = {name: split_of(name) for name in folder.ending(suffix)}
        if hub in folder.folders:
            splits |= {f"{hub}/{name}": split_of(name) for name in Folder.of(folder.path / hub).ending(suffix)}
    return {path: split for path, split in splits.items() if split} or dict.fromkeys(splits, "train")


def split_of(name: str) -> str:
    """Return the split that a name tells: imagenet1k-validation-00.tar → val; empty where it tells none."""
    words = [word for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_FOLDERS]
    words += [word for word in SPLIT_FOLDERS if name.lower().startswith(word)]
    return SPLIT_FOLDERS[words[0]] if words else ""


def _add_shard(sources: Sources, folder: Folder, path: str, split: str, listings: ListingCache) -> None:
    """Add the pictures of a shard. A sample's KEY is the name up to the first dot of its last part."""
    file, left_out = folder.path / path, sources.ignored
    samples: dict[tuple[str, str], dict[str, Member]] = {}  # KEY → its "picture", "cls" and "json"
    for member in listings.members(file, left_out.add):
        above, _, last = member.name.rpartition("/")
        stem, _, extension = last.partition(".")
        extension = extension.lower()
        sample = samples.setdefault((above, stem), {})
        if member.size <= MAX_SIZES.get(extension, -1):
            sample[extension] = member
        elif f".{extension}" not in SUFFIXES or not stem:
            left_out.add(f".{extension}"[:20] + " in a shard", f"{path}/{member.name}")
        elif "picture" in sample:
            left_out.add("second picture of one sample", f"{path}/{member.name}")
        else:
            sample["picture"] = member
    with storage.opened(file) as (read, _):
        for sample in samples.values():
            if picture := sample.get("picture"):
                label = _label(sample, read)
                if label is None and split != "test":
                    left_out.add("picture without a label in .cls or .json", f"{path}/{picture.name}")
                else:
                    name = f"{path}/{picture.name}"
                    sources.images.append(RawImage(split, name, label, str(file), picture.offset, picture.size))


def _label(sample: dict[str, Member], read: Read) -> str | None:
    """Return the label as text; None where there is none that can be used."""
    member = sample.get("cls") or sample.get("json")
    if member is None:
        return None
    data = read(member.size, member.offset)
    try:
        label = data.decode() if "cls" in sample else json.loads(data).get("label")
    except (ValueError, RecursionError, AttributeError):
        return None
    return usable_label(str(label)) if isinstance(label, (int, str)) and not isinstance(label, bool) else None


def usable_label(text: str) -> str | None:
    """Return a label, None where it is no printable text of at most MAX_LABEL characters, or −1, which means none."""
    text = text.strip()
    return text if text.isprintable() and 0 < len(text) <= MAX_LABEL and text != "-1" else None


def name_classes(sources: Sources, named: Mapping[int, ClassRecord] | None, file: str) -> None:
    """Give classes that are named by numbers the names that `file` has for them; without it, numbers of one width.

    Where not all are numbers, or `named` is None, the labels stay as they are.
    """
    labels, known = sources.images.wnids, (named or {}).values()
    words = {record.wnid: record.words for record in known}
    if named is None or not all(map(NUMBER.fullmatch, labels)):
        sources.classes = ranked(labels, words, {})
        return
    numbers = [int(label) for label in labels]
    if named and (beyond := sorted(set(numbers) - named.keys())):
        reach = f"names the classes 0 to {max(named)}, but an image has the label {beyond[0]}"
        raise SourceError(f"{file}: {reach}; correct that list or remove it")
    width = len(str(max(numbers, default=0)))
    names = {label: named[n].wnid if named else f"{n:0{width}d}" for label, n in zip(labels, numbers)}
    sources.images.rename_classes(names.__getitem__)
    ids = {record.wnid: record.devkit_id for record in known if record.devkit_id is not None}
    sources.classes = ranked(words or names.values(), words, ids)


def _read_class_list(file: Location) -> dict[int, ClassRecord]:
    """Return the classes of dataset.json (a dataset directory of ours) or of classes.txt, by number.

    In classes.txt, line i names class i − 1: a wnid, with words or without; else the words are the name. Where two
    classes have the same words ("crane"), their numbers keep the names apart.
    """
    if file.name == FILE_NAME:
        try:
            records = json.loads(read_text(file))["classes"]
            classes = [ClassRecord(int(r["label"]), str(r["wnid"]), str(r["words"]), r["devkit_id"]) for r in records]
            return {record.label: record for record in classes}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise SourceError(f"{file}: has no list of classes as ours have; remove it") from error
    lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    if "" in lines:
        raise SourceError(f"{file}: line {lines.index('') + 1} is blank; line i must name class i − 1")
    named: dict[int, ClassRecord] = {}
    for number, line in enumerate(lines):
        match = WNID_LINE.fullmatch(line)
        name = match[1] if match else f"{line} ({number})" if lines.count(line) > 1 else line
        named[number] = ClassRecord(number, name, match[2] or match[1] if match else line, None)
    if len({record.wnid for record in named.values()}) != len(named):
        raise SourceError(f"{file}: names one wnid twice; each line must name a class of its own")
    return named
