"""ILSVRC2012 and ILSVRC2010 as published: archives of images and a development kit, each of them packed or unpacked."""

import gzip
import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline import SourceError, storage
from pipeline.archives import ListingCache, members
from pipeline.offline.classes import ranked, read_small
from pipeline.offline.names import SPLITS
from pipeline.offline.published import WNID, WNID_TAR, add_synsets, add_tar_of_synset_tars
from pipeline.offline.raw import Options, Promise, RawImage, RawTable, Reading, Sources
from pipeline.offline.tree import Folder, part_pictures
from pipeline.storage import Location

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"
CLASSES = 1000  # of either year
# raised by scipy on damaged bytes
DAMAGE = (LookupError, ValueError, TypeError, OverflowError, MemoryError, NotImplementedError, OSError, EOFError)
MAX_BYTES = 64 * 2**20  # of the kit unpacked; the real one has 6 MB


@dataclass(frozen=True)
class Challenge:
    """One year: the names of each of its parts, the preferred one first, and the published numbers of images."""

    year: int
    parts: Mapping[str, tuple[str, ...]]
    images: dict[str, int]


ILSVRC2012 = Challenge(
    2012,
    {
        "train": (TRAIN_TAR, "ILSVRC2012_img_train", "train"),
        "val": (VAL_TAR, "ILSVRC2012_img_val", "val", "validation"),
        "test": ("ILSVRC2012_img_test*.tar", "ILSVRC2012_img_test*", "test"),
        "devkit": (DEVKIT_TAR, "ILSVRC2012_devkit_t12"),
    },
    {"train": 1_281_167, "val": 50_000, "test": 100_000},  # the devkit's readme
)
ILSVRC2010 = Challenge(
    2010,
    {split: (f"ILSVRC2010_images_{split}.tar", f"ILSVRC2010_images_{split}", split) for split in SPLITS}
    | {"devkit": ("ILSVRC2010_devkit-1.0.tar.gz", "ILSVRC2010_devkit-1.0", "devkit-1.0")},
    {"train": 1_261_406, "val": 50_000, "test": 150_000},
)
PATCHES = "patch_images.tar"  # 2010's corrections of blank pictures: …/SPLIT/NAME takes the place of NAME


