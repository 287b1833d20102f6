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
from trainer.parallel import TwoColumns, default_devices, parse_devices, reference_precision
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
    default=default_devices,
    show_default="two GPUs, or one twice, or cpu,cpu",
    help="One device per column, such as cuda:0,cuda:1.",
)


@click.group()
def main() -> None:
    """AlexNet (2012) as two columns on two devices."""
    reference_precision()


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
@DEVICES
def train(data: Path, run: Path, recipe: str | None, settings: tuple[str, ...], resume: bool, devices: str) -> None:
    """Train on DATA's training split.

    \b
    Examples:
      python -m trainer train --data /data/imagenet-256 --out runs/1
      python -m trainer train --data photos-256 --recipe tiny --out runs/2 --devices cpu,cpu
    """
    two = parse_devices(devices)
    if resume and recipe:
        raise UserError(f"--recipe {recipe}: a resumed run keeps its recipe; change single keys with --set")
    resumed = checkpoints.load(run) if resume else None
    chosen = recipes.override(resumed.recipe, settings) if resumed else recipes.load(recipe or "original", settings)
    run_training(data, run, chosen, two, resumed)


@main.command(cls=Command)
@DATA
@CHECKPOINT
@click.option("--split", default="val", show_default=True)
@DEVICES
def evaluate(data: Path, run: Path, split: str, devices: str) -> None:
    """Top-1 and top-5 error over every image of a split, for the centre view and the ten views."""
    dataset = manifest.load(data)
    two = parse_devices(devices)
    checkpoint = checkpoints.load(run)
    if dataset.split(split).samples == 0:
        raise DatasetError(f"{data}: the split {split!r} is empty; there is nothing to evaluate")
    network = load_network(checkpoint, dataset, two, run)
    result: dict[str, Any] = {"step": checkpoint.step, "split": split, "dataset": dataset.identity}
    click.echo(
        f"{'':12}{'top-1 error':>12}{'top-5 error':>12}{'log-likelihood':>16}   "
        f"({split}, {dataset.split(split).samples:,} images, step {checkpoint.step})"
    )
    for views, name in (("centre", "centre view"), ("ten", "ten views")):
        found = evaluate_views(network, dataset, split, views)
        result[views] = found.to_dict()
        click.echo(f"{name:12}{found.top1_error:>10.1f} %{found.top5_error:>10.1f} %{-found.nll:>16.4f}")
    if run.is_dir():
        write_bytes_aside(run / "evaluation.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def load_network(
    checkpoint: checkpoints.Checkpoint,
    dataset: manifest.Manifest,
    devices: tuple[torch.device, torch.device],
    where: Path,
) -> TwoColumns:
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
    network = TwoColumns(checkpoint.recipe.model, len(mine), devices)
    network.load(checkpoint.weights)
    return network


@main.command(cls=Command)
@DATA
@CHECKPOINT
@DEVICES
def report(data: Path, run: Path, devices: str) -> None:
    """Write RUN/report.html: results, samples, curves, kernels and predictions of the run directory --checkpoint."""
    from trainer.report import write_report  # here, because plotly takes long to import

    two = parse_devices(devices)
    checkpoint = checkpoints.load(run)
    network = load_network(checkpoint, manifest.load(data), two, run)
    click.echo(write_report(run, data, network, checkpoint))


if __name__ == "__main__":
    main(prog_name="python -m trainer")
