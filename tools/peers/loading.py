"""One run of `load`: a contestant delivers batches of training views."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline import UserError
from tools.peers.loadjob import LoadJob
from tools.peers.processes import run_module, run_program
from tools.peers.rounds import Entry, Figures


@dataclass(frozen=True)
class Loading:
    dataset: Path
    scratch: Path
    batch: int
    batches: int
    say: Callable[[str], None]

    def taken(self, workers: int) -> int:
        """Pictures that a run takes."""
        return LoadJob(self.dataset, self.scratch, self.batch, self.batches, workers).images

    def run(self, entry: Entry) -> Figures:
        """The process's figures. Before the first run its own format is written, if it has one.

        Raises:
            UserError: it fails, or delivers another number of pictures.
        """
        contestant = entry.contestant
        converted = self.scratch / contestant.name
        taken = self.taken(entry.workers)
        words = (self.dataset, converted, self.batch, self.batches, entry.workers, *contestant.arguments)
        if contestant.converter and not converted.exists():
            self.say(f"{contestant.name}: writing its own format, untimed")
            run_program(contestant.environment, contestant.converter, words, entry.workers, taken)
        run = run_module(contestant.environment, contestant.module, words, entry.workers, taken)
        if run["images"] != self.batch * self.batches:
            raise UserError(f"delivered {run['images']:,} of {self.batch * self.batches:,} pictures")
        return run
