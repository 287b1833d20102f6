"""Measure the runs of an experiment; estimate means, differences and ratios with their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from pipeline import UserError
from pipeline.manifest import Manifest
from trainer import checkpoint as checkpoints
from trainer.data import evaluation
from trainer.devices import choose_devices
from trainer.evaluate import Tally, predictions
from trainer.figures import kernels
from trainer.reproduce.crew import Line
from trainer.reproduce.experiment import Run


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


def difference(one: Estimate, other: Estimate) -> Estimate:
    """Return one − other, of independent runs: the squares of their standard errors add up."""
    error = None if one.error is None or other.error is None else math.hypot(one.error, other.error)
    return Estimate(one.mean - other.mean, error, min(one.n, other.n))


def ratio(one: Estimate, other: Estimate) -> Estimate:
    """Return one / other; the squares of their relative standard errors add up, to first order."""
    value = one.mean / other.mean
    known = one.error is not None and other.error is not None
    error = abs(value) * math.hypot((one.error or 0) / one.mean, (other.error or 0) / other.mean) if known else None
    return Estimate(value, error, min(one.n, other.n))


def epochs_to(lines: Sequence[Line], epoch: int, target: float) -> float | None:
    """Return after how many epochs the training error was `target` percent; None: never.

    `lines` are a log with a line for each epoch of so many steps. The error of a line is the mean over its epoch, and
    stands for the epoch's end; between two lines it goes straight.
    """
    before: tuple[float, float] | None = None
    for line in lines:
        time, error = line["step"] / epoch, line["top1_error"]
        if error <= target:
            if before is None:
                return time
            return before[0] + (time - before[0]) * (before[1] - target) / (before[1] - error)
        before = time, error
    return None


def error_rates(run: Run, dataset: Manifest, split: str, views: str, device: str | None) -> dict[str, Any]:
    """Return `Evaluation`'s fields of a run's last network over a split, the probabilities of `views` averaged."""
    checkpoint = checkpoints.load(run.folder)
    columns = checkpoint.recipe.model.columns
    devices = choose_devices(",".join([device] * columns) if device else None, columns)
    network = checkpoints.load_network(checkpoint, dataset, devices, run.folder)
    tally = Tally(network.classes)
    with evaluation(dataset, checkpoint.recipe, split, views, devices) as loader:
        for labels, by_views in predictions(network, loader, [views]):
            tally.add(labels, by_views[views])
    return asdict(tally.errors())


def columns_of(run: Run) -> dict[str, Any]:
    """Return the selectivity of both columns' kernels in the first layer, and the p-value of their difference."""
    weights = checkpoints.load(run.folder).weights
    first = run.loaded().model.order[0]
    kernel = weights[f"{first}.weight"].numpy()
    one, other = (kernels.selectivity(column) for column in np.split(kernel, 2))
    return {
        "colour": [one[0], other[0]],
        "orientation": [one[1], other[1]],
        "p": kernels.chance(kernel),
    }


def combined(p_values: Sequence[float]) -> float:
    """Return the p-value of several independent ones together (Fisher's method).

    −2 Σ ln p has a χ² distribution of 2k degrees of freedom, whose upper tail at x is e^(−x/2) Σ (x/2)^i / i!, i < k.
    """
    half = -sum(map(math.log, p_values))
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(len(p_values)))
