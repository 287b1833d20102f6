"""Find numbers that are not finite, by step and layer; and the change of each layer's weights by an update."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from numpy import ndarray
from torch import Tensor

from pipeline import UserError
from trainer.distributed import SINGLE, World
from trainer.model import Column
from trainer.optim import Rates
from trainer.parallel import TwoColumnNet

EVERY = 50  # steps at most between two checks; only a check waits for the devices
NEVER = 2**62


class Diverged(UserError):
    """A run that met a number which is not finite."""


class Watch:
    """Keeps on the devices the first step at which loss, output or gradient of a layer is not finite.

    `note` at every step does not wait for the devices; `check` reads the steps.
    """

    def __init__(self, network: TwoColumnNet, world: World = SINGLE) -> None:
        self._world = world
        self._loss = torch.full((), NEVER, device=network.devices[0])
        self._columns = [_ColumnNotes(module) for module in network.modules() if isinstance(module, Column)]

    @torch.no_grad()
    def note(self, step: int, losses: Tensor) -> None:
        """Examine a step, after its forward and backward passes and before its update."""
        self._loss = _first(self._loss, losses, step)
        for column in self._columns:
            column.note(step)

    def check(self) -> None:
        """Raise Diverged, with the step and the layer, if a number was not finite in any rank. A collective call."""
        outputs = _by_layer((column.layers, column.outputs) for column in self._columns)
        gradients = _by_layer((column.layers, column.gradients) for column in self._columns)
        own = [int(self._loss), *outputs.values(), *gradients.values()]
        loss, *steps = map(min, zip(*self._world.all_gather(own)))
        outputs, gradients = dict(zip(outputs, steps)), dict(zip(gradients, steps[len(outputs) :]))
        step = min(loss, *steps)
        if step == NEVER:
            return
        forward = next((f"the output of {layer}" for layer, first in outputs.items() if first == step), None)
        backward = next((f"the gradient of {layer}" for layer in reversed(gradients) if gradients[layer] == step), None)
        origin = forward or ("the loss" if loss == step else backward)
        raise Diverged(f"step {step + 1}: {origin} is not a finite number: training has diverged")


class _ColumnNotes:
    """The first steps at which outputs and gradients of a column's layers were not finite: (layers,) int64."""

    def __init__(self, column: Column) -> None:
        self._weights = column.weights()
        self.layers = list(dict.fromkeys(name.partition(".")[0] for name in self._weights))
        self.outputs = torch.full((len(self.layers),), NEVER, device=next(column.parameters()).device)
        self.gradients = self.outputs.clone()
        self._nothing = dict.fromkeys(self.layers, torch.zeros(()))
        self._sums = dict(self._nothing)  # keys from the start: for other keys torch.compile would compile again
        column.observe = self._observe

    def _observe(self, layer: str, output: Tensor) -> None:
        """Keep the sum of an output, which is not finite if one of its terms is not."""
        self._sums[layer] = output.detach().sum(dtype=torch.promote_types(output.dtype, torch.float32))

    def note(self, step: int) -> None:
        sums = torch.stack([self._sums[layer] for layer in self.layers])
        self._sums |= self._nothing  # which gives CUDA graphs their memory back
        self.outputs = _first(self.outputs, sums, step)
        zero = sums.new_zeros(1)  # for a frozen layer
        gradients = [zero if w.grad is None else w.grad for w in self._weights.values()]
        # On a CPU the 2-norm takes a fifteenth of the time of the maximum. It overflows if a gradient is above 1.8e19,
        # at which a run has diverged, too.
        norms = torch.stack(torch._foreach_norm(gradients))
        self.gradients = _first(self.gradients, norms.unflatten(0, (len(self.layers), 2)).sum(1), step)


def _first(noted: Tensor, values: Tensor, step: int) -> Tensor:
    return torch.where(values.isfinite(), noted, noted.clamp(max=step))


def _by_layer(columns: Iterable[tuple[Sequence[str], Tensor]]) -> dict[str, int]:
    """Return the first step of each layer in any column."""
    steps: dict[str, int] = {}
    for layers, noted in columns:
        for layer, step in zip(layers, noted.tolist()):
            steps[layer] = min(step, steps.get(layer, NEVER))
    return steps


@torch.no_grad()
def update_ratios(
    parts: Sequence[dict[str, Tensor]], velocity: Sequence[dict[str, Tensor]], rates: Mapping[str, Rates]
) -> dict[str, dict[str, float]]:
    """Return by layer the means of |w| and of |Δw|, the last update, and their ratio, which the 2012 program printed.

    A ratio between 10⁻⁴ and 3·10⁻³ is healthy; that of a frozen layer is 0. Waits for the devices.
    """
    ratios = {}
    for name in (name for name in parts[0] if name.endswith(".weight")):
        columns = [i for i, part in enumerate(parts) if name in part]
        count = sum(parts[i][name].numel() for i in columns)
        w, v = (sum(float(values[i][name].abs().sum()) for i in columns) / count for values in (parts, velocity))
        layer = name.removesuffix(".weight")
        v = 0.0 if rates[layer].frozen else v
        ratios[layer] = {"weight": w, "update": v, "ratio": v / w if w else 0.0}
    return ratios


def require_finite_outputs(outputs: Tensor | ndarray, network: str, kind: str = "outputs") -> None:
    """Raise Diverged if outputs in evaluation are not finite; `network` names the file of its weights, if any."""
    if not bool(torch.as_tensor(outputs).isfinite().all()):
        problem = f"the network's {kind} are not finite numbers: its training has diverged"
        raise Diverged(f"{network}: {problem}; name an older checkpoint" if network else problem)


def require_finite(step: int, weights: dict[str, Tensor]) -> None:
    """Raise Diverged if weights are not finite numbers: an update may overflow where its gradient does not."""
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise Diverged(f"step {step}: {name} is not a finite number: training has diverged")
