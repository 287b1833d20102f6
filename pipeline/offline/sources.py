"""Where raw images are: every layout that we know → split, class and locator of each image."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from pipeline import storage
from pipeline.errors import UserError
from pipeline.offline import classfolders, counts, ilsvrc, kaggle, parquet, synsets, webdataset
from pipeline.offline.ilsvrc import DEVKIT_TAR, ILSVRC2010, ILSVRC2012, TRAIN_TAR, VAL_TAR
from pipeline.offline.raw import Folder, LeftOut, RawImage, SourceError, Sources
from pipeline.offline.scans import Scans
from pipeline.offline.table import RawTable
from pipeline.offline.words import read_text
from pipeline.storage import Location, volumes

__all__ = [
    "DEVKIT_TAR",
    "LAYOUTS",
    "TRAIN_TAR",
    "VAL_TAR",
    "LeftOut",
    "RawImage",
    "SourceError",
    "Sources",
    "find_sources",
]


@dataclass(frozen=True)
class Layout:
    name: str
    looks_for: str
    recognise: Callable[[Folder], bool]
    read: Callable[[Folder, Scans], Sources]


LAYOUTS = {
    layout.name: layout
    for layout in (  # in the order in which they are tried
        Layout(
            "ilsvrc2012",
            f"{TRAIN_TAR} (with {VAL_TAR} and {DEVKIT_TAR}), or the same unpacked",
            partial(ilsvrc.recognise, challenge=ILSVRC2012),
            partial(ilsvrc.read, challenge=ILSVRC2012),
        ),
        Layout(
            "ilsvrc2010",
            "ILSVRC2010_images_train.tar and the like",
            partial(ilsvrc.recognise, challenge=ILSVRC2010),
            partial(ilsvrc.read, challenge=ILSVRC2010),
        ),
        Layout("kaggle", "Kaggle's ILSVRC/Data/CLS-LOC", kaggle.recognise, kaggle.read),
        Layout("fall2011", "nXXXXXXXX.tar, or one tar of those", synsets.recognise, synsets.read),
        Layout("parquet", "Hugging Face's parquet files", parquet.recognise, parquet.read),
        Layout("webdataset", "WebDataset tars", webdataset.recognise, webdataset.read),
        Layout(
            "split-folders",
            "train/ and val/ with one folder per class",
            classfolders.recognise_splits,
            classfolders.read_splits,
        ),
        Layout("flat", "files named WNID_….JPEG", classfolders.recognise_flat, classfolders.read_flat),
        Layout("class-folders", "one folder per class", classfolders.recognise_classes, classfolders.read_classes),
    )
}


def find_sources(
    raw: Location,
    layout: str | None = None,
    *,
    classes: Location | None = None,
    allow_incomplete: bool = False,
    cache: Location | None = None,
) -> Sources:
    """Recognise the layout of RAW and list its images.

    Args:
        raw: a folder or the URL of one, or one tar or parquet file.
        layout: a name in LAYOUTS, to be used whatever RAW looks like.
        classes: a file of class names; the other classes are left out, and labels are ranks among those chosen.
        allow_incomplete: note, and do not refuse, other numbers of images than the layout promises.
        cache: DATASET/.build, where the listings of archives are remembered.

    Raises:
        SourceError: RAW does not exist, is empty or damaged, has no layout that we know or not the one named, or has
            not the images that its layout promises.
    """
    folder = _folder(raw)
    chosen = _choose(folder, layout)
    scans = Scans(cache)
    try:
        sources = chosen.read(folder, scans)
    finally:
        scans.save()
    del scans  # its listings hold every name a second time
    sources.name = chosen.name
    if classes:
        _keep_classes(sources, classes)
    counts.check(sources, allow_incomplete, chosen=classes is not None)
    if not sources.images.has("train"):
        raise SourceError(f"{raw}: {sources.layout}, but no training picture with a label is in it")
    return sources


def _folder(raw: Location) -> Folder:
    if storage.is_dir(raw):
        return Folder.of(raw)
    if storage.is_file(raw) and raw.suffix.lower() in (".tar", ".parquet"):
        return Folder(raw.parent, (raw.name,), ())
    raise SourceError(
        f"{raw}: {'not a directory, a .tar or a .parquet' if storage.exists(raw) else 'no such directory'}; "
        f"RAW is the folder with the raw images or archives{volumes.hint(raw)}"
    )


def _choose(folder: Folder, name: str | None) -> Layout:
    if name is not None:
        if name not in LAYOUTS:
            raise SourceError(f"--layout {name}: no such layout; there are: {', '.join(LAYOUTS)}")
        return LAYOUTS[name]
    for layout in LAYOUTS.values():
        if layout.recognise(folder):
            return layout
    if hint := volumes.hint(folder.path):
        raise SourceError(f"{folder.path}: no raw images{hint}")
    some = folder.folders or folder.files
    found = f"{len(folder.folders)} folders and {len(folder.files)} files" if some else "nothing"
    raise SourceError(
        f"{folder.path}: no layout that Penstock knows. Looked for "
        f"{'; '.join(layout.looks_for for layout in LAYOUTS.values())}. Found {found}."
    )


def _keep_classes(sources: Sources, file: Location) -> None:
    """Leave out all classes that `file` does not name, one a line; blank lines and what follows a # say nothing."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in read_text(file).splitlines())
    wanted = {line for line in lines if line}
    known = {record.wnid for record in sources.classes}
    if not wanted:
        raise UserError(f"--classes {file}: names no class; write one wnid or folder name a line")
    if unknown := sorted(wanted - known):
        more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
        raise UserError(
            f"--classes {file}: {', '.join(unknown[:5])}{more}: not among the {len(known):,} classes of the raw data"
        )
    kept = [record for record in sources.classes if record.wnid in wanted]
    sources.classes = tuple(replace(record, label=label) for label, record in enumerate(kept))
    images = RawTable()
    for image in sources.images:
        if image.wnid in wanted:
            images.append(image)
        else:
            sources.ignored.add("picture of no class in --classes", image.path)
    sources.images = images
