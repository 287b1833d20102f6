"""Measure the runs of an experiment; estimate means with their standard errors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from trainer import checkpoint as checkpoints
from trainer.data import evaluation
from trainer.devices import choose_devices
from trainer.evaluate import Tally, predictions
from trainer.figures import kernels
from trainer.parallel import TwoColumnNet
from trainer.recipe import Recipe
from trainer.reproduce.crew import Line
from trainer.reproduce.experiment import Run
from trainer.retrieval.index import features
from trainer.retrieval.search import nearest

NEAREST, QUERIES = 6, 1000  # training pictures of each (figure 4); pictures, spread evenly over a split


class Estimate(NamedTuple):
    """A mean of `n` values and its standard error, which one value does not have."""

    mean: float
    error: float | None
    n: int

    def text(self, unit: str = "", digits: int = 2) -> str:
        if self.error is None:
            return f"{self.mean:.{digits}f}{unit} (one run: no standard error)"
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}{unit}"


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean with s/√n, where s² = Σ(x − mean)²/(n − 1). Raises UserError: there are no values."""
    if not values:
        raise UserError("no values to take the mean of")
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def epochs_to(lines: Sequence[Line], epoch: int, target: float) -> float | None:
    """Return after how many epochs the training error was `target` percent; None: never.

    `lines` are a log with a line for each epoch of so many steps. The error of a line is the mean over its epoch, and
    stands for the epoch's middle; between two of these it goes straight.
    """
    before: tuple[float, float] | None = None
    for line in lines:
        time, error = line["step"] / epoch - 0.5, line["top1_error"]
        if error <= target:
            if before is None:
                return time
            return before[0] + (time - before[0]) * (before[1] - target) / (before[1] - error)
        before = time, error
    return None


def error_rates(run: Run, dataset: Manifest, split: str, views: str, device: str | None) -> dict[str, Any]:
    """Return `Evaluation`'s fields of a run's last network over a split, the probabilities of `views` averaged."""
    network = _network(run, dataset, device)
    tally = Tally(network.classes)
    with evaluation(dataset, run.loaded(), split, views, network.devices) as loader:
        for labels, by_views in predictions(network, loader, [views]):
            tally.add(labels, by_views[views])
    return asdict(tally.errors())


def neighbours_of(run: Run, dataset: Manifest, split: str, device: str | None) -> dict[str, Any]:
    """Return how often the nearest training pictures of those of a split are of their class, in percent.

    "features": nearest by the last hidden layer; "pixels": by the centre views themselves; "chance": of all training
    pictures; "common": of those nearest by features, how many are by pixels, too.
    """
    network, recipe = _network(run, dataset, device), run.loaded()
    samples = dataset.split(split).samples
    asked = np.unique(np.arange(QUERIES) * samples // QUERIES)
    labels, truth = (dataset.samples(name)["label"].astype(np.int64) for name in ("train", split))
    found = {}
    for kind, rows in (("features", partial(features, network)), ("pixels", _pixels)):
        trained, tried = (
            np.concatenate([part for _, part in rows(dataset, recipe, name)]) for name in ("train", split)
        )
        found[kind] = nearest(trained, tried[asked], NEAREST)[0]
    same = {kind: 100 * float((labels[ids] == truth[asked, None]).mean()) for kind, ids in found.items()}
    common = np.mean([np.isin(one, other).mean() for one, other in zip(found["features"], found["pixels"])])
    chance = 100 * float((labels[None] == truth[asked, None]).mean())
    return {"samples": len(asked), **same, "chance": chance, "common": 100 * float(common)}


def _pixels(dataset: Manifest, recipe: Recipe, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids (n,) and centre views (n, 3 · view²) float32 of every image of a split, as the network sees them."""
    with evaluation(dataset, recipe, split, "centre", (torch.device("cpu"),)) as loader:
        for batch in loader:
            yield batch.ids, batch.images.flatten(1).numpy().copy()


def _network(run: Run, dataset: Manifest, device: str | None) -> TwoColumnNet:
    checkpoint, columns = checkpoints.load(run.folder), run.loaded().model.columns
    devices = choose_devices(",".join([device] * columns) if device else None, columns)
    return checkpoints.load_network(checkpoint, dataset, devices, run.folder)


def columns_of(run: Run) -> dict[str, Any]:
    """Return the selectivity of both columns' kernels in the first layer, and how their colours differ by chance.

    "p": the p-value of the difference; "halves": the mean difference of random halves of the kernels.
    """
    weights = checkpoints.load(run.folder).weights[f"{run.loaded().model.order[0]}.weight"].numpy()
    one, other = (kernels.selectivity(column) for column in np.split(weights, 2))
    p, halves = kernels.chance(weights)
    return {"colour": [one[0], other[0]], "orientation": [one[1], other[1]], "p": p, "halves": halves}


def combined(p_values: Sequence[float]) -> float:
    """Return the p-value of several independent ones together (Fisher's method).

    −2 Σ ln p has a χ² distribution of 2k degrees of freedom, whose upper tail at x is e^(−x/2) Σ (x/2)^i / i!, i < k.
    """
    half = -sum(map(math.log, p_values))
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(len(p_values)))
