"""The key of each raw image: WebDataset's `__key__`, unique over all splits, with no dot and no slash in it."""

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Sequence

import numpy as np

MAX_LENGTH = 90  # so that KEY.jpg fits the 100 bytes of a USTAR name with room to spare
_FORBIDDEN = re.compile(rb"[^A-Za-z0-9_-]")


class Keys(Sequence[str]):
    """The key of each path, made from the path when asked for: one byte an image, whichever spelling it has."""

    def __init__(self, paths: Sequence[str], spelling: np.ndarray, numbered: dict[int, str]) -> None:
        self._paths = paths
        self._spelling = spelling  # (n,) uint8: a place in SPELLINGS, or past them: in `numbered`
        self._numbered = numbered

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]  # no slices
        spelling = self._spelling[i]
        return SPELLINGS[spelling](self._paths[i]) if spelling < len(SPELLINGS) else self._numbered[i]


def assign_keys(paths: Sequence[str]) -> Keys:
    """One key per raw path.

    A key is the file's stem where that is unique; else the path without its extension, `/` as `_`; else that with the
    extension; else that with -2, -3, … in sorted path order. (Two neighbouring samples with one stem would silently
    become one sample in WebDataset; a dot would move the extension.)

    Spellings are compared by 64 bits of their hash: where two different ones should meet, both go on to the next.
    """
    spelling = np.full(len(paths), len(SPELLINGS), np.uint8)
    taken = np.empty(0, np.uint64)  # hashes of the keys in use, sorted
    rest = np.arange(len(paths), dtype=np.uint32)
    for number, spell in enumerate(SPELLINGS):
        hashes = _hashes(paths, rest, spell)
        ordered = np.sort(hashes)
        free = ~(_among(hashes, ordered[1:][ordered[1:] == ordered[:-1]]) | _among(hashes, taken))
        del ordered
        spelling[rest[free]] = number
        rest = rest[~free]
        if not len(rest):
            break
        taken = np.sort(np.concatenate([taken, hashes[free]]))
    return Keys(paths, spelling, _numbered(paths, rest, taken))


def _hashes(paths: Sequence[str], places: np.ndarray, spell: Callable[[str], str]) -> np.ndarray:
    """(n,) uint64, a hash of each spelling."""
    hashes = array("Q", bytes(8 * len(places)))
    for n, i in enumerate(map(int, places)):
        hashes[n] = _hash(spell(paths[i]))
    return np.asarray(hashes)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _among(values: np.ndarray, ordered: np.ndarray, block: int = 2**20) -> np.ndarray:
    """Whether each value is in `ordered`; by blocks, for the memory's sake."""
    found = np.zeros(len(values), bool)
    for start in range(0, len(values) if len(ordered) else 0, block):
        some = values[start : start + block]
        places = np.minimum(np.searchsorted(ordered, some), len(ordered) - 1)
        found[start : start + block] = ordered[places] == some
    return found


def _numbered(paths: Sequence[str], rest: np.ndarray, taken: np.ndarray) -> dict[int, str]:
    """Keys for paths that are alike in every spelling, such as a_b/c.x beside a/b_c.x, in sorted path order."""
    numbered: dict[int, str] = {}
    mine: set[str] = set()
    for i in sorted(rest.tolist(), key=lambda i: os.fsencode(paths[i])):
        stem, number = _whole(paths[i]), 1
        key = stem
        while key in mine or _among(np.array([_hash(key)], np.uint64), taken)[0]:
            number += 1
            suffix = f"-{number}"
            key = stem[: MAX_LENGTH - len(suffix)] + suffix
        numbered[i] = key
        mine.add(key)
    return numbered


def _stem(path: str) -> str:
    return _escape(os.path.splitext(path.rpartition("/")[2])[0])


def _path(path: str) -> str:
    return _escape(os.path.splitext(path)[0].replace("/", "_"))


def _whole(path: str) -> str:
    return _escape(path.replace("/", "_"))


SPELLINGS = (_stem, _path, _whole)


def _escape(text: str) -> str:
    """Only [A-Za-z0-9_-]; any other byte as -XX; longer than 90 characters: cut, with a digest of the whole."""
    raw = os.fsencode(text)
    escaped = _FORBIDDEN.sub(lambda match: b"-%02X" % match.group()[0], raw).decode("ascii")
    if len(escaped) <= MAX_LENGTH:
        return escaped
    return escaped[: MAX_LENGTH - 17] + "-" + hashlib.sha256(raw).hexdigest()[:16]
