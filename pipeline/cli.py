"""click command that turns user errors, OS errors and signals into one line and an exit code; what commands print."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from pipeline import UserError, volumes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Command(click.Command):
    """A click command with one-line errors; its exit code is then 2, after Ctrl-C 130, and after SIGTERM 143."""

    def __init__(self, *args: Any, interrupted: str = "", **options: Any) -> None:
        """`interrupted` tells the user what an interruption leaves."""
        super().__init__(*args, **options)
        self._interrupted = f"; {interrupted}" if interrupted else ""

    def invoke(self, ctx: click.Context) -> Any:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in handlers.items():
            if handler != signal.SIG_IGN:  # as nohup and a shell's `&` have it
                signal.signal(number, _interrupt)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head`: what Python still flushes at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from None
        except UserError as error:
            message, code = "; ".join([str(error), *getattr(error, "__notes__", [])]), error.exit_code
        except OSError as error:
            if error.strerror is None:
                raise
            message, code = volumes.explained(error), UserError.exit_code
        except KeyboardInterrupt as error:
            number = error.args[0] if error.args else signal.SIGINT
            ending = "terminated" if number == signal.SIGTERM else "interrupted"
            message, code = ending + self._interrupted, 128 + number
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        click.echo(f"Error: {printable(message)}", err=True)
        ctx.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, once: a second signal must not interrupt the deletion of temporary files."""
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def printable(text: str, limit: int = 0) -> str:
    """Return text that a terminal may show, cut to `limit` characters (0: all): control characters are escaped."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return plain if not limit or len(plain) <= limit else plain[: limit - 3] + "..."


def json_text(value: Any, indent: int | None = None) -> str:
    r"""Return JSON that every parser takes: a byte of a file name that is not UTF-8 becomes the text \xNN.

    Python has such a byte as half of a surrogate pair, which no JSON may hold alone. Raises ValueError: not finite.
    """

    def as_text(half: re.Match[str]) -> str:
        if not half[1]:  # a backslash of the text, or a whole pair
            return half[0]
        number = int(half[1], 16)
        return rf"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else rf"\\u{half[1]}"

    text = json.dumps(value, indent=indent, allow_nan=False)
    return re.sub(r"\\\\|\\ud[89ab]..\\ud[c-f]..|\\u(d[89a-f]..)", as_text, text)


@contextmanager
def progress_bars() -> Iterator[Callable[..., None]]:
    """Yield show(task, done, total, note=""), which draws a bar for each task if stderr is a terminal, else nothing."""
    from rich import markup, progress  # here, for who wants only `printable`
    from rich.console import Console

    tasks: dict[str, progress.TaskID] = {}
    bar, count, left = progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
    columns = ("{task.description}", bar, count, "{task.fields[note]}", left)
    # not rich's own opinion: FORCE_COLOR, which CI services set, makes a pipe a terminal in its eyes
    shown = sys.stderr.isatty()
    with progress.Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bars:

        def show(task: str, done: int, total: int, note: str = "") -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(markup.escape(task), total=total, note=note)
            bars.update(tasks[task], completed=done, note=note)

        yield show
