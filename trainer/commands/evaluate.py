"""python -m trainer evaluate"""

import json
from pathlib import Path
from typing import Any

import click

from pipeline import manifest
from pipeline.cli import Command
from pipeline.files import write_bytes_aside
from pipeline.manifest import DatasetError
from trainer import checkpoint as checkpoints
from trainer.commands.options import CHECKPOINT, DATA, DEVICES, placed
from trainer.evaluate import evaluate as evaluate_views
from trainer.network import load_network


@click.command(cls=Command)
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
