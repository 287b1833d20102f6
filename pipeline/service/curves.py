"""The curves of a run: the lines of its metrics.jsonl, read on as the file grows, and thinned to a bounded number."""

import threading
from collections.abc import Iterator
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from pipeline import UserError, typed
from pipeline.typed import Count
from pipeline.volumes import open_regular

FILE_NAME = "metrics.jsonl"
MOST = 1_000  # lines of a kind; up to twice as many are kept
PIECE = 2**20  # bytes that are read at a time, and of a line at most
TAIL = 256  # bytes before the position, by which the file is known again


class _Step(msgspec.Struct):
    step: Count


class Speed(msgspec.Struct):
    images_per_second: float
    stall: float  # share of the time
    stall_by: dict[str, float] = {}  # shares by cause


class Training(msgspec.Struct, tag_field="kind", tag="train"):
    """A line of training; the file has more keys."""

    step: Count
    epoch: int | float
    loss: float  # nats per image
    lr: float
    time: Speed
    top1_error: float | msgspec.UnsetType = msgspec.UNSET  # percent; lines of earlier versions have none


class Validation(msgspec.Struct, tag_field="kind", tag="validation"):
    """A line of a validation, with errors in percent."""

    step: Count
    epoch: int | float
    top1_error: float
    top5_error: float
    nll: float


class _Thinned(list[Any]):
    """Every nth of the values that were added, n a power of two, less than 2 · MOST of them; `last` is the newest."""

    stride, added, last = 1, 0, None

    def add(self, value: Any) -> None:
        if self.added % self.stride == 0:
            self.append(value)
        if len(self) == 2 * MOST:
            self[:] = self[::2]
            self.stride *= 2
        self.added += 1
        self.last = value

    def with_last(self) -> list[Any]:
        return [*self, *([self.last] if self and self[-1] is not self.last else [])]


class Curves:
    """The lines of one file, whose readers take turns. `best`: the validation with the least error; `error`: the first
    damaged line, if any, in words."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self._position, self._tail, self._number = 0, b"", 0
        self.training, self.validation = _Thinned(), _Thinned()
        self.best: Validation | None = None
        self.error: str | None = None

    def read(self) -> "Curves":
        """Read the lines that are new, all of them where the file is another one; return these curves.

        A last line without an end does not count. Raises OSError.
        """
        with self._lock:
            try:
                with open_regular(self._path) as file:
                    self._read(file)
            except FileNotFoundError:
                self._restart()
        return self

    def lines(self, after: int = 0) -> list[dict[str, Any]]:
        """Return the lines past the step `after`, as the file has them but for keys that are not drawn."""
        with self._lock:
            both = [*self.training.with_last(), *self.validation.with_last()]
        return [msgspec.to_builtins(line) for line in sorted(both, key=lambda line: line.step) if line.step > after]

    def _read(self, file: BufferedReader) -> None:
        file.seek(self._position - len(self._tail))
        if file.read(len(self._tail)) != self._tail:  # a resumed run has written it anew
            self._restart()
            file.seek(0)
        while piece := file.read(PIECE):
            end = piece.rfind(b"\n") + 1 or (PIECE if len(piece) == PIECE else 0)
            if not end:
                break
            for line in piece[:end].splitlines():
                self._add(line)
            self._position += end
            self._tail = piece[max(0, end - TAIL) : end]
            file.seek(self._position)

    def _add(self, text: bytes) -> None:
        self._number += 1
        try:
            line = typed.from_json(text, Training | Validation)  # type: ignore[arg-type]
        except UserError as error:
            self.error = self.error or f"{FILE_NAME}: line {self._number} is damaged ({error}); delete that line"
            return
        if isinstance(line, Training):
            self.training.add(line)
        else:
            self.validation.add(line)
            if self.best is None or line.top1_error < self.best.top1_error:
                self.best = line


@lru_cache(256)
def of(run: Path) -> Curves:
    """Return the curves of a run, kept between calls."""
    return Curves(run / FILE_NAME)


def newer(file: BufferedReader, after: int) -> Iterator[bytes]:
    """Yield the whole lines of an open metrics.jsonl past step `after`, and damaged ones, as they are; close it."""
    with file:
        start = file.seek(0, 2)
        while start:  # back from the end, since steps grow, and the newest are asked for most
            start = max(0, start - PIECE)
            file.seek(start)
            if start and (step := _step(file.readline() and file.readline())) is not None and step <= after:
                break
        file.seek(start)
        if start:
            file.readline()
        for line in iter(lambda: file.readline(PIECE), b""):
            if line.endswith(b"\n") and ((step := _step(line)) is None or step > after):
                yield line


def _step(line: bytes) -> int | None:
    try:
        return typed.from_json(line, _Step).step
    except UserError:
        return None
