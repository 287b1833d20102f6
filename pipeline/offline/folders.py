"""Layouts of folders: classes, splits with classes, flat files, Kaggle's CLS-LOC; and tars and folders of synsets."""

import csv
import io
import re
from collections.abc import Iterable, Iterator

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, Member, members
from pipeline.cli import printable
from pipeline.offline.raw import (
    SPLIT_FOLDERS,
    Folder,
    LeftOut,
    Promise,
    RawImage,
    Sources,
    is_picture,
    kind_of,
    pictures,
    ranked,
)
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


def recognise_classes(folder: Folder) -> bool:
    """Return whether folders hold pictures, and no file is one. Raises SourceError where RAW seems one level off."""
    if any(is_picture(name) for name in folder.files):
        return False
    named = [name for name in folder.folders if has_pictures(folder.path / name)]
    hint = "(--layout class-folders takes the folders as classes all the same)"
    if splits := [name for name in named if name.casefold() in SPLIT_FOLDERS]:
        raise SourceError(
            f"{folder.path}: {', '.join(splits)}: named as a split, not as a class, and there is no train/; "
            f"rename or name another RAW {hint}"
        )
    if len(named) == 1:
        raise SourceError(
            f"{folder.path}: only one folder with pictures, {printable(named[0], 120)}, hence one class; "
            f"is RAW one level too high? {hint}"
        )
    return bool(named)


def read_classes(folder: Folder, listings: ListingCache) -> Sources:
    """Return the pictures of one folder per class, all for training."""
    sources = Sources("one folder per class")
    for name in folder.folders:
        for image in pictures(folder.path / name, name, sources.ignored):
            sources.images.append(image, name)
    if not sources.images:
        raise folder.misfit("class-folders", f"no picture is in its {len(folder.folders)} folders")
    return _with_words(sources, folder, folder.folders)


def recognise_splits(folder: Folder) -> bool:
    return any(SPLIT_FOLDERS.get(name) == "train" for name in folder.folders)


def read_splits(folder: Folder, listings: ListingCache) -> Sources:
    """Return those of train/, val/ and test/ with one folder per class; pictures directly in test/ have no label."""
    splits = split_folders(folder)
    if "train" not in splits.values():
        raise folder.misfit("split-folders", "it has no train/")
    sources = Sources(" and ".join(f"{name}/" for name in splits) + " with one folder per class")
    for name, split in splits.items():
        _add_split(sources, folder.path / name, name, split)
    if not sources.images.has("train"):
        raise SourceError("no training pictures: train/ has no class folder with pictures in it")
    return _with_words(sources, folder, splits)


def _add_split(sources: Sources, folder: Location, below: str, split: str, labels: Location | None = None) -> None:
    """Add the pictures of a split: each is of the class that the folder in the split names.

    One outside the class folders has no label in a test split; in Kaggle's validation split, the file `labels` has it.
    """
    truth: dict[str, str] = {}
    for image in pictures(folder, below, sources.ignored, split):
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


def _with_words(sources: Sources, folder: Folder, used: Iterable[str]) -> Sources:
    folder.ignore(sources.ignored, [*used, MAPPING])
    sources.classes = ranked(sources.images.wnids, read_mapping(folder.path / MAPPING), {})
    return sources


def split_folders(folder: Folder) -> dict[str, str]:
    """Return folder name → split. Raises SourceError for two folders of one split."""
    splits = {name: SPLIT_FOLDERS[name] for name in folder.folders if name in SPLIT_FOLDERS}
    if len(set(splits.values())) != len(splits):
        raise SourceError(f"{folder.path}: {', '.join(splits)}: two folders for one split; rename or remove one")
    return splits


def has_pictures(folder: Location) -> bool:
    return next(pictures(folder, "", LeftOut()), None) is not None


# ---- flat files named WNID_….JPEG


def recognise_flat(folder: Folder) -> bool:
    names = [name for name in folder.files if is_picture(name)]
    return bool(names) and all(FLAT_NAME.fullmatch(name) for name in names)


def read_flat(folder: Folder, listings: ListingCache) -> Sources:
    """Return the files named WNID_…; a rest that is words (n01440764_tench.JPEG) and no number names the class."""
    sources = Sources("one flat folder of WNID_… files")
    words: dict[str, str] = {}
    used = {name: match for name in folder.files if is_picture(name) and (match := FLAT_NAME.fullmatch(name))}
    sizes = storage.sizes(folder.path, used)
    for name, match in used.items():
        wnid, rest = match.groups()
        sources.images.append(RawImage("train", name, wnid, str(folder.path / name), 0, sizes[name]))
        words.setdefault(wnid, wnid if rest[0].isdigit() else rest.replace("_", " "))
    if not used:
        raise folder.misfit("flat", "no file in it is named WNID_….JPEG, such as n01440764_10026.JPEG")
    folder.ignore(sources.ignored, [*used, MAPPING])
    sources.classes = ranked(words, words | read_mapping(folder.path / MAPPING), {})
    return sources


# ---- synset tars, each of one class; ImageNet Fall 2011 is nothing else


def recognise_synsets(folder: Folder) -> bool:
    return has_synset_tars(folder) or bool(_tars_of_synset_tars(folder))


def read_synsets(folder: Folder, listings: ListingCache) -> Sources:
    """Return ImageNet Fall 2011: RAW holds nXXXXXXXX.tar, or tars of those; classes are the wnids."""
    sources = Sources("ImageNet's synset tars")
    outer = [] if has_synset_tars(folder) else _tars_of_synset_tars(folder)
    synsets = [name for name in (*folder.files, *folder.folders) if WNID.fullmatch(name.removesuffix(".tar"))]
    for name in outer:
        add_tar_of_synset_tars(sources, folder, name, listings)
    if outer:
        sources.layout = f"one tar of synset tars ({', '.join(outer)})"
    elif synsets:
        add_synsets(sources, folder, "", listings)
    else:
        raise folder.misfit("fall2011", "it holds no nXXXXXXXX.tar and no tar of those")
    folder.ignore(sources.ignored, outer or synsets)
    sources.classes = ranked(sources.images.wnids, {}, {})
    return sources


