"""A run of a narrow network whose weights carry a signal, to make indexes of and look pictures up in."""

from pathlib import Path

import torch
from click.testing import Result

from networks import drawn, narrow
from pipeline import manifest
from runs import trainer
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint

RECIPE = narrow("original")  # 48 units in fc7
UNITS = 48


def save_run(run: Path, data: Path, factor: float = 1.0, step: int = 3) -> dict[str, torch.Tensor]:
    """A run directory of one checkpoint, of the weights of tests/networks.py; fc7's times `factor`."""
    dataset = manifest.load(data)
    weights = drawn(RECIPE.model, len(dataset.classes), torch.float32)
    weights = {name: value * (factor if name.startswith("fc7") else 1) for name, value in weights.items()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    classes = tuple(record.wnid for record in dataset.classes)
    state = Checkpoint(step, RECIPE, classes, dataset.identity, weights, velocity, {}, {}, ())
    checkpoints.save(run, state)
    return weights


def index(run: Path, data: Path, *options: object) -> Result:
    return trainer("index", run, data, "--devices", "cpu,cpu", *options)


def similar(run: Path, data: Path, *words: object) -> Result:
    return trainer("similar", *words, "--checkpoint", run, "--data", data, "--devices", "cpu,cpu")
