"""ILSVRC2012 and ILSVRC2010 as published: archives of images and a devkit, each of them packed or unpacked."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline import storage
from pipeline.offline.devkit import Devkit, read_devkit
from pipeline.offline.raw import Entry, Folder, Promise, RawImage, SourceError, Sources, pictures, ranked
from pipeline.offline.scans import Scans
from pipeline.offline.synsets import WNID, add_archive, add_folder, archive_entries, has_synset_tars
from pipeline.offline.table import RawTable
from pipeline.storage import Location

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"
CLASSES = 1000  # of either year


@dataclass(frozen=True)
class Challenge:
    """One year: how its parts are called, the preferred name first, and the published numbers of images."""

    year: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    devkit: tuple[str, ...]
    images: dict[str, int]

    @property
    def name(self) -> str:
        return f"ilsvrc{self.year}"


ILSVRC2012 = Challenge(
    year=2012,
    train=(TRAIN_TAR, "ILSVRC2012_img_train", "train"),
    val=(VAL_TAR, "ILSVRC2012_img_val", "val", "validation"),
    test=("ILSVRC2012_img_test*.tar", "ILSVRC2012_img_test*", "test"),
    devkit=(DEVKIT_TAR, "ILSVRC2012_devkit_t12"),
    images={"train": 1_281_167, "val": 50_000, "test": 100_000},  # the devkit's readme
)
ILSVRC2010 = Challenge(
    year=2010,
    train=("ILSVRC2010_images_train.tar", "ILSVRC2010_images_train", "train"),
    val=("ILSVRC2010_images_val.tar", "ILSVRC2010_images_val", "val"),
    test=("ILSVRC2010_images_test.tar", "ILSVRC2010_images_test", "test"),
    devkit=("ILSVRC2010_devkit-1.0.tar.gz", "ILSVRC2010_devkit-1.0", "devkit-1.0"),
    images={"train": 1_261_406, "val": 50_000, "test": 150_000},
)
PATCHES = "patch_images.tar"  # 2010's corrections of blank pictures: …/SPLIT/NAME takes the place of NAME


def recognise(folder: Folder, challenge: Challenge) -> bool:
    """A part has the official name; or train/ has beside it a devkit or a flat val/, or in it synset tars."""
    parts = _parts(folder, challenge)
    if any(name.startswith(f"ILSVRC{challenge.year}") for split, name in parts.items() if split != "devkit"):
        return True
    if "train" not in parts:
        return False
    flat = "val" in parts and _is_flat(folder.path / parts["val"], challenge.year)
    return flat or "devkit" in parts or (challenge.year == 2012 and has_synset_tars(Folder.of(folder.path / "train")))


def read(folder: Folder, scans: Scans, challenge: Challenge) -> Sources:
    """The images of all parts that are there.

    Raises:
        SourceError: no training images, flat validation images without a devkit, or parts of different years.
    """
    parts = _parts(folder, challenge)
    devkit_name = parts.pop("devkit", "")
    if "train" not in parts:
        raise folder.misfit(challenge.name, f"it has no {', '.join(challenge.train[:2])} or train/ with the synsets")
    devkit = read_devkit(folder.path / devkit_name, challenge.year) if devkit_name else Devkit({}, {}, [])
    packed = all(name in folder.files for name in parts.values())
    sources = Sources(f"the official ILSVRC{challenge.year} archives")
    if not packed:
        sources.layout = f"ILSVRC{challenge.year} in {', '.join(filter(None, [*parts.values(), devkit_name]))}"
    truth = {"val": devkit.validation, "test": devkit.test}
    for split, name in parts.items():
        if split != "train":
            _add_numbered(sources, folder, name, split, truth[split], scans, challenge)
        elif name in folder.files:
            add_archive(sources, folder, name, split, scans)
        else:
            add_folder(sources, Folder.of(folder.path / name), name, split, scans)
    patches = [PATCHES] if challenge.year == 2010 and PATCHES in folder.files else []
    if patches:
        _patch(sources, folder, scans)
    truths = [name for name in folder.files if devkit.test and name == f"ILSVRC{challenge.year}_test_ground_truth.txt"]
    folder.ignore(sources.ignored, [*parts.values(), devkit_name, *patches, *truths])
    if challenge.year == 2010 and "test" in parts and not devkit.test:
        sources.notes.append(
            f"{parts['test']}: without labels, because ILSVRC2010_test_ground_truth.txt is not beside it"
        )
    seen = sources.images.wnids
    if unknown := sorted(set(seen) - devkit.ids.keys()) if devkit.ids else []:
        raise SourceError(
            f"{folder.path / parts['train']}: synsets that the devkit lacks: {', '.join(unknown[:5])}; "
            "archive and devkit are of different years"
        )
    sources.classes = ranked(devkit.ids or seen, devkit.words, devkit.ids)
    _promise(sources, parts, devkit, challenge)
    return sources


def _parts(folder: Folder, challenge: Challenge) -> dict[str, str]:
    """Split (or "devkit") → the name in RAW that it is read from: the first that is there."""
    found = {}
    for part in ("train", "val", "test", "devkit"):
        for pattern in getattr(challenge, part):
            entries = folder.files if pattern.endswith((".tar", ".gz")) else folder.folders
            if names := [name for name in entries if fnmatchcase(name, pattern)]:
                found[part] = names[-1]  # of two test archives the newer
                break
    return found


def _is_flat(path: Location, year: int) -> bool:
    return storage.is_dir(path) and any(entry.startswith(f"ILSVRC{year}_val_") for entry in Folder.of(path).files)


def _add_numbered(
    sources: Sources, folder: Folder, name: str, split: str, truth: list[str], scans: Scans, challenge: Challenge
) -> None:
    """Add validation or test images: each is of the synset folder that it lies in, or its number tells the label.

    The ground truth has a line for each file in the order of names, hence for number n the line n, and a missing file
    does not shift the others.
    """
    numbered = re.compile(rf"ILSVRC{challenge.year}_{split}_([0-9]{{1,9}})\.\w+")
    for path, file, offset, size in _entries(sources, folder, name, scans):
        above, last = path.split("/")[-2:]
        number = numbered.fullmatch(last)
        wnid: str | None = None
        if WNID.fullmatch(above):
            wnid = above
        elif truth and number:
            if not 1 <= int(number[1]) <= len(truth):
                raise SourceError(
                    f"{folder.path / path}: number {int(number[1])}, but the devkit has {len(truth)} labels; "
                    "archive and devkit are of different years"
                )
            wnid = truth[int(number[1]) - 1]
        elif split == "val" and number:
            raise SourceError(
                f"{folder.path / name}: its labels are in {challenge.devkit[0]}, which is missing beside it; fetch it "
                "(of Kaggle's files, RAW is the folder that holds ILSVRC/)"
            )
        elif split == "val" or truth:
            sources.ignored.add(f"{split} picture without a number in its name", path)
            continue
        sources.images.append(RawImage(split, path, wnid, file, offset, size))


def _entries(sources: Sources, folder: Folder, name: str, scans: Scans) -> Iterator[Entry]:
    if name in folder.files:
        return archive_entries(folder, name, "", scans, sources.ignored)
    return pictures(folder.path / name, name, sources.ignored)


def _patch(sources: Sources, folder: Folder, scans: Scans) -> None:
    """Put the corrected pictures in the place of the blank ones, by split and file name."""
    patches = {}
    for path, file, offset, size in archive_entries(folder, PATCHES, "", scans, sources.ignored):
        patches[tuple(path.split("/")[-2:])] = (path, file, offset, size)
    images = RawTable()
    for image in sources.images:
        patch = patches.pop((image.split, image.name), None)
        images.append(RawImage(image.split, patch[0], image.wnid, *patch[1:]) if patch else image)
    sources.images = images
    for path, *_ in patches.values():
        sources.ignored.add("correction of a picture that is not there", path)


def _promise(sources: Sources, parts: dict[str, str], devkit: Devkit, challenge: Challenge) -> None:
    """The published numbers hold for 1,000 classes; for a devkit with another number of them, its own numbers."""
    published = len(devkit.ids) in (0, CLASSES)
    sources.promised_classes = CLASSES if published else len(devkit.ids)
    truths = {"train": devkit.train, "val": _count(devkit.validation), "test": _count(devkit.test)}
    for split, name in parts.items():
        own = sum(truths[split].values())
        by = f"ILSVRC{challenge.year}" if published else "the devkit"
        images = challenge.images[split] if published else own
        if images:
            labels = split != "train" and not published
            words = (f"{by} has", "labels") if labels else (f"{by} promises", "images")
            sources.promises.append(Promise(split, name, images, *words, truths[split]))


def _count(wnids: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for wnid in wnids:
        counts[wnid] = counts.get(wnid, 0) + 1
    return counts
