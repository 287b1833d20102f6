"""How every command of ours ends before its time: one line on stderr and an exit code, no traceback."""

import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from pipeline import UserError, volumes
from pipeline.storage import Location, location


class Command(click.Command):
    """A click command that reports mistakes, the operating system's errors (a full disk) and signals in one line.

    Exit codes: 2 for what the user can mend, 130 after Ctrl-C and 143 after SIGTERM, as shells have it. `interrupted`
    tells the user what an interruption leaves.
    """

    def __init__(self, *args: Any, interrupted: str = "", **options: Any) -> None:
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
            notes = getattr(error, "__notes__", [])
            raise _Failure("; ".join([str(error), *notes]), error.exit_code) from error
        except BrokenPipeError:
            raise _nobody_listens() from None
        except OSError as error:
            if error.strerror is None:
                raise
            raise _Failure(volumes.explained(error)) from error
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
    """SIGTERM, as an exception: what is open is closed, and temporary files are deleted."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise the signal as an exception, once: impatience must not interrupt the deletion of temporary files."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else _Terminated


def _nobody_listens() -> SystemExit:
    """How a command ends whose output was closed (`| head`): quietly."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # for what is still in the buffer
    os.close(nowhere)
    return SystemExit(128 + signal.SIGPIPE)


def shown(text: str) -> str:
    """What a terminal may show: control characters, and bytes that are no UTF-8, are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(shown(message))
        self.exit_code = exit_code  # type: ignore[misc]
