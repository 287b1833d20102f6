"""The layouts of raw data that Penstock knows, which of them RAW has, and whether RAW is complete.

To add a layout, write a function `read(folder, listings, forced)` and enter it in LAYOUTS, before every layout that
would take its folders too. It returns the images and classes, or None where RAW has another layout; at the cost of some
listed folders, if not `forced`: then the user names this layout, whatever RAW looks like.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from pipeline import SourceError, UserError, storage, volumes
from pipeline.archives import ListingCache
from pipeline.offline import folders, ilsvrc, parquet, webdataset
from pipeline.offline.folders import read_text
from pipeline.offline.ilsvrc import DEVKIT_TAR, ILSVRC2010, ILSVRC2012, TRAIN_TAR, VAL_TAR
from pipeline.offline.raw import Folder, Promise, RawTable, Sources
from pipeline.storage import Location

NAMED = 5  # classes in a message; the rest is counted


class Layout(NamedTuple):
    looks_for: str
    read: Callable[[Folder, ListingCache, bool], Sources | None]


LAYOUTS = {  # as --layout takes them, in the order in which they are tried
    "ilsvrc2012": Layout(
        f"{TRAIN_TAR} (with {VAL_TAR} and {DEVKIT_TAR}), or the same unpacked", partial(ilsvrc.read, ILSVRC2012)
    ),
    "ilsvrc2010": Layout("ILSVRC2010_images_train.tar and the like", partial(ilsvrc.read, ILSVRC2010)),
    "kaggle": Layout("Kaggle's ILSVRC/Data/CLS-LOC", folders.read_kaggle),
    "fall2011": Layout("nXXXXXXXX.tar, or one tar of those", folders.read_synsets),
    "parquet": Layout("Hugging Face's parquet files", parquet.read),
    "webdataset": Layout("WebDataset tars", webdataset.read),
    "split-folders": Layout("train/ and val/ with one folder per class", folders.read_splits),
    "flat": Layout("files named WNID_….JPEG", folders.read_flat),
    "class-folders": Layout("one folder per class", folders.read_classes),
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
        cache: DATASET/.build, where the listings of archives are kept.

    Raises:
        SourceError: RAW does not exist, is empty or damaged, has no layout that we know or not the one named, or has
            not the images that its layout promises.
    """
    folder, listings = _folder(raw), ListingCache(cache)
    try:
        sources = _read(folder, listings, layout)
    finally:
        listings.save()
    del listings  # they hold every name a second time
    if classes:
        _keep_classes(sources, classes)
    _check_promises(sources, allow_incomplete, chosen=classes is not None)
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


def _read(folder: Folder, listings: ListingCache, name: str | None) -> Sources:
    if name is not None and name not in LAYOUTS:
        raise SourceError(f"--layout {name}: no such layout; there are: {', '.join(LAYOUTS)}")
    for layout in (name,) if name else LAYOUTS:
        if sources := LAYOUTS[layout].read(folder, listings, name is not None):
            sources.name = layout
            return sources
    if not folder.files and not folder.folders:
        raise SourceError(f"{folder.path}: no raw images{volumes.hint(folder.path)}")
    wanted = "; ".join(LAYOUTS[layout].looks_for for layout in ((name,) if name else LAYOUTS))
    problem = f"not the layout {name}: it lacks" if name else "no layout that Penstock knows. Looked for"
    content = f"{len(folder.folders)} folders and {len(folder.files)} files{volumes.hint(folder.path)}"
    raise SourceError(f"{folder.path}: {problem} {wanted}. Found {content}")


def _keep_classes(sources: Sources, file: Location) -> None:
    """Leave out all classes that `file` does not name, one a line; blank lines and what follows a # say nothing."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in read_text(file).splitlines())
    wanted = {line for line in lines if line}
    known = {record.wnid for record in sources.classes}
    if not wanted:
        raise UserError(f"--classes {file}: names no class; write one wnid or folder name a line")
    if unknown := sorted(wanted - known):
        more = f" and {len(unknown) - NAMED:,} more" if len(unknown) > NAMED else ""
        raise UserError(
            f"--classes {file}: {', '.join(unknown[:NAMED])}{more}: not among the {len(known):,} classes of the raw "
            "data"
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


def _check_promises(sources: Sources, allow_incomplete: bool, chosen: bool) -> None:
    """Compare the numbers of images and classes with those that the layout promises.

    A difference is refused, or noted if the user allows it. `chosen`: only some classes were asked for.

    Raises:
        SourceError: one line with each difference and the classes concerned.
    """
    counts = {promise.split: sources.images.per_class(promise.split) for promise in sources.promises}
    differences = [_difference(promise, counts[promise.split], sources, chosen) for promise in sources.promises]
    classes = len({wnid for per_class in counts.values() for wnid in per_class if wnid})
    if sources.promised_classes not in (0, classes) and not chosen:
        differences.append(f"{classes:,} classes have images, {sources.promised_classes:,} are promised")
    differences = [difference for difference in differences if difference]
    if differences and not allow_incomplete:
        raise SourceError(
            f"{'; '.join(differences)}; fetch what is missing, build with what is there (--allow-incomplete), or name "
            "another --layout"
        )
    sources.notes += differences


def _difference(promise: Promise, counts: Counter[str | None], sources: Sources, chosen: bool) -> str:
    """Return what is missing or too much in one split; empty: nothing."""
    words = {record.wnid: record.words for record in sources.classes}
    expected = {wnid: promise.per_class.get(wnid, 0) for wnid in words}
    known = bool(promise.per_class)
    if known:
        wrong = [wnid for wnid in words if counts[wnid] != expected[wnid]]
    else:
        wrong = [wnid for wnid in words if not counts[wnid] and counts.keys() - {None}]
    if not (known and wrong) and (chosen or counts.total() == promise.images):
        return ""
    images = sum(expected.values()) if chosen else promise.images
    named = [
        f"{wnid} ({words[wnid]}) {counts[wnid]:,}" + (f" of {expected[wnid]:,}" if known else "")
        for wnid in wrong[:NAMED]
    ]
    if len(wrong) > NAMED:
        named.append(f"{len(wrong) - NAMED:,} classes more")
    concerned = f" ({', '.join(named)})" if named else ""
    return f"{promise.part}: {counts.total():,} images, but {promise.by} {images:,} {promise.unit}{concerned}"
