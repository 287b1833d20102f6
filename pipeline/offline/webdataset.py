"""WebDataset shards as raw images: tars of KEY.jpg beside KEY.cls or KEY.json, read by offset."""

import json
import re
from itertools import islice

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, Member, members
from pipeline.manifest import FILE_NAME
from pipeline.offline.classes import name_classes, read_class_list
from pipeline.offline.names import file_splits, folder_splits, missing
from pipeline.offline.raw import Options, RawImage, Reading, Sources
from pipeline.offline.tree import Folder, is_picture
from pipeline.storage import Location, Read

CLASSES = "classes.txt"
HUB = "data"  # the folder of the files in a repository of Hugging Face
MAX_LABEL = 4096  # characters, as of a name
MAX_SIZES = {"cls": 4 * MAX_LABEL, "json": 2**20}  # bytes
BLANKS = "\ufeff \t\r\n"  # around a label; U+FEFF begins the texts of some Windows programs
OTHER_TAR = re.compile(r"ilsvrc20\d\d_(img|images)_.*|n\d{8}\.tar")  # of published archives without labels inside
LOOKED_AT = 8  # tars, each of another series
HEADERS = 256  # members of each
SCANNED = 16  # folders below RAW, in search of one that RAW might rather be


def evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's tars as shards, if the first members of one are KEY.jpg beside KEY.cls or KEY.json.

    Tars of pictures alone account for nothing, and are in doubt; so are those that cannot be read.
    """
    reading = file_evidence(folder, ".tar", "WebDataset shards")
    if reading is None or not reading.evidence:
        return reading
    series: dict[str, str] = {}  # name without its numbers → the first tar
    for path in _files(folder, ".tar"):
        series.setdefault(re.sub("[0-9]+", "", path), path)
    alone = ""
    for path in [*series.values()][:LOOKED_AT]:
        published = OTHER_TAR.fullmatch(path.lower())
        try:
            pictures, labelled = _first_members(folder.path / path)
        except SourceError as error:
            doubt = str(error).removeprefix(f"{folder.path}/")
            return None if published else Reading(reading.text, reading.evidence, doubt)
        if labelled:
            return reading
        alone = alone or (path if pictures and not published else "")
    problem = f"{alone}: pictures without labels, no .cls or .json of one's name is among its first {HEADERS} members"
    remedy = "unpack a tar that is no WebDataset shard; of one that is, --layout webdataset reads all members"
    return Reading(reading.text, frozenset(), f"{problem}; {remedy}") if alone else None


def _first_members(archive: Location) -> tuple[bool, bool]:
    """Return whether pictures are among an archive's first members, and whether the label of one is."""
    pictures, labels = set[str](), set[str]()
    with storage.opened(archive) as (read, size):
        for member in islice(members(read, 0, size, str(archive)), HEADERS):
            stem, _, extension = member.name.rpartition(".")
            if not member.reason and is_picture(member.name):
                pictures.add(stem)
            elif not member.reason and extension.lower() in MAX_SIZES:
                labels.add(stem)
            if pictures & labels:
                return True, True
    return bool(pictures), False


def file_evidence(folder: Folder, suffix: str, text: str) -> Reading | None:
    """Return the reading of RAW's files with this suffix; they lie in RAW, in its folder data/, or in train/ …

    Where they lie deeper, RAW should be the folder that holds them: the reading is in doubt, and accounts for nothing.
    """
    if used := list(dict.fromkeys(path.partition("/")[0] for path in _files(folder, suffix))):
        return Reading(f"{text}: {', '.join(used[:3])}{' …' if len(used) > 3 else ''}", frozenset(used))
    if below := _deeper(folder, suffix):
        doubt = f"{below}: the first folder with {suffix} files; name {folder.path / below} as RAW"
        return Reading(text, frozenset(), doubt)
    return None


def _deeper(folder: Folder, suffix: str) -> str:
    """Return the path below RAW of the first folder that has such files where RAW should have them; "" for none."""
    paths = [*folder.folders] if len(folder.folders) < SCANNED else []
    for path in paths:  # as they are appended: by depth
        inner = Folder.of(folder.path / path)
        if _files(inner, suffix):
            return path
        if len(paths) + len(inner.folders) <= SCANNED:
            paths += [f"{path}/{name}" for name in inner.folders]
    return ""


def _files(folder: Folder, suffix: str) -> list[str]:
    """Return the paths of the files with this suffix in RAW, data/, train/ …"""
    above = [name for name in (HUB, *folder_splits(folder.folders)[0]) if name in folder.folders]
    inside = [f"{name}/{file}" for name in above for file in Folder.of(folder.path / name).ending(suffix)]
    return [*folder.ending(suffix), *inside]


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
    name_classes(sources, named, str(lists[0]) if lists else "", options)
    return sources


