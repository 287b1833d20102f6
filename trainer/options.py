"""What several commands ask for, and what they make of it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from pipeline import UserError, storage
from trainer.evaluate import Progress


class Local(click.Path):
    """A path on this machine: of a URL, a path would be a folder called s3: here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and storage.is_remote(value):
            self.fail(f"{value}: is a URL; name a path on this machine", param, ctx)
        return super().convert(value, param, ctx)


PATH = Local(path_type=Path, readable=False)  # what cannot be read is told with its remedy, where it is read

DATA = click.option("--data", type=PATH, required=True, help="A dataset directory, from tools/build_shards.py.")
CHECKPOINT = click.option(
    "--checkpoint",
    "run",
    type=PATH,
    required=True,
    metavar="RUN",
    help="A run directory (its newest checkpoint), or a checkpoint file.",
)
RUN = click.argument("run", type=PATH)
DEVICES = click.option(
    "--devices",
    help="One device per column, such as cuda:0,cuda:1.  [default: two GPUs, or one twice, or cpu,cpu]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="JSON, for programs, instead of text for people.")


@contextmanager
def followed() -> Iterator[Progress]:
    """How far a long command is, on a terminal, on stderr, until the context ends."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def follow(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=of)
            bars.update(tasks[what], completed=done)

        yield follow


def require_writable(path: Path | None) -> None:
    """Meet what keeps a file from being written now, and not once its content is computed.

    Raises:
        UserError: it is a directory, or stands below a file.
        OSError: the operating system's own words.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise UserError(f"{path}: {above} is a file, not a directory; name another place")
    with tempfile.TemporaryFile(dir=above):
        pass
