"""The choice of classes in a user's file: one a line, lines of a mapping, CSV, or JSON."""

import csv
import json
import re
from collections.abc import Collection, Iterator

from pipeline import UserError
from pipeline.cli import printable
from pipeline.offline.names import NUMBER, are_numbers, lines_of, normal

NAMED = 5  # classes in a message; the rest is counted
HEADS = {"wnid", "class", "classes", "name", "names", "label", "labels", "id", "synset", "folder", "words", "index"}
HEADS |= {"number", "category", "class_id", "class_name", "class_index", "description"}
ID = re.compile(r"n[0-9]{8}|-?[0-9]{1,255}")  # what stands beside a name, or before its words
COMMENT = re.compile(r"(^|\s)#.*")


class _Known:
    """The classes of RAW, by their names as a file may have them."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = {normal(name): name for name in names}
        self._numbers = {int(name): name for name in names} if are_numbers(names) else {}

    def get(self, text: str) -> str | None:
        """Return the class of this name, else of this number where all names are numbers, else None."""
        if name := self._names.get(normal(text)):
            return name
        return self._numbers.get(int(text)) if NUMBER.fullmatch(text) else None


def chosen_classes(text: str, names: Collection[str], file: str) -> set[str]:
    """Return which of the class names of RAW a file chooses.

    A line that is a class's name is that; else a row of cells, of which the class stands in the same column of all
    rows. Several names in one row are a list where it is the only row. What follows a # says nothing.

    Raises UserError: the file chooses no class, one that RAW has not, or can be read in two ways.
    """
    known = _Known(names)
    rows = [row for row in (_json_rows(text) or [_cells(line, known) for line in lines_of(text)]) if any(row)]
    head = bool(rows) and not any(map(known.get, rows[0])) and bool(HEADS & {cell.casefold() for cell in rows[0]})
    rows = rows[head:]
    if not rows:
        raise UserError(f"{file}: names no class; write one wnid or folder name a line")
    cells = rows[0] if len(rows) == 1 and not head and _is_list(rows[0], known) else _column(rows, known, file)
    if unknown := sorted({cell for cell in cells if known.get(cell) is None}):
        shown = ", ".join(printable(name, 120) for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED:,} more" if len(unknown) > NAMED else ""
        raise UserError(f"{file}: {shown}{more}: not among the {len(names):,} classes of the raw data")
    return {name for cell in cells if (name := known.get(cell))}


def _is_list(row: list[str], known: _Known) -> bool:
    """Return whether each cell of the only row is to be a class, and none its number or its words."""
    ids = [cell for cell in row if ID.fullmatch(cell)]
    return all(map(known.get, row)) or not ids or len(ids) == len(row) == sum(cell[0] == "n" for cell in row)


def _column(rows: list[list[str]], known: _Known, file: str) -> list[str]:
    """Return the cells of the column that holds most classes; rows of one cell have no other."""
    wide = [row for row in rows if len(row) > 1]
    width = min(map(len, wide), default=1)
    column = max(range(width), key=lambda i: sum(known.get(row[i]) is not None for row in wide))
    cells = [row[column] if len(row) > 1 else row[0] for row in rows]
    for row, cell in zip(rows, cells):
        for other in row:
            if known.get(cell) and known.get(other) not in (None, known.get(cell)):
                named = f"{printable(cell, 120)} and {printable(other, 120)}"
                raise UserError(f"{file}: {named} stand in one line, and both are classes; write one a line")
    return cells


def _cells(line: str, known: _Known) -> list[str]:
    """Return the cells of a line: the name alone, a wnid or a number and a name, or what commas or tabs part."""
    for text in (line.strip(), line := COMMENT.sub("", line).strip(), _bare(line)):
        if known.get(text):
            return [text]
    delimiter = next((sign for sign in "\t;" if sign in line), ",")
    try:
        row = [_bare(cell) for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
    except csv.Error:  # a cell of more than 131,072 characters
        return [_bare(line)]
    words = line.split()
    if delimiter != "," or len(words) < 2 or all(map(known.get, row)):
        return row
    if all(known.get(word) or ID.fullmatch(word) for word in words):
        return words
    if ID.fullmatch(words[0]):
        return [words[0], line[len(words[0]) :].strip()]
    before = line[: -len(words[-1])].strip()
    return [before, words[-1]] if NUMBER.fullmatch(words[-1]) and known.get(before) else row


def _bare(text: str) -> str:
    return text.strip().strip("\"'").rstrip("/").strip()


def _json_rows(text: str) -> list[list[str]]:
    """Return the rows of a JSON list or index; none where the text is no JSON."""
    if not text.lstrip().startswith(("{", "[")):
        return []
    try:
        value = json.loads(text)
        if isinstance(value, dict) and len(value) == 1 and not ID.fullmatch(key := next(iter(value))):
            value = value[key] if isinstance(value[key], list | dict) else value  # {"classes": [...]}
        rows = value.items() if isinstance(value, dict) else value
        return [[_bare(cell) for cell in _texts(row)] for row in rows]
    except (ValueError, RecursionError):
        return []


def _texts(value: object) -> Iterator[str]:
    """Yield the texts and numbers in a JSON value, keys first."""
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, str | int | float):
        yield str(value)
    elif value is not None:
        for item in value:  # type: ignore[attr-defined]
            yield from _texts(item)
