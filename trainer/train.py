"""A training run, from the first step or from a checkpoint, in one process or in each of a job's."""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline import UserError, manifest
from trainer import agreement, nonfinite, resume
from trainer import checkpoint as checkpoints
from trainer import data as feed
from trainer.checkpoint import Checkpoint
from trainer.distributed import SINGLE, AnyRank, RankLost, World
from trainer.evaluate import error_rates
from trainer.journal import Journal
from trainer.layers import multiply_adds, parameter_count
from trainer.model import initial_weights
from trainer.nonfinite import Diverged, Watch
from trainer.optim import Momentum, Schedule
from trainer.parallel import TwoColumnNet, reference_precision
from trainer.recipe import Recipe, flat, to_dict
from trainer.replicas import Replicas
from trainer.step import drawn_masks, update
from trainer.stop import Stop, Stopped
from trainer.window import LogInterval


@dataclass(frozen=True)
class Start:
    """Where a run begins: nowhere, with the weights of another run's layers, or where it was."""

    resumed: Checkpoint | None = None  # its tensors are needed in the first process alone
    other_data: bool = False  # whether it may be on other data than the checkpoint's
    init: Checkpoint | None = None  # likewise
    init_layers: tuple[str, ...] = ()  # none: all that fit


def train(
    data: Path,
    run: Path,
    recipe: Recipe,
    devices: tuple[torch.device, ...],
    start: Start,
    world: World = SINGLE,
) -> None:
    """Train on the split `train` of `data` to the end of the recipe; leave recipe, metrics and checkpoints in `run`.

    Every process of a job calls it with its own devices. They share each global batch; only the first needs `run`.

    Raises:
        UserError: `run` exists and is not resumed; data, recipe and checkpoint do not fit together, or are not those
            of the other processes; a number is not finite; a disk is full; another process is gone.
        Stopped: a signal asked for the end. The run is saved.
    """
    try:
        _train(data, run, recipe, devices, start, world)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{error.args[0].splitlines()[0]} Lower train.batch_size, or name other --devices") from error
    except RankLost as error:
        raise RankLost(f"{error}; go on by --resume, with as many processes as there are") from error
    except (Diverged, Stopped) as error:
        if not world.is_main:  # every process finds the same
            raise SystemExit(error.exit_code) from error
        if isinstance(error, Stopped):
            raise
        found = checkpoints.files(run)
        if not found:
            raise Diverged(f"{error}; the first weights are too large: lower the layers' sd") from error
        step = int(found[-1].stem.removeprefix("step-"))
        raise Diverged(
            f"{error}; the checkpoint of step {step} is from before: lower optim.lr and go on from it, "
            "--resume --set optim.lr=…"
        ) from error


