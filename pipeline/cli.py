"""click command that turns user errors, OS errors and signals into one line and an exit code; what commands print."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from pipeline import UserError, volumes
from pipeline.storage import Location, location


class Command(click.Command):
    """A click command with one-line errors; its exit code is then 2, after Ctrl-C 130, and after SIGTERM 143."""

    def __init__(self, *args: Any, interrupted: str = "", **options: Any) -> None:
        """`interrupted` tells the user what an interruption leaves."""
        super().__init__(*args, **options)
        self._interrupted = f"; {interrupted}" if interrupted else ""

    def invoke(self, ctx: click.Context) -> Any:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as nohup and a shell's `&` have it
                signal.signal(number, _interrupt)
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _Failure("; ".join([str(error), *getattr(error, "__notes__", [])]), error.exit_code) from error
        except BrokenPipeError:
            discard_stdout()
            raise SystemExit(128 + signal.SIGPIPE) from None
        except OSError as error:
            if error.strerror is None:
                raise
            raise _Failure(volumes.explained(error), UserError.exit_code) from error
        except _Terminated as error:
            raise _Failure(f"terminated{self._interrupted}", 128 + signal.SIGTERM) from error
        except KeyboardInterrupt as error:
            raise _Failure(f"interrupted{self._interrupted}", 128 + signal.SIGINT) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Place(click.ParamType):
    """A path, or the URL of an object store, as a `storage.Location`."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Location:
        try:
            return location(value)
        except UserError as error:
            self.fail(str(error), param, ctx)


class _Terminated(BaseException):
    """SIGTERM as an exception, so that open files are closed and temporary files deleted."""


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(printable(message))
        self.exit_code = exit_code  # type: ignore[misc]


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise the signal as an exception, once: a second Ctrl-C must not interrupt the deletion of temporary files."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else _Terminated


def discard_stdout() -> None:
    """Send what is still printed to nowhere, once the reader of stdout has gone (`| head`)."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)


def printable(text: str, limit: int = 0) -> str:
    """Return text that a terminal may show, cut to `limit` characters (0: all): control characters are escaped."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return plain if not limit or len(plain) <= limit else plain[: limit - 3] + "..."


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (task, done, total) that draws a bar for each task if stderr is a terminal, else nothing."""
    from rich.console import Console  # here, for who wants only `printable`
    from rich.markup import escape
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    # not rich's own opinion: FORCE_COLOR, which CI services set, makes a pipe a terminal in its eyes
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:

        def show(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(escape(task), total=total)
            bars.update(tasks[task], completed=done, total=total)

        yield show
