"""The training loop, in one process or in each of a job's; the command train."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import UserError, manifest
from pipeline.cli import Command
from pipeline.doubts import doubts
from pipeline.online.batch import Batch
from pipeline.online.devices import missing_device
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer import dropout, nonfinite
from trainer import recipe as recipes
from trainer import run as runs
from trainer.devices import choose_devices
from trainer.distributed import SINGLE, Replicas, World, join
from trainer.evaluate import labelled
from trainer.figures import draw_page
from trainer.metrics import LogInterval
from trainer.model import Masks
from trainer.optim import Momentum, Rates, Schedule
from trainer.options import DATA, DEVICES, FEED, JSON, MAX_STALL, PATH, PATIENCE_OPTION
from trainer.parallel import TwoColumnNet, reference_precision
from trainer.stop import BadData, Stopped, StopRequest, ended_by_data, remedies
from trainer.validation import error_rates, judge


def draw_masks(network: TwoColumnNet, seed: int, batch: Batch) -> list[Masks]:
    """Return the dropout masks of a batch for each column, drawn on its device."""
    probability = network.recipe.dropout
    units = {layer.name: layer.width for layer in network.layers if probability and "dropout" in layer.recipe.then}
    size, devices = len(batch.ids), dict.fromkeys(network.devices)  # one device may have both columns
    masks = {d: dropout.masks(seed, batch.step, size, units, probability, d, batch.position) for d in devices}
    return [masks[device] for device in network.devices]


def train_step(
    network: TwoColumnNet | Replicas,
    optimiser: Momentum,
    batch: Batch,
    masks: Masks | Sequence[Masks],
    rates: dict[str, Rates],
    recipe: recipes.TrainRecipe,
    watch: nonfinite.Watch | None = None,
) -> Tensor:
    """Update the weights by a batch; return two sums over its images, (2,) float on the first device.

    They are the losses in nats, and how many images were wrong by top-1, as the network saw them before the update.
    Each of several ranks has its part of the batch, and gets the sums of that; `Replicas` sums the gradients.
    A short batch counts for less: its gradient too is divided by the full batch's size, as in the 2012 code.
    """
    optimiser.freeze(rates)  # before the forward pass, which records what needs gradients

    # forward
    with torch.autocast(network.devices[0].type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = network(batch.replicas, masks)  # (n, classes)

    # loss
    if logits.dtype == torch.bfloat16:  # but not float64, in which tests compute
        logits = logits.float()
    losses = F.cross_entropy(logits, batch.labels, reduction="sum")
    sums = torch.stack([losses.detach(), (logits.detach().argmax(1) != batch.labels).sum()])

    # backward
    if losses.requires_grad:  # else every layer is frozen
        (losses / recipe.batch_size).backward()
    if watch:
        watch.note(batch.step, losses.detach())

    # update
    optimiser.step(rates)
    return sums


def main(settings: runs.Settings, world: World = SINGLE) -> None:
    """Train to the end of the recipe; leave recipe, metrics and checkpoints in the run directory.

    Every process of a job calls it with devices of its own. They share each global batch; only the main one writes.

    Raises:
        UserError: the directory holds a run that is not resumed; data, recipe and checkpoint do not fit together, or
            are not those of the other processes; a number is not finite; a disk is full; another process is gone.
        Stopped: a signal asked for the end. The run is saved.
        BadData: data cannot be read. The run is saved.
    """
    recipe, devices, resumed = settings.recipe, settings.devices, settings.resumed
    taken: runs.Taken = {}

    # ---------------- Data. What can be refused is refused here, before anything is written. ----------------
    with world.raise_together():
        dataset = manifest.load(settings.data, shards=not recipe.data.workers)
        classes = tuple(record.wnid for record in dataset.classes)
        steps = loaders.steps_of(dataset, recipe)
        validated = "val" in dataset.splits and dataset.split("val").samples > 0 and labelled(dataset, "val")
        runs.require_trainable(dataset, recipe, validated)
        if resumed:
            runs.require_resumable(settings, resumed, dataset, steps)
        elif world.is_main:
            runs.require_fresh(settings.run, settings.data)
        loaders.require_pictures(dataset, recipe)
    placement = f"{len(set(devices))} of type {devices[0].type}"  # gradients are summed device by device
    versions = {"the data set": dataset.identity, "devices:": placement, "torch": torch.__version__}
    world.require_equal_settings(recipes.flat(asdict(recipe)) | versions)
    for doubt in doubts(dataset) if world.is_main else ():
        click.echo(f"warning: {doubt}", err=True)

    # ---------------- Network, optimiser, schedule ----------------
    reference_precision(recipe.train.precision)
    network = TwoColumnNet(recipe.model, len(classes), devices, recipe.train.compile, recipe.train.channels_last)
    optimiser, schedule = Momentum(network.parts(), recipe.optim.momentum), Schedule(recipe, steps)
    with world.raise_together():
        if resumed:
            schedule.load_state(resumed.progress["schedule"], forget_errors=settings.other_data)
        if resumed and world.is_main:
            network.load(resumed.weights)
            optimiser.velocity = network.scatter(resumed.velocity)
        elif world.is_main:
            weights, taken = runs.first_weights(settings, classes)
            network.load(weights)
    replicas = Replicas(network, world)  # broadcasts the main process's weights
    world.broadcast([v for part in optimiser.velocity for v in part.values()])

    with ExitStack() as stack:
        # ---------------- Outputs and loader, which end with the run ----------------
        stop = stack.enter_context(StopRequest())
        start = runs.history_entry(settings, dataset, world.size, taken)
        history = (*(resumed.history if resumed else ()), start)
        with world.raise_together():
            training = loaders.training(dataset, recipe, devices, world, workers=recipe.data.workers)
            loader = stack.enter_context(training)
            if resumed:
                runs.set_loader(settings, resumed, loader)
            writers = stack.enter_context(runs.opened(settings, history, steps)) if world.is_main else None
        watch = nonfinite.Watch(network, world)
        window, stalled = resumed.progress["window"] if resumed else None, loaders.stall_remedies(recipe, dataset)
        interval = LogInterval(devices[0], loader.meter, world, window, stalled)
        if writers:
            for text in runs.introduction(recipe, len(classes), validated, history):
                writers.console.print(text)

        def save(step: int, best: bool = False, over: bool = False, pending: bool = False) -> None:
            """Check the weights of all processes, and hand a checkpoint to its writer.

            `best`: no validation had a lower error. `over`: a run that ended on its last plateau, and cannot go on.
            `pending`: the validation of this step is due.
            """
            with interval.paused():
                watch.check()
                state = [w for part in (*network.parts(), *optimiser.velocity) for w in part.values()]
                replicas.require_equal(step, state)
                bad = sorted({sample for samples in world.all_gather(loader.bad) for sample in samples})
                allowed = bad[: recipe.data.max_bad]  # with more the run ends, and the others may be mended
                progress = {"schedule": schedule.state(), "window": interval.state(), "steps": steps}
                progress |= {"over": over, "pending": pending}
                with world.raise_together():
                    if writers:
                        weights, velocity = network.gathered(), network.gathered(optimiser.velocity)
                        nonfinite.require_finite(step, weights)
                        described = {**loader.state_dict(), "step": step, "bad": allowed}, progress, history
                        saved = step, recipe, classes, dataset.identity, weights, velocity, *described
                        writers.checkpoints.save(checkpoints.Checkpoint(*saved), best, pending)
            with ended_by_data(step, recipe), world.raise_together():
                loaders.require_few_bad(len(bad), dataset, "train", recipe)

        def finish(step: int) -> None:
            """Wait for the last checkpoint, and name it."""
            if writers:
                writers.checkpoints.close()
                writers.console.checkpoint(checkpoints.step_file(settings.run, step), step)

        def validate(step: int) -> bool:
            """Validate, and save the outcome over the checkpoint of this step; return True if the run is over.

            Raises:
                Stopped, BadData: a signal or the data ended the validation, which --resume repeats.
            """
            try:
                with interval.paused():
                    errors, unreadable = error_rates(network, dataset, recipe, step, stop, world)
            except (Stopped, BadData):
                finish(step)
                raise
            except nonfinite.Diverged:
                if writers:  # the newest checkpoint that stays is from before
                    writers.checkpoints.close()
                    checkpoints.step_file(settings.run, step).unlink(missing_ok=True)
                raise
            with world.raise_together():
                best, over = judge(errors, unreadable, step, (step - 1) // epoch, schedule, writers)
            save(step, best, over)
            return over

        if not resumed or start["changed"] or settings.other_data:  # a --resume finds the start, and keeps the changes
            save(settings.start, pending=settings.pending)

        # ---------------- The loop. Log lines, validations, checkpoints and checks wait for devices. ----------------
        done, epoch = settings.start, loaders.steps_per_epoch(dataset, recipe)  # in steps
        validate_every, save_every = recipe.train.validate_every or epoch, recipe.train.checkpoint_every or epoch
        saved, over = done, validated and settings.pending and validate(done)
        while done < steps and not over:
            # end early; all processes do before one begins a step that another cannot take
            try:
                batch, failure = stop.next(loader), None
            except (UserError, OSError) as error:
                batch, failure = None, error
            if world.any(batch is None or stop.number is not None):
                if saved < done:
                    save(done)
                with world.raise_together():
                    finish(done)
                with ended_by_data(done, recipe), world.raise_together():
                    if failure:
                        raise failure
                raise Stopped(done, stop.number)
            assert batch is not None

            rates = schedule.rates(batch.step)
            masks = draw_masks(network, recipe.train.seed, batch)
            with world.collective():  # gradients are summed within
                sums = train_step(replicas, optimiser, batch, masks, rates, recipe.train, watch)
            interval.add(sums, len(batch.ids))

            done = batch.step + 1
            ending = done == steps
            logging = ending or done % recipe.train.log_every == 0
            validating = validated and (ending or done % validate_every == 0)
            if logging or validating or done % nonfinite.EVERY == 0:
                watch.check()
            if writers:
                writers.console.step(done)

            # log
            if logging:
                figures, stall = interval.close()
                with world.raise_together():
                    if writers:
                        line = {"step": done, "epoch": batch.epoch, "lr": schedule.lr(batch.step), **figures}
                        line["layers"] = nonfinite.update_ratios(network.parts(), optimiser.velocity, rates)
                        writers.checkpoints.raise_if_failed()
                        writers.metrics.train(line)
                        writers.console.train(line, stall, loader.news)

            # save, then validate: a validation may end at any time
            if validating or ending or done % save_every == 0:
                save(done, pending=validating)
                saved = done
            over = validating and validate(done)

        with world.raise_together():
            finish(done)


@click.command(cls=Command)
@DATA
@click.option("--out", "run", type=PATH, required=True, help="The run directory.")
@click.option("--recipe", help="A file in trainer/recipes without .toml, or a path.  [default: original]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the newest checkpoint in --out, with its recipe; without its workers by --set 'data.workers=[]'.",
)
@click.option("--other-data", is_flag=True, help="Resume on other data of the same classes, too.")
@FEED
@MAX_STALL
@click.option("--init", type=PATH, metavar="CHECKPOINT", help="Begin with the layers of another run that fit.")
@click.option("--init-layers", metavar="NAMES", help="Only these of them, such as conv1,conv2.")
@DEVICES
@JSON
@click.option("--no-page", is_flag=True, help="Draw no page, RUN/report.html, at the end.")
@PATIENCE_OPTION
def train(
    data: Path,
    run: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    resume: bool,
    other_data: bool,
    workers: tuple[str, ...],
    max_stall: tuple[str, ...],
    init: Path | None,
    init_layers: str | None,
    devices: str | None,
    as_json: bool,
    no_page: bool,
    patience: int,
) -> None:
    """Train on DATA's training split.

    \b
    Examples:
      python -m trainer train --data /data/imagenet-256 --out runs/1
      python -m trainer train --data photos-256 --recipe tiny --out runs/2 --devices cpu,cpu
      python -m trainer train --data /data/imagenet-256 --out runs/1 --resume --set optim.lr=0.001
      torchrun --nproc-per-node 4 -m trainer train --data /data/imagenet-256 --out runs/1   (docs/scale-out.md)
    """
    layers = tuple(name.strip() for name in (init_layers or "").split(",") if name.strip())
    with join(patience) as world:
        with world.raise_together():
            _require_consistent(run, recipe, resume, other_data, init, init_layers)
            resumed = checkpoints.load(run) if resume and world.is_main else None
            initial = checkpoints.load(init) if init and world.is_main else None
        resumed = checkpoints.shared(world, resumed)
        options = {"--resume": resume, "--other-data": other_data, "--init": init and str(init)}
        world.require_equal_settings({**options, "--init-layers": init_layers})
        with world.raise_together():
            base = resumed.recipe if resumed else recipes.load("original" if recipe is None else recipe)
            chosen = recipes.override(base, (*max_stall, *overrides))
            if workers:
                chosen = recipes.from_dict({"data": {"workers": list(workers)}}, chosen, "--feed")
            placement = choose_devices(devices, chosen.model.columns)
            if init_layers is not None and not layers:
                raise UserError(f"--init-layers {init_layers!r}: names no layer; leave it out to take all that fit")
        if devices is None and placement[0].type == "cpu" and torch.version.cuda and world.is_main:
            click.echo(f"training on the CPU: {missing_device(0)}", err=True)
        ended: BadData | None = None
        try:
            with remedies(run, world):
                main(runs.Settings(data, run, chosen, placement, resumed, other_data, initial, layers, as_json), world)
        except BadData as error:
            ended = error
    if world.is_main and not no_page:
        draw_page(data, run, placement, "the run is saved" if ended else "the run is complete and saved", as_json)
    if ended:
        raise ended


def _require_consistent(
    run: Path, recipe: str | None, resume: bool, other_data: bool, init: Path | None, init_layers: str | None
) -> None:
    """Raise UserError where options contradict each other."""
    if resume and (recipe or init):
        option, value = ("--recipe", recipe) if recipe else ("--init", init)
        raise UserError(f"{option} {value}: a resumed run keeps its own; change single keys with --set")
    if other_data and not resume:
        raise UserError("--other-data: is for --resume; a new run takes any data")
    if init_layers is not None and init is None:
        raise UserError(f"--init-layers {init_layers}: name the run that they come from, too: --init CHECKPOINT")
    if resume and run.is_file():
        raise UserError(f"{run}: is a file; name the run directory as --out, and it goes on from its newest checkpoint")
