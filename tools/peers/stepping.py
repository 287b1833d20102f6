"""A contestant of `train`: a process of its own that takes steps when it is told to, and is idle between."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pipeline.online.meter import Meter

from pipeline.manifest import load
from pipeline.online.loader import Batch, Loader
from tools.failures import FAILURES, reason
from tools.gpu_training import Training
from tools.operations import Product
from tools.peers.job import own_peak
from tools.peers.trainers import COLUMNS, FED, GROUPED, LOADER, MATRIX, TRAINERS
from tools.plain_alexnet import PlainTraining
from tools.ways import Way, synthetic
from trainer import feed, recipe

AHEAD = 8  # batches: more than a loader has ready
WARM_UP = {"cuda": 8, "cpu": 1}  # steps; CUDA graphs are replayed from the third
UNTIMED = {"cuda": 3, "cpu": 1}  # steps at the beginning of a turn: caches and memory are as in a run again
Figures = dict[str, Any]


@dataclass(frozen=True)
class StepJob:
    """What a contestant trains, and how much of it is a turn: at least so many steps, and so many seconds."""

    contestant: str
    dataset: str
    recipe: str
    precision: str
    batch: int
    devices: tuple[str, ...]
    compile: str
    channels_last: bool
    steps: int
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def way(self) -> Way:
        return Way(self.precision, self.channels_last, self.compile)


class Turns:
    """Turns of steps that a function takes; it returns the step's images, or the operations of a product.

    A turn that a loader feeds begins as a long run stands. Between turns the loader makes ready all that it can have
    ahead, which in a run it does only where it is faster than the steps. So a turn first takes untimed steps, until
    those batches are used, or until the loader could have made them anew. It ends when they are made anew: the next
    contestant has the machine for itself.
    """

    def __init__(self, job: StepJob, step: Callable[[], int], check: Callable[[], None], loader: Loader | None) -> None:
        self._job, self._step, self._check, self._loader = job, step, check, loader
        self._devices = [device for device in dict.fromkeys(map(torch.device, job.devices)) if device.type == "cuda"]
        kind = "cuda" if self._devices else "cpu"
        self._untimed, self._refill = UNTIMED[kind], self._refilled() if loader else 0.0
        for _ in range(WARM_UP[kind]):
            step()
        self._synchronise()

    def take(self) -> Figures:
        """One turn: what was done in how many seconds, of which shares passed in waiting for batches, by cause."""
        self._settle()
        meter = self._loader.meter if self._loader else Meter()
        waited, done, steps, began = meter.total, 0, 0, time.perf_counter()
        while steps < self._job.steps or time.perf_counter() < began + self._job.seconds:
            done, steps = done + self._step(), steps + 1
        self._synchronise()
        seconds = time.perf_counter() - began
        self._check()
        shares = (meter.total - waited).shares(seconds) if self._loader else {}
        time.sleep(self._refill)
        for device in self._devices:  # to the others
            with torch.cuda.device(device):
                torch.cuda.empty_cache()
        return {"done": done, "steps": steps, "seconds": seconds, "stall_by": shares, "peak": self._peak()}

    def _settle(self) -> None:
        began, least = time.perf_counter(), self._untimed
        most = max(AHEAD, least) if self._loader else least
        for number in range(most):
            if number >= least and time.perf_counter() > began + 2 * self._refill:
                break
            self._step()
            self._synchronise()

    def _refilled(self) -> float:
        """Seconds in which the loader makes ready as many batches as it may have ahead."""
        assert self._loader
        for _ in range(AHEAD):
            next(self._loader)
        self._synchronise()
        began = time.perf_counter()
        for _ in range(AHEAD):
            next(self._loader)
        self._synchronise()
        return time.perf_counter() - began

    def _synchronise(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)

    def _peak(self) -> int:
        """Bytes: torch's on the GPU that has most; without a GPU the process's, at any time since its start."""
        return max(map(torch.cuda.max_memory_allocated, self._devices), default=1024 * own_peak())


def prepare(job: StepJob, stack: ExitStack) -> tuple[Turns, Figures]:
    """→ its turns, and of what trains, {"operations": of an image, "parameters", "devices"}.

    Raises:
        one of FAILURES.
    """
    device, *rest = map(torch.device, job.devices)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if job.contestant == MATRIX:
        return Turns(job, Product(job.precision, device).step, lambda: None, None), {}
    data = load(job.dataset)
    if job.contestant == LOADER:
        plan = recipe.load(job.recipe, (f"train.batch_size={job.batch}",))
        loader = stack.enter_context(feed.training(data, plan, (device, *rest)))
        return Turns(job, lambda: len(next(loader).ids), lambda: None, loader), {}
    trained: Training | PlainTraining
    if job.contestant in (COLUMNS, FED, GROUPED):
        whole, second = job.contestant == GROUPED, rest[0] if rest else None
        trained = Training(data, device, job.recipe, job.batch, job.way, whole=whole, second=second)
    else:
        trained = PlainTraining(data, device, job.recipe, job.batch, job.way)
    fed = stack.enter_context(trained.loader()) if TRAINERS[job.contestant].loads else None
    batches = fed or _same(synthetic(job.batch, trained.side, trained.devices))
    facts = {"operations": trained.operations, "parameters": trained.parameters, "devices": len(set(trained.devices))}
    return Turns(job, lambda: trained.step(next(batches)), trained.check, fed), facts


def _same(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def main() -> None:
    """A line of JSON when it is ready, and one for each line that it reads; {"error": …} is the last."""
    job = StepJob(**json.loads(sys.argv[1]))
    with os.fdopen(os.dup(1), "w", buffering=1) as answers, ExitStack() as stack:
        os.dup2(2, 1)  # what a library prints is no answer
        try:
            turns, facts = prepare(job, stack)
            print(json.dumps(facts), file=answers)
            for _ in sys.stdin:
                print(json.dumps(turns.take()), file=answers)
        except FAILURES as error:
            print(json.dumps({"error": reason(error)}), file=answers)


if __name__ == "__main__":
    main()
