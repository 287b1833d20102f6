"""What the network is: the 2012 configuration, as one grouped network in plain torch.

Source: the configuration whose log gives the paper's 37.5 / 17.0 (specification, section 4). `parallel.py` is the same
network as two columns; both use the functions below.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.normalisation import lrn, same_map_norm
from trainer.recipe import ModelRecipe

# name, kernel, groups: conv2, conv4 and conv5 see their own column only
CONVOLUTIONS = (("conv1", 11, 1), ("conv2", 5, 2), ("conv3", 3, 1), ("conv4", 3, 2), ("conv5", 3, 2))
LAYERS = (*(name for name, _, _ in CONVOLUTIONS), "fc6", "fc7", "fc8")
POOLED = 6  # pool5 gives 6 × 6 maps

Shapes = dict[str, tuple[int, ...]]


class Layers(nn.Module):
    """Convolutions and fully-connected layers by name, on one device, zero until weights are put in."""

    def __init__(self, layers: Shapes, device: torch.device | None = None) -> None:
        super().__init__()
        for name, shape in layers.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros(shape, device=device)))

    def weights(self) -> dict[str, Tensor]:
        """The parameters by layer: conv1.weight, conv1.bias, …"""
        return {name.replace("_", "."): parameter for name, parameter in self.named_parameters()}

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))


class AlexNet(Layers):
    """The grouped network on one device: channels [column 0 | column 1]. The layout of saved weights; the oracle."""

    def __init__(self, recipe: ModelRecipe, classes: int) -> None:
        super().__init__(shapes(recipe, classes))
        self.recipe = recipe

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over weights in the grouped layout."""
        with torch.no_grad():
            for name, parameter in self.weights().items():
                parameter.copy_(weights[name])

    def forward(self, x: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """(n, 3, 224, 224) → logits (n, classes). `masks`: 0/1 dropout masks (n, units) of fc6, fc7; None: testing."""
        x = after_conv1(self.conv("conv1", overhang(x), stride=4), columns=2)
        x = after_conv2(self.conv("conv2", x, padding=2, groups=2), columns=2)
        x = F.relu(self.conv("conv3", x, padding=1))
        x = F.relu(self.conv("conv4", x, padding=1, groups=2))
        x = after_conv5(self.conv("conv5", x, padding=1, groups=2)).flatten(1)
        for i, name in enumerate(("fc6", "fc7")):
            x = dropout(F.relu(self.linear(name, x)), masks[i] if masks else None, self.recipe.dropout)
        return self.linear("fc8", x)


def shapes(recipe: ModelRecipe, classes: int) -> Shapes:
    """Every parameter's shape in the grouped layout; weights (out, in / groups, kernel, kernel) or (out, in)."""
    result: Shapes = {}
    inputs = 3
    for (name, kernel, groups), maps in zip(CONVOLUTIONS, recipe.maps):
        result[f"{name}.weight"] = (maps, inputs // groups, kernel, kernel)
        result[f"{name}.bias"] = (maps,)
        inputs = maps
    inputs *= POOLED * POOLED
    for name, units in (("fc6", recipe.units[0]), ("fc7", recipe.units[1]), ("fc8", classes)):
        result[f"{name}.weight"] = (units, inputs)
        result[f"{name}.bias"] = (units,)
        inputs = units
    return result


def initial_weights(recipe: ModelRecipe, classes: int, seed: int) -> dict[str, Tensor]:
    """Weights from N(0, sd²), constant biases, float32 on the CPU: the same for every placement of the network."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(recipe, classes).items():
        layer, _, kind = name.partition(".")
        if kind == "weight":
            weights[name] = torch.randn(shape, generator=generator) * recipe.weight_sd[LAYERS.index(layer)]
        else:
            weights[name] = torch.full(shape, recipe.bias[LAYERS.index(layer)])
    return weights


def parameter_count(recipe: ModelRecipe, classes: int) -> int:
    return sum(math.prod(shape) for shape in shapes(recipe, classes).values())


# The parts between convolutions. x holds the maps of one or of two columns; normalisation never crosses columns.


def overhang(x: Tensor) -> Tensor:
    """224 → 227: the last windows of conv1 hang over the right and bottom edge, where they read zero."""
    return F.pad(x, (0, 3, 0, 3))


def after_conv1(x: Tensor, columns: int) -> Tensor:
    """LRN of the values before ReLU, pooling, ReLU: 55 → 27."""
    return F.relu(max_pool(lrn(x, columns)))


def after_conv2(x: Tensor, columns: int) -> Tensor:
    """ReLU, LRN, the normalisation within each map that the paper does not mention, pooling: 27 → 13."""
    return max_pool(same_map_norm(lrn(F.relu(x), columns)))


def after_conv5(x: Tensor) -> Tensor:
    """Pooling and ReLU (they commute): 13 → 6."""
    return F.relu(max_pool(x))


def max_pool(x: Tensor) -> Tensor:
    """Overlapping: 3 × 3 windows, 2 apart."""
    return F.max_pool2d(x, 3, 2)


def dropout(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """The paper's form: in training the mask alone, in evaluation times 1 − probability."""
    return x * mask if mask is not None else x * (1 - probability)
