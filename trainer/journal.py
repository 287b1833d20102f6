"""What a run leaves in its directory and says to people: by the first process of its job alone."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.files import write_bytes_aside
from trainer import resume
from trainer.checkpoint import Checkpoint
from trainer.metrics import Metrics
from trainer.progress import Progress
from trainer.recipe import Recipe, to_dict
from trainer.saver import Saver


class Journal:
    """A run directory, claimed for this process until the context ends: recipe, history, metrics, checkpoints; words.

    Raises:
        UserError: another process trains there; a disk is full.
    """

    def __init__(
        self, run: Path, recipe: Recipe, history: tuple[dict[str, Any], ...], steps: int, began: int = 0
    ) -> None:
        """`steps`: of the whole run, of which `began` are done."""
        self._run, self._recipe, self._history, self._steps, self._began = run, recipe, history, steps, began

    def __enter__(self) -> "Journal":
        with ExitStack() as stack:
            stack.enter_context(resume.claimed(self._run))
            for name, value in (("recipe.json", to_dict(self._recipe)), ("history.json", self._history)):
                write_bytes_aside(self._run / name, (json.dumps(value, indent=1) + "\n").encode())
            self._metrics = stack.enter_context(Metrics(self._run, self._began))
            self._saver = stack.enter_context(Saver(self._run, self._recipe.train.keep))
            self._progress = stack.enter_context(Progress(self._steps, self._began))
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        self._progress.say(text)

    def step(self, done: int) -> None:
        """So many steps are done. Cheap."""
        self._progress.step(done)

    def train(self, line: dict[str, Any], said: str) -> None:
        """A log line, as for `Metrics.train` and `Progress.train`. Raises UserError also where a checkpoint failed."""
        self._saver.look()
        self._metrics.train(line)
        self._progress.train(line, said)

    def validation(self, line: dict[str, Any]) -> None:
        """A validation, as for `Metrics.validation`."""
        self._metrics.validation(line)
        self._progress.validation(line)

    def save(self, checkpoint: Checkpoint, best: bool, last: bool) -> None:
        """Begin to write a checkpoint, as `Saver.save`; wait for it where it is the `last`, and say its path."""
        path = self._saver.save(checkpoint, best)
        if last:
            self._saver.close()
            self._progress.say(f"checkpoint: {path}")