def files_by_split(folder: Folder, suffix: str, options: Options, notes: list[str]) -> dict[str, str]:
    """Return path below RAW → split of the files with this suffix: that of their folder, or the one in their names.

    Files lie in train/ and the like; else in RAW itself or its folder data/, for training if no name tells a split.

    Raises SourceError: files missing in a numbered series, names in doubt, or only some that tell a split; with
    --allow-incomplete, what is missing and what is left out is noted.
    """
    splits, doubt = folder_splits(folder.folders, forced=options.layout is not None)
    inside = [(f"{name}/", split) for name, split in splits.items()]
    files = {above + name: split for above, split in inside for name in Folder.of(folder.path / above).ending(suffix)}
    for path, split in files.items():
        named = file_splits([path.partition("/")[2]])[0].values()
        if {*named} - {"", split}:
            raise SourceError(
                f"{folder.path / path}: of {split} by its folder, of {min(named)} by its name; move or rename it"
            )
    paths = [path for path in _files(folder, suffix) if path not in files]
    beside = paths if files else []
    if not files:
        files, doubt = file_splits(paths)
    if doubt:
        raise SourceError(f"{folder.path}: {doubt}")
    without = [path for path, split in files.items() if not split]
    problems = [f"{', '.join(beside[:3])}: beside the folders of the splits, in none"] if beside else []
    hub = Folder.of(folder.path / HUB) if HUB in folder.folders else None
    if deeper := _files(hub, suffix)[len(hub.ending(suffix)) :] if hub else []:
        problems.append(f"{HUB}/{deeper[0]}: in a folder of {HUB}/, beside files that lie in {HUB}/ or RAW itself")
    if lacking := [] if folder.alone else missing(files):
        problems.append(f"missing: {', '.join(lacking)}")
    if 0 < len(without) < len(files):
        problems.append(f"{', '.join(without[:3])}: name no split, others do")
    if problems and not options.allow_incomplete:
        remedy = "fetch or move them, or build without them by --allow-incomplete"
        raise SourceError(f"{folder.path}: {'; '.join(problems)}; {remedy}")
    notes += problems
    return {path: split for path, split in files.items() if split} or dict.fromkeys(files, "train")


def _add_shard(sources: Sources, folder: Folder, path: str, split: str, listings: ListingCache) -> None:
    """Add the pictures of a shard. A sample's KEY is a name up to its last dot: a.1.jpg is beside a.1.cls."""
    file, left_out = folder.path / path, sources.ignored
    samples: dict[str, dict[str, Member]] = {}  # KEY → its "picture", "cls" and "json"
    for member in listings.members(file, left_out.add):
        key, _, extension = member.name.rpartition(".")
        extension = extension.lower()
        sample = samples.setdefault(key, {})
        if member.size <= MAX_SIZES.get(extension, -1):
            sample[extension] = member
        elif not is_picture(member.name):
            left_out.add(f".{extension}"[:20] + " in a shard", f"{path}/{member.name}")
        elif "picture" in sample:
            left_out.lose("second picture of one sample", f"{path}/{member.name}")
        else:
            sample["picture"] = member
    with storage.opened(file) as (read, _):
        for key, sample in samples.items():
            if picture := sample.get("picture"):
                label, name = _label(sample, read), f"{path}/{picture.name}"
                if label is None and "picture" in samples.get(_first_dot(key), {}):  # a.mask.png beside a.jpg
                    left_out.lose("second picture of one sample", name)
                elif label is None and split != "test":
                    left_out.lose("picture without a label in .cls or .json", name)
                else:
                    sources.images.append(RawImage(split, name, label, str(file), picture.offset, picture.size))


def _first_dot(key: str) -> str:
    """Return KEY as webdataset has it, which ends it at the first dot of a name; "" where that is no other."""
    above, slash, last = key.rpartition("/")
    stem, dot, _ = last.partition(".")
    return above + slash + stem if dot else ""


def _label(sample: dict[str, Member], read: Read) -> str | None:
    """Return the label as text; None where there is none that can be used."""
    member = sample.get("cls") or sample.get("json")
    if member is None:
        return None
    data = read(member.size, member.offset)
    if "cls" in sample:
        return usable_label(data)
    try:
        label = json.loads(data).get("label")
    except (ValueError, RecursionError, AttributeError):
        return None
    return None if isinstance(label, bool) else usable_label(label)


def usable_label(value: object) -> str | None:
    """Return a label as the name of a class: text as that of a folder, a whole number, true or false.

    None where it is no such value, longer than MAX_LABEL characters, of several lines, or −1, which means none.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")  # JSON may have halves of surrogate pairs
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape").strip(BLANKS)
    text = str(value) if isinstance(value, (int, str)) else ""
    return text if 0 < len(text) <= MAX_LABEL and text != "-1" and not re.search(r"[\0\r\n]", text) else None
