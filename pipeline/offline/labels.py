"""Flat pictures and a table of their labels: CSV, TSV or JSON lines, with or without a header."""

import csv
import io
import itertools
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from pipeline import SourceError, storage
from pipeline.archives import ListingCache
from pipeline.cli import printable
from pipeline.offline.classes import ranked, read_text
from pipeline.offline.names import SPLITS, WORDS, folder_splits, lines_of, listed, normal, spelled
from pipeline.offline.raw import Options, RawTable, Reading, Sources
from pipeline.offline.tree import Folder, is_picture, pictures
from pipeline.storage import Location

MAX_TABLE = 512 * 2**20  # bytes
SHOWN = 3  # names in a message
TRIED = 1000  # rows that decide which column has what
LABELS = {"label", "labels", "class", "classes", "class_name", "category", "category_name", "target", "wnid"}
LABELS |= {"breed", "species", "variety", "dx"}
NO_LABEL = ("", "-1", "nan", "NaN")  # the last two are pandas' of an empty cell
FLAGS = {"is_valid", "is_val", "is_train", "is_test"}  # columns of splits
MANY = 20  # pictures that each have a label of their own are not labelled by class

Row = Sequence[str]


def evidence(folder: Folder, options: Options) -> Reading | None:
    """Return none: a table of labels is a layout only where the user names one."""
    return None


def read(folder: Folder, listings: ListingCache, options: Options) -> Sources:
    """Return the pictures below RAW with the labels that the table `options.labels` has for them.

    A row names a picture by its path below RAW or below the table's folder, by its file name, or by that without the
    extension. Folders that are called so are splits; in test/, a picture may have no label.

    Raises:
        SourceError: a table that is none, names a picture in two ways, or leaves pictures without a label.
    """
    if not options.labels:
        raise SourceError(f"{folder.path}: not the layout labels: no table is named; say --labels FILE")
    table, sources = options.labels, Sources("flat pictures and a table of labels")
    below = _below(table, folder)
    images, problems = _images(folder, f"{below}{table.name}", sources)
    if not len(images):
        return sources
    rows, names = _rows(table), _Names(images, below, _of_test(table.name))
    file_column, label_column, header = _columns(rows, names, table)
    _require_same_splits(rows, header, file_column, names, images, table)
    title = rows[0][label_column] if header else f"column {label_column + 1}"
    sources.gives = f"the table {table.name}, {printable(title, 60)}"
    labels, unknown = _labels(rows[header:], file_column, label_column, names, table)
    if len(labels) >= MANY and len({*labels.values()}) == len(labels) and title.casefold() not in LABELS:
        problem = f"each picture has a label of its own in {printable(title, 60)}, so it is no class"
        raise SourceError(f"{table}: {problem}; remove that column, or call it label")
    without = []
    for number, image in enumerate(images):
        if label := labels.get(number):
            sources.images.append(image, normal(label))
        elif image.split == "test":
            sources.images.append(image)
        else:
            without.append(image.path)
            sources.ignored.lose(f"picture without a label in {printable(table.name, 60)}", image.path)
    problems += [f"{len(without):,} pictures have no label in it: {listed(without, SHOWN)}"] if without else []
    problems += [f"{len(unknown):,} rows name no picture: {listed(unknown, SHOWN)}"] if unknown else []
    if problems and not options.allow_incomplete:
        raise SourceError(f"{table}: {'; '.join(problems)}; correct it, or leave them out by --allow-incomplete")
    sources.notes += problems
    sources.classes = ranked(sources.images.wnids, {}, {})
    return sources


def _images(folder: Folder, table: str, sources: Sources) -> tuple[RawTable, list[str]]:
    """Return the pictures below RAW, without labels, and a line for each empty split. Raises SourceError."""
    images = RawTable()
    for image in pictures(folder.path, "", sources.ignored, used=table):
        images.append(image)
    splits = _splits(folder, {path.rpartition("/")[0] for path in images.paths})
    outside = 0
    for number, path in enumerate(images.paths):
        above = itertools.accumulate(path.split("/")[:-1], "{}/{}".format)
        split = next((splits[x] for x in above if x in splits), "")
        outside += not split
        images.split_numbers[number] = SPLITS.index(split or "train")
    if outside and "train" in splits.values():
        listed = ", ".join(f"{printable(name)}/" for name in splits)
        sources.notes.append(f"{outside:,} pictures in no folder of a split ({listed}) are of train")
    empty = [name for name, split in folder_splits(folder.folders)[0].items() if split not in splits.values()]
    return images, [f"no picture is in {name}/" for name in empty]


