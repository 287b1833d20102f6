"""A limit on the time of one decode. It fails the task, and never skips a picture: times differ between machines."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import UserError

SECONDS = 60.0
_WAKES = 0.5  # seconds between two looks


class Watchdog:
    """One thread that looks at what is being decoded; where that takes too long, it ends the process."""

    def __init__(self) -> None:
        self._what, self._since = "", 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Watch the block. Raises UserError where it ended after the limit, in a library that let no thread run."""
        self._what, self._since = what, time.monotonic()
        yield
        took, self._since = time.monotonic() - self._since, 0.0
        if took > SECONDS:
            raise UserError(_message(what))

    def _watch(self) -> None:
        while not self._over.wait(min(_WAKES, SECONDS / 4)):
            if self._since and time.monotonic() - self._since > SECONDS:
                print(_message(self._what), file=sys.stderr, flush=True)
                os._exit(2)  # a decoder in C hears no exception


def _message(what: str) -> str:
    return (
        f"Error: {what}: still decoding after {SECONDS:g} s, which fails the build (a time never skips an image); "
        "remove the file, or run the same command again on a faster machine"
    )
