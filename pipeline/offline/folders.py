"""Layouts of folders: one for each class, with or without train/, val/ and test/; and flat files named by class."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from pipeline import SourceError, storage
from pipeline.archives import ListingCache
from pipeline.cli import printable
from pipeline.offline.classes import MAPPING, ranked, read_mapping, with_empty
from pipeline.offline.labels import tables
from pipeline.offline.names import containers, folder_splits, in_order, listed, normal, spelled
from pipeline.offline.raw import LeftOut, Options, RawImage, Reading, Sources
from pipeline.offline.tree import Folder, has_pictures, is_picture, pictures_among, walk
from pipeline.storage import Location

FLAT_NAME = re.compile(r"(n\d{8})_(.+)\.\w+")
DOCUMENTS = {".xml", ".txt", ".json", ".csv", ".md", ".html", ".pdf", ".mat", ".py", ".docx", ".yaml", ".yml", ".ipynb"}
ARCHIVES = (".tar", ".zip", ".tgz", ".tar.gz", ".7z", ".rar")
SHOWN = 5  # folders in a message
FOLDERS = "one folder per class"


class _Tree:
    """The pictures of RAW's class folders, as they are added split by split."""

    def __init__(self, sources: Sources, folder: Folder, options: Options) -> None:
        self.sources, self.folder, self.options = sources, folder, options
        self.declared: dict[str, set[str]] = defaultdict(set)  # split → the classes that have a folder there
        self.loose: dict[str, list[str]] = defaultdict(list)  # split → the first pictures outside the class folders
        self._deep: dict[str, int] = {}  # the first folders below a class folder, and the number of their pictures

    def add(self, below: str, split: str) -> None:
        """Add the pictures in the folder `below` of RAW; of RAW itself, all but the list of words."""
        ignored, root = self.sources.ignored, self.folder.path / below if below else self.folder.path
        depth = max(self.options.class_depth, 1)
        for directory, prefix, entries in walk(root, below, ignored):
            parts = prefix.removeprefix(below).strip("/").split("/") if prefix != below else []
            leaf = not any(entry.is_dir for entry in entries)
            if not prefix:
                entries = [entry for entry in entries if entry.name != MAPPING]
            name, count = self._class_of(parts), 0
            for image in pictures_among(entries, directory, prefix, ignored, split):
                count += 1
                if name is None and (parts or split != "test"):
                    self._lose(image, split, bool(parts))
                else:
                    self.sources.images.append(image, name)
            if count and len(parts) > depth and len(self._deep) <= SHOWN:
                self._deep[prefix] = count
            if name is not None and (count or (leaf if self.options.class_depth < 0 else len(parts) == depth)):
                self.declared[split].add(normal(name))

    def _class_of(self, parts: list[str]) -> str | None:
        depth = self.options.class_depth or 1
        if not parts or len(parts) < depth:
            return None
        return "/".join(parts if depth < 0 else parts[:depth])

    def _lose(self, image: RawImage, split: str, shallow: bool) -> None:
        reason = "picture above --class-depth" if shallow else "picture outside the class folders"
        self.sources.ignored.lose(reason, image.path)
        if len(self.loose[split]) < SHOWN:
            self.loose[split].append(image.path)

    def require_one_depth(self) -> None:
        """Raise SourceError where folders lie in the class folders, and the user has not said which gives the class."""
        if not self._deep:
            return
        shown = ", ".join(f"{printable(path)}/ ({count:,})" for path, count in [*self._deep.items()][:SHOWN])
        if not self.options.class_depth:
            raise SourceError(
                f"{self.folder.path}: pictures lie deeper than in class folders: {shown}"
                f"{', …' if len(self._deep) > SHOWN else ''}. Which folder gives the class? Say "
                "--class-depth 1 (the first), 2 (the first two), … or last (all)"
            )
        if self.options.class_depth > 0:
            named = f"--class-depth {self.options.class_depth}: pictures of deeper folders are of the class above"
            self.sources.notes.append(f"{named}: {shown}")


def _finished(tree: _Tree, folder: Folder) -> Sources:
    """Check what was read, and name the classes: those of all folders, with or without a picture."""
    tree.require_one_depth()
    sources, options = tree.sources, tree.options
    with_pictures = set(sources.images.wnids)
    if not options.layout and (shared := in_order(containers(with_pictures))):
        layout = "class-folders" if sources.layout == FOLDERS else "split-folders"
        raise SourceError(
            f"{folder.path}: {listed([f'{name}/' for name in shared])}: by the name no class, but pictures of any; "
            f"take the labels of a table by --labels FILE, remove what is no class, or say --layout {layout}"
        )
    declared = {name for names in tree.declared.values() for name in names - with_pictures} | tree.declared["train"]
    for split in ("val", "test"):
        if lacking := tree.declared[split] - sources.images.per_class(split).keys():
            sources.notes.append(f"class folders of {split} without a picture: {listed(in_order(lacking))}")
    names = with_empty(folder.path, declared, sources, options)
    sources.classes = ranked(names, read_mapping(folder.path / MAPPING), {})
    return sources


