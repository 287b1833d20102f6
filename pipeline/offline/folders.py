"""Layouts of folders: classes, splits with classes, flat files, Kaggle's CLS-LOC; and tars and folders of synsets.

A layout's function returns None where RAW has another; `forced`: the user names this one, whatever RAW looks like.
"""

import csv
import io
import re

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, members
from pipeline.cli import printable
from pipeline.offline.raw import SPLIT_FOLDERS, Folder, Promise, RawImage, Sources, is_picture, part_pictures, ranked
from pipeline.storage import Location

WNID = re.compile(r"n[0-9]{8}")
WNID_LINE = re.compile(r"(n[0-9]{8})(?:\s+(.+))?")
WNID_TAR = re.compile(r"(?:.*/)?(n[0-9]{8})\.tar")
MAPPING = "LOC_synset_mapping.txt"  # lines such as `n02012849 crane`
MAX_TEXT = 16 * 2**20  # bytes
FLAT_NAME = re.compile(r"(n\d{8})_(.+)\.\w+")
KAGGLE_DATA = "Data/CLS-LOC"
KAGGLE_LABELS = "LOC_val_solution.csv"
KAGGLE_IMAGES = {"train": 1_281_167, "val": 50_000}  # as ILSVRC2012
KAGGLE_CLASSES = 1000

# ---- one folder per class, with or without train/, val/ and test/


def read_classes(folder: Folder, listings: ListingCache, forced: bool) -> Sources | None:
    """Return the pictures of one folder per class, all for training. Raises SourceError if RAW seems one level off."""
    if any(is_picture(name) for name in folder.files) and not forced:
        return None
    sources = Sources("one folder per class")
    for name in folder.folders:
        for image in part_pictures(folder, name, name, listings, sources.ignored):
            sources.images.append(image, name)
    names, problem = sources.images.wnids, ""
    if splits := [name for name in names if name.casefold() in SPLIT_FOLDERS]:
        problem = f"{', '.join(splits)}: named as a split, not as a class, and there is no train/"
    elif len(names) == 1:
        problem = (
            f"only one folder with pictures, {printable(names[0], 120)}, hence one class; RAW may be one level too high"
        )
    if problem and not forced:
        hint = "name another RAW (--layout class-folders takes the folders as classes all the same)"
        raise SourceError(f"{folder.path}: {problem}; rename, or {hint}")
    return _with_words(sources, folder, [*folder.folders]) if names else None


def read_splits(folder: Folder, listings: ListingCache, forced: bool) -> Sources | None:
    """Return those of train/, val/ and test/ with one folder per class; pictures directly in test/ have no label."""
    if all(SPLIT_FOLDERS.get(name) != "train" for name in folder.folders):
        return None
    splits = split_folders(folder)
    sources = Sources(" and ".join(f"{name}/" for name in splits) + " with one folder per class")
    for name, split in splits.items():
        _add_split(sources, folder, name, split, listings)
    return _with_words(sources, folder, [*splits])


def _add_split(
    sources: Sources, folder: Folder, below: str, split: str, listings: ListingCache, labels: Location | None = None
) -> None:
    """Add the pictures of a split: each is of the class that the folder in the split names.

    One outside the class folders has no label in a test split; in Kaggle's validation split, the file `labels` has it.
    """
    truth: dict[str, str] = {}
    for image in part_pictures(folder, below, below, listings, sources.ignored, split):
        above, slash, _ = image.path.removeprefix(f"{below}/").partition("/")
        wnid = above if slash else None
        if not slash and split == "val" and labels:
            truth = truth or _read_kaggle_labels(labels)
            wnid = truth.get(above.rpartition(".")[0])
            if wnid is None:
                sources.ignored.add(f"validation picture that {KAGGLE_LABELS} lacks", image.path)
                continue
        elif not slash and split != "test":
            raise SourceError(f"{image.file}: a picture outside the class folders has no label; move it into one")
        sources.images.append(image, wnid)


