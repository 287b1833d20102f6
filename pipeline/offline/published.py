"""Published downloads beside ILSVRC's own: ImageNet Fall 2011's synset tars, Kaggle's CLS-LOC, Tiny ImageNet."""

import csv
import io
import re
from collections.abc import Mapping

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, members
from pipeline.cli import printable
from pipeline.offline.classes import MAPPING, ranked, read_mapping, read_text, read_words, with_empty
from pipeline.offline.names import SPLITS, lines_of
from pipeline.offline.raw import Options, Promise, Reading, Sources
from pipeline.offline.tree import Folder, has_pictures, is_picture, part_pictures
from pipeline.storage import Location

WNID = re.compile(r"n[0-9]{8}")
WNID_TAR = re.compile(r"(?:.*/)?(n[0-9]{8})\.tar")
KAGGLE_DATA = "Data/CLS-LOC"
KAGGLE_LABELS = "LOC_val_solution.csv"
KAGGLE_IMAGES = {"train": 1_281_167, "val": 50_000}  # as ILSVRC2012
KAGGLE_CLASSES = 1000
TINY_LISTS = ("wnids.txt", "words.txt")
TINY_IMAGES = "images"
TINY_LABELS_PATH = "val/val_annotations.txt"

# ---- synset tars, each of one class; ImageNet Fall 2011 is nothing else


def synset_evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's tars as one for each synset, or as tars of those."""
    packed = [name for name in folder.files if WNID_TAR.fullmatch(name)]
    outer = [] if packed else _tars_of_synset_tars(folder)
    folders = [name for name in folder.folders if WNID.fullmatch(name)] if packed else []
    used = frozenset([*packed, *outer, *folders])
    return Reading("each nXXXXXXXX.tar is a class", used) if used else None


def _tars_of_synset_tars(folder: Folder) -> list[str]:
    """Return the tars whose first member is a synset tar, but for the training archives of ILSVRC, which are such."""
    tars = [name for name in folder.ending(".tar") if not name.casefold().startswith("ilsvrc")]
    return [tar for tar in tars if WNID_TAR.fullmatch(_first_name(folder.path / tar))]


