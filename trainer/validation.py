"""The validation of a run, which a signal, or data that cannot be read, may end at any batch."""

from contextlib import ExitStack
from dataclasses import asdict

import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from trainer.data import evaluation, require_few_bad
from trainer.distributed import World
from trainer.evaluate import Evaluation, Tally, predictions
from trainer.optim import Schedule
from trainer.parallel import TwoColumnNet
from trainer.recipe import Recipe
from trainer.run import Writers
from trainer.stop import Stopped, StopRequest, ended_by_data

SPLIT, VIEWS = "val", "centre"


def error_rates(
    network: TwoColumnNet, dataset: Manifest, recipe: Recipe, step: int, stop: StopRequest, world: World
) -> tuple[Evaluation, int]:
    """Return, in each process, the error rates after `step`, and how many images could not be read and count as wrong.

    Every image has a label. The processes end together, whichever of them has a reason.

    Raises:
        Stopped: a process had a signal.
        BadData: more than `data.max_bad` images cannot be read, or a shard cannot.
        Diverged: an output is not a finite number.
    """
    tally, unreadable, ended = Tally(network.classes), 0, False
    error: UserError | OSError | None = None
    with ExitStack() as stack:
        with ended_by_data(step, recipe), world.raise_together():
            bad, workers = recipe.data.max_bad, recipe.data.workers
            loader = stack.enter_context(
                evaluation(dataset, recipe, SPLIT, VIEWS, network.devices, None, world, bad, workers)
            )
        batches = predictions(network, loader, [VIEWS], world, gather=False)
        for _ in range(len(loader)):
            try:
                if batch := stop.next(batches):
                    labels, by_views = batch
                    read = labels >= 0
                    tally.add(labels[read], by_views[VIEWS][read])
                    unreadable += int((~read).sum())
            except (UserError, OSError) as problem:
                error = problem
            if ended := world.any(error is not None or stop.number is not None):
                break
    unreadable = sum(world.all_gather(unreadable))
    with ended_by_data(step, recipe), world.raise_together():
        if error:
            raise error
        require_few_bad(unreadable, dataset, SPLIT, recipe)
    if ended:
        raise Stopped(step, stop.number, validating=True)
    tally.sums = torch.stack(world.all_gather(tally.sums)).sum(0)
    return tally.errors(unreadable=unreadable), unreadable


def judge(
    errors: Evaluation, unreadable: int, step: int, epoch: int, schedule: Schedule, writers: Writers | None
) -> tuple[bool, bool]:
    """Hand a validation to the schedule, and write it down. Return two answers: none was better; the run is over.

    Raises UserError: an error is not a finite number; the disk is full.
    """
    best, plateau = schedule.is_best(errors.top1_error), schedule.validated(errors.top1_error)
    if writers:
        line = {"step": step, "epoch": epoch, **asdict(errors), "unreadable": unreadable}
        line |= {"plateau": plateau} if plateau else {}
        writers.metrics.validation(line)
        writers.console.validation(line)
        if plateau:
            writers.console.print(schedule.plateau(step, plateau))
    return best, plateau == "end"
