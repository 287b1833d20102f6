"""The layouts of raw data that Penstock knows, which of them RAW has, and whether RAW is complete.

To add a layout, write `evidence(folder, options)`, which tells by names what the layout would make of RAW, and
`read(folder, listings, options)`, and enter both in LAYOUTS. Their order there means nothing: of several readings one
holds only if it accounts for all that the others do.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline import LFS_POINTER, SourceError, storage, volumes
from pipeline.archives import ListingCache, require_content
from pipeline.cli import printable
from pipeline.offline import folders, ilsvrc, parquet, published, webdataset
from pipeline.offline import labels as tables
from pipeline.offline.classes import finish
from pipeline.offline.ilsvrc import DEVKIT_TAR, ILSVRC2010, ILSVRC2012, TRAIN_TAR, VAL_TAR
from pipeline.offline.raw import LeftOut, Options, Promise, Reading, Sources
from pipeline.offline.tree import Folder, has_pictures, is_picture, kind_of, pictures
from pipeline.storage import Location

LFS_BYTES = 1024  # a pointer has fewer
NAMED = 5  # classes in a message; the rest is counted


class Layout(NamedTuple):
    looks_for: str
    evidence: Callable[[Folder, Options], Reading | None]
    read: Callable[[Folder, ListingCache, Options], Sources]


LAYOUTS = {  # as --layout takes them
    "ilsvrc2012": Layout(
        f"{TRAIN_TAR} (with {VAL_TAR} and {DEVKIT_TAR}), or the same unpacked",
        partial(ilsvrc.evidence, ILSVRC2012),
        partial(ilsvrc.read, ILSVRC2012),
    ),
    "ilsvrc2010": Layout(
        "ILSVRC2010_images_train.tar and the like",
        partial(ilsvrc.evidence, ILSVRC2010),
        partial(ilsvrc.read, ILSVRC2010),
    ),
    "kaggle": Layout("Kaggle's ILSVRC/Data/CLS-LOC", published.kaggle_evidence, published.read_kaggle),
    "tiny-imagenet": Layout("Tiny ImageNet as it unpacks", published.tiny_evidence, published.read_tiny),
    "fall2011": Layout("nXXXXXXXX.tar, or one tar of those", published.synset_evidence, published.read_synsets),
    "parquet": Layout("Hugging Face's parquet files", parquet.evidence, parquet.read),
    "webdataset": Layout("WebDataset tars", webdataset.evidence, webdataset.read),
    "split-folders": Layout("train/ and val/ with one folder per class", folders.split_evidence, folders.read_splits),
    "flat": Layout("files named WNID_….JPEG", folders.flat_evidence, folders.read_flat),
    "class-folders": Layout("one folder per class", folders.class_evidence, folders.read_classes),
    "labels": Layout("flat pictures, and a table of labels (--labels FILE)", tables.evidence, tables.read),
}


def find_sources(
    raw: Location,
    layout: str | None = None,
    *,
    classes: Location | None = None,
    classes_of: Location | None = None,
    labels: Location | None = None,
    class_depth: int = 0,
    keep_labels: bool = False,
    allow_incomplete: bool = False,
    cache: Location | None = None,
) -> Sources:
    """Recognise the layout of RAW and list its images.

    Args:
        raw: a folder or the URL of one, or one tar or parquet file.
        layout, classes, classes_of, labels, class_depth, keep_labels, allow_incomplete: see `Options`.
        cache: DATASET/.build, where the listings of archives are kept.

    Raises:
        SourceError: RAW does not exist, is empty or damaged, has no layout that we know or not the one named, could be
            read in two ways, or has not the images that its layout promises.
    """
    options = Options(layout, classes, classes_of, labels, class_depth, keep_labels, allow_incomplete)
    folder, listings = _folder(raw), ListingCache(cache)
    try:
        name = options.layout or ("labels" if options.labels else _recognised(folder, options))
        if name not in LAYOUTS:
            raise SourceError(f"--layout {name}: no such layout; there are: {', '.join(LAYOUTS)}")
        if options.class_depth and name not in ("class-folders", "split-folders"):
            raise SourceError(
                f"{raw}: --class-depth is for folders of classes, and this is read as {name}; leave it out"
            )
        sources = LAYOUTS[name].read(folder, listings, options)
    finally:
        listings.save()
    del listings  # they hold every name a second time
    sources.name = name
    _require_content(sources)
    if not len(sources.images):
        raise SourceError(_nothing_of(folder, sources, name))
    finish(sources, options)
    _require_common_classes(raw, sources)
    _check_promises(sources, options.allow_incomplete, chosen=options.classes is not None)
    if not sources.images.has("train") and not options.classes_of:
        raise SourceError(f"{raw}: {sources.layout}, but no training picture with a label is in it{_left_out(sources)}")
    return sources


def _folder(raw: Location) -> Folder:
    if storage.is_dir(raw):
        return Folder.of(raw)
    if storage.is_file(raw) and raw.suffix.lower() in (".tar", ".parquet"):
        return Folder(raw.parent, (raw.name,), (), alone=True)
    raise SourceError(
        f"{raw}: {'not a directory, a .tar or a .parquet' if storage.exists(raw) else 'no such directory'}; "
        f"RAW is the folder with the raw images or archives{volumes.hint(raw)}"
    )


def _recognised(folder: Folder, options: Options) -> str:
    """Return the name of the one layout whose reading accounts for all that any other's does.

    Raises SourceError where there is none, where two readings contradict each other, or where the one is in doubt.
    """
    readings = {name: about for name, layout in LAYOUTS.items() if (about := layout.evidence(folder, options))}
    if not readings:
        raise SourceError(_nothing_known(folder))
    name = max(readings, key=lambda name: len(readings[name].evidence))
    others = [other for other in readings if not readings[other].evidence < readings[name].evidence and other != name]
    if others:
        listed = "; or ".join(f"{readings[x].text} (--layout {x})" for x in (name, *others))
        raise SourceError(f"{folder.path}: can be read in more than one way: {listed}. Say which by --layout")
    if readings[name].doubt:
        raise SourceError(f"{folder.path}: {readings[name].doubt}")
    return name


def _require_content(sources: Sources) -> None:
    """Raise SourceError where a dozen pictures, drawn evenly, are all Git LFS pointers."""
    sizes = np.asarray(sources.images.sizes)
    drawn = sorted(set(np.linspace(0, len(sizes) - 1, min(12, len(sizes))).astype(int).tolist()))
    if not len(sizes) or (sizes[drawn] > LFS_BYTES).any() or sources.name == "parquet":
        return
    heads = [(image.file, image.read()) for image in map(sources.images.__getitem__, drawn)]
    if all(head.startswith(LFS_POINTER) for _, head in heads):
        require_content(*heads[0])


def _require_common_classes(raw: Location, sources: Sources) -> None:
    """Raise SourceError where no class of the validation split is one of the training split."""
    train, val = (sources.images.per_class(split).keys() - {None} for split in ("train", "val"))
    if train and val and not train & val:
        shown = " and ".join(printable(min(map(str, names)), 60) for names in (train, val))
        raise SourceError(
            f"{raw}: none of {len(val):,} classes to validate is one of the {len(train):,} to train, such as {shown}; "
            "they are of two data sets, or labelled in two ways"
        )


def _nothing_of(folder: Folder, sources: Sources, name: str) -> str:
    problem = f"not the layout {name}: it lacks {LAYOUTS[name].looks_for}. Found {_content(folder)}"
    return f"{folder.path}: {problem}{_left_out(sources)}{volumes.hint(folder.path)}"


def _left_out(sources: Sources) -> str:
    """Return what was left out, to end a message."""
    lines = sources.ignored.lines()
    return f"; left out: {'; '.join(lines[:NAMED])}{' …' if len(lines) > NAMED else ''}" if lines else ""


def _nothing_known(folder: Folder) -> str:
    """Return the message that RAW has no layout that we know, with what is in it, and what it may be."""
    hint = volumes.hint(folder.path)
    if not (folder.files or folder.folders):
        return f"{folder.path}: no raw images{hint}"
    wanted = "; ".join(layout.looks_for for layout in LAYOUTS.values())
    advice = _advice(folder) or f"no layout that Penstock knows. Looked for {wanted}"
    return f"{folder.path}: {advice}. Found {_content(folder)}{hint} (docs/building.md: your layout is not here)"


FOREIGN = {  # suffix → what it is, and what to do
    ".gz": "a compressed archive (.tar.gz), in which no picture can be found alone: unpack it to a .tar",
    ".tgz": "a compressed archive (.tar.gz), in which no picture can be found alone: unpack it to a .tar",
    ".zip": "a zip, which is not read: unpack it",
    ".arrow": "Hugging Face's Arrow files, which are not read: save the data set by to_parquet",
    ".mds": "MosaicML's shards, which are not read: write them as WebDataset tars",
    ".beton": "FFCV's file, which is not read: build from the pictures that it was made of",
    ".tfrecord": "TensorFlow's records, which are not read: write them as WebDataset tars",
}


def _advice(folder: Folder) -> str:
    """Return what RAW seems to be, and what would help; empty where nothing comes to mind."""
    flat = [name for name in folder.files if is_picture(name)]
    if backslashes := [name for name in (*folder.files, *folder.folders) if "\\" in name]:
        return f"names with a backslash, such as {backslashes[0]}: a zip of Windows; unpack it again by 7z or Python"
    if flat and (lists := tables.tables(folder)):
        table = folder.path / lists[0]
        return f"{len(flat):,} pictures in no class folder: take the labels of a table by --labels {table}"
    if flat:
        return f"{len(flat):,} pictures in no class folder ({flat[0]} …): name a table of labels by --labels FILE"
    for name in folder.files:
        for suffix, advice in FOREIGN.items():
            if name.lower().endswith(suffix):
                return f"{name}: {advice}"
    if tars := folder.ending(".tar"):
        return f"{tars[0]}: a tar without labels (KEY.cls or KEY.json) beside its pictures; unpack it"
    having = [name for name in folder.folders if has_pictures(folder.path / name)]
    if len(having) == 1:
        inner = Folder.of(folder.path / having[0])
        readings = [name for name, layout in LAYOUTS.items() if layout.evidence(inner, Options())]
        seems = f", which looks like {readings[0]}" if readings else ""
        return f"only one folder with pictures, {printable(having[0], 120)}{seems}: RAW may be one level too high"
    left_out = LeftOut()
    if not having and any(
        True for name in folder.folders[:NAMED] for _ in pictures(folder.path / name, name, left_out)
    ):
        return ""
    lines = "; ".join(left_out.lines()[:NAMED])
    return f"no file in its folders has the extension of a picture that is read: {lines}" if lines else ""


def _content(folder: Folder) -> str:
    """Return what lies in RAW: its kinds of files with their numbers, and the first of its folders."""
    kinds = Counter(map(kind_of, folder.files)).most_common(NAMED)
    files = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
    shown = ", ".join(f"{printable(name, 60)}/" for name in folder.folders[:NAMED])
    more = f" and {len(folder.folders) - NAMED:,} more" if len(folder.folders) > NAMED else ""
    names = f" ({shown}{more})" if shown else ""
    return f"{len(folder.folders)} folders{names} and {len(folder.files)} files{f' ({files})' if files else ''}"


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
