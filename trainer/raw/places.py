"""Where pictures to predict come from: files, folders and tars, on this machine or in an object store."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from pipeline import UserError, storage
from pipeline.cli import printable
from pipeline.manifest import BuildRecipe
from pipeline.storage import Location, read_ahead
from trainer.raw.raws import Failure, LeftOut, Raw, no_picture, unreadable, useless
from trainer.raw.tarred import tarred

MOST = 100_000  # places that one pattern may name
TARS = (".tar", ".tar.gz", ".tgz")  # of which the packed ones are refused


def places(words: Sequence[str]) -> list[Location]:
    """Paths, URLs, and patterns as `val-{000000..000012}.tar` for several of them; a path that exists is no pattern.

    Raises:
        UserError: a place that does not exist; a pattern of more than `MOST`, or with a brace left open.
    """
    found = [storage.location(each) for word in words for each in _expanded(word)]
    for place, there in read_ahead(found, storage.exists):
        if not there:
            raise UserError(f"{printable(str(place))}: no such file or folder")
    return found


def _expanded(word: str) -> list[str]:
    if "{" not in word or (not storage.is_remote(word) and Path(word).exists()):
        return [word]
    too_many = f"{printable(word)}: names more than {MOST:,} places; name fewer at a time"
    for first, last in re.findall(r"(-?\d+)\.\.(-?\d+)", word):  # each range is held at once
        if max(len(first), len(last)) > 18 or abs(int(last) - int(first)) >= MOST:
            raise UserError(too_many)
    try:
        found = list(islice(braceexpand(word, escape=False), MOST + 1))
    except ValueError as error:
        raise UserError(f"{printable(word)}: a brace is not closed, or not opened") from error
    if len(found) > MOST:
        raise UserError(too_many)
    return found


def pictures(found: Sequence[Location], rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """Every picture at places that exist, place by place, in the order of paths and of members. Few are held at a time.

    In folders and tars, files whose name is hidden or ends as in `raws.BESIDE`, and what is no file, are counted in
    `left_out`; any other file should be a picture, whatever its name. `rules`: of the data set that the network was
    trained on.

    Raises:
        StorageError: the object store fails.
    """
    for place in found:
        empty = True
        for each in _at(place, rules, left_out):
            empty = False
            yield each
        if empty:
            left_out.empty.append(str(place))


def _at(place: Location, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    try:
        if storage.is_dir(place):
            yield from _below(place, rules, left_out)
        elif storage.is_file(place):
            yield from _file(place, storage.stamp(place)[0], rules, left_out)
        else:
            yield Failure(str(place), "unreadable", "neither a file nor a folder")
    except OSError as error:
        yield unreadable(place, error)


def _below(folder: Location, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """The files of a folder and its folders. Links to folders are followed, each folder once."""
    pending = [(folder, -1)]  # bytes of a file; −1: a folder
    seen: set[tuple[int, int]] = set()
    while pending:
        place, size = pending.pop()
        if size >= 0:
            yield from _file(place, size, rules, left_out)
        elif isinstance(place, Path) and _again(place, seen):
            left_out.kinds["second link to one folder"] += 1
        else:
            try:
                pending += reversed(list(_inside(place, left_out)))
            except OSError as error:
                yield unreadable(place, error)


def _again(folder: Path, seen: set[tuple[int, int]]) -> bool:
    status = folder.stat()
    before = len(seen)
    seen.add((status.st_dev, status.st_ino))
    return len(seen) == before


def _inside(folder: Location, left_out: LeftOut) -> Iterator[tuple[Location, int]]:
    for entry in storage.scan(folder):
        if entry.is_dir and not entry.name.startswith("."):
            yield folder / entry.name, -1
        elif kind := no_picture(entry.name):
            left_out.kinds[kind] += 1
        elif entry.is_file:
            yield folder / entry.name, entry.size
        else:
            left_out.kinds["link to nothing, pipe or device"] += 1


def _file(place: Location, size: int, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    if place.name.lower().endswith(TARS):
        yield from tarred(place, rules, left_out)
    elif size > rules.max_bytes:  # it is not even read
        yield useless(str(place), "too_many_bytes")
    else:
        yield Raw(str(place), size, lambda: storage.read_range(str(place), 0, size))