def _splits(folder: Folder, directories: Iterable[str]) -> dict[str, str]:
    """Return folder → split, of the first folder on the way to each of the directories that is called so.

    Raises SourceError where that is in doubt.
    """
    inside: dict[str, set[str]] = defaultdict(set)
    for directory in directories:
        above = ""
        for name in filter(None, directory.split("/")):
            inside[above].add(name)
            above = f"{above}/{name}".lstrip("/")
    splits: dict[str, str] = {}
    stack = [""]
    while stack:
        above = stack.pop()
        own, doubt = folder_splits(sorted(inside[above]))
        if doubt:
            raise SourceError(f"{folder.path / above if above else folder.path}: {doubt}")
        for name in sorted(inside[above]):
            path = f"{above}/{name}".lstrip("/")
            if name in own:
                splits[path] = own[name]
            else:
                stack.append(path)
    return splits


def _require_same_splits(
    rows: list[Row], header: int, file_column: int, names: "_Names", images: RawTable, table: Location
) -> None:
    """Raise SourceError where a column has the splits of pictures, and their folders say something else, or nothing."""
    for i, title in enumerate(rows[0] if len(rows) > header else ()):
        values = {row[i].casefold() for row in rows[header:]}
        flag = bool(header) and title.casefold() in FLAGS
        if i == file_column or not (values <= WORDS.keys() or flag):
            continue
        for row in rows[header:]:
            for number in names.find(row[file_column])[:1]:
                if flag or WORDS[row[i].casefold()] != SPLITS[images.split_numbers[number]]:
                    remedy = f"sort the pictures into folders of these names, or remove column {i + 1}"
                    shown = f"{i + 1} has splits ({printable(row[i], 40)} …)"
                    raise SourceError(
                        f"{table}: column {shown}, and {images.paths[number]} lies in no such folder; {remedy}"
                    )


def tables(folder: Folder) -> list[str]:
    """Return the paths below RAW of what may be a table of labels, in RAW or in a split."""
    inside = [(f"{name}/", Folder.of(folder.path / name)) for name in folder_splits(folder.folders)[0]]
    endings = (".csv", ".tsv", ".jsonl")
    paths = [f"{above}{name}" for above, x in [("", folder), *inside] for name in x.files]
    return sorted((path for path in paths if path.lower().endswith(endings)), key=_of_test)


def _of_test(path: str) -> bool:
    """Return whether a table seems to be about test pictures: Kaggle's sample_submission.csv has no true label."""
    about = spelled(path.rpartition("/")[2].rpartition(".")[0])
    return "submission" in path.lower() or (about is not None and "train" not in about.splits)


def _below(table: Location, folder: Folder) -> str:
    """Return the path of the table's folder below RAW, with a slash at its end; empty where it lies elsewhere."""
    above, raw = (
        str(path).rstrip("/") if storage.is_remote(path) else os.path.abspath(path)
        for path in (table.parent, folder.path)
    )
    return f"{above.removeprefix(raw)[1:]}/" if above.startswith(f"{raw}/") else ""


class _Names:
    """The pictures by what a table may call them."""

    def __init__(self, images: RawTable, below: str, of_test: bool) -> None:
        self._below = below
        self._paths: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._stems: dict[str, int] = {}
        self.paths, self._many = images.paths, set[str]()  # names and stems of several pictures
        test = np.asarray(images.split_numbers) == SPLITS.index("test")
        for number in np.argsort(test ^ of_test, kind="stable").tolist():  # a name may be of train/ and of test/
            path = images.paths[number]
            self._paths[path] = number
            name = path.rpartition("/")[2]
            for text, index in ((name, self._numbers), (name.rpartition(".")[0], self._stems)):
                if test[index.setdefault(text, number)] == test[number] and index[text] != number:
                    self._many.add(text)
            self._stems.setdefault(path.rpartition(".")[0], number)

    def find(self, text: str) -> list[int]:
        """Return the number of the picture that `text` names; two numbers where it names several, none for none."""
        text = text.strip().replace("\\", "/").removeprefix("./")
        for candidate in (self._below + text, text):
            if candidate in self._paths:
                return [self._paths[candidate]]
            for index in (self._numbers, self._stems):
                if candidate in index:
                    return [index[candidate]] * (2 if candidate in self._many else 1)
        return []

    def of(self, text: str) -> list[str]:
        """Return the paths of the pictures that have this name or stem."""
        return [
            path for path in self.paths if text in (path.rpartition("/")[2], path.rpartition("/")[2].rpartition(".")[0])
        ]


def _rows(table: Location) -> list[Row]:
    """Return the rows of a table, all of one length of two or more, the header among them. Raises SourceError."""
    text = read_text(table, MAX_TABLE)
    if table.name.lower().endswith((".jsonl", ".ndjson", ".json")):
        return _json_rows(text, table)
    lines = [line for line in lines_of(text) if line.strip()]
    for delimiter in (",", "\t", ";"):
        try:
            rows = [*csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, strict=True)]
        except csv.Error:
            continue
        if rows and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
            return [[cell.strip() for cell in row] for row in rows]
    counts = Counter(line.count(",") + 1 for line in lines).most_common(3)
    seen = ", ".join(f"{count:,} rows of {width}" for width, count in counts) or "it is empty"
    raise SourceError(f"{table}: no table of two or more columns by commas, tabs or semicolons ({seen}); correct it")


