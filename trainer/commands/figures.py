"""python -m trainer figures"""

from pathlib import Path

import click
import torch

from pipeline import manifest
from pipeline.cli import Command
from trainer import checkpoint as checkpoints
from trainer.checkpoint import load_network
from trainer.devices import choose_devices
from trainer.options import DATA, DEVICES, RUN


@click.command(cls=Command)
@RUN
@DATA
@click.option("--split", help="The split whose images are shown with predictions.  [default: val]")
@click.option("--only-errors", is_flag=True, help="Show images that the network gets wrong.")
@DEVICES
def figures(run: Path, data: Path, split: str | None, only_errors: bool, devices: str | None) -> None:
    """Draw RUN/figures/*.png and the page RUN/report.html.

    Kernels of the first layer (Figure 3 of the paper), predictions and nearest training images (Figure 4), crops and
    lighting of one picture; the page adds curves of loss, error and updates.
    """
    if split is not None:
        manifest.load(data).split(split)
    where = choose_devices(devices, checkpoints.load(run).recipe.model.columns)
    for line in drawn(data, run, where, split or "val", only_errors):
        click.echo(line)


def drawn(
    data: Path, run: Path, devices: tuple[torch.device, ...], split: str = "val", only_errors: bool = False
) -> list[str]:
    """Draw all. Returns a line for each figure, written or not, the page last."""
    from trainer.figures.gather import gather  # here, because plotly takes long to import
    from trainer.figures.page import draw

    checkpoint, dataset = checkpoints.load(run), manifest.load(data)
    network = load_network(checkpoint, dataset, devices, run)
    written, lacking = draw(gather(run, dataset, network, checkpoint, split, only_errors))
    return [*(f"no {name}: {why}" for name, why in lacking.items()), *map(str, written)]
