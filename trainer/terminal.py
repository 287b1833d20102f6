"""Print the progress of a run: a bar on a terminal, plain lines elsewhere, or events for programs."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.cli import print_line

WIDTH = 120  # characters of a plain line
REDRAWN = 2.0  # times a second; each time costs the training a millisecond or two
ESTIMATE_OVER = 600.0  # seconds; from the speed of the latest steps the bar estimates the time left


class Terminal:
    """Reports a run of `steps` steps, `start` of which are done: on a terminal by a bar, elsewhere by plain lines.

    On a terminal other lines scroll above the bar, and the log lines of training only change it. Plain lines have no
    escape codes, whatever the environment says of colours. With `as_json` each line is an event of the run `name`, from
    `plan` to, unless an error ends it, `done`.
    """

    def __init__(self, steps: int, start: int, name: str = "", as_json: bool = False) -> None:
        self._steps, self._start, self._since = steps, start, monotonic()
        self._name, self._as_json, self._done = name, as_json, start
        self._first, self._advised = True, ""
        console = Console(highlight=False)
        # FORCE_COLOR, which CI services set, makes a pipe a terminal in the eyes of rich
        drawn = console.is_interactive and sys.stdout.isatty() and not as_json
        self._bar = _Bar(console, steps, start) if drawn else None

    def __enter__(self) -> "Terminal":
        if self._bar:
            self._bar.start()
        if self._as_json:
            self.print("", "plan", run=self._name, steps=self._steps, start=self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._as_json and kind is None:
            self.print("", "done", step=self._done)

    def step(self, done: int) -> None:
        """Move the bar: `done` steps of the whole run are done. Cheap: the bar is drawn twice a second."""
        self._done = done
        if self._bar:
            self._bar.update(self._bar.row, completed=done)

    def train(self, line: dict[str, Any], stall: str, news: list[str]) -> None:
        """Print the loader's `news`, which this empties, and a log line, as for `Metrics.train`.

        `stall` is `stall.Wait.text`.
        """
        for text in news:
            self.print(f"loader: {text}", "loader", text=text)
        news.clear()
        speed = f"{line['time']['images_per_second']:6.0f} images/s"
        error = f"  error {line['top1_error']:.1f} %" if "top1_error" in line else ""
        figures = f"epoch {line['epoch']:<3} loss {line['loss']:.4f}{error}  lr {line['lr']:.2g}  {speed}  "
        if self._bar:
            self._bar.figures = figures + stall
            self._bar.update(self._bar.row, completed=line["step"])
            return
        start = f"step {line['step']:>{len(str(self._steps))}}/{self._steps}  {figures}"
        end = self._estimate(line["step"])
        short, advice = self._shortened(stall, WIDTH - len(start) - len(end))
        text = start + short + end + (f"\n{advice}" if advice else "")
        self.print(text, "train", **line, steps=self._steps, stall_text=stall)

    def validation(self, line: dict[str, Any]) -> None:
        """Print a validation, as for `Metrics.validation`."""
        unreadable = line.get("unreadable", 0)
        counted = f"; {unreadable} of {line['samples']:,} could not be read; counted as wrong" if unreadable else ""
        text = f"validation at step {line['step']}: top-1 error {line['top1_error']:.1f} %, "
        self.print(f"{text}top-5 error {line['top5_error']:.1f} % (centre view){counted}", "validation", **line)

    def checkpoint(self, file: Path, step: int) -> None:
        """Name a checkpoint."""
        self.print(f"checkpoint: {file}", "checkpoint", file=str(file), step=step)

    def print(self, text: str, event: str = "note", /, **values: Any) -> None:
        """Print another line; for programs as `cli.print_line`."""
        try:
            if self._bar:
                self._bar.console.print(text, markup=False, soft_wrap=True)
            else:
                print_line(self._as_json, text, event, **values)
        except BrokenPipeError:  # the reader has gone (`| head`): the run goes on, and metrics.jsonl has it all
            nowhere, output, errors = os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno(), sys.stderr.fileno()
            if os.path.sameopenfile(output, errors):  # `2>&1 | head`
                os.dup2(nowhere, errors)
            os.dup2(nowhere, output)
            os.close(nowhere)

    def _estimate(self, done: int) -> str:
        """Return the time left, by the speed so far; nothing on the first line, whose speed is that of warming up."""
        first, self._first = self._first, False
        if first or done <= self._start or done >= self._steps:
            return ""
        seconds = round((monotonic() - self._since) / (done - self._start) * (self._steps - done))
        return f"  ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _shortened(self, stall: str, room: int) -> tuple[str, str]:
        """Return `stall 12.3 % (cause: remedy)` and ""; if too long, it without the remedy, and that if it is new."""
        share, _, hint = stall.partition(" (")
        cause, _, remedy = hint.removesuffix(")").partition(": ")
        if len(stall) <= room or not remedy:
            return stall, ""
        news, self._advised = cause != self._advised, cause
        return f"{share} ({cause})", f"stall by {cause}: {remedy}" if news else ""


class _Bar(Progress):
    """Two rows: the progress of the run, and its latest figures."""

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
