"""A training run, from the first step or from a checkpoint."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.online import Loader
from trainer import checkpoint as checkpoints
from trainer import feed, resume, watch
from trainer.checkpoint import Checkpoint
from trainer.evaluate import evaluate
from trainer.layers import multiply_adds, parameter_count
from trainer.metrics import Metrics
from trainer.model import initial_weights
from trainer.optim import Momentum, Schedule
from trainer.parallel import Columns, reference_precision
from trainer.progress import Progress
from trainer.recipe import Recipe, to_dict
from trainer.saver import Saver
from trainer.step import drawn_masks, update
from trainer.stop import Stop
from trainer.watch import Diverged, Watch


@dataclass(frozen=True)
class Start:
    """Where a run begins: nowhere, with the weights of another run's layers, or where it was."""

    resumed: Checkpoint | None = None
    other_data: bool = False  # whether it may be on other data than the checkpoint's
    init: Checkpoint | None = None
    init_layers: tuple[str, ...] = ()  # none: all that fit


def train(data: Path, run: Path, recipe: Recipe, devices: tuple[torch.device, ...], start: Start) -> None:
    """Train on the split `train` of `data` to the end of the recipe; leave recipe, metrics and checkpoints in `run`.

    Raises:
        UserError: `run` exists and is not resumed; data, recipe and checkpoint do not fit together; a number is not
            finite; a disk is full.
        Stopped: a signal asked for the end. The run is saved.
    """
    try:
        _train(data, run, recipe, devices, start)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{error.args[0].splitlines()[0]} Lower train.batch_size, or name other --devices") from error
    except Diverged as error:
        found = checkpoints.files(run)
        if not found:
            raise Diverged(f"{error}; the first weights are too large: lower the layers' sd") from error
        step = int(found[-1].stem.removeprefix("step-"))
        raise Diverged(
            f"{error}; the checkpoint of step {step} is from before: lower optim.lr and go on from it, "
            "--resume --set optim.lr=…"
        ) from error