def read_synsets(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return ImageNet Fall 2011: RAW holds nXXXXXXXX.tar, or tars of those; classes are the wnids."""
    packed = any(WNID_TAR.fullmatch(name) for name in folder.files)
    outer = [] if packed else _tars_of_synset_tars(folder)
    sources = Sources(f"one tar of synset tars ({', '.join(outer)})" if outer else "ImageNet's synset tars")
    sources.gives = "the name of the synset tar"
    for name in outer:
        add_tar_of_synset_tars(sources, folder, name, listings)
    used = outer or add_synsets(sources, folder, "", listings)
    folder.ignore(sources.ignored, used)
    declared = [name.removesuffix(".tar") for name in used if packed]
    sources.classes = ranked(with_empty(folder.path, declared, sources, options), {}, {})
    return sources


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
            sources.ignored.lose("picture outside the synset tars", image.path)


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


def _kaggle_data(folder: Folder) -> str:
    """Return the path of CLS-LOC below RAW; "" where it has none."""
    return next((x for x in (f"ILSVRC/{KAGGLE_DATA}", KAGGLE_DATA) if storage.is_dir(folder.path / x / "train")), "")


def kaggle_evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of ILSVRC/Data/CLS-LOC, where RAW has it."""
    if not (below := _kaggle_data(folder)):
        return None
    beside = [name for name in (MAPPING, KAGGLE_LABELS) if name in folder.files]
    return Reading(f"Kaggle's {below}", frozenset([below.partition("/")[0], *beside]))


def read_kaggle(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return train/ by synset folders, val/ by LOC_val_solution.csv, test/ without labels.

    RAW is the folder ILSVRC, or the one above it.

    Raises:
        SourceError: validation images without LOC_val_solution.csv, or words of other synsets.
    """
    if not (below := _kaggle_data(folder)):
        return Sources("")
    # The LOC_ files lie beside ILSVRC/ in Kaggle's download; in it, for some.
    base = folder.path / "ILSVRC" if below.startswith("ILSVRC") else folder.path
    mapping, labels = (
        base / name if storage.is_file(base / name) else base.absolute().parent / name
        for name in (MAPPING, KAGGLE_LABELS)
    )
    sources, words = Sources("Kaggle's CLS-LOC"), read_mapping(mapping)
    sources.gives = f"the folder in train/, and {KAGGLE_LABELS} for val/"
    splits = [split for split in ("train", "val", "test") if storage.is_dir(folder.path / below / split)]
    for split in splits:
        flat = any(map(is_picture, Folder.of(folder.path / below / split).files))
        truth = _read_kaggle_labels(labels) if split == "val" and flat else {}
        _add_split(sources, folder, f"{below}/{split}", split, listings, truth)
        if len(words) == KAGGLE_CLASSES and split in KAGGLE_IMAGES:
            sources.promises.append(Promise(split, f"{below}/{split}", KAGGLE_IMAGES[split], "ILSVRC2012 promises"))
            sources.promised_classes = KAGGLE_CLASSES
    if unknown := sorted(set(sources.images.wnids) - words.keys()) if words else []:
        raise SourceError(f"{mapping}: lacks the synsets {', '.join(unknown[:5])}; it is of another data set")
    names = [*words]
    if not sources.promised_classes:  # else the number of pictures is compared with what ILSVRC2012 has
        declared = words or Folder.of(folder.path / below / "train").folders
        names = with_empty(folder.path / below, declared, sources, options)
    sources.classes = ranked(names, words, {})
    folder.ignore(sources.ignored, [MAPPING, KAGGLE_LABELS, *(f"{below}/{split}" for split in splits)])
    return sources


def _read_kaggle_labels(path: Location) -> dict[str, str]:
    """Return ImageId → wnid: the first word of its PredictionString; four numbers of a box follow each wnid."""
    if not storage.is_file(path):
        raise SourceError(f"{path}: missing; it has the labels of val/, and lies in the same download")
    truth: dict[str, str] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path)), strict=True):
            name, wnid = row["ImageId"], row["PredictionString"].split()[0]
            if truth.setdefault(name, wnid) != wnid:
                raise SourceError(f"{path}: {printable(name, 60)} has two labels; fetch it again")
    except (csv.Error, KeyError, IndexError, AttributeError, TypeError) as error:
        raise SourceError(f"{path}: row {len(truth) + 2} has no ImageId and wnid; fetch it again") from error
    if not truth:
        raise SourceError(f"{path}: no row in it; fetch it again")
    return truth


def _add_split(
    sources: Sources, folder: Folder, below: str, split: str, listings: ListingCache, truth: Mapping[str, str]
) -> None:
    """Add the pictures of a split: each is of the class that the folder in the split names.

    The class of one outside the class folders stands in `truth`, by the name without its extension; in a test split,
    such a picture has no label.
    """
    for image in part_pictures(folder, below, below, listings, sources.ignored, split, TINY_LABELS_PATH):
        above, slash, _ = image.path.removeprefix(f"{below}/").partition("/")
        wnid = above if slash and above != TINY_IMAGES else truth.get(image.name.rpartition(".")[0])
        if wnid or split == "test":
            sources.images.append(image, wnid)
        else:
            sources.ignored.lose("picture without a label", image.path)


# ---- Tiny ImageNet: train/WNID/images, val/images with val_annotations.txt, test/images


def tiny_evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of Tiny-ImageNet-200 as it unpacks."""
    lists = [name for name in TINY_LISTS if name in folder.files]
    labels = [TINY_LABELS_PATH] if storage.is_file(folder.path / TINY_LABELS_PATH) else []
    if "train" not in folder.folders or not (lists[:1] == ["wnids.txt"] or labels):
        return None
    splits = [split for split in SPLITS if split in folder.folders]
    return Reading("Tiny ImageNet", frozenset([*lists, *labels, *splits]))


def read_tiny(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return Tiny ImageNet: classes are those of wnids.txt, in sorted order.

    The labels of val/images are in val_annotations.txt, and test/images has none; other pictures are of their folder.

    Raises SourceError: val/images without val_annotations.txt, or classes that wnids.txt lacks.
    """
    sources = Sources("Tiny ImageNet", gives=f"the folder in train/, and {TINY_LABELS_PATH} for val/")
    wnids = read_text(folder.path / "wnids.txt").split() if "wnids.txt" in folder.files else []
    words = read_words(folder.path / "words.txt") if "words.txt" in folder.files else {}
    splits = [split for split in SPLITS if split in folder.folders]
    flat = storage.is_dir(folder.path / "val" / TINY_IMAGES) and has_pictures(folder.path / "val" / TINY_IMAGES)
    truth = _read_tiny_labels(folder.path / TINY_LABELS_PATH) if flat else {}
    for split in splits:
        _add_split(sources, folder, split, split, listings, truth if split == "val" else {})
    folder.ignore(sources.ignored, [*TINY_LISTS, *splits])
    if unknown := sorted(set(sources.images.wnids) - set(wnids)) if wnids else []:
        raise SourceError(f"{folder.path / 'wnids.txt'}: lacks {', '.join(unknown[:5])}; it is of another data set")
    declared = wnids or (Folder.of(folder.path / "train").folders if "train" in splits else ())
    sources.classes = ranked(with_empty(folder.path, declared, sources, options), words, {})
    return sources


def _read_tiny_labels(path: Location) -> dict[str, str]:
    """Return the picture's name without its extension → wnid; a box follows."""
    if not storage.is_file(path):
        raise SourceError(f"{path}: missing; it has the labels of val/images, and lies in the same download")
    truth: dict[str, str] = {}
    for number, line in enumerate(lines_of(read_text(path).rstrip()), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not WNID.fullmatch(wnid):
            raise SourceError(f"{path}: line {number} has no name and wnid; fetch it again")
        if truth.setdefault(name.rpartition(".")[0], wnid) != wnid:
            raise SourceError(f"{path}: {printable(name, 60)} has two labels; fetch it again")
    return truth
