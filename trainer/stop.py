"""End a run early: on a signal, or on an error, to which the remedy is added."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from pipeline import UserError, process, volumes
from pipeline.manifest import DatasetError
from pipeline.online.batch import NoWorkerError
from pipeline.online.samples import BadSample
from pipeline.storage import StorageError
from trainer import checkpoint as checkpoints
from trainer.distributed import RankLost, World
from trainer.nonfinite import Diverged
from trainer.recipe import Recipe

Value = TypeVar("Value")


class _Asked(BaseException):
    """A signal amid `StopRequest.next`."""


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGHUP within its context; a second signal acts as without this context."""

    number: int | None = None  # of the signal
    _waiting = False

    def __enter__(self) -> "StopRequest":
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._note) for number in process.handlers()}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if self._waiting:
            raise _Asked

    def next(self, iterator: Iterator[Value]) -> Value | None:
        """Return an iterator's next value; None if a signal came before, or amid the wait, which may be long."""
        try:
            try:
                self._waiting = True  # before the look at `number`, so that no signal is missed between the two
                return next(iterator) if self.number is None else None
            finally:
                self._waiting = False
        except _Asked:
            return None

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


class Stopped(UserError):
    """The end that a signal asked for, once the run is saved."""

    def __init__(self, step: int, number: int | None, validating: bool = False) -> None:
        """`number`: of this process's signal; None: another process of the job had one."""
        name = signal.Signals(number).name if number else "another process was asked to end"
        remedy = "its validation was not finished, --resume repeats it" if validating else "go on by --resume"
        super().__init__(f"{name}: stopped and saved after step {step}; {remedy}")
        self.exit_code = 128 + (number or signal.SIGTERM)  # as shells count: 143 for SIGTERM, 130 for SIGINT


class BadData(UserError):
    """The end of a run whose data cannot be read, or that no worker decodes, once the run is saved."""


@contextmanager
def ended_by_data(step: int, recipe: Recipe) -> Iterator[None]:
    """Raise BadData for an error of the data in this block; the run is saved after `step`."""
    try:
        yield
    except (DatasetError, StorageError, NoWorkerError, OSError) as error:
        reason, remedy = str(error), f"the run is saved after step {step}: go on by --resume"
        if isinstance(error, OSError) and error.strerror:
            reason = volumes.explained(error)
        if isinstance(error, BadSample):
            more = recipe.data.max_bad + 1
            remedy += (
                f", or unmended by --resume --set data.max_bad={more}, on other data than the run's identity names"
            )
        if isinstance(error, NoWorkerError):
            remedy += ", with --feed for other workers, or --set 'data.workers=[]' for none"
        raise BadData(f"{reason}; {remedy}") from error


@contextmanager
def remedies(run: Path, world: World) -> Iterator[None]:
    """Add to the errors of a training run what the user can do; every rank calls it.

    Raises:
        UserError: the error with its remedy. SystemExit in other ranks than the main one, which all end alike.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{error.args[0].splitlines()[0]} Lower train.batch_size, or name other --devices") from error
    except RankLost as error:
        raise RankLost(f"{error}; go on by --resume, with as many processes as there are") from error
    except (Diverged, Stopped) as error:
        if not world.is_main:
            raise SystemExit(error.exit_code) from error
        if isinstance(error, Stopped):
            raise
        step = checkpoints.newest_step(run)
        if step is None:
            raise Diverged(f"{error}; the first weights are too large: lower the layers' sd") from error
        raise Diverged(
            f"{error}; the checkpoint of step {step} is from before: lower optim.lr and go on from it, "
            "--resume --set optim.lr=…"
        ) from error
