"""The update rule of 2012, and its rates.

v ← μ·v − λ·ε·w − ε·⟨∂L/∂w⟩,  w ← w + v   (paper, section 5). ε stands inside v, so that a drop of the rate does not
rescale the momentum that was gathered before it; torch.optim.SGD differs there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.recipe import OptimRecipe


@dataclass(frozen=True)
class Rates:
    weights: float
    biases: float


def rates(recipe: OptimRecipe, step: int, steps: int) -> Rates:
    """Equally long stretches of constant rates, each lower by the same factor (the schedule of configuration 170)."""
    return Rates(
        recipe.lr * _fall(step / steps, recipe.lr_steps, recipe.lr_factor),
        recipe.bias_lr * _fall(step / steps, recipe.bias_lr_steps, recipe.bias_lr_factor),
    )


def _fall(progress: float, stretches: int, factor: float) -> float:
    """1 at the beginning, 1 / factor in the last stretch."""
    if stretches == 1:
        return 1.0
    return factor ** (-min(int(progress * stretches), stretches - 1) / (stretches - 1))


class Momentum:
    """Holds the velocities of a network's parameters; `parts` is one dict of parameters per column."""

    def __init__(self, parts: Sequence[dict[str, Tensor]], recipe: OptimRecipe) -> None:
        self.parts, self.recipe = parts, recipe
        self.velocity = [{name: torch.zeros_like(parameter) for name, parameter in part.items()} for part in parts]

    @torch.no_grad()
    def step(self, now: Rates) -> None:
        """One update from the parameters' gradients, which are then forgotten. Biases do not decay."""
        for part, velocity in zip(self.parts, self.velocity):
            for name, w in part.items():
                v = velocity[name].mul_(self.recipe.momentum)
                assert w.grad is not None, name
                if name.endswith(".bias"):
                    v.sub_(w.grad, alpha=now.biases)
                else:
                    v.sub_(w, alpha=self.recipe.decay * now.weights).sub_(w.grad, alpha=now.weights)
                w.add_(v)
                w.grad = None
