"""How every command of ours ends before its time: one line on stderr and an exit code, no traceback."""

import signal
from types import FrameType
from typing import Any

import click

from pipeline.errors import UserError


class Command(click.Command):
    """A click command that reports mistakes, the operating system's errors (a full disk) and signals in one line.

    Exit codes: 2 for what the user can mend, 130 after Ctrl-C and 143 after SIGTERM, as shells have it. `interrupted`
    tells the user what an interruption leaves.
    """

    def __init__(self, *args: Any, interrupted: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self._interrupted = f"; {interrupted}" if interrupted else ""

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _Failure(str(error)) from error
        except OSError as error:
            if error.strerror is None:
                raise
            raise _Failure(f"{error.filename}: {error.strerror}" if error.filename else error.strerror) from error
        except _Terminated as error:
            raise _Failure(f"terminated{self._interrupted}", 128 + signal.SIGTERM) from error
        except KeyboardInterrupt as error:
            raise _Failure(f"interrupted{self._interrupted}", 128 + signal.SIGINT) from error
        finally:
            signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """SIGTERM, as an exception: what is open is closed, and temporary files are deleted."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


class _Failure(click.ClickException):
    exit_code: int

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
