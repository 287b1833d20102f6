"""The update rule of 2012, and its learning rates.

v ← μ·v − λ·ε·w − ε·⟨∂L/∂w⟩,  w ← w + v   (paper, section 5). The rate ε is a factor within v, so that a drop of the
rate does not rescale the momentum gathered before it; torch.optim.SGD multiplies v by the rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.recipe import LayerRates, Recipe


@dataclass(frozen=True)
class Rates:
    """Learning rates of one layer at a step."""

    weights: float
    biases: float
    decay: float  # λ, of the weights alone
    frozen: bool = False  # neither weights nor velocity change


class Schedule:
    """The rates at each of a run's `steps`, to which the recipe's epochs stretch; and the search for plateaus."""

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self._recipe, self._steps = recipe, steps
        self._best = math.inf  # top-1 error
        self._since, self._fallen = 0, 0  # validations since the best one or the last drop; drops

    def epoch(self, step: int) -> float:
        """Return the time of a step in epochs of the recipe: `train.epochs` at the end of the run."""
        return step * self._recipe.train.epochs / self._steps  # exact at whole epochs, in this order

    def lr(self, step: int) -> float:
        """Return the rate of the weights, without factors of layers, for log lines."""
        return self._scaled(self._recipe.optim.lr) / self._divisor(step)[0]

    def rates(self, step: int) -> dict[str, Rates]:
        """Return every layer's rates at a step."""
        optim, (weights, biases) = self._recipe.optim, self._divisor(step)
        now, rates = self.epoch(step), {}
        for name in self._recipe.model.order:
            layer = optim.layers.get(name, LayerRates())
            once_more = optim.drop_factor ** _passed(layer.drops, now)
            rates[name] = Rates(
                self._scaled(optim.lr) * layer.lr / weights / once_more,
                self._scaled(optim.bias_lr) * layer.bias_lr / biases,
                optim.decay * layer.decay,
                0 < layer.frozen_from <= now,
            )
        return rates

    def validated(self, error: float) -> str | None:
        """Record a validation's top-1 error; return "drop" or "end", which follows on a plateau, or None."""
        optim = self._recipe.optim
        if error < self._best:
            self._best, self._since = error, 0
            return None
        self._since += 1
        if optim.schedule != "plateau" or self._since < optim.patience:
            return None
        self._since = 0
        self._fallen += 1
        return "end" if self._fallen > optim.most_drops else "drop"

    def plateau(self, step: int, effect: str) -> str:
        """Return a line on the plateau that `validated` has reported after `step`, and its effect."""
        optim = self._recipe.optim
        if effect == "drop":
            return f"a plateau: the learning rate falls to {self.lr(step):.2g}"
        return (
            f"ended at step {step} of {self._steps}: after {optim.most_drops} drops of the learning rate "
            f"(optim.most_drops) the validation error has not improved for {optim.patience} validations"
        )

    def is_best(self, error: float) -> bool:
        """Return True if the error is below those of all validations so far; to be called before `validated`."""
        return error < self._best

    def state(self) -> dict[str, Any]:
        return {"best": None if self._best == math.inf else self._best, "since": self._since, "fallen": self._fallen}

    def load_state(self, state: dict[str, Any], forget_errors: bool = False) -> None:
        """Restore `state`; with `forget_errors`, for they are of other images, only the number of drops."""
        self._fallen = state["fallen"]
        if not forget_errors:
            self._best = math.inf if state["best"] is None else state["best"]
            self._since = state["since"]

    def _scaled(self, rate: float) -> float:
        """Return a rate in proportion to the batch: 256 at 0.02 was as good as 128 at 0.01 in the original's log."""
        return rate * self._recipe.train.batch_size / self._recipe.optim.batch_size

    def _divisor(self, step: int) -> tuple[float, float]:
        """Return the divisors of the rates of weights and of biases."""
        optim, now = self._recipe.optim, self.epoch(step)
        if optim.schedule == "plateau":
            return (optim.drop_factor ** min(self._fallen, optim.most_drops),) * 2  # "equal for all layers": the paper
        if optim.schedule == "drops":
            return optim.drop_factor ** _passed(optim.drops, now), optim.drop_factor ** _passed(optim.bias_drops, now)
        progress = step / self._steps
        return (
            _fall(progress, optim.lr_steps, optim.lr_factor),
            _fall(progress, optim.bias_lr_steps, optim.bias_lr_factor),
        )


def _passed(times: Sequence[float], now: float) -> int:
    return sum(time <= now for time in times)


def _fall(progress: float, stretches: int, factor: float) -> float:
    """Return the divisor at `progress` (0 to 1): 1 in the first stretch, `factor` in the last, in equal ratios."""
    if stretches == 1:
        return 1.0
    return factor ** (min(int(progress * stretches), stretches - 1) / (stretches - 1))


class Momentum:
    """The optimiser: velocities of a network's parameters, which `parts` has by name for each column."""

    def __init__(self, parts: Sequence[dict[str, Tensor]], momentum: float) -> None:
        self.parts, self.momentum = parts, momentum
        self.velocity = [{name: torch.zeros_like(parameter) for name, parameter in part.items()} for part in parts]

    def freeze(self, rates: dict[str, Rates]) -> None:
        """Switch gradients off in frozen layers, and on in all others; to be called before the forward pass."""
        for part in self.parts:
            for name, w in part.items():
                w.requires_grad_(not rates[name.partition(".")[0]].frozen)

    @torch.no_grad()
    def step(self, rates: dict[str, Rates]) -> None:
        """Update velocities and parameters by the gradients, and free these. Biases do not decay."""
        for part, velocity in zip(self.parts, self.velocity):
            for name, w in part.items():
                layer, _, kind = name.partition(".")
                rate = rates[layer]
                if rate.frozen:
                    continue
                assert w.grad is not None, name
                v = velocity[name].mul_(self.momentum)
                if kind == "bias":
                    v.sub_(w.grad, alpha=rate.biases)
                else:
                    v.sub_(w, alpha=rate.decay * rate.weights).sub_(w.grad, alpha=rate.weights)
                w.add_(v)
                w.grad = None
