"""click command that turns user errors, OS errors and signals into one line and an exit code; what commands print."""

import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import click

from pipeline import UserError, process, volumes

SHORT_OF_MEMORY = (  # words of errors that have no type of their own: of oneDNN, torch, threads, loaders of libraries
    *("could not create a primitive", "allocate memory", "out of memory", "bad_alloc", "start new thread"),
    "failed to map",
)

JSON = click.Option(["--json", "as_json"], is_flag=True, help="One JSON object a line on stdout, for programs.")
BETWEEN_EVENTS = 0.25  # seconds: a task's progress is printed for programs no more often


class OneLine(click.Command):
    """A click command that ends with one line also where its help cannot be printed, or its module not be imported."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except (OSError, MemoryError, ImportError, RuntimeError) as error:
            end(error)


class Command(OneLine):
    """A click command with one-line errors; its exit code is then 2, and after a signal 128 and its number.

    An empty argument, or an empty value of an option, is refused: as a path it would be the current folder.
    """

    def __init__(self, *args: Any, interrupted: str = "", **options: Any) -> None:
        """`interrupted` tells the user what an interruption leaves."""
        super().__init__(*args, **options)
        self._interrupted = interrupted

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        for param in self.params:
            value = values.get(str(param.name))
            for text in value if isinstance(value, list | tuple) else (value,):
                if isinstance(text, str) and not text.strip():
                    name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
                    end(UserError(f"{name} is empty (an unset shell variable?)"))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        before = process.handlers()
        try:
            try:  # a signal amid the last lines of this block is caught, too
                process.interrupt(before)
                return super().invoke(ctx)
            finally:
                process.restore(before)
                if number := process.taken():
                    raise process.Interruption(number)
        except (EOFError, click.Abort) as error:  # of which click says "Aborted!"
            raise AssertionError("a defect of ours") from error
        except (KeyboardInterrupt, UserError, OSError, MemoryError, ImportError, RuntimeError) as error:
            end(error, self._interrupted)


def end(error: BaseException, interrupted: str = "") -> NoReturn:
    """Print an error's one line, and exit with its code; `interrupted` is added after a signal. Raises other errors."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, KeyboardInterrupt):  # whose handling may fail, as on a lost terminal
        cause = cause.__context__
    if cause:
        number = signal.Signals(getattr(cause, "number", signal.SIGINT))
        message, code = "; ".join(filter(None, [process.WORDS[number], interrupted])), 128 + number
    elif isinstance(error, BrokenPipeError):  # `| head`
        _drop(sys.stdout)
        raise SystemExit(128 + signal.SIGPIPE) from None
    elif isinstance(error, UserError):
        message, code = "; ".join([str(error), *getattr(error, "__notes__", [])]), error.exit_code
    elif _short_of_memory(error):
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        remedy = "raise the limit (ulimit -v, a container's), or take fewer --workers or a smaller batch"
        message, code = f"not enough memory ({reason}); {remedy}", UserError.exit_code
    elif isinstance(error, OSError) and error.strerror is not None:
        if error.filename == process.OUTPUT:
            _drop(sys.stdout)
        message, code = volumes.explained(error), UserError.exit_code
    else:
        raise error
    try:
        click.echo(f"Error: {printable(message)}", err=True)
    except OSError:  # the terminal is lost, or a disk full
        _drop(sys.stderr)
    raise SystemExit(code)


def _short_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):  # whose text may hold the name of a file
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in SHORT_OF_MEMORY)


def _drop(stream: TextIO) -> None:
    """Let what Python still flushes at its end go nowhere, since the stream takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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


def print_event(event: str, **values: Any) -> None:
    """Print one line of JSON. Raises ValueError: a number is not finite."""
    click.echo(json_text({"event": event, **values}))


def print_line(as_json: bool, text: str, event: str = "note", /, **values: Any) -> None:
    """Print a text; for programs the event with its values in place of it, or, without values, with the text."""
    if as_json:
        print_event(event, **(values or {"text": text}))
    else:
        click.echo(text)


@contextmanager
def progress_bars(as_json: bool = False) -> Iterator[Callable[..., None]]:
    """Yield show(task, done, total, note=""), which draws a bar for each task if stderr is a terminal, else nothing.

    `as_json`: it prints events `progress` instead, a task's last among them.
    """
    if as_json:
        printed: dict[str, float] = {}  # when, by task

        def event(task: str, done: int, total: int, note: str = "") -> None:
            if done == total or time.monotonic() - printed.get(task, -BETWEEN_EVENTS) >= BETWEEN_EVENTS:
                printed[task] = time.monotonic()
                print_event("progress", task=task, done=done, total=total)

        yield event
        return
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
