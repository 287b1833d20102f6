"""Classes: their names, order and words; lists of them in files; and which of them a user keeps."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from pipeline import SourceError, UserError, manifest, storage
from pipeline.cli import printable
from pipeline.manifest import FILE_NAME, ClassRecord, Manifest
from pipeline.offline.choice import chosen_classes
from pipeline.offline.names import are_numbers, in_order, lines_of, listed, look_alike, normal, spelled
from pipeline.offline.raw import Options, RawTable, Sources
from pipeline.storage import Location
from pipeline.typed import from_values

NAMED = 5  # classes in a message; the rest is counted
MAX_TEXT = 16 * 2**20  # bytes
MAPPING = "LOC_synset_mapping.txt"  # lines such as `n02012849 crane`
WNID_LINE = re.compile(r"(n[0-9]{8})(?:\s+(.+))?")
LABELLED = {"webdataset", "parquet"}  # their readers know the labels, and keep them by `name_classes`
MAX_KEPT = 99_999  # with --keep-labels; each number up to the highest is a class


def ranked(names: Iterable[str], words: Mapping[str, str], ids: Mapping[str, int]) -> tuple[ClassRecord, ...]:
    """Return the classes in the order of their labels: the rank of the name, see `in_order`."""
    ordered = enumerate(in_order(names))
    return tuple(ClassRecord(label, name, words.get(name, name), ids.get(name)) for label, name in ordered)


def finish(sources: Sources, options: Options) -> None:
    """Give the classes of any layout their final names and labels, as the options have them, and note what is odd.

    Raises:
        SourceError, UserError: classes that `options.classes` or `classes_of` has not; names that are no numbers.
    """
    spellings = sources.images.spellings
    if several := sorted(name for name, names in spellings.items() if len(names) > 1):
        sources.notes.append(f"names that look the same but for their Unicode are one class: {listed(several)}")
    if options.classes_of:
        return _adopt(sources, manifest.load(options.classes_of))
    if options.classes:
        _keep(sources, options.classes)
    names = [record.wnid for record in sources.classes]
    if alike := look_alike(names):
        pairs = listed([" and ".join(map(printable, group)) for group in alike])
        sources.notes.append(f"names that differ by case, blanks or zeros alone are classes of their own: {pairs}")
    sources.order = f"labels are ranks of the class names, by {'number' if are_numbers(names) else 'code points'}"
    if 0 < sum(are_numbers([name]) for name in names) < len(names):
        sources.notes.append("class names are numbers and words: both are ordered by code points, 10 before 2")
    if options.keep_labels:
        sources.order = "labels are the numbers in RAW (--keep-labels)"
        if options.classes or sources.name not in LABELLED:
            _keep_numbers(sources)


def with_empty(where: object, declared: Iterable[str], sources: Sources, options: Options) -> list[str]:
    """Return all class names: those with pictures, and those `declared` by a folder or archive.

    Raises SourceError where a declared one has no picture, unless --allow-incomplete keeps it; then that is noted.
    """
    pictured = set(sources.images.wnids)
    if (empty := in_order({*declared} - sources.images.per_class("train").keys())) and pictured:
        problem = f"class folders without a picture that is read: {listed(empty)}"
        if not options.allow_incomplete:
            left_out = "".join(f"; left out: {line}" for line in sources.ignored.lines()[:NAMED])
            raise SourceError(
                f"{where}: {problem}{left_out}. Fetch their pictures, remove the folders, or keep the classes by "
                "--allow-incomplete"
            )
        sources.notes.append(problem)
    return in_order(pictured | {*empty})


def _keep(sources: Sources, file: Location) -> None:
    """Leave out all classes that `file` does not choose."""
    wanted = chosen_classes(read_text(file), [record.wnid for record in sources.classes], f"--classes {file}")
    kept = [record for record in sources.classes if record.wnid in wanted]
    sources.classes = tuple(replace(record, label=label) for label, record in enumerate(kept))
    images = RawTable()
    for image in sources.images:
        if image.wnid in wanted:
            images.append(image)
        else:
            sources.ignored.add("picture of no class in --classes", image.path)
    sources.images = images


def _keep_numbers(sources: Sources) -> None:
    """Make the number in each class's name its label; the classes between have no pictures."""
    records = {record.wnid: record for record in sources.classes}
    _require_kept(records)
    numbers = {int(name): name for name in records}
    if len(numbers) < len(records):
        twice = next(name for name in records if numbers[int(name)] != name)
        raise UserError(f"--keep-labels: {twice} and {numbers[int(twice)]} are one number; rename one, or merge them")
    lengths = {*map(len, records)}
    width = lengths.pop() if len(lengths) == 1 else 1
    names = [numbers.get(label, f"{label:0{width}d}") for label in range(max(numbers, default=-1) + 1)]
    sources.classes = tuple(
        replace(records[name], label=label) if name in records else ClassRecord(label, name, name, None)
        for label, name in enumerate(names)
    )


# ---- the classes of another data set