def has_synset_tars(folder: Folder) -> bool:
    return any(WNID_TAR.fullmatch(name) for name in folder.files)


def _tars_of_synset_tars(folder: Folder) -> list[str]:
    return [name for name in folder.tars if WNID_TAR.fullmatch(_first_name(folder.path / name))]


def _first_name(archive: Location) -> str:
    """Return the name of an archive's first regular file; empty where it has none, or is damaged."""
    try:
        with storage.opened(archive) as (read, size):
            regular = (member for member in members(read, 0, size, str(archive)) if not member.reason)
            return next(regular, Member("", 0, 0)).name
    except SourceError:
        return ""


def archive_pictures(
    folder: Folder, name: str, below: str, listings: ListingCache, left_out: LeftOut, split: str, nested: bool = False
) -> Iterator[RawImage]:
    """Yield every picture of one archive, without a label; `below` is the archive's folder in RAW."""
    file, path = str(folder.path / name), f"{below}/{name}" if below else name
    for member, offset, size, _ in listings.members(folder.path / name, left_out.add, nested):
        if is_picture(member):
            yield RawImage(split, f"{path}/{member}", None, file, offset, size)
        else:
            left_out.add(kind_of(member), f"{name}/{member}")


def add_tar_of_synset_tars(sources: Sources, folder: Folder, name: str, listings: ListingCache) -> None:
    """Add the training pictures of a tar of synset tars. What lies in no synset tar is left out."""
    for image in archive_pictures(folder, name, "", listings, sources.ignored, "train", nested=True):
        wnid = image.path.removeprefix(f"{name}/").partition(".tar/")[0].rpartition("/")[2]
        if WNID.fullmatch(wnid):
            sources.images.append(image, wnid)
        else:
            sources.ignored.add("member outside the synset tars", image.path)


def add_synsets(sources: Sources, folder: Folder, below: str, listings: ListingCache) -> None:
    """Add the training pictures of the synset tars and synset folders in `folder`, which is `below` in RAW.

    Of a tar and a folder of one synset, the tar is taken.
    """
    tars = {name.removesuffix(".tar"): name for name in folder.files if WNID_TAR.fullmatch(name)}
    folders = [name for name in folder.folders if WNID.fullmatch(name)]
    for wnid, name in tars.items():
        for image in archive_pictures(folder, name, below, listings, sources.ignored, "train"):
            sources.images.append(image, wnid)
    for wnid in folders:
        path = f"{below}/{wnid}" if below else wnid
        if wnid in tars:
            sources.ignored.add("folder beside its synset tar", path)
            continue
        for image in pictures(folder.path / wnid, path, sources.ignored):
            sources.images.append(image, wnid)
    if below:
        folder.ignore(sources.ignored, [*tars.values(), *folders])


# ---- Kaggle: ILSVRC/Data/CLS-LOC with flat val/ and test/, its labels and words in LOC_ files


def recognise_kaggle(folder: Folder) -> bool:
    return _kaggle_folder(folder.path) is not None


def read_kaggle(folder: Folder, listings: ListingCache) -> Sources:
    """Return train/ by synset folders, val/ by LOC_val_solution.csv, test/ without labels.

    Raises:
        SourceError: no CLS-LOC, or validation images without LOC_val_solution.csv.
    """
    base = _kaggle_folder(folder.path)
    if base is None:
        raise folder.misfit("kaggle", f"neither ILSVRC/{KAGGLE_DATA}/train nor {KAGGLE_DATA}/train is in it")
    data, below = base / KAGGLE_DATA, KAGGLE_DATA if base == folder.path else f"ILSVRC/{KAGGLE_DATA}"
    # The LOC_ files lie beside ILSVRC/ in Kaggle's download; in it, for some.
    beside = {
        name: base / name if storage.is_file(base / name) else base.absolute().parent / name
        for name in (MAPPING, KAGGLE_LABELS)
    }
    sources = Sources("Kaggle's CLS-LOC")
    splits = [split for split in ("train", "val", "test") if storage.is_dir(data / split)]
    for split in splits:
        _add_split(sources, data / split, f"{below}/{split}", split, beside[KAGGLE_LABELS])
    words = read_mapping(beside[MAPPING])
    if unknown := sorted(set(sources.images.wnids) - words.keys()) if words else []:
        raise SourceError(f"{beside[MAPPING]}: lacks the synsets {', '.join(unknown[:5])}; it is of another data set")
    sources.classes = ranked(words or sources.images.wnids, words, {})
    if len(words) == KAGGLE_CLASSES:
        sources.promised_classes = KAGGLE_CLASSES
        for split in splits:
            if images := KAGGLE_IMAGES.get(split):
                sources.promises.append(Promise(split, f"{below}/{split}", images, "ILSVRC2012 promises"))
    folder.ignore(sources.ignored, ["ILSVRC", "Data", *beside])
    Folder.of(data).ignore(sources.ignored, ["train", "val", "test"])
    if base != folder.path:
        Folder.of(base).ignore(sources.ignored, ["Data"])
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


def _kaggle_folder(path: Location) -> Location | None:
    """Return the folder ILSVRC: in RAW, or RAW itself."""
    return next((base for base in (path / "ILSVRC", path) if storage.is_dir(base / KAGGLE_DATA / "train")), None)


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
