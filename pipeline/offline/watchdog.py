"""A limit on the time of one decode. It fails the task, and never skips a picture: times differ between machines."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline import UserError

SECONDS = 60.0
_PAUSE = 0.5  # seconds between two looks


class Watchdog:
    """One thread that looks at what is being decoded; where that takes too long, it ends the process.

    It counts looks, and not the time between them, so that a process that was stopped (Ctrl-Z) may go on.
    """

    def __init__(self) -> None:
        self._watched: tuple[str] | None = None  # what is decoded: a new object for each block, read once a look
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Watch the block. Raises UserError where it ended after the limit, in a library that let no thread run."""
        self._watched, began = (what,), time.thread_time()
        yield
        self._watched = None
        if time.thread_time() - began > SECONDS:
            raise UserError(_message(what))

    def _watch(self) -> None:
        pause = min(_PAUSE, SECONDS / 4)
        seen, looks = None, 0
        while not self._over.wait(pause):
            watched = self._watched
            looks = looks + 1 if watched is seen else 0
            seen = watched
            if watched and looks * pause > SECONDS:
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
                print(f"{show_cursor}Error: {_message(watched[0])}", file=sys.stderr, flush=True)
                os._exit(2)  # a decoder in C hears no exception


def _message(what: str) -> str:
    return (
        f"{what}: still decoding after {SECONDS:g} s, which fails the build (a time never skips an image); "
        "remove the file, or run the same command again on a faster machine"
    )