def evidence(challenge: Challenge, folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW as the parts of a challenge: named as published, or beside its devkit."""
    year, parts = challenge.year, _parts(folder, challenge)
    named = [name for name in parts.values() if name.casefold().startswith(f"ilsvrc{year}")]
    inside = [f"as {name}" for name in named] or _official_files(folder, parts, year)
    if not inside:
        return None
    doubt = ""
    if "train" not in parts:
        doubt = f"has {', '.join(named)}, but no {challenge.parts['train'][0]} or train/; fetch it"
    return Reading(f"ILSVRC{year}: {', '.join(parts.values())}", frozenset([*parts.values(), *inside]), doubt)


def read(challenge: Challenge, folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return the images of all parts that are there.

    Raises:
        SourceError: flat validation images without a devkit, or parts of different years.
    """
    year, parts = challenge.year, _parts(folder, challenge)
    kit_name = parts.pop("devkit", "")
    if "train" not in parts:
        return Sources("")
    kit = read_devkit(folder.path / kit_name, year) if kit_name else Devkit({}, {}, [], [], {})
    gives = "the synset tar or folder of train, and the devkit's ground truth by the number of a validation picture"
    sources = Sources(f"the official ILSVRC{year} archives", gives=gives)
    if any(name in folder.folders for name in parts.values()):
        sources.layout = f"ILSVRC{year} in {', '.join(filter(None, [*parts.values(), kit_name]))}"
    used, truth = [*parts.values(), kit_name], f"ILSVRC{year}_test_ground_truth.txt"
    for split, name in parts.items():
        if split != "train":
            _add_numbered(sources, folder, name, split, kit, listings, challenge)
        elif name in folder.files:
            add_tar_of_synset_tars(sources, folder, name, listings)
        else:
            used += add_synsets(sources, Folder.of(folder.path / name), name, listings)
    if year == 2010 and PATCHES in folder.files:
        _patch(sources, folder, listings)
        used.append(PATCHES)
    if kit.test:
        used.append(truth)
    elif year == 2010 and "test" in parts:
        sources.notes.append(f"{parts['test']}: without labels, because {truth} is not beside it")
    folder.ignore(sources.ignored, used)
    if unknown := sorted(set(sources.images.wnids) - kit.ids.keys()) if kit.ids else []:
        problem = f"synsets that the devkit lacks: {', '.join(unknown[:5])}"
        raise SourceError(f"{folder.path / parts['train']}: {problem}; archive and devkit are of different years")
    sources.classes = ranked(kit.ids or sources.images.wnids, kit.words, kit.ids)
    _promise(sources, parts, kit, challenge)
    return sources


def _official_files(folder: Folder, parts: dict[str, str], year: int) -> list[str]:
    """Return the first numbered file of val/ and, for 2012, the first synset tar of train/, as far as there are any."""
    files = {part: Folder.of(folder.path / parts[part]).files for part in ("train", "val") if part in parts}
    numbered = [f"val/{name}" for name in files.get("val", ()) if name.startswith(f"ILSVRC{year}_val_")]
    tars = [f"train/{name}" for name in files.get("train", ()) if year == 2012 and WNID_TAR.fullmatch(name)]
    return (numbered[:1] + tars[:1]) if "train" in parts else []


def _parts(folder: Folder, challenge: Challenge) -> dict[str, str]:
    """Return split (or "devkit") → the name in RAW that it is read from: the first that is there."""
    parts = {}
    for part, patterns in challenge.parts.items():
        for pattern in patterns:
            entries = folder.files if pattern.endswith((".tar", ".gz")) else folder.folders
            if names := [name for name in entries if fnmatchcase(name.casefold(), pattern.casefold())]:
                parts[part] = names[-1]  # of two test archives the newer
                break
    return parts


def _add_numbered(
    sources: Sources, folder: Folder, name: str, split: str, kit: "Devkit", listings: ListingCache, challenge: Challenge
) -> None:
    """Add validation or test images: each is of the synset folder that it lies in, or its number tells the label.

    The ground truth has a line for each file in the order of names, hence for number n the line n, and a missing file
    does not shift the others.
    """
    truth = kit.validation if split == "val" else kit.test
    numbered = re.compile(rf"ILSVRC{challenge.year}_{split}_([0-9]{{1,9}})\.\w+")
    for image in part_pictures(folder, name, name, listings, sources.ignored, split):
        above, last = image.path.split("/")[-2:]
        match = numbered.fullmatch(last)
        number = int(match[1]) if match else 0
        if WNID.fullmatch(above):
            sources.images.append(image, above)
        elif match and truth:
            if not 1 <= number <= len(truth):
                problem = f"number {number}, but the devkit has {len(truth)} labels"
                raise SourceError(f"{folder.path / image.path}: {problem}; archive and devkit are of different years")
            sources.images.append(image, truth[number - 1])
        elif match and split == "val":
            raise SourceError(
                f"{folder.path / image.path}: its label is in {challenge.parts['devkit'][0]}, which is missing beside "
                f"{name}; fetch it (of Kaggle's files, RAW is the folder that holds ILSVRC/)"
            )
        elif split == "val" or truth:
            sources.ignored.lose(f"{split} picture without a number in its name", image.path)
        else:
            sources.images.append(image)


def _patch(sources: Sources, folder: Folder, listings: ListingCache) -> None:
    """Replace the blank pictures by the corrected ones, by split and file name."""
    corrected = part_pictures(folder, PATCHES, PATCHES, listings, sources.ignored)
    patches = {tuple(image.path.split("/")[-2:]): image for image in corrected}
    images = RawTable()
    for image in sources.images:
        patch = patches.pop((image.split, image.name), image)
        images.append(RawImage(image.split, patch.path, image.wnid, patch.file, patch.offset, patch.size))
    sources.images = images
    for image in patches.values():
        sources.ignored.add("correction of a picture that is not there", image.path)


def _promise(sources: Sources, parts: dict[str, str], kit: "Devkit", challenge: Challenge) -> None:
    """Promise the published numbers for 1,000 classes; for a devkit with another number of them, its own numbers."""
    published = len(kit.ids) in (0, CLASSES)
    sources.promised_classes = CLASSES if published else len(kit.ids)
    truths = {"train": kit.train, "val": Counter(kit.validation), "test": Counter(kit.test)}
    for split, name in parts.items():
        by = f"ILSVRC{challenge.year}" if published else "the devkit"
        if images := challenge.images[split] if published else sum(truths[split].values()):
            labels = split != "train" and not published
            words = (f"{by} has", "labels") if labels else (f"{by} promises", "images")
            sources.promises.append(Promise(split, name, images, *words, truths[split]))


@dataclass(frozen=True)
class Devkit:
    """The development kit: class words and ids, and the labels of the flat splits."""

    words: dict[str, str]  # wnid → words
    ids: dict[str, int]  # wnid → ILSVRC2012_ID (or 2010's), 1 … n, an order of its own
    validation: list[str]  # the wnid of each validation image, in ascending order of file names
    test: list[str]  # the same of the test images, published for 2010 alone
    train: dict[str, int]  # wnid → number of training images, where the kit says so


def read_devkit(path: Location, year: int = 2012) -> Devkit:
    """Read a development kit: the .tar.gz, in memory and without unpacking it, or the unpacked folder.

    2010's test labels are looked for in the kit and beside it.

    Raises:
        SourceError: a damaged archive, a missing member, or a ground truth that names unknown ids.
    """
    meta, truth, test = ("meta.mat", *(f"ILSVRC{year}_{split}_ground_truth.txt" for split in ("validation", "test")))
    inside = [path / "data" / name for name in (meta, truth, test)] if storage.is_dir(path) else []
    files = {file.name: read_small(file, MAX_BYTES) for file in (path.parent / test, *inside) if storage.is_file(file)}
    if not inside:
        files |= _unpacked(path, (meta, truth, test))
    for name in (meta, truth):
        if name not in files:
            raise SourceError(f"{path}: has no …/data/{name}; this is not the ILSVRC{year} devkit")
    return parse_devkit(files[meta], files[truth], str(path), year, files.get(test, b""))


def _unpacked(path: Location, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Return the wanted files of the archive, by name."""
    try:
        with gzip.open(io.BytesIO(read_small(path, MAX_BYTES))) as file:
            data = file.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: damaged ({error}); fetch it again") from error
    if len(data) > MAX_BYTES:
        raise SourceError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes; this is no ILSVRC devkit")
    regular = (x for x in members(lambda size, at: data[at : at + size], 0, len(data), str(path)) if not x.reason)
    return {x.name.split("/")[-1]: data[x.offset :][: x.size] for x in regular if x.name.split("data/")[-1] in wanted}


def parse_devkit(meta: bytes, truth: bytes, where: str, year: int = 2012, test: bytes = b"") -> Devkit:
    """Read meta.mat and the ground truth files. Only leaves of the hierarchy (num_children 0) are classes."""
    from scipy.io import loadmat  # here: the builder's workers need not hold it
    from scipy.io.matlab import MatReadError

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"].reshape(-1)
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        if not all(isinstance(row[name], str) for row in leaves for name in ("WNID", "words")):
            raise ValueError("a synset without a string WNID or words")
        ids = {str(row["WNID"]): int(row[f"ILSVRC{year}_ID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        counted = leaves if "num_train_images" in synsets.dtype.names else []
        train = {str(row["WNID"]): int(row["num_train_images"]) for row in counted}
        numbers, test_numbers = ([int(line) for line in lines.split()] for lines in (truth, test))
    except (MatReadError, zlib.error, struct.error, *DAMAGE) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SourceError(f"{where}: meta.mat or the ground truth is damaged ({reason}); fetch it again") from error
    wnids = {number: wnid for wnid, number in ids.items()}
    if unknown := sorted({*numbers, *test_numbers} - wnids.keys()):
        raise SourceError(f"{where}: the ground truth names class ids that meta.mat lacks: {unknown[:5]}")
    if len(wnids) != len(leaves) or len(ids) != len(leaves):
        raise SourceError(f"{where}: meta.mat has one wnid or one id twice; fetch it again")
    return Devkit(words, ids, [wnids[n] for n in numbers], [wnids[n] for n in test_numbers], train)