def _train(data: Path, run: Path, recipe: Recipe, devices: tuple[torch.device, ...], start: Start) -> None:
    # everything that can be refused, before anything is written
    dataset, resumed = manifest.load(data), start.resumed
    classes = tuple(record.wnid for record in dataset.classes)
    resume.require_classes(recipe, dataset)
    steps, steps_per_epoch = feed.steps_of(dataset, recipe), feed.steps_per_epoch(dataset, recipe)
    if resumed:
        resume.require_same(resumed, recipe, dataset, run, start.other_data)
        resume.require_unfinished(resumed, recipe, steps, run)
    else:
        resume.require_fresh(run)
    feed.require_pictures(dataset, recipe)
    validated = resume.require_labels(dataset, recipe)

    # network, optimiser, schedule
    reference_precision(recipe.train.precision)
    network = Columns(recipe.model, len(classes), devices, recipe.train.compile, recipe.train.channels_last)
    optimiser, schedule = Momentum(network.parts(), recipe.optim.momentum), Schedule(recipe, steps)
    if resumed:
        network.load(resumed.weights)
        optimiser.velocity = network.scatter(resumed.velocity)
        schedule.load_state(resumed.progress["schedule"], forget_errors=start.other_data)
    else:
        weights = initial_weights(recipe.model, len(classes), recipe.train.seed)
        taken = resume.taken_over(weights, start.init, start.init_layers, classes)
        network.load(weights | taken)
        del weights, taken
    counts = parameter_count(recipe.model, len(classes)), multiply_adds(recipe.model, len(classes)) / 1e6
    history = (*(resumed.history if resumed else ()), resume.entry(resumed, start.init, recipe, dataset, devices))

    began = resumed.step if resumed else 0
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        stack.enter_context(resume.claimed(run))
        write_bytes_aside(run / "recipe.json", (json.dumps(to_dict(recipe), indent=1) + "\n").encode())
        write_bytes_aside(run / "history.json", (json.dumps(history, indent=1) + "\n").encode())
        loader = stack.enter_context(feed.training(dataset, recipe, devices))
        if resumed:
            loader.load_state_dict(resumed.loader if not start.other_data else {**loader.state_dict(), "step": began})
        metrics = stack.enter_context(Metrics(run, began))
        saver = stack.enter_context(Saver(run, recipe.train.keep))
        progress = stack.enter_context(Progress(steps, began))
        progress.say(f"{counts[0]:,} parameters, {counts[1]:,.1f} million multiply-adds an image; {_where(devices)}")
        for news in resume.said(history):
            progress.say(news)
        if not validated:
            progress.say("no validation split, or not every image of it has a label: the run is not validated")

        watched, window = Watch(network), _Window(devices[0], loader, resumed.progress["window"] if resumed else None)

        def save(step: int, best: bool = False) -> Path:
            """Hand a checkpoint to the saver; raises Diverged where there is nothing worth saving."""
            watched.check()
            weights, velocity = network.gathered(), network.gathered(optimiser.velocity)
            watch.require_finite(step, weights)
            remembered = {"schedule": schedule.state(), "window": window.state(), "steps": steps, "over": over}
            state = loader.state_dict()
            checkpoint = Checkpoint(
                step, recipe, classes, dataset.identity, weights, velocity, state, remembered, history
            )
            return saver.save(checkpoint, best)

        over = False  # by a last plateau, before its steps are done
        if not resumed or history[-1]["changed"] or start.other_data:
            save(began)  # so that there is one before whatever happens, and what was changed holds

        # the loop; the devices are waited for at log lines, validations, checkpoints, and every watch.EVERY steps
        for batch in loader:
            rates = schedule.rates(batch.step)
            drop = drawn_masks(network, recipe.train.seed, batch)
            losses = update(network, optimiser, batch, drop, rates, recipe.train, watched)
            window.add(losses, len(batch.ids))

            done = batch.step + 1
            epoch_ends = done % steps_per_epoch == 0
            ended = done == steps
            progress.step(done)
            if done % watch.EVERY == 0:
                watched.check()
            if done % recipe.train.log_every == 0 or ended:
                watched.check()
                saver.look()
                found, said = window.close()
                layers = watch.changes(network.parts(), optimiser.velocity, rates)
                line = {"step": done, "epoch": batch.epoch, "lr": schedule.lr(batch.step), **found, "layers": layers}
                metrics.train(line)
                progress.train(line, said)
            best = False
            if validated and (_due(recipe.train.validate_every, done, epoch_ends) or ended):
                watched.check()
                with window.paused():
                    errors = evaluate(network, dataset, recipe, "val", "centre")
                line = {"step": done, "epoch": batch.epoch, **errors.to_dict()}
                metrics.validation(line)
                progress.validation(line)
                best = schedule.is_best(errors.top1_error)
                what = schedule.validated(errors.top1_error)
                over = what == "end"
                ended = ended or over
                if what == "drop":
                    progress.say(f"a plateau: the learning rate falls to {schedule.lr(done):.2g}")
            asked = stop.asked  # now: a validation takes long
            if best or ended or asked or _due(recipe.train.checkpoint_every, done, epoch_ends):
                with window.paused():
                    path = save(done, best)
                if ended or asked:
                    saver.close()
                    progress.say(f"checkpoint: {path}")
            if ended:
                break
            if asked:
                stop.obey(done)


def _due(every: int, done: int, epoch_ends: bool) -> bool:
    """Whether it is time for what happens every so many steps, or, for 0, at the end of each epoch."""
    return done % every == 0 if every else epoch_ends


def _where(devices: tuple[torch.device, ...]) -> str:
    if len(devices) == 1:
        return f"one column on {devices[0]}"
    return f"two columns on {devices[0]} and {devices[1]}"


class _Window:
    """Loss, speed and stall of the steps since the last log line; a checkpoint holds what the loss is made of."""

    def __init__(self, device: torch.device, loader: Loader, state: dict[str, Any] | None) -> None:
        self._device, self._loader = device, loader
        self._restart()
        if state:
            self._losses.fill_(state["losses"])
            self._images = state["images"]

    def _restart(self) -> None:
        self._losses, self._images, self._timed = torch.zeros((), device=self._device), 0, 0
        self._since, self._waited = time.perf_counter(), self._loader.meter.total

    def add(self, losses: Tensor, images: int) -> None:
        self._losses += losses
        self._images += images
        self._timed += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here takes no time of the window."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the steps that were started belong to it
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        return {"losses": float(self._losses), "images": self._images}

    def close(self) -> tuple[dict[str, Any], str]:
        """{"loss": its mean, "time": images/s and stall}, and what is said of the stall. Waits for the device."""
        loss = float(self._losses) / self._images
        seconds = time.perf_counter() - self._since
        waited = self._loader.meter.total - self._waited
        shares = waited.shares(seconds)
        speed = {"images_per_second": self._timed / seconds, "stall": sum(shares.values()), "stall_by": shares}
        self._restart()
        return {"loss": loss, "time": speed}, waited.said(seconds)
