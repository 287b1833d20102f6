"""Rounds: every contestant once, with each number of workers, then all of them again."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import UserError
from tools.peers.contestants import Contestant

Figures = dict[str, Any]  # job.report's keys, "wall" (seconds), and what the job adds


@dataclass
class Entry:
    """A contestant with so many workers: its runs so far, or why it is not run."""

    contestant: Contestant
    workers: int
    runs: list[Figures] = field(default_factory=list)
    not_run: str = ""


def run_rounds(
    entries: Sequence[Entry], run: Callable[[Entry], Figures], repetitions: int, say: Callable[[str], None]
) -> None:
    """`run` every entry `repetitions` times, interleaved; one that raises UserError is not run again."""
    for repetition in range(repetitions):
        for entry in entries:
            if entry.not_run:
                continue
            os.sync()  # what the one before wrote is not written back on this one's time
            try:
                figures = run(entry)
            except UserError as error:
                entry.runs, entry.not_run = [], str(error)
                say(f"{entry.contestant.name}, workers {entry.workers}: not run: {error}")
                continue
            entry.runs.append(figures)
            rate = figures["images"] / figures["seconds"]
            say(
                f"{repetition + 1}/{repetitions} {entry.contestant.name}, workers {entry.workers}: {rate:,.0f} images/s"
            )
