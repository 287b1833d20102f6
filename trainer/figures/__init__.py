"""Draw a run: PNG sheets and a page; at the end of training, whose exit code does not depend on it."""

import shlex
import signal
from pathlib import Path

import click
import torch

from pipeline import UserError, manifest, process, volumes
from pipeline.cli import print_line
from pipeline.online.samples import SampleReader


def draw_page(
    data: Path,
    run: Path,
    devices: tuple[torch.device, ...],
    state: str = "the run is complete and saved",
    as_json: bool = False,
) -> None:
    """Draw the page of a run, whose `state` the messages name; if that fails, a line on stderr says why.

    Raises UserError with the exit code of a signal that comes meanwhile.
    """
    number: int | None = None  # of a signal
    later = shlex.join(["python", "-m", "trainer", "figures", str(run), "--data", str(data)])
    try:
        from trainer.figures import gather, page  # imports plotly

        dataset = manifest.load(data, shards=False)
        with SampleReader(dataset, "train") as reader:
            if not reader.is_here():  # as where workers decode
                raise UserError(f"{data}: not all shards are here, whose pictures it shows")
        count = gather.searched(dataset)
        work = f", {count:,} training pictures through the network" if count else ""
        click.echo(f"{state}; drawing its page{work} (--no-page leaves it out)", err=True)
        _, files = page.draw(data, run, devices)
    except KeyboardInterrupt:
        number = process.taken() or signal.SIGINT
    except (UserError, OSError, MemoryError, ImportError) as error:
        reason = volumes.explained(error) if isinstance(error, OSError) else str(error) or "not enough memory"
        if not (number := process.taken()):
            click.echo(f"no page: {reason}; draw it by: {later}", err=True)
    else:
        print_line(as_json, f"page: {files[-1]}", "page", file=str(files[-1]))
    if number:  # not above, where the interruption would be its context, of which commands have words of their own
        stopped = UserError(f"{signal.Signals(number).name}: {state}; draw its page by: {later}")
        stopped.exit_code = 128 + number
        raise stopped
