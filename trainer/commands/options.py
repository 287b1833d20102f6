"""What several commands ask for, and what they make of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from trainer.evaluate import Progress

PATH = click.Path(path_type=Path)

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
