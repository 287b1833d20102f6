"""The layers of a recipe in plain torch, as one column or as one grouped network; their first weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.layers import Layer, ModelRecipe, plan
from trainer.lrn import LRN, lrn, same_map_norm

Weights = dict[str, Tensor]  # by layer: conv1.weight, conv1.bias, …
Masks = Mapping[str, Tensor]  # by layer: 0/1 dropout masks (n, units)
Observer = Callable[[str, Tensor], None]  # of the name of a layer and its output


class Column(nn.Module):
    """One column of the network, on one device; or with `column=None` all columns. Weights are zero at first.

    All columns' maps stand in the order [column 0 | column 1]: the grouped layout, in which weights are saved.
    `observe` is called with the name and the output of each layer that `run` computes.
    """

    def __init__(
        self, recipe: ModelRecipe, classes: int, column: int | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.recipe, self.column, self.device = recipe, column, device
        self.lrn = LRN(recipe.lrn_size, recipe.lrn_alpha / (recipe.lrn_size if recipe.lrn_divided else 1), recipe.lrn_k)
        self.layers = plan(recipe, classes)
        self.observe: Observer | None = None
        for layer in self.layers:
            for kind, shape in (("weight", layer.weight), ("bias", layer.bias)):
                width = len(range(shape[0])[self.share(layer)])
                if width:
                    values = torch.zeros((width, *shape[1:]), device=device)
                    self.register_parameter(f"{layer.name}_{kind}", nn.Parameter(values))

    def share(self, layer: Layer) -> slice:
        """Return the maps or units of a layer that this column holds."""
        return slice(0, layer.width) if self.column is None else layer.share(self.column)

    def weights(self) -> Weights:
        """Return the parameters by their names in checkpoints: conv1.weight, conv1.bias, …"""
        return {name.replace("_", "."): parameter for name, parameter in self.named_parameters()}

    def groups(self, count: int) -> int:
        """Return how many of a layer's `count` groups, or columns, are here."""
        return count if self.column is None else 1

    def layer(self, layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
        """Compute one layer and the operations that follow it.

        Args:
            x: (n, maps, side, side) or (n, units).
            mask: (n, units) of 0 and 1, for the units of this column; None in evaluation, or without dropout.
        """
        weight, bias = getattr(self, f"{layer.name}_weight"), getattr(self, f"{layer.name}_bias")
        recipe, groups = layer.recipe, self.groups(layer.groups)
        if recipe.kind == "linear":
            x = _linear(x.flatten(1), weight, bias, groups)
        else:
            if recipe.overhang:  # the last windows hang over the edge, and see zeros there
                x = F.pad(x, (0, recipe.overhang, 0, recipe.overhang))
            if recipe.kind == "conv":
                x = F.conv2d(x, weight, bias, recipe.stride, recipe.padding, groups=groups)
            else:
                x = _local(x, weight, bias, layer, groups)
        for word in recipe.then:
            x = self._then(word, x, self.groups(layer.columns), mask)
        return x

    def _then(self, word: str, x: Tensor, columns: int, mask: Tensor | None) -> Tensor:
        if word == "relu":
            return F.relu(x)
        if word == "tanh":
            return F.tanh(x)
        if word == "dropout":  # the paper's form: in training the mask alone, in evaluation times 1 − probability
            return x * (1 - self.recipe.dropout) if mask is None else x * mask.to(x.dtype)
        if word == "lrn":
            return lrn(x, columns, self.lrn)
        if word == "rnorm":
            return same_map_norm(x)
        size, stride = self.recipe.pool_size, self.recipe.pool_stride
        pool = F.max_pool2d if word == "pool" else F.avg_pool2d
        return pool(x, size, stride, ceil_mode=True)  # a last window may hang over, as `layers.pooled` has it

    def run(self, layers: Sequence[Layer], x: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
        """Compute layers one after the other, with a mask or None for each."""
        for layer, mask in zip(layers, masks):
            x = self.layer(layer, x, mask)
            if self.observe:
                self.observe(layer.name, x)
        return x


class Grouped(Column):
    """The network on one device, without columns: the layout of saved weights, and the oracle for TwoColumnNet."""

    def load(self, weights: Weights) -> None:
        """Copy weights in the grouped layout into the network."""
        with torch.no_grad():
            for name, parameter in self.weights().items():
                parameter.copy_(weights[name])

    def forward(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """Return the logits (n, classes) of images (n, 3, size, size). `masks` for training; None: evaluation."""
        return self.run(self.layers, x, [(masks or {}).get(layer.name) for layer in self.layers])


def initial_weights(recipe: ModelRecipe, classes: int, seed: int) -> Weights:
    """Draw weights from N(0, sd²), with constant biases; float32 on the CPU, the same wherever the columns are."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in plan(recipe, classes):
        weights[f"{layer.name}.weight"] = torch.randn(layer.weight, generator=generator) * layer.recipe.sd
        weights[f"{layer.name}.bias"] = torch.full(layer.bias, layer.recipe.bias)
    return weights


def _linear(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return F.linear(x, weight, bias)
    half = len(weight) // groups  # of an odd number, the first column has the smaller half
    columns = zip(x.chunk(groups, 1), (weight[:half], weight[half:]))
    return torch.cat([F.linear(inputs, rows) for inputs, rows in columns], 1) + bias


def _local(x: Tensor, weight: Tensor, bias: Tensor, layer: Layer, groups: int) -> Tensor:
    """Return a convolution whose positions do not share weights: (n, in, side, side) → (n, out, side', side').

    Sizes are read from the recipe, not from the tensors: the ONNX exporter, which traces, needs them as numbers.
    """
    recipe, side = layer.recipe, layer.side
    windows = F.unfold(x, recipe.kernel, padding=recipe.padding, stride=recipe.stride)  # (n, in · kernel², side'²)
    columns = windows.unflatten(1, (groups, -1))
    rows = weight.unflatten(0, (groups, -1)).flatten(2, 4).flatten(3)  # (groups, out / groups, in · kernel², side'²)
    return torch.einsum("ngkp,gokp->ngop", columns, rows).flatten(1, 2).unflatten(2, (side, side)) + bias


def compiled(run: Callable[..., Any], how: str) -> Callable[..., Any]:
    """Return `Column.run` compiled: "segments", or "graphs", which are CUDA graphs as well; or as it is: "no"."""
    if how == "no":
        return run
    torch._dynamo.config.recompile_limit = 128  # a compilation for each segment of a column, and size of batch
    torch._dynamo.config.optimize_ddp = False  # no other cuts: not one for each bucket of gradients
    return torch.compile(run, dynamic=False, mode="reduce-overhead" if how == "graphs" else None)