def _adopt(sources: Sources, dataset: Manifest) -> None:
    """Give the classes their names and labels in `dataset`; without a training split, all images are to evaluate it.

    Raises SourceError: a class that `dataset` has not.
    """
    images = sources.images
    matches, by = _matches(images.wnids, dataset.classes)
    texts = {record.wnid: normal(record.words) for record in sources.classes if are_numbers(images.wnids)}
    if any(
        match and texts.get(name, name) != name and _differs(texts[name], match, dataset)
        for name, match in matches.items()
    ):
        by_text, by = _matches([texts[name] for name in matches], dataset.classes)
        matches = {name: by_text[texts[name]] for name in matches}
    if lacking := in_order(name for name, match in matches.items() if not match):
        raise SourceError(
            f"--classes-of {dataset.root}: {listed(lacking)}: not among the {by} of its {len(dataset.classes):,} "
            "classes; remove or rename what it cannot know"
        )
    images.rename_classes(matches.__getitem__)
    sources.classes = dataset.classes
    sources.order = f"labels are those of {dataset.root}, by its {by}"
    note = f"{len(images.wnids):,} of {len(dataset.classes):,} classes of {dataset.root} have pictures"
    if not _has_training_split(sources):
        images.join_splits("val")
        sources.evaluation_of = dataset
        sources.promises, sources.promised_classes = [], 0
        note += "; there is no training split, so all pictures are for its evaluation (val)"
    sources.notes.append(note)


def _differs(text: str, wnid: str, dataset: Manifest) -> bool:
    """Return whether a class of `dataset` has names, and none is `text`: an equal number is then another class."""
    record = next(record for record in dataset.classes if record.wnid == wnid)
    names = [name for name in (normal(record.wnid), normal(record.words)) if not are_numbers([name])]
    return bool(names) and text not in names


def _matches(names: Sequence[str], classes: Sequence[ClassRecord]) -> tuple[dict[str, str], str]:
    """Return name → wnid, "" for none, and in words by which of the classes' names they are compared.

    Numbers are compared as numbers. Words that several classes have ("crane") match none of them.
    """
    wnids = {normal(record.wnid): record.wnid for record in classes}
    if are_numbers(names) and are_numbers(wnids):
        numbers = {int(name): wnid for name, wnid in wnids.items()}
        return {name: numbers.get(int(name), "") for name in names}, "numbers"
    if wnids.keys() & {*names}:
        return {name: wnids.get(name, "") for name in names}, "wnids"
    if are_numbers(names):
        labels = {record.label: record.wnid for record in classes}
        return {name: labels.get(int(name), "") for name in names}, "labels"
    counts = Counter(normal(record.words) for record in classes)
    words = {text: record.wnid for record in classes if counts[text := normal(record.words)] == 1}
    return {name: words.get(name, "") for name in names}, "names and words"


def _has_training_split(sources: Sources) -> bool:
    """Return whether RAW has training images that it calls so; where it has no splits, all images are of train."""
    images = sources.images
    if not images.has("train") or images.has("val") or images.has("test"):
        return images.has("train")
    names = (PurePosixPath(folder).stem for folder in images[0].path.split("/")[:-1])
    words = (about for name in names if (about := spelled(name)))
    return any(about.beside == "train" or (about.certain and about.splits == {"train"}) for about in words)


# ---- names in lists


def name_classes(sources: Sources, named: Mapping[int, ClassRecord], file: str, options: Options) -> None:
    """Give classes that are named by numbers the names that `file` has for them; without it, numbers of one width.

    Where not all are numbers, the labels stay as they are. A number that is not the label of its class is noted;
    with --keep-labels it is that label, and classes between may have no picture.

    Raises SourceError: a number that the list in `file` lacks, or with --keep-labels one below 0, or text.
    """
    names, known = sources.images.wnids, named.values()
    words = {record.wnid: record.words for record in known}
    ids = {record.wnid: record.devkit_id for record in known if record.devkit_id is not None}
    if options.keep_labels:
        _require_kept([*names, *map(str, named)])
    if not are_numbers(names):
        sources.classes = ranked(names, words, {})
        return
    number_of = {name: int(name) for name in names}
    numbers = sorted({*number_of.values()})
    if named and (beyond := [number for number in numbers if number not in named]):
        reach = f"names the classes 0 to {max(named)}, but an image has the label {beyond[0]}"
        raise SourceError(f"{file}: {reach}; correct that list or remove it")
    width = len(str(max(numbers, default=0)))
    kept = range(max([*numbers, *named], default=-1) + 1) if options.keep_labels else numbers
    name_of = {n: named[n].wnid if n in named else f"{n:0{width}d}" for n in kept}
    sources.images.rename_classes(lambda name: name_of[number_of[name]])
    sources.classes = ranked(words or name_of.values(), words, ids)
    if options.keep_labels:
        sources.classes = tuple(ClassRecord(n, x, words.get(x, x), ids.get(x)) for n, x in name_of.items())
    label_of = {record.wnid: record.label for record in sources.classes}
    _note_spellings(sources, number_of)
    if not (options.classes_of or options.classes):  # they change the labels again
        _note_changes(sources, {n: label_of[name_of[n]] for n in numbers})