def _with_words(sources: Sources, folder: Folder, used: list[str]) -> Sources:
    folder.ignore(sources.ignored, [*used, MAPPING])
    sources.classes = ranked(sources.images.wnids, read_mapping(folder.path / MAPPING), {})
    return sources


def split_folders(folder: Folder) -> dict[str, str]:
    """Return folder name → split. Raises SourceError for two folders of one split."""
    splits = {name: SPLIT_FOLDERS[name] for name in folder.folders if name in SPLIT_FOLDERS}
    if len(set(splits.values())) != len(splits):
        raise SourceError(f"{folder.path}: {', '.join(splits)}: two folders for one split; rename or remove one")
    return splits


# ---- flat files named WNID_….JPEG


def read_flat(folder: Folder, listings: ListingCache, forced: bool) -> Sources | None:
    """Return the files named WNID_…; a rest that is words (n01440764_tench.JPEG) and no number names the class."""
    names = {name: FLAT_NAME.fullmatch(name) for name in folder.files if is_picture(name)}
    used = {name: match for name, match in names.items() if match}
    if not used or (len(used) < len(names) and not forced):
        return None
    sources = Sources("one flat folder of WNID_… files")
    words: dict[str, str] = {}
    sizes = storage.sizes(folder.path, used)
    for name, match in used.items():
        wnid, rest = match.groups()
        sources.images.append(RawImage("train", name, wnid, str(folder.path / name), 0, sizes[name]))
        words.setdefault(wnid, wnid if rest[0].isdigit() else rest.replace("_", " "))
    folder.ignore(sources.ignored, [*used, MAPPING])
    sources.classes = ranked(words, words | read_mapping(folder.path / MAPPING), {})
    return sources


# ---- synset tars, each of one class; ImageNet Fall 2011 is nothing else


def read_synsets(folder: Folder, listings: ListingCache, forced: bool) -> Sources | None:
    """Return ImageNet Fall 2011: RAW holds nXXXXXXXX.tar, or tars of those; classes are the wnids."""
    packed = any(WNID_TAR.fullmatch(name) for name in folder.files)
    tars = [] if packed else folder.ending(".tar")
    outer = [tar for tar in tars if WNID_TAR.fullmatch(_first_name(folder.path / tar))]
    if not (packed or outer or forced):
        return None
    sources = Sources(f"one tar of synset tars ({', '.join(outer)})" if outer else "ImageNet's synset tars")
    for name in outer:
        add_tar_of_synset_tars(sources, folder, name, listings)
    synsets = outer or add_synsets(sources, folder, "", listings)
    folder.ignore(sources.ignored, synsets)
    sources.classes = ranked(sources.images.wnids, {}, {})
    return sources if synsets else None


def _first_name(archive: Location) -> str:
    """Return the name of an archive's first regular file; empty where it has none, or is damaged."""
    try:
        with storage.opened(archive) as (read, size):
            return next((x.name for x in members(read, 0, size, str(archive)) if not x.reason), "")
    except SourceError:
        return ""


def add_tar_of_synset_tars(sources: Sources, folder: Folder, name: str, listings: ListingCache) -> None:
    """Add the training pictures of a tar of synset tars. What lies in no synset tar is left out."""
    for image in part_pictures(folder, name, name, listings, sources.ignored):
        wnid = image.path.removeprefix(f"{name}/").partition(".tar/")[0].rpartition("/")[2]
        if WNID.fullmatch(wnid):
            sources.images.append(image, wnid)
        else:
            sources.ignored.add("member outside the synset tars", image.path)


def add_synsets(sources: Sources, folder: Folder, below: str, listings: ListingCache) -> list[str]:
    """Add the training pictures of the synset tars and synset folders in `folder`, which is `below` in RAW.

    Of a tar and a folder of one synset, the tar is taken. Returns the paths of both below RAW.
    """
    names = [name for name in (*folder.files, *folder.folders) if WNID.fullmatch(name.removesuffix(".tar"))]
    paths = {name: f"{below}/{name}".strip("/") for name in names}
    for name, path in paths.items():
        if f"{name}.tar" in paths:
            sources.ignored.add("folder beside its synset tar", path)
            continue
        for image in part_pictures(folder, name, path, listings, sources.ignored):
            sources.images.append(image, name.removesuffix(".tar"))
    return [*paths.values()]


