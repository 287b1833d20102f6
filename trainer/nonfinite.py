"""Watches over the numbers of a run: which layer gave the first one that is not finite, and how much layers change."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import UserError
from trainer.distributed import SINGLE, World
from trainer.optim import Rates
from trainer.parallel import TwoColumnNet

EVERY = 50  # steps at most between looks; the devices are waited for at a look only
NEVER = 2**62


class Diverged(UserError):
    """A run that met a number which is not finite."""


class Watch:
    """Notes on the devices, at every step, whether loss, outputs and gradients are finite; `check` reads the notes."""

    def __init__(self, network: TwoColumnNet, world: World = SINGLE) -> None:
        self._world = world
        self._layers = [
            [layer.name for layer in network.layers if i < layer.columns] for i in range(len(network.devices))
        ]
        self._parts = network.parts()
        self._loss = torch.full((), NEVER, device=network.devices[0])
        self._outputs = [torch.full((len(own),), NEVER, device=d) for own, d in zip(self._layers, network.devices)]
        self._gradients = [outputs.clone() for outputs in self._outputs]

    @torch.no_grad()
    def note(self, step: int, losses: Tensor, sums: Sequence[Tensor]) -> None:
        """To be called with a step's loss, the sums of its outputs (`watched`), and the gradients in place."""
        self._loss = _first(self._loss, losses, step)
        for i, (layers, part) in enumerate(zip(self._layers, self._parts)):
            self._outputs[i] = _first(self._outputs[i], sums[i], step)
            found = [part[f"{layer}.{kind}"].grad for layer in layers for kind in ("weight", "bias")]
            greatest = torch._foreach_norm([_zero(sums[i]) if each is None else each for each in found], float("inf"))
            both = torch.stack(greatest).unflatten(0, (len(layers), 2)).sum(1)
            self._gradients[i] = _first(self._gradients[i], both, step)

    def check(self) -> None:
        """Raise Diverged, with the step and the layer, where a number since the beginning was not finite.

        Every process of a job calls it, and each sees what one has noted.
        """
        outputs = self._merged(self._outputs)
        gradients = self._merged(self._gradients)
        loss, *each = self._world.minimum([int(self._loss), *outputs.values(), *gradients.values()])
        outputs, gradients = dict(zip(outputs, each)), dict(zip(gradients, each[len(outputs) :]))
        step = min(loss, *outputs.values(), *gradients.values())
        if step == NEVER:
            return
        out = next((name for name, first in outputs.items() if first == step), None)
        back = next((name for name in reversed(gradients) if gradients[name] == step), None)
        what = f"the output of {out}" if out else "the loss" if loss == step else f"the gradient of {back}"
        raise Diverged(f"step {step + 1}: {what} is not a finite number: training has diverged")

    def _merged(self, noted: Sequence[Tensor]) -> dict[str, int]:
        """The first step of each layer, over its columns."""
        found: dict[str, int] = {}
        for layers, steps in zip(self._layers, noted):
            for name, step in zip(layers, steps.tolist()):
                found[name] = min(step, found.get(name, NEVER))
        return found


def _first(noted: Tensor, values: Tensor, step: int) -> Tensor:
    return torch.where(values.isfinite(), noted, noted.clamp(max=step))


def _zero(like: Tensor) -> Tensor:
    """For what a frozen layer has no gradient of."""
    return like.new_zeros(1)


@torch.no_grad()
def changes(
    parts: Sequence[dict[str, Tensor]], velocity: Sequence[dict[str, Tensor]], rates: Mapping[str, Rates]
) -> dict[str, dict[str, float]]:
    """By layer: the mean of |w| and of |Δw|, the last update, and their ratio, which the 2012 program printed too.

    A ratio between 10⁻⁴ and 3·10⁻³ is healthy; a frozen layer has 0. It waits for the devices.
    """
    found: dict[str, Any] = {}
    for name in (name for name in parts[0] if name.endswith(".weight")):
        held = [i for i, part in enumerate(parts) if name in part]
        count = sum(parts[i][name].numel() for i in held)
        w, v = (sum(float(values[i][name].abs().sum()) for i in held) / count for values in (parts, velocity))
        layer = name.removesuffix(".weight")
        v = 0.0 if rates[layer].frozen else v
        found[layer] = {"weight": w, "update": v, "ratio": v / w if w else 0.0}
    return found


def require_finite(step: int, weights: dict[str, Tensor]) -> None:
    """Raise Diverged where weights are not finite numbers: the update itself may be where they overflow."""
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise Diverged(f"step {step}: {name} is not a finite number: training has diverged")
