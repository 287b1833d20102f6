"""The words of classes in text files: LOC_synset_mapping.txt, and classes.txt beside shards."""

import re

from pipeline import storage
from pipeline.offline.raw import SourceError
from pipeline.storage import Location

MAPPING = "LOC_synset_mapping.txt"
CLASSES = "classes.txt"
MAX_BYTES = 16 * 2**20
_WNID_LINE = re.compile(r"(n[0-9]{8})(?:\s+(.+))?")


def read_text(path: Location) -> str:
    """A small text file. Raises SourceError where it is too large or not UTF-8."""
    with storage.opened(path) as (read, _):
        data = read(MAX_BYTES + 1, 0)
    if len(data) > MAX_BYTES:
        raise SourceError(f"{path}: has more than {MAX_BYTES:,} bytes; it cannot be what its name says")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def read_mapping(path: Location) -> dict[str, str]:
    """wnid → words, from lines such as `n02012849 crane`. An absent file gives none. Raises SourceError."""
    if not storage.is_file(path):
        return {}
    words: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        found = _WNID_LINE.fullmatch(line.strip())
        if not found or found[1] in words:
            wrong = "a wnid for the second time" if found else "no wnid at its beginning"
            raise SourceError(f"{path}: line {number} has {wrong}; fetch it again")
        words[found[1]] = found[2] or found[1]
    return words


def read_class_list(path: Location) -> list[tuple[str, str]]:
    """(name, words) of class 0, 1, …, one a line: a wnid, with words or without; else the words are the name.

    Where two classes have the same words ("crane"), their numbers keep the names apart. Raises SourceError.
    """
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if blank := [number for number, line in enumerate(lines, start=1) if not line]:
        raise SourceError(f"{path}: line {blank[0]} is blank; line i must name class i − 1")
    classes = []
    for number, line in enumerate(lines):
        found = _WNID_LINE.fullmatch(line)
        name, words = (found[1], found[2] or found[1]) if found else (line, line)
        twice = lines.count(line) > 1 if not found else False
        classes.append((f"{name} ({number})" if twice else name, words))
    if len({name for name, _ in classes}) != len(classes):
        raise SourceError(f"{path}: names one wnid twice; each line must name a class of its own")
    return classes
