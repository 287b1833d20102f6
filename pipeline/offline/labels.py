"""Flat pictures and a table of their labels: CSV, TSV or JSON lines, with or without a header."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline import SourceError
from pipeline.archives import ListingCache
from pipeline.cli import printable
from pipeline.offline.classes import ranked, read_text
from pipeline.offline.names import folder_splits, normal
from pipeline.offline.raw import Options, RawTable, Reading, Sources
from pipeline.offline.tree import Folder, pictures
from pipeline.storage import Location

MAX_TABLE = 512 * 2**20  # bytes
SHOWN = 3  # names in a message
TRIED = 1000  # rows that decide which column has what
LABELS = ("label", "labels", "class", "classes", "category", "target", "wnid", "breed", "species", "variety", "dx")
JSON_FILE = ("file_name", "file", "filename", "path", "image")

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
        raise SourceError(f"{folder.path}: --layout labels needs a table: --labels FILE")
    table, (splits, doubt) = options.labels, folder_splits(folder.folders)
    if doubt:
        raise SourceError(f"{folder.path}: {doubt}; rename them")
    sources, images = Sources("flat pictures and a table of labels"), RawTable()
    below = _below(table, folder)
    for image in pictures(folder.path, "", sources.ignored, used=f"{below}{table.name}"):
        images.append(replace(image, split=splits.get(image.path.partition("/")[0], "train")))
    rows, names = _rows(table), _Names(images, below)
    file_column, label_column, header = _columns(rows, names, table)
    title = rows[0][label_column] if header else f"column {label_column + 1}"
    sources.gives = f"the table {table.name}, {printable(title, 60)}"
    labels, unknown = _labels(rows[header:], file_column, label_column, names, table)
    without = []
    for number, image in enumerate(images):
        if label := labels.get(number):
            sources.images.append(image, normal(label))
        elif image.split == "test":
            sources.images.append(image)
        else:
            without.append(image.path)
            sources.ignored.lose(f"picture without a label in {printable(table.name, 60)}", image.path)
    problems = [f"{len(without):,} pictures have no label in it: {_listed(without)}"] if without else []
    problems += [f"{len(unknown):,} rows name no picture: {_listed(unknown)}"] if unknown else []
    if problems and not options.allow_incomplete:
        raise SourceError(f"{table}: {'; '.join(problems)}; correct it, or leave them out by --allow-incomplete")
    sources.notes += problems
    sources.classes = ranked(sources.images.wnids, {}, {})
    return sources


def tables(folder: Folder) -> list[str]:
    """Return the paths below RAW of what may be a table of labels: in RAW, or in a folder that is called like a split."""
    inside = [(f"{name}/", Folder.of(folder.path / name)) for name in folder_splits(folder.folders)[0]]
    endings = (".csv", ".tsv", ".jsonl")
    return [
        f"{above}{name}" for above, x in [("", folder), *inside] for name in x.files if name.lower().endswith(endings)
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name, 120) for name in names[:SHOWN]) + more


def _below(table: Location, folder: Folder) -> str:
    """Return the path of the table's folder below RAW, with a slash at its end; empty where it lies elsewhere."""
    above, raw = str(table.parent).rstrip("/"), str(folder.path).rstrip("/")
    return f"{above.removeprefix(raw)[1:]}/" if above.startswith(f"{raw}/") else ""


class _Names:
    """The pictures by what a table may call them."""

    def __init__(self, images: RawTable, below: str) -> None:
        self._below = below
        self._numbers: dict[str, int] = {}
        self._stems: dict[str, int] = {}
        self.paths, self._many = images.paths, set[str]()  # names and stems of several pictures
        for number, path in enumerate(images.paths):
            self._numbers[path] = number
            name = path.rpartition("/")[2]
            for text, index in ((name, self._numbers), (name.rpartition(".")[0], self._stems)):
                if text != path and index.setdefault(text, number) != number:
                    self._many.add(text)
            self._stems.setdefault(path.rpartition(".")[0], number)

    def find(self, text: str) -> list[int]:
        """Return the number of the picture that `text` names; two numbers where it names several, none for none."""
        text = text.strip().replace("\\", "/").removeprefix("./")
        for candidate in (self._below + text, text):
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
    lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
    for delimiter in (",", "\t", ";"):
        try:
            rows = [*csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, strict=True)]
        except csv.Error:
            continue
        if rows and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
            return [[cell.strip() for cell in row] for row in rows]
    counts = Counter(len(row) for row in csv.reader(lines)).most_common(3)
    seen = ", ".join(f"{count:,} rows of {width}" for width, count in counts)
    raise SourceError(f"{table}: no table of two or more columns by commas, tabs or semicolons ({seen}); correct it")


def _json_rows(text: str, table: Location) -> list[Row]:
    rows: list[Row] = []
    try:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        columns = list(
            dict.fromkeys(key for record in records for key in record if not isinstance(record[key], dict | list))
        )
        rows = [columns, *([_cell(record.get(key)) for key in columns] for record in records)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{table}: no JSON object a line ({printable(str(error), 80)}); correct it") from error
    if len(rows) < 2 or len(columns) < 2:
        raise SourceError(f"{table}: no line with a file name and a label; correct it")
    return rows


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _columns(rows: list[Row], names: _Names, table: Location) -> tuple[int, int, int]:
    """Return the columns of file names and labels, and the number of header rows, 0 or 1. Raises SourceError."""
    hits = [sum(bool(names.find(row[i])) for row in rows[:TRIED]) for i in range(len(rows[0]))]
    best = max(range(len(hits)), key=hits.__getitem__)
    titles = [title.casefold() for title in rows[0]]
    listed = ", ".join(printable(title, 40) for title in rows[0][:20])
    if not hits[best]:
        raise SourceError(
            f"{table}: no column has names of the pictures in RAW, such as {names.paths[0] if len(names.paths) else '?'}; "
            f"its first row is {listed}"
        )
    if hits.count(hits[best]) > 1:
        raise SourceError(f"{table}: more than one column has names of pictures ({listed}); keep one, and the labels")
    header = int(not names.find(rows[0][best]))
    others = [i for i in range(len(titles)) if i != best]
    called = [i for i in others if header and titles[i] in LABELS]
    if len(others) == 1 or len(called) == 1:
        return best, (others if len(others) == 1 else called)[0], header
    raise SourceError(f"{table}: which column has the labels? It has {listed}; keep two, or call one of them label")


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
    return {number: label for number, label in labels.items() if label}, unknown
