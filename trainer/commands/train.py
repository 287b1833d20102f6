"""python -m trainer train"""

from pathlib import Path

import click
import torch

from pipeline import UserError
from pipeline.cli import Command
from pipeline.online.devices import missing_device
from trainer import agreement
from trainer import checkpoint as checkpoints
from trainer import recipe as recipes
from trainer.devices import placed
from trainer.distributed import PATIENCE, processes
from trainer.figures.page import draw as drawn
from trainer.options import DATA, DEVICES, PATH
from trainer.train import Start
from trainer.train import train as run_training


@click.command(cls=Command)
@DATA
@click.option("--out", "run", type=PATH, required=True, help="The run directory.")
@click.option("--recipe", help="A file in trainer/recipes without .toml, or a path.  [default: original]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as train.steps=4; may be repeated.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out, with its recipe.")
@click.option(
    "--other-data", is_flag=True, help="Resume also on other data than the checkpoint's, of the same classes."
)
@click.option(
    "--init",
    type=PATH,
    metavar="CHECKPOINT",
    help="Begin with the layers of another run or checkpoint that fit (fine-tuning).",
)
@click.option("--init-layers", metavar="NAMES", help="Only these of them, such as conv1,conv2.")
@DEVICES
@click.option(
    "--patience",
    type=click.FloatRange(min=1),
    default=PATIENCE,
    show_default=True,
    help="Seconds that a process of torchrun waits for another before it holds it for gone.",
)
def train(
    data: Path,
    run: Path,
    recipe: str | None,
    settings: tuple[str, ...],
    resume: bool,
    other_data: bool,
    init: Path | None,
    init_layers: str | None,
    devices: str | None,
    patience: float,
) -> None:
    """Train on DATA's training split.

    \b
    Examples:
      python -m trainer train --data /data/imagenet-256 --out runs/1
      python -m trainer train --data photos-256 --recipe tiny --out runs/2 --devices cpu,cpu
      python -m trainer train --data /data/imagenet-256 --out runs/1 --resume --set optim.lr=0.001
      torchrun --nproc-per-node 4 -m trainer train --data /data/imagenet-256 --out runs/1   (docs/scale-out.md)
    """
    with processes(patience) as world:
        with world.raise_together():
            _require_possible(run, recipe, resume, other_data, init, init_layers)
            resumed = checkpoints.load(run) if resume and world.is_main else None
            initial = checkpoints.load(init) if init and world.is_main else None
        resumed = agreement.shared(world, resumed)
        options = {"--resume": resume, "--other-data": other_data, "--init": init and str(init)}
        agreement.require_alike(world, {**options, "--init-layers": init_layers})
        with world.raise_together():
            base = resumed.recipe if resumed else recipes.load("original" if recipe is None else recipe)
            chosen = recipes.override(base, settings)
            where = placed(devices, chosen.model.columns)
            layers = tuple(name.strip() for name in (init_layers or "").split(",") if name.strip())
            if init_layers is not None and not layers:
                raise UserError(f"--init-layers {init_layers!r}: names no layer; leave it out to take all that fit")
        if devices is None and where[0].type == "cpu" and torch.version.cuda and world.is_main:
            click.echo(f"training on the CPU: {missing_device(0)}", err=True)
        run_training(data, run, chosen, where, Start(resumed, other_data, initial, layers), world)
    if world.is_main:
        try:
            click.echo(f"page: {drawn(data, run, where)[-1]}")
        except UserError as error:  # a sample that does not decode, say: the run is whole, and saved
            click.echo(f"no page: {error}", err=True)


def _require_possible(
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
