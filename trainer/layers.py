"""The recipe of a model, and the layers that it makes: their shapes, parameters and multiply-adds."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from pipeline import UserError

MAX_PARAMETERS = 2**31
MAX_COUNT = 2**20  # maps, images of a batch, epochs, steps between two log lines: beyond any sense
Count: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Pixels: TypeAlias = Annotated[int, Meta(ge=1, le=4096)]
Probability: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]
Words: TypeAlias = Annotated[tuple[str, ...], Meta(max_length=256)]
MAPS = ("lrn", "rnorm", "pool", "mean-pool", "relu", "tanh")  # what may follow "conv" and "local"
UNITS = ("relu", "tanh", "dropout")  # what may follow "linear"


class RecipeError(UserError):
    """A recipe that does not exist, does not parse, or holds an impossible value."""


@dataclass(frozen=True)
class LayerRecipe:
    """A layer of weights, and the operations that follow it.

    Args:
        kind: "conv"; "local", a convolution with other weights at each position; "linear".
        width: maps or units, of all columns together; 0, in the last layer: one per class.
        kernel, stride, padding: in pixels, of "conv" and "local".
        overhang: zeros, in pixels, beyond the right and the bottom edge, over which the 2012 code's last windows hang.
        sees: "own": the maps of its own column, or "both". The first layer sees the image.
        then: "lrn" across maps, "rnorm" within a map, "pool" and "mean-pool" (the greatest value of a window, the
            mean), "relu", "tanh", "dropout"; in this order.
        sd, bias: the first weights are drawn from N(0, sd²), the biases are constant.
    """

    kind: Literal["conv", "local", "linear"] = "conv"
    width: Count = 0
    kernel: Pixels = 1
    stride: Pixels = 1
    padding: Count = 0
    overhang: Count = 0
    sees: Literal["own", "both"] = "own"
    then: Words = ()
    sd: Annotated[float, Meta(ge=0, le=10**6)] = 0.01
    bias: Annotated[float, Meta(ge=-(10**6), le=10**6)] = 0.0


@dataclass(frozen=True)
class ModelRecipe:
    """The layers in the order in which an image visits them, and their common constants."""

    size: Pixels = 224  # of a side of the input
    columns: Literal[1, 2] = 2
    classes: Annotated[int, Meta(ge=0, le=2**31)] = 0  # that it is meant for; 0: as many as the data set has
    order: Words = ()
    layers: Mapping[str, LayerRecipe] = field(default_factory=dict)
    dropout: Probability = 0.5  # of dropping a unit
    pool_size: Pixels = 3
    pool_stride: Pixels = 2
    lrn_size: Annotated[int, Meta(ge=1, le=1023)] = 5  # maps
    lrn_alpha: Annotated[float, Meta(ge=0, le=10**6)] = 1e-4
    lrn_divided: bool = True  # α by the number of maps: as the 2012 code does, and the paper's formula does not
    lrn_k: Annotated[float, Meta(ge=1e-6, le=10**6)] = 2.0

    def __post_init__(self) -> None:
        require(self.pool_size >= self.pool_stride, "model.pool_stride", self.pool_stride, "1 to model.pool_size")
        require(self.lrn_size % 2 == 1, "model.lrn_size", self.lrn_size, "an odd number of maps")
        require(len(set(self.order)) == len(self.order), "model.order", self.order, "names, each once")
        for name in dict.fromkeys((*self.layers, *self.order)):
            key = f"model.layers.{name}"
            require(re.fullmatch("[a-z][a-z0-9]*", name) is not None, key, name, "small letters and digits")
            require(name in self.order, key, name, f"in model.order, which has {', '.join(self.order)}")
            require(name in self.layers, "model.order", name, f"a layer that has a section, model.layers.{name}")
            _check(key, self.layers[name])
        if self.order:  # layers that do not fit together are an error here, before the first image
            plan(self, self.classes or 1000)


def _check(key: str, layer: LayerRecipe) -> None:
    possible = UNITS if layer.kind == "linear" else MAPS
    allowed = f"of {', '.join(possible)}: what may follow {layer.kind!r}"
    for word in layer.then:
        require(word in possible, f"{key}.then", repr(word), allowed)
    require(layer.then.count("dropout") < 2, f"{key}.then", layer.then, "with dropout once")
    for name in ("padding", "overhang"):
        value, allowed = getattr(layer, name), f"less than the kernel, {layer.kernel} pixels"
        require(value == 0 or value < layer.kernel, f"{key}.{name}", value, allowed)


@dataclass(frozen=True)
class Layer:
    """A layer in its network, all columns together. Sides are in pixels; of units they are 1."""

    name: str
    recipe: LayerRecipe
    width: int  # maps or units
    inputs: int  # maps or units that one of its maps or units sees
    groups: int  # 2: each column sees its own maps alone
    columns: int  # that hold it: a last layer that sees both columns is in the first alone
    side: int  # of the output of the weights
    end: int  # side after the operations that follow

    @property
    def weight(self) -> tuple[int, ...]:
        """Return (out, in, kernel, kernel); for "local" also (…, side, side), for "linear" (out, in)."""
        kernel = self.recipe.kernel
        extents = {"conv": (kernel, kernel), "local": (kernel, kernel, self.side, self.side), "linear": ()}
        return (self.width, self.inputs, *extents[self.recipe.kind])

    @property
    def bias(self) -> tuple[int, ...]:
        return (self.width, self.side, self.side) if self.recipe.kind == "local" else (self.width,)

    @property
    def multiply_adds(self) -> int:
        """Return the multiply-adds of one image, without the biases."""
        shared = self.side**2 if self.recipe.kind == "conv" else 1
        return math.prod(self.weight) * shared

    def share(self, column: int) -> slice:
        """Return the maps or units that a column holds."""
        if column >= self.columns:
            return slice(0, 0)
        return slice(column * self.width // self.columns, (column + 1) * self.width // self.columns)


def plan(recipe: ModelRecipe, classes: int) -> tuple[Layer, ...]:
    """Return the layers of a network for so many classes. Raises RecipeError if they do not fit together."""
    layers: list[Layer] = []
    maps, side = 3, recipe.size  # of the layer before; at first, of the image
    for i, name in enumerate(recipe.order):
        layer, key, last = recipe.layers[name], f"model.layers.{name}", i == len(recipe.order) - 1
        widths = "0 in the last layer, which has one per class, and only there"
        require((layer.width == 0) == last, f"{key}.width", layer.width, widths)
        require(not last or layer.kind == "linear", f"{key}.kind", repr(layer.kind), "linear, being the last layer's")
        require(not last or not layer.then, f"{key}.then", layer.then, "empty, being the last layer's: softmax follows")
        width = layer.width or classes
        groups = recipe.columns if layer.sees == "own" and i else 1
        columns = 1 if last and groups == 1 else recipe.columns
        require(last or width % columns == 0, f"{key}.width", width, "a number of which either column has the half")
        require(width >= columns, "classes", width, "one for each column at least, which hold halves of them")
        require(i > 0 or columns == recipe.columns, "model.order", recipe.order, "two layers at least, of two columns")
        if layer.kind == "linear":
            maps, side, output = maps * side**2, 1, 1
        else:
            linear = layers and layers[-1].recipe.kind == "linear"
            require(not linear, f"{key}.kind", layer.kind, "before the linear ones")
            output = (side + 2 * layer.padding + layer.overhang - layer.kernel) // layer.stride + 1
            require(output >= 1, f"{key}.kernel", layer.kernel, f"at most what it sees: {side} pixels, and its padding")
        end = output
        for word in layer.then:
            if "pool" in word:
                require(end >= recipe.pool_size, f"{key}.then", word, f"after {recipe.pool_size} pixels; it has {end}")
                end = pooled(end, recipe.pool_size, recipe.pool_stride)
        layers.append(Layer(name, layer, width, maps // groups, groups, columns, output, end))
        maps, side = width, end
    require(bool(layers), "model.order", recipe.order, "one layer at least")
    count = sum(math.prod(layer.weight) + math.prod(layer.bias) for layer in layers)
    require(count <= MAX_PARAMETERS, "model", f"{count:,} parameters", f"at most {MAX_PARAMETERS:,}")
    return tuple(layers)


def pooled(side: int, size: int, stride: int) -> int:
    """Return the side after pooling. A last window that hangs over counts if it begins inside, as in the 2012 code."""
    return min(-(-(side - size) // stride), (side - 1) // stride) + 1


def shapes(recipe: ModelRecipe, classes: int) -> dict[str, tuple[int, ...]]:
    """Return every parameter's shape in the grouped layout: conv1.weight, conv1.bias, …"""
    layers = plan(recipe, classes)
    return {f"{layer.name}.{kind}": getattr(layer, kind) for layer in layers for kind in ("weight", "bias")}


def parameter_count(recipe: ModelRecipe, classes: int) -> int:
    return sum(math.prod(shape) for shape in shapes(recipe, classes).values())


def multiply_adds(recipe: ModelRecipe, classes: int) -> int:
    """Return the multiply-adds of the forward pass of one image, without the biases."""
    return sum(layer.multiply_adds for layer in plan(recipe, classes))


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise RecipeError, which says what is allowed, unless a key's value `holds`."""
    if not holds:
        raise RecipeError(f"{key} = {value}: must be {allowed}")
