"""Narrow networks of the recipes, with weights that carry a signal, for tests that compute them."""

import math

import torch
from torch import Tensor

from trainer import recipe as recipes
from trainer.layers import ModelRecipe, plan, shapes
from trainer.recipe import Recipe

WIDTHS = {
    "conv1": 8, "conv2": 16, "conv3": 24, "conv4": 24, "conv5": 16, "conv6": 16, "local3": 6, "local4": 4,
    "fc4": 40, "fc6": 64, "fc7": 48, "bottleneck": 20,
}  # fmt: skip
HALVES = "halves"  # pretrain-2011 with half of the classes for either column


def narrow(name: str, *settings: str, size: int = 100) -> Recipe:
    """A recipe of trainer/recipes, or HALVES, at WIDTHS, of images of 100 pixels, or 24 where it is for CIFAR-10."""
    if name == HALVES:
        return narrow("pretrain-2011", 'model.layers.fc8.sees="own"', *settings, size=size)
    order = recipes.load(name).model.order
    widths = [f"model.layers.{layer}.width={WIDTHS[layer]}" for layer in order[:-1]]
    sizes = [f"model.size={size}"] if "fc8" in order else []
    return recipes.load(name, [*widths, *sizes, *settings])


def drawn(model: ModelRecipe, classes: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights of which every layer's output is about as large as its input, and biases that are all different."""
    generator, weights = torch.Generator().manual_seed(5), {}
    for name, shape in shapes(model, classes).items():
        sd = math.sqrt(2 / math.prod(shape[1:4])) if name.endswith(".weight") else 0.5
        weights[name] = (torch.randn(shape, generator=generator) * sd).to(dtype)
    return weights


def images(model: ModelRecipe, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """As large as centred pixels are."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, 3, model.size, model.size, generator=generator) * 60).to(dtype)


def masks_of(model: ModelRecipe, n: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> dict[str, Tensor]:
    """Dropout masks of torch's own generator."""
    generator, dropped = torch.Generator().manual_seed(seed), model.dropout > 0
    units = {layer.name: layer.width for layer in plan(model, 1000) if dropped and "dropout" in layer.recipe.then}
    return {name: torch.randint(2, (n, width), generator=generator).to(dtype) for name, width in units.items()}


def apart(actual: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    greatest = float(expected.abs().max())
    assert greatest > 0
    return float((actual.to(expected.dtype) - expected).abs().max()) / greatest