# ---- Kaggle: ILSVRC/Data/CLS-LOC with flat val/ and test/, its labels and words in LOC_ files


def read_kaggle(folder: Folder, listings: ListingCache, forced: bool) -> Sources | None:
    """Return train/ by synset folders, val/ by LOC_val_solution.csv, test/ without labels.

    RAW is the folder ILSVRC, or the one above it.

    Raises:
        SourceError: validation images without LOC_val_solution.csv, or words of other synsets.
    """
    below = next((x for x in (f"ILSVRC/{KAGGLE_DATA}", KAGGLE_DATA) if storage.is_dir(folder.path / x / "train")), None)
    if below is None:
        return None
    # The LOC_ files lie beside ILSVRC/ in Kaggle's download; in it, for some.
    base = folder.path / "ILSVRC" if below.startswith("ILSVRC") else folder.path
    mapping, labels = (
        base / name if storage.is_file(base / name) else base.absolute().parent / name
        for name in (MAPPING, KAGGLE_LABELS)
    )
    sources, words = Sources("Kaggle's CLS-LOC"), read_mapping(mapping)
    splits = [split for split in ("train", "val", "test") if storage.is_dir(folder.path / below / split)]
    for split in splits:
        _add_split(sources, folder, f"{below}/{split}", split, listings, labels)
        if len(words) == KAGGLE_CLASSES and split in KAGGLE_IMAGES:
            sources.promises.append(Promise(split, f"{below}/{split}", KAGGLE_IMAGES[split], "ILSVRC2012 promises"))
            sources.promised_classes = KAGGLE_CLASSES
    if unknown := sorted(set(sources.images.wnids) - words.keys()) if words else []:
        raise SourceError(f"{mapping}: lacks the synsets {', '.join(unknown[:5])}; it is of another data set")
    sources.classes = ranked(words or sources.images.wnids, words, {})
    folder.ignore(sources.ignored, [MAPPING, KAGGLE_LABELS, *(f"{below}/{split}" for split in splits)])
    return sources


def _read_kaggle_labels(path: Location) -> dict[str, str]:
    """Return ImageId → wnid: the first word of its PredictionString; four numbers of a box follow each wnid."""
    if not storage.is_file(path):
        raise SourceError(f"{path}: missing; it has the labels of val/, and lies in the same download")
    truth = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path)), strict=True):
            truth[row["ImageId"]] = row["PredictionString"].split()[0]
    except (csv.Error, KeyError, IndexError, AttributeError, TypeError) as error:
        raise SourceError(f"{path}: row {len(truth) + 2} has no ImageId and wnid; fetch it again") from error
    if not truth:
        raise SourceError(f"{path}: no row in it; fetch it again")
    return truth


# ---- small text files, and the words of classes in them


def read_small(path: Location, most: int) -> bytes:
    """Return a small file. Raises SourceError where it has more than `most` bytes."""
    with storage.opened(path) as (read, _):
        data = read(most + 1, 0)
    if len(data) > most:
        raise SourceError(f"{path}: has more than {most:,} bytes; it cannot be what its name says")
    return data


def read_text(path: Location) -> str:
    """Return a small text file. Raises SourceError where it is too large or not UTF-8."""
    try:
        return read_small(path, MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def read_mapping(path: Location) -> dict[str, str]:
    """Return wnid → words, from a file as MAPPING; none where it is absent. Raises SourceError."""
    words: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines() if storage.is_file(path) else (), start=1):
        match = WNID_LINE.fullmatch(line.strip())
        if match and match[1] not in words:
            words[match[1]] = match[2] or match[1]
        elif line.strip():
            wrong = "a wnid for the second time" if match else "no wnid at its beginning"
            raise SourceError(f"{path}: line {number} has {wrong}; fetch it again")
    return words
