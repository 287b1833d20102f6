"""The update rule of 2012, and its rates.

v ← μ·v − λ·ε·w − ε·⟨∂L/∂w⟩,  w ← w + v   (paper, section 5). ε stands inside v, so that a drop of the rate does not
rescale the momentum that was gathered before it; torch.optim.SGD differs there.
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
    """Of one layer. `decay` is λ of its weights; a frozen layer does not change, nor does its velocity."""

    weights: float
    biases: float
    decay: float
    frozen: bool = False


class Schedule:
    """The rates at each step of a run of so many; it remembers what a plateau needs.

    Args:
        recipe: as the run's; its epochs stretch to `steps`.
        steps: of the whole run.
    """

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self._recipe, self._steps = recipe, steps
        self._best, self._since, self._fallen = math.inf, 0, 0

    def epoch(self, step: int) -> float:
        """The time of a step on the recipe's own clock: `train.epochs` at the end of the run."""
        return step * self._recipe.train.epochs / self._steps  # exact at whole epochs, in this order

    def lr(self, step: int) -> float:
        """The rate of the weights, but for what a layer has of its own; what log lines show."""
        return self._scaled(self._recipe.optim.lr) / self._divisor(step)[0]

    def rates(self, step: int) -> dict[str, Rates]:
        """Every layer's."""
        optim, (weights, biases) = self._recipe.optim, self._divisor(step)
        found = {}
        for name in self._recipe.model.order:
            own, now = optim.layers.get(name, LayerRates()), self.epoch(step)
            once_more = optim.drop_factor ** _passed(own.drops, now)
            found[name] = Rates(
                self._scaled(optim.lr) * own.lr / weights / once_more,
                self._scaled(optim.bias_lr) * own.bias_lr / biases,
                optim.decay * own.decay,
                0 < own.frozen_from <= now,
            )
        return found

    def validated(self, error: float) -> str | None:
        """Take notice of a validation's top-1 error. → What follows from it on a plateau: "drop", "end"; or None."""
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

    def is_best(self, error: float) -> bool:
        """Whether no validation so far had so low an error; to be asked before `validated`."""
        return error < self._best

    def state(self) -> dict[str, Any]:
        return {"best": None if self._best == math.inf else self._best, "since": self._since, "fallen": self._fallen}

    def load_state(self, state: dict[str, Any], forget_errors: bool = False) -> None:
        """Take over what `state` gave; `forget_errors`, which are of other images, and keep how often rates fell."""
        self._fallen = state["fallen"]
        if not forget_errors:
            self._best = math.inf if state["best"] is None else state["best"]
            self._since = state["since"]

    def _scaled(self, rate: float) -> float:
        """Rates grow with the batch: 256 at 0.02 was as good as 128 at 0.01 in the original's log."""
        return rate * self._recipe.train.batch_size / self._recipe.optim.batch_size

    def _divisor(self, step: int) -> tuple[float, float]:
        """What the rates of weights and biases have fallen by."""
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
    """1 in the first stretch, `factor` in the last."""
    if stretches == 1:
        return 1.0
    return factor ** (min(int(progress * stretches), stretches - 1) / (stretches - 1))


class Momentum:
    """Holds the velocities of a network's parameters; `parts` is one dict of parameters per column."""

    def __init__(self, parts: Sequence[dict[str, Tensor]], momentum: float) -> None:
        self.parts, self.momentum = parts, momentum
        self.velocity = [{name: torch.zeros_like(parameter) for name, parameter in part.items()} for part in parts]

    def freeze(self, rates: dict[str, Rates]) -> None:
        """Let the gradients of frozen layers not be computed, and those of others be. To be called before a step."""
        for part in self.parts:
            for name, w in part.items():
                w.requires_grad_(not rates[name.partition(".")[0]].frozen)

    @torch.no_grad()
    def step(self, rates: dict[str, Rates]) -> None:
        """One update from the parameters' gradients, which are then forgotten. Biases do not decay."""
        for part, velocity in zip(self.parts, self.velocity):
            for name, w in part.items():
                layer, _, kind = name.partition(".")
                now = rates[layer]
                if now.frozen:
                    continue
                assert w.grad is not None, name
                v = velocity[name].mul_(self.momentum)
                if kind == "bias":
                    v.sub_(w.grad, alpha=now.biases)
                else:
                    v.sub_(w, alpha=now.decay * now.weights).sub_(w.grad, alpha=now.weights)
                w.add_(v)
                w.grad = None
