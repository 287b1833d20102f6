"""What a run says of itself, for people: a bar on a terminal, plain lines elsewhere."""

import os
import sys
from collections.abc import Iterable
from time import monotonic
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Rows
from rich.text import Text

WIDTH = 120  # characters of a plain line
REDRAWN = 2.0  # times a second; each costs the training a millisecond or two
ESTIMATE_OVER = 600.0  # seconds of the latest steps, from which the bar tells what is left


class Progress:
    """Tells of a run of `steps` steps, `start` of which an earlier run has done.

    On a terminal by a bar, above which other lines scroll; the log lines of training only change the bar. Elsewhere by
    plain lines without escape codes, whatever the environment says of colours.
    """

    def __init__(self, steps: int, start: int) -> None:
        self._steps, self._start, self._since = steps, start, monotonic()
        self._told, self._advised = False, ""
        console = Console(highlight=False)
        # FORCE_COLOR, which CI services set, makes a pipe a terminal in the eyes of rich
        self._bar = _Bar(console, steps, start) if console.is_interactive and sys.stdout.isatty() else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: int) -> None:
        """Move the bar: `done` steps of the whole run are done. Cheap; it is drawn when its time comes."""
        if self._bar:
            self._bar.update(self._bar.row, completed=done)

    def train(self, line: dict[str, Any], said: str) -> None:
        """A log line, as for `metrics.Metrics.train`; `said` is the meter's word of the stall (`Wait.said`)."""
        speed = f"{line['time']['images_per_second']:6.0f} images/s"
        figures = f"epoch {line['epoch']:<3} loss {line['loss']:.4f}  lr {line['lr']:.2g}  {speed}  "
        if self._bar:
            self._bar.figures = figures + said
            self._bar.update(self._bar.row, completed=line["step"])
            return
        start = f"step {line['step']:>{len(str(self._steps))}}/{self._steps}  {figures}"
        left = self._left(line["step"])
        stall, advice = self._shortened(said, WIDTH - len(start) - len(left))
        self.say(start + stall + left)
        if advice:
            self.say(advice)

    def validation(self, line: dict[str, Any]) -> None:
        """A validation, as for `metrics.Metrics.validation`."""
        self.say(
            f"validation at step {line['step']}: top-1 error {line['top1_error']:.1f} %, "
            f"top-5 error {line['top5_error']:.1f} % (centre view)"
        )

    def say(self, text: str) -> None:
        """Any other line."""
        try:
            if self._bar:
                self._bar.console.print(text, markup=False, soft_wrap=True)
            else:
                click.echo(text)
        except BrokenPipeError:  # who listened has gone (`| head`): the run goes on, and metrics.jsonl has it all
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)

    def _left(self, done: int) -> str:
        """When the run will end, by the speed so far; nothing on the first line, whose speed is that of warming up."""
        first, self._told = not self._told, True
        if first or done <= self._start or done >= self._steps:
            return ""
        seconds = (monotonic() - self._since) / (done - self._start) * (self._steps - done)
        return f"  ETA {clock(seconds)}"

    def _shortened(self, said: str, room: int) -> tuple[str, str]:
        """`stall 12.3 % (cause: what to turn)`, where too long without what to turn; that as a line when it is news."""
        stall, _, hint = said.partition(" (")
        cause, _, knobs = hint.rstrip(")").partition(": ")
        if len(said) <= room or not knobs:
            return said, ""
        news, self._advised = cause != self._advised, cause
        return f"{stall} ({cause})", f"stall by {cause}: {knobs}" if news else ""


class _Bar(Rows):
    """Two rows: how far the run is, and its latest figures."""

    def __init__(self, console: Console, steps: int, start: int) -> None:
        self.figures = ""
        super().__init__(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=REDRAWN,
            speed_estimate_period=ESTIMATE_OVER,
            expand=True,
        )
        self.row = self.add_task("", total=steps, completed=start)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures, no_wrap=True, overflow="ellipsis")


def clock(seconds: float) -> str:
    """1:23:45, of hours without end."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
