"""python -m trainer report"""

from pathlib import Path

import click
import torch

from pipeline import manifest
from pipeline.cli import Command
from trainer import checkpoint as checkpoints
from trainer.commands.options import CHECKPOINT, DATA, DEVICES
from trainer.network import load_network
from trainer.parallel import placed


@click.command(cls=Command)
@DATA
@CHECKPOINT
@DEVICES
def report(data: Path, run: Path, devices: str | None) -> None:
    """Write RUN/report.html anew: results, samples, curves, kernels and predictions of a run directory."""
    click.echo(page(data, run, placed(devices, checkpoints.load(run).recipe.model.columns)))


def page(data: Path, run: Path, devices: tuple[torch.device, ...]) -> Path:
    """Write it; return its path."""
    from trainer.figures.page import write_report  # here, because plotly takes long to import

    checkpoint = checkpoints.load(run)
    network = load_network(checkpoint, manifest.load(data), devices, run)
    return write_report(run, data, network, checkpoint)