def _train(
    data: Path, run: Path, recipe: Recipe, devices: tuple[torch.device, ...], start: Start, world: World
) -> None:
    # everything that can be refused, before anything is written
    resumed = start.resumed
    with world.raise_together():
        dataset = manifest.load(data)
        classes = tuple(record.wnid for record in dataset.classes)
        resume.require_classes(recipe, dataset)
        steps, steps_per_epoch = feed.steps_of(dataset, recipe), feed.steps_per_epoch(dataset, recipe)
        if resumed:
            resume.require_same(resumed, recipe, dataset, run, start.other_data)
            resume.require_unfinished(resumed, recipe, steps, run)
        elif world.is_main:
            resume.require_fresh(run)
        feed.require_pictures(dataset, recipe)
        validated = resume.require_labels(dataset, recipe)
    place = f"{len(set(devices))} of type {devices[0].type}"  # gradients are summed device by device
    facts = {"the data set": dataset.identity, "devices:": place, "torch": torch.__version__}
    agreement.require_alike(world, {**flat(to_dict(recipe)), **facts})

    # network, optimiser, schedule
    reference_precision(recipe.train.precision)
    network = TwoColumnNet(recipe.model, len(classes), devices, recipe.train.compile, recipe.train.channels_last)
    optimiser, schedule = Momentum(network.parts(), recipe.optim.momentum), Schedule(recipe, steps)
    with world.raise_together():
        if resumed:
            schedule.load_state(resumed.progress["schedule"], forget_errors=start.other_data)
        if resumed and world.is_main:
            network.load(resumed.weights)
            optimiser.velocity = network.scatter(resumed.velocity)
        elif world.is_main:
            weights = initial_weights(recipe.model, len(classes), recipe.train.seed)
            taken = resume.taken_over(weights, start.init, start.init_layers, classes)
            network.load(weights | taken)
            del weights, taken
    replicas = Replicas(network, world)  # with the first process's weights
    replicas.equalise([v for part in optimiser.velocity for v in part.values()])
    counts = parameter_count(recipe.model, len(classes)), multiply_adds(recipe.model, len(classes)) / 1e6
    latest = resume.entry(resumed, start.init, recipe, dataset, devices, world.size)
    history = (*(resumed.history if resumed else ()), latest)

    began = resumed.step if resumed else 0
    with ExitStack() as stack:
        stop, vote = stack.enter_context(Stop()), AnyRank(world)
        with world.raise_together():
            journal = stack.enter_context(Journal(run, recipe, history, steps, began)) if world.is_main else None
            loader = stack.enter_context(feed.training(dataset, recipe, devices, rank=world.rank, ranks=world.size))
            if resumed:
                there = {**loader.state_dict(), "step": began} if start.other_data else resumed.loader
                loader.load_state_dict(there)
        if journal:
            each = f", in each of {world.size} processes" if world.size > 1 else ""
            journal.say(
                f"{counts[0]:,} parameters, {counts[1]:,.1f} million multiply-adds an image; {_where(devices)}{each}"
            )
            for news in resume.said(history):
                journal.say(news)
            if not validated:
                journal.say("no validation split, or not every image of it has a label: the run is not validated")

        watched = Watch(network, world)
        window = LogInterval(devices[0], loader.meter, world, resumed.progress["window"] if resumed else None)

        def save(step: int, best: bool = False, last: bool = False) -> None:
            """Hand a checkpoint to its writer; raises Diverged where there is nothing worth saving."""
            watched.check()
            tensors = [w for parts in (network.parts(), optimiser.velocity) for part in parts for w in part.values()]
            replicas.require_equal(step, tensors)
            remembered = {"schedule": schedule.state(), "window": window.state(), "steps": steps, "over": over}
            bad = {sample for text in world.texts(json.dumps(loader.bad)) for sample in json.loads(text)}
            state = {**loader.state_dict(), "bad": sorted(bad)}
            with world.raise_together():
                if len(bad) > recipe.data.max_bad:  # each process has met fewer
                    raise UserError(
                        f"step {step}: {len(bad)} samples failed in all processes, allowed: "
                        f"data.max_bad={recipe.data.max_bad}; look at the data with tools/verify_shards.py"
                    )
                if journal:
                    weights, velocity = network.gathered(), network.gathered(optimiser.velocity)
                    nonfinite.require_finite(step, weights)
                    identity = dataset.identity
                    checkpoint = Checkpoint(
                        step, recipe, classes, identity, weights, velocity, state, remembered, history
                    )
                    journal.save(checkpoint, best, last)

        over = False  # by a last plateau, before its steps are done
        if not resumed or history[-1]["changed"] or start.other_data:
            save(began)  # so that there is one before whatever happens, and what was changed holds

        # the loop; the devices are waited for at log lines, validations, checkpoints, and every nonfinite.EVERY steps
        for batch in loader:
            rates = schedule.rates(batch.step)
            drop = drawn_masks(network, recipe.train.seed, batch)
            with world.exchange():
                losses = update(replicas, optimiser, batch, drop, rates, recipe.train, watched)
            window.add(losses, len(batch.ids))

            done = batch.step + 1
            epoch_ends = done % steps_per_epoch == 0
            ended = done == steps
            if journal:
                journal.step(done)
            if done % nonfinite.EVERY == 0:
                watched.check()
            if done % recipe.train.log_every == 0 or ended:
                watched.check()
                found, said = window.close()
                with world.raise_together():
                    if journal:
                        layers = nonfinite.changes(network.parts(), optimiser.velocity, rates)
                        lr = schedule.lr(batch.step)
                        journal.train({"step": done, "epoch": batch.epoch, "lr": lr, **found, "layers": layers}, said)
            best = False
            if validated and (_due(recipe.train.validate_every, done, epoch_ends) or ended):
                watched.check()
                with window.paused():
                    errors = error_rates(network, dataset, recipe, "val", "centre", world)
                best = schedule.is_best(errors.top1_error)
                what = schedule.validated(errors.top1_error)
                over = what == "end"
                ended = ended or over
                with world.raise_together():
                    if journal:
                        journal.validation({"step": done, "epoch": batch.epoch, **asdict(errors)})
                if journal and what == "drop":
                    journal.say(f"a plateau: the learning rate falls to {schedule.lr(done):.2g}")
            asked = vote(stop.asked)  # now: a validation takes long
            if best or ended or asked or _due(recipe.train.checkpoint_every, done, epoch_ends):
                with window.paused():
                    save(done, best, ended or asked)
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
