"""python -m trainer COMMAND"""

import json
from pathlib import Path
from typing import Any

import click
import torch

from pipeline import manifest
from pipeline.cli import Command
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.manifest import DatasetError
from trainer import checkpoint as checkpoints
from trainer import recipe as recipes
from trainer.evaluate import evaluate as evaluate_views
from trainer.parallel import Columns, default_devices, parse_devices, reference_precision
from trainer.train import Start
from trainer.train import train as run_training

DATA = click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="A dataset directory, from tools/build_shards.py."
)
CHECKPOINT = click.option(
    "--checkpoint",
    "run",
    type=click.Path(path_type=Path),
    required=True,
    help="A run directory (its newest checkpoint), or a checkpoint file.",
)
DEVICES = click.option(
    "--devices",
    help="One device per column, such as cuda:0,cuda:1.  [default: two GPUs, or one twice, or cpu,cpu]",
)


@click.group()
def main() -> None:
    """AlexNet (2012) as two columns on two devices."""
    reference_precision()  # a recipe may choose another


@main.command(cls=Command)
@DATA
@click.option("--out", "run", type=click.Path(path_type=Path), required=True, help="The run directory.")
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
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Begin with the layers of another run or checkpoint that fit (fine-tuning).",
)
@click.option("--init-layers", metavar="NAMES", help="Only these of them, such as conv1,conv2.")
@DEVICES
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
) -> None:
    """Train on DATA's training split.

    \b
    Examples:
      python -m trainer train --data /data/imagenet-256 --out runs/1
      python -m trainer train --data photos-256 --recipe tiny --out runs/2 --devices cpu,cpu
      python -m trainer train --data /data/imagenet-256 --out runs/1 --resume --set optim.lr=0.001
    """
    if resume and (recipe or init):
        option, value = ("--recipe", recipe) if recipe else ("--init", init)
        raise UserError(f"{option} {value}: a resumed run keeps its own; change single keys with --set")
    if other_data and not resume:
        raise UserError("--other-data: is for --resume; a new run takes any data")
    if init_layers is not None and init is None:
        raise UserError(f"--init-layers {init_layers}: name the run that they come from, too: --init CHECKPOINT")
    if resume and run.is_file():
        raise UserError(f"{run}: is a file; name the run directory as --out, and it goes on from its newest checkpoint")
    resumed = checkpoints.load(run) if resume else None
    base = resumed.recipe if resumed else recipes.load("original" if recipe is None else recipe)
    chosen = recipes.override(base, settings)
    where = placed(devices, chosen.model.columns)
    layers = tuple(name.strip() for name in (init_layers or "").split(",") if name.strip())
    if init_layers is not None and not layers:
        raise UserError(f"--init-layers {init_layers!r}: names no layer; leave it out to take all that fit")
    start = Start(resumed, other_data, checkpoints.load(init) if init else None, layers)
    run_training(data, run, chosen, where, start)
    click.echo(f"page: {_write_report(data, run, where)}")


def placed(devices: str | None, columns: int) -> tuple[torch.device, ...]:
    """A device per column: those that were named, or the default."""
    return parse_devices(default_devices(columns) if devices is None else devices, columns)


@main.command(cls=Command)
@DATA
@CHECKPOINT
@click.option("--split", default="val", show_default=True)
@DEVICES
def evaluate(data: Path, run: Path, split: str, devices: str | None) -> None:
    """Top-1 and top-5 error over every image of a split, for the centre view and the ten views."""
    dataset = manifest.load(data)
    checkpoint = checkpoints.load(run)
    where = placed(devices, checkpoint.recipe.model.columns)
    if dataset.split(split).samples == 0:
        raise DatasetError(f"{data}: the split {split!r} is empty; there is nothing to evaluate")
    network = load_network(checkpoint, dataset, where, run)
    result: dict[str, Any] = {"step": checkpoint.step, "split": split, "dataset": dataset.identity}
    click.echo(
        f"{'':12}{'top-1 error':>12}{'top-5 error':>12}{'log-likelihood':>16}   "
        f"({split}, {dataset.split(split).samples:,} images, step {checkpoint.step})"
    )
    for views, name in (("centre", "centre view"), ("ten", "ten views")):
        found = evaluate_views(network, dataset, checkpoint.recipe, split, views)
        result[views] = found.to_dict()
        click.echo(f"{name:12}{found.top1_error:>10.1f} %{found.top5_error:>10.1f} %{-found.nll:>16.4f}")
    if run.is_dir():
        write_bytes_aside(run / "evaluation.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def load_network(
    checkpoint: checkpoints.Checkpoint,
    dataset: manifest.Manifest,
    devices: tuple[torch.device, ...],
    where: Path,
) -> Columns:
    """The network of a checkpoint, on `devices`. Raises CheckpointError where its classes are not the data set's."""
    mine, theirs = checkpoint.classes, tuple(record.wnid for record in dataset.classes)
    if mine != theirs:
        differing = next((pair for pair in zip(mine, theirs) if pair[0] != pair[1]), None)
        how = (
            f"label {mine.index(differing[0])} is {differing[0]}, there {differing[1]}" if differing else "fewer there"
        )
        raise checkpoints.CheckpointError(
            f"{where}: a network of {len(mine)} classes, {dataset.root} has {len(theirs)} others ({how}); "
            "name a data set with the classes that it was trained on"
        )
    network = Columns(checkpoint.recipe.model, len(mine), devices)
    network.load(checkpoint.weights)
    return network


@main.command(cls=Command)
@DATA
@CHECKPOINT
@DEVICES
def report(data: Path, run: Path, devices: str | None) -> None:
    """Write RUN/report.html anew: results, samples, curves, kernels and predictions of a run directory."""
    click.echo(_write_report(data, run, placed(devices, checkpoints.load(run).recipe.model.columns)))


def _write_report(data: Path, run: Path, devices: tuple[torch.device, ...]) -> Path:
    from trainer.report import write_report  # here, because plotly takes long to import

    checkpoint = checkpoints.load(run)
    network = load_network(checkpoint, manifest.load(data), devices, run)
    return write_report(run, data, network, checkpoint)


if __name__ == "__main__":
    main(prog_name="python -m trainer")
