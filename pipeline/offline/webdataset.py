"""WebDataset shards as raw images: tars of KEY.jpg beside KEY.cls or KEY.json, read by offset."""

import json
import re

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, Member
from pipeline.manifest import FILE_NAME
from pipeline.offline.classes import name_classes, read_class_list
from pipeline.offline.names import file_splits, folder_splits, missing
from pipeline.offline.raw import Options, RawImage, Reading, Sources
from pipeline.offline.tree import SUFFIXES, Folder
from pipeline.storage import Read

CLASSES = "classes.txt"
HUB = "data"  # the folder of the files in a repository of Hugging Face
MAX_LABEL = 200  # characters
MAX_SIZES = {"cls": 4 * MAX_LABEL, "json": 2**20}  # bytes
NUMBER = re.compile(r"[0-9]{1,9}")


def evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's tars as shards."""
    return file_evidence(folder, ".tar", "WebDataset shards")


def file_evidence(folder: Folder, suffix: str, text: str) -> Reading | None:
    """Return the reading of RAW's files with this suffix; they lie in RAW, in its folder data/, or in train/ …"""
    above = [name for name in (*folder_splits(folder.folders)[0], HUB) if name in folder.folders]
    used = [*folder.ending(suffix), *(name for name in above if Folder.of(folder.path / name).ending(suffix))]
    return Reading(f"{text}: {', '.join(used[:3])}{' …' if len(used) > 3 else ''}", frozenset(used)) if used else None


def read(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return every labelled picture of the shards; in a test split, those without a label too.

    Where all labels are numbers, dataset.json or classes.txt in RAW names the classes, else the number itself does.

    Raises:
        SourceError: a damaged shard, or a label that the list of classes does not reach.
    """
    sources = Sources("WebDataset shards", gives=".cls or .json beside each picture")
    tars = files_by_split(folder, ".tar", options, sources.notes)
    sources.layout = f"{len(tars)} WebDataset shards"
    for path, split in tars.items():
        _add_shard(sources, folder, path, split, listings)
    folder.ignore(sources.ignored, [*tars, FILE_NAME, CLASSES])
    lists = [folder.path / name for name in (FILE_NAME, CLASSES) if name in folder.files]
    named = read_class_list(lists[0]) if lists else {}
    name_classes(sources, named, str(lists[0]) if lists else "")
    return sources


def files_by_split(folder: Folder, suffix: str, options: Options, notes: list[str]) -> dict[str, str]:
    """Return path below RAW → split of the files with this suffix: that of their folder, or the one in their names.

    Files lie in train/ and the like; else in RAW itself or its folder data/, for training if no name tells a split.

    Raises SourceError: files missing in a numbered series, names in doubt, or only some that tell a split; with
    --allow-incomplete, what is missing and what is left out is noted.
    """
    splits, doubt = folder_splits(folder.folders)
    inside = [(f"{name}/", split) for name, split in splits.items()]
    files = {above + name: split for above, split in inside for name in Folder.of(folder.path / above).ending(suffix)}
    if not files:
        paths = folder.ending(suffix)
        if HUB in folder.folders:
            paths += [f"{HUB}/{name}" for name in Folder.of(folder.path / HUB).ending(suffix)]
        files, doubt = file_splits(paths)
    if doubt:
        raise SourceError(f"{folder.path}: {doubt}")
    without = [path for path, split in files.items() if not split]
    problems = []
    if lacking := missing(files):
        problems.append(f"missing: {', '.join(lacking)}")
    if 0 < len(without) < len(files):
        problems.append(f"{', '.join(without[:3])}: name no split, others do")
    if problems and not options.allow_incomplete:
        remedy = "fetch or move them, or build without them by --allow-incomplete"
        raise SourceError(f"{folder.path}: {'; '.join(problems)}; {remedy}")
    notes += problems
    return {path: split for path, split in files.items() if split} or dict.fromkeys(files, "train")


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
