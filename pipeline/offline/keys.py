"""The key of each raw image: WebDataset's `__key__`, unique over all splits, with no dot and no slash in it."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence

MAX_LENGTH = 90  # so that KEY.jpg fits the 100 bytes of a USTAR name with room to spare
_FORBIDDEN = re.compile(rb"[^A-Za-z0-9_-]")


def assign_keys(paths: Sequence[str]) -> list[str]:
    """One key per raw path.

    A key is the file's stem where that is unique; else the path without its extension, `/` as `_`; else that with the
    extension; else that with -2, -3, … in sorted path order. (Two neighbouring samples with one stem would silently
    become one sample in WebDataset; a dot would move the extension.)
    """
    keys: list[str] = [""] * len(paths)
    taken: set[str] = set()
    open_ones = sorted(range(len(paths)), key=lambda i: os.fsencode(paths[i]))
    for spell in (_stem, _path, _whole):
        candidates = {i: _escape(spell(paths[i])) for i in open_ones}
        count = Counter(candidates.values())
        for i in open_ones:
            if count[candidates[i]] == 1 and candidates[i] not in taken:
                keys[i] = candidates[i]
        open_ones = [i for i in open_ones if not keys[i]]
        taken.update(candidates[i] for i in candidates if keys[i])
    for i in open_ones:
        stem, number = _escape(_whole(paths[i])), 1
        key = stem
        while key in taken:
            number += 1
            suffix = f"-{number}"
            key = stem[: MAX_LENGTH - len(suffix)] + suffix
        keys[i] = key
        taken.add(key)
    return keys


def _stem(path: str) -> str:
    return os.path.splitext(path.rpartition("/")[2])[0]


def _path(path: str) -> str:
    return os.path.splitext(path)[0].replace("/", "_")


def _whole(path: str) -> str:
    return path.replace("/", "_")


def _escape(text: str) -> str:
    """Only [A-Za-z0-9_-]; any other byte as -XX; longer than 90 characters: cut, with a digest of the whole."""
    raw = os.fsencode(text)
    escaped = _FORBIDDEN.sub(lambda match: b"-%02X" % match.group()[0], raw).decode("ascii")
    if len(escaped) <= MAX_LENGTH:
        return escaped
    return escaped[: MAX_LENGTH - 17] + "-" + hashlib.sha256(raw).hexdigest()[:16]
