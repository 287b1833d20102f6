"""ImageNet as Kaggle publishes it: ILSVRC/Data/CLS-LOC with flat val/ and test/, its labels and words in LOC_ files."""

import csv
import io
import sys
from collections.abc import Iterator

from pipeline import storage
from pipeline.offline.raw import Entry, Folder, Promise, RawImage, SourceError, Sources, pictures, ranked
from pipeline.offline.scans import Scans
from pipeline.offline.words import MAPPING, read_mapping, read_text
from pipeline.storage import Location

DATA = "Data/CLS-LOC"
SOLUTION = "LOC_val_solution.csv"
PUBLISHED = {"train": 1_281_167, "val": 50_000}  # as ILSVRC2012
CLASSES = 1000


def recognise(folder: Folder) -> bool:
    return _base(folder.path) is not None


def read(folder: Folder, scans: Scans) -> Sources:
    """train/ by synset folders, val/ by LOC_val_solution.csv, test/ without labels.

    Raises:
        SourceError: no CLS-LOC, or validation images without LOC_val_solution.csv.
    """
    base = _base(folder.path)
    if base is None:
        raise folder.misfit("kaggle", f"neither ILSVRC/{DATA}/train nor {DATA}/train is in it")
    data, below = base / DATA, DATA if base == folder.path else f"ILSVRC/{DATA}"
    beside = {name: _beside(base, name) for name in (MAPPING, SOLUTION)}
    sources = Sources("Kaggle's CLS-LOC")
    for split in ("train", "val", "test"):
        if storage.is_dir(data / split):
            entries = pictures(data / split, f"{below}/{split}", sources.ignored)
            for image in _labelled(entries, split, len(f"{below}/{split}/"), beside[SOLUTION], sources):
                sources.images.append(image)
    words = read_mapping(beside[MAPPING])
    seen = sources.images.wnids
    if unknown := sorted(set(seen) - words.keys()) if words else []:
        raise SourceError(f"{beside[MAPPING]}: lacks the synsets {', '.join(unknown[:5])}; it is of another data set")
    sources.classes = ranked(words or seen, words, {})
    if len(words) == CLASSES:
        sources.promised_classes = CLASSES
        parts = [split for split in PUBLISHED if storage.is_dir(data / split)]
        sources.promises += [Promise(s, f"{below}/{s}", PUBLISHED[s], "ILSVRC2012 promises") for s in parts]
    for place, used in ((folder, ["ILSVRC", "Data", *beside]), (Folder.of(data), ["train", "val", "test"])):
        place.ignore(sources.ignored, used)
    if base != folder.path:
        Folder.of(base).ignore(sources.ignored, ["Data"])
    return sources


def _labelled(
    entries: Iterator[Entry], split: str, prefix: int, solution: Location, sources: Sources
) -> Iterator[RawImage]:
    """A picture in a folder of its split is of the class that the folder names; a flat one is looked up.

    `prefix` is the length of the split's own path, which all paths begin with.
    """
    truth: dict[str, str] = {}
    for path, file, offset, size in entries:
        above, slash, _ = path[prefix:].partition("/")
        wnid: str | None = sys.intern(above) if slash else None
        if wnid is None and split == "train":
            raise SourceError(f"{file}: a picture outside the synset folders has no label; move it into one")
        if wnid is None and split == "val":
            truth = truth or _solution(solution)
            wnid = truth.get(above.rpartition(".")[0])
            if wnid is None:
                sources.ignored.add(f"validation picture that {SOLUTION} lacks", path)
                continue
        yield RawImage(split, path, wnid, file, offset, size)


def _solution(path: Location) -> dict[str, str]:
    """ImageId → wnid: the first word of its PredictionString; four numbers of a box follow each wnid."""
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


def _base(path: Location) -> Location | None:
    """The folder ILSVRC: in RAW, or RAW itself."""
    return next((base for base in (path / "ILSVRC", path) if storage.is_dir(base / DATA / "train")), None)


def _beside(base: Location, name: str) -> Location:
    """A LOC_ file lies beside ILSVRC/ in Kaggle's download; in it, for some."""
    inside = base / name
    return inside if storage.is_file(inside) else base.absolute().parent / name