# ---- one folder for each class


def class_evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's folders as classes; one folder alone is none, nor are splits."""
    splits, _ = folder_splits(folder.folders)
    others = [name for name in folder.folders if name not in splits]
    if splits:  # then they are classes only if splits and others alike hold pictures themselves
        direct = [name for name in others if any(map(is_picture, Folder.of(folder.path / name).files))]
        flat = all(_is_flat(Folder.of(folder.path / name)) for name in splits)
        if not (flat and len(direct) > 1 and len(direct) == len(others)):
            return None
    having = (name for name in others if has_pictures(folder.path / name))
    two = next(having, None) is not None and next(having, None) is not None
    return Reading("each folder is a class", frozenset(others)) if two else None


def _is_flat(folder: Folder) -> bool:
    return any(map(is_picture, folder.files)) and not folder.folders


def read_classes(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return the pictures of one folder for each class, all for training.

    Raises SourceError where the class folders have folders in them, or no picture.
    """
    tree = _Tree(Sources(FOLDERS, gives=_gives("RAW", options)), folder, options)
    tree.add("", "train")
    empty = tree.declared["train"] - tree.sources.images.per_class("train").keys()
    for name in [name for name in folder.folders if normal(name) in empty and _has_documents_alone(folder.path / name)]:
        tree.declared["train"].discard(normal(name))
        tree.sources.ignored.add("folder of documents", name)
    return _finished(tree, folder)


def _has_documents_alone(folder: Location) -> bool:
    """Return whether a folder holds texts and tables, and no picture or anything that may have been one."""
    entries = [entry for _, _, inside in walk(folder, "", LeftOut()) for entry in inside if not entry.is_dir]
    return bool(entries) and all(PurePosixPath(entry.name).suffix.lower() in DOCUMENTS for entry in entries)


def _gives(where: str, options: Options) -> str:
    if options.class_depth > 1:
        return f"the first {options.class_depth} folders below {where}, as one path"
    return f"the path of the folder below {where}" if options.class_depth < 0 else f"the folder below {where}"


# ---- train/, val/ and test/ with one folder for each class


def split_evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's folders as splits, if one is called so."""
    splits, doubt = folder_splits(folder.folders)
    inner = [Folder.of(folder.path / name) for name in splits]
    if not splits or all(x.files and not x.folders and not any(map(is_picture, x.files)) for x in inner):
        return None  # or they hold nothing but shards and the like
    if not doubt and "train" not in splits.values() and not options.classes_of:
        doubt = f"{', '.join(f'{name}/' for name in splits)}: named as a split, not as a class, and there is no train/"
        doubt += "; rename, or say --layout class-folders (they are classes) or --classes-of DATASET (they evaluate it)"
    return Reading(f"{', '.join(f'{name}/' for name in splits)}: splits", frozenset(splits), doubt)


def read_splits(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return train/, val/ and test/ with one folder for each class; a test split may have no labels.

    Raises SourceError: a split that is empty or has no labels, classes in doubt, a val/ of other classes than train/.
    """
    splits, doubt = folder_splits(folder.folders, forced=options.layout is not None)
    if doubt:
        raise SourceError(f"{folder.path}: {doubt}")
    tree = _Tree(Sources(""), folder, options)
    for name, split in splits.items():
        _add_split(tree, folder, name, split, options)
    text = " and ".join(f"{name}/" for name, split in splits.items() if tree.sources.images.has(split))
    tree.sources.layout, tree.sources.gives = f"{text} with one folder per class", _gives(text, options)
    _match_classes(tree, splits)
    tests = tree.sources.images.per_class("test")
    if 0 < tests[None] < tests.total():
        tree.sources.notes.append(
            f"{tests[None]:,} of {tests.total():,} test pictures lie in no class folder: no labels"
        )
    _require_unpacked(folder, splits, options)
    beside = [name for name in folder.folders if name not in splits]
    for name in beside:
        if count := sum(1 for _ in _pictures_in(folder, name)):
            tree.sources.notes.append(f"{printable(name)}/ lies beside the splits: its {count:,} pictures are left out")
    folder.ignore(tree.sources.ignored, [*splits, MAPPING])
    return _finished(tree, folder)


def _require_unpacked(folder: Folder, splits: dict[str, str], options: Options) -> None:
    """Raise SourceError where an archive in RAW is called like the validation split, of which there is no folder."""
    for name in folder.files if "val" not in splits.values() and not options.allow_incomplete else ():
        about = spelled(name.partition(".")[0]) if name.lower().endswith(ARCHIVES) else None
        if about and about.certain and about.splits == {"val"}:
            remedy = "unpack it, or go on without it by --allow-incomplete"
            raise SourceError(f"{folder.path / name}: a validation split that is not unpacked; {remedy}")


def _pictures_in(folder: Folder, name: str) -> Iterable[RawImage]:
    unused = LeftOut()
    for directory, prefix, entries in walk(folder.path / name, name, unused):
        yield from pictures_among(entries, directory, prefix, unused, "train")


def _add_split(tree: _Tree, folder: Folder, name: str, split: str, options: Options) -> None:
    """Add a split; descend where its folder holds nothing but one of its own name, as train/train."""
    below = name
    while True:
        inner = Folder.of(folder.path / below)
        about = spelled(inner.folders[0]) if len(inner.folders) == 1 else None
        if about is None or about.splits != {split} or any(map(is_picture, inner.files)):
            break
        inner.ignore(tree.sources.ignored, inner.folders)
        below = f"{below}/{inner.folders[0]}"
        tree.sources.notes.append(f"{split} is read from {printable(below)}/: {printable(name)}/ holds nothing else")
    images, before = tree.sources.images, len(tree.sources.images)
    tree.add(below, split)
    if len(images) > before:
        loose = [path for path in tree.loose[split] if re.search(r"ILSVRC20\d\d_val_\d+\.", path)]
        if loose and not options.allow_incomplete:
            raise SourceError(
                f"{folder.path / loose[0]}: flat beside class folders, so its label is unknown; moved half-way? Move "
                "the rest, or leave them out by --allow-incomplete"
            )
        return
    tree.require_one_depth()
    if tree.loose[split] and options.class_depth > 1:
        problem = f"--class-depth {options.class_depth}: no picture lies in so many folders ({tree.loose[split][0]})"
        raise SourceError(f"{folder.path / below}: {problem}; say a smaller number, or last")
    if tree.loose[split]:
        shown, lists = ", ".join(tree.loose[split][:2]), tables(folder)
        raise SourceError(
            f"{folder.path / below}: its pictures lie in no class folder ({shown} …), so they have no label; sort them "
            f"into folders, or take the labels of a table by --labels {folder.path / lists[0] if lists else 'FILE'}"
        )
    if split == "train" or not options.allow_incomplete:
        left_out = "".join(f"; left out: {line}" for line in tree.sources.ignored.lines()[:SHOWN])
        remedy = "" if split == "train" else ", remove the folder, or go on without it by --allow-incomplete"
        raise SourceError(f"{folder.path / below}: no picture in it{left_out}; fetch {name}/{remedy}")
    tree.sources.notes.append(f"{below}/ is empty: there is no {split} split in RAW")


def _match_classes(tree: _Tree, splits: dict[str, str]) -> None:
    """Compare the classes of val/ and test/ with those of train/."""
    images, train = tree.sources.images, tree.declared["train"]
    for name, split in splits.items():
        own = tree.declared[split]
        if split == "train" or not train or not own or own & train:
            continue
        shown = ", ".join(map(printable, sorted(own)[:SHOWN]))
        if split == "val":
            raise SourceError(
                f"{tree.folder.path / name}: none of its folders ({shown}) is a class of train/; rename them, or "
                f"remove {name}/, and a share of train/ is held out"
            )
        images.forget_classes(split)
        own.clear()
        tree.sources.notes.append(f"{name}/ has folders ({shown}), but none is a class of train/: it has no labels")


# ---- flat files named WNID_….JPEG


def flat_evidence(folder: Folder, options: Options) -> Reading | None:
    """Return the reading of RAW's files by the WNIDs at the beginning of their names."""
    used = [name for name in folder.files if is_picture(name) and FLAT_NAME.fullmatch(name)]
    return Reading("each file is of the class WNID in its name, WNID_…", frozenset(used)) if used else None


def read_flat(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return the files named WNID_…; a rest that is words (n01440764_tench.JPEG) and no number names the class."""
    used = {name: match for name in folder.files if is_picture(name) and (match := FLAT_NAME.fullmatch(name))}
    sources = Sources("one flat folder of WNID_… files", gives="the WNID at the beginning of the file's name")
    words: dict[str, str] = {}
    sizes = storage.sizes(folder.path, used)
    for name, match in used.items():
        wnid, rest = match.groups()
        sources.images.append(RawImage("train", name, wnid, str(folder.path / name), 0, sizes[name]))
        words.setdefault(wnid, wnid if rest[0].isdigit() else rest.replace("_", " "))
    for name in folder.folders:
        for image in _pictures_in(folder, name):
            sources.ignored.lose("picture in a folder beside the flat files", image.path)
    loose = [name for name in folder.files if is_picture(name) and name not in used]
    for name in loose:
        sources.ignored.lose("picture without a WNID in its name", name)
    folder.ignore(sources.ignored, [*used, *loose, MAPPING])
    sources.classes = ranked(words, words | read_mapping(folder.path / MAPPING), {})
    return sources