def _json_rows(text: str, table: Location) -> list[Row]:
    rows: list[Row] = []
    try:
        records = [json.loads(line) for line in lines_of(text) if line.strip()]
        columns = list(
            dict.fromkeys(key for record in records for key in record if not isinstance(record[key], dict | list))
        )
        rows = [[*map(_cell, columns)], *([_cell(record.get(key)) for key in columns] for record in records)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{table}: no JSON object a line ({printable(str(error), 80)}); correct it") from error
    if len(rows) < 2 or len(columns) < 2:
        raise SourceError(f"{table}: no line with a file name and a label; correct it")
    return rows


def _cell(value: object) -> str:
    """Return a value as text. Raises ValueError where it has half of a surrogate pair, or is infinite."""
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("a number is infinite, or beyond 1.8e308")
    text = "" if value is None else str(value)
    text.encode()
    return text.strip()


def _columns(rows: list[Row], names: _Names, table: Location) -> tuple[int, int, int]:
    """Return the columns of file names and labels, and the number of header rows, 0 or 1. Raises SourceError."""
    titles = [title.casefold() for title in rows[0]]
    listed = ", ".join(printable(title, 40) for title in rows[0][:20])
    file_column = _file_column(rows, names, table, listed)
    first = rows[0][file_column]
    header = int(not (names.find(first) or is_picture(first) or first.isdecimal()))
    others = [i for i in range(len(titles)) if i != file_column]
    if len(others) == 1 and rows[0][others[0]] in {row[others[0]] for row in rows[1:]}:
        header = 0  # a label like others: the first row names a picture that RAW lacks
    called = [i for i in others if header and titles[i] in LABELS]
    if len(others) == 1 or len(called) == 1:
        return file_column, (others if len(others) == 1 else called)[0], header
    raise SourceError(f"{table}: which column has the labels? It has {listed}; keep two, or call one of them label")


def _file_column(rows: list[Row], names: _Names, table: Location, listed: str) -> int:
    """Return the column that names the most pictures. Raises SourceError where there is none, or another may be it."""
    candidates = [i for i, title in enumerate(rows[0]) if title.casefold() not in LABELS] or [0]
    # labels such as 1 and 2 may be stems, too, but of fewer pictures
    hits = {i: len({*itertools.chain(*(names.find(row[i]) for row in rows[:TRIED]))}) for i in candidates}
    best = max(candidates, key=hits.__getitem__)
    files = [i for i in candidates if all(is_picture(row[i]) for row in rows[1:TRIED])]  # whether in RAW or not
    if hits[best] and len(rows) > 1 and files and best not in files:
        name = printable(rows[1][files[0]], 120)
        raise SourceError(f"{table}: {name} is not in RAW; correct column {files[0] + 1}, or remove it: {listed}")
    if not hits[best]:
        raise SourceError(
            f"{table}: no column has names of the pictures in RAW, such as {printable(names.paths[0], 120)}; its first "
            f"row is {listed}"
        )
    least = hits[best] if len(rows[0]) == 2 else hits[best] // 2 + 1  # a column of row numbers may name most, too
    if sum(count >= least for count in hits.values()) > 1:
        raise SourceError(f"{table}: more than one column has names of pictures ({listed}); keep one, and the labels")
    return best


def _labels(
    rows: Iterable[Row], file_column: int, label_column: int, names: _Names, table: Location
) -> tuple[dict[int, str], list[str]]:
    """Return picture number → label, and the names of no picture. Raises SourceError for what has two labels."""
    labels: dict[int, str] = {}
    unknown: list[str] = []
    for row in rows:
        name, label = row[file_column], row[label_column]
        numbers = names.find(name)
        if not numbers:
            unknown.append(name)
        elif len(numbers) > 1:
            several = " and ".join(printable(path, 120) for path in names.of(name)[:SHOWN])
            raise SourceError(f"{table}: {printable(name, 120)} may be {several}; write their paths below RAW")
        elif labels.setdefault(numbers[0], label) != label:
            both = f"{printable(labels[numbers[0]], 60)} and {printable(label, 60)}"
            raise SourceError(f"{table}: {printable(name, 120)} has two labels, {both}; correct it")
    whole = [label for label in labels.values() if label not in NO_LABEL]
    if whole and all(re.fullmatch(r"-?[0-9]+\.0+", label) for label in whole):  # pandas writes numbers so beside gaps
        labels = {number: label.partition(".")[0] for number, label in labels.items()}
    return {number: label for number, label in labels.items() if label not in NO_LABEL}, unknown