def _require_kept(names: Iterable[str]) -> None:
    """Raise SourceError where a name is no number that --keep-labels can keep as a label."""
    for name in in_order(names):
        if not are_numbers([name]) or not 0 <= int(name) <= MAX_KEPT:
            reach = f"the label {printable(name, 60)} is no number from 0 to {MAX_KEPT:,}"
            remedy = "without that option, classes get the numbers 0, 1, 2, … in order"
            raise SourceError(f"--keep-labels: {reach}; {remedy}")


def _note_spellings(sources: Sources, number_of: Mapping[str, int]) -> None:
    """Note labels such as 07 and 7, which are one class."""
    counts = Counter(number_of.values())
    twice = [number for number, count in counts.items() if count > 1]
    groups = [" and ".join(name for name, number in number_of.items() if number == n) for n in twice[:NAMED]]
    if groups:
        sources.notes.append(f"labels that are one number are one class: {', '.join(groups)}")


def _note_changes(sources: Sources, label_of: Mapping[int, int]) -> None:
    """Note numbers in RAW that are not the labels of their classes."""
    changed = [(number, label) for number, label in label_of.items() if number != label]
    if changed:
        before, after = (", ".join(map(str, column[:NAMED])) for column in zip(*changed))
        more = f" (and {len(changed) - NAMED:,} more)" if len(changed) > NAMED else ""
        hint = " (--keep-labels keeps the numbers)" if changed[0][0] >= 0 else ""
        sources.notes.append(f"labels {before} are classes {after}{more}{hint}")


def read_class_list(file: Location) -> dict[int, ClassRecord]:
    """Return the classes of dataset.json (a dataset directory of ours) or of classes.txt, by number.

    In classes.txt, line i names class i − 1: a wnid, with words or without; else the words are the name. Where two
    classes have the same words ("crane"), their numbers keep the names apart.
    """
    if file.name == FILE_NAME:
        try:
            classes = from_values(json.loads(read_text(file))["classes"], list[ClassRecord])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise SourceError(f"{file}: has no list of classes as ours have ({error}); remove it") from error
        _require_one_to_one(file, classes)
        return {record.label: record for record in classes}
    lines = [normal(line.strip()) for line in lines_of(read_text(file).rstrip())]
    if "" in lines:
        raise SourceError(f"{file}: line {lines.index('') + 1} is blank; line i must name class i − 1")
    named: dict[int, ClassRecord] = {}
    for number, line in enumerate(lines):
        match = WNID_LINE.fullmatch(line)
        name = match[1] if match else f"{line} ({number})" if lines.count(line) > 1 else line
        named[number] = ClassRecord(number, name, match[2] or match[1] if match else line, None)
    if len({record.wnid for record in named.values()}) != len(named):
        raise SourceError(f"{file}: names one wnid twice; each line must name a class of its own")
    return named


def _require_one_to_one(file: Location, classes: Iterable[ClassRecord]) -> None:
    """Raise SourceError where one class has two labels, or one label two classes."""
    labels, names = dict[str, int](), dict[int, str]()
    for record in classes:
        label, name = labels.setdefault(normal(record.wnid), record.label), names.setdefault(record.label, record.wnid)
        problem = f"the class {printable(record.wnid, 60)} has the labels {label} and {record.label}"
        if label == record.label:
            problem = f"the label {label} is of {printable(name, 60)} and of {printable(record.wnid, 60)}"
        if (label, name) != (record.label, record.wnid):
            raise SourceError(f"{file}: {problem}; correct that list or remove it")


# ---- small text files


def read_small(path: Location, most: int) -> bytes:
    """Return a small file. Raises SourceError where it has more than `most` bytes."""
    with storage.opened(path) as (read, _):
        data = read(most + 1, 0)
    if len(data) > most:
        raise SourceError(f"{path}: has more than {most:,} bytes; it cannot be what its name says")
    return data


def read_text(path: Location, most: int = MAX_TEXT) -> str:
    """Return a small text file. Raises SourceError where it is too large, or neither UTF-8 nor marked as UTF-16."""
    data = read_small(path, most)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def read_mapping(path: Location) -> dict[str, str]:
    """Return wnid → words, from a file as MAPPING; none where it is absent. Raises SourceError."""
    words: dict[str, str] = {}
    for number, line in enumerate(lines_of(read_text(path)) if storage.is_file(path) else (), start=1):
        match = WNID_LINE.fullmatch(line.strip())
        if match and match[1] not in words:
            words[match[1]] = match[2] or match[1]
        elif line.strip():
            wrong = "a wnid for the second time" if match else "no wnid at its beginning"
            raise SourceError(f"{path}: line {number} has {wrong}; fetch it again")
    return words


def read_words(path: Location) -> dict[str, str]:
    """Return wnid → words, from lines of WNID, a tab and words, as Tiny ImageNet's words.txt has them."""
    return {wnid: words for line in lines_of(read_text(path)) for wnid, tab, words in [line.partition("\t")] if tab}
