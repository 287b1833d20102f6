"""The network of a recipe as an ONNX graph, node by node: what `model.Grouped` computes when testing."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper

from pipeline import UserError
from trainer.layers import Layer, LayerRecipe, ModelRecipe, parameter_count, plan
from trainer.normalisation import BETA, SAME_MAP_ALPHA, SAME_MAP_SIZE

OPSET, IR_VERSION = 17, 8  # of 2022, so that older runtimes read it too; its operators are all that we need
MOST_BYTES = 2**31 - 2**24  # of a protobuf message, which an ONNX file is: 2 GiB, with room for what is not weights

Weights = Mapping[str, np.ndarray]  # float32, in the grouped layout: conv1.weight, conv1.bias, …


def build(recipe: ModelRecipe, weights: Weights, mean: np.ndarray, classes: int, text: Mapping[str, str]) -> ModelProto:
    """`pixels` (n, 3, size, size) float32, RGB grey levels → `logits` and `probabilities` (n, classes) float32.

    Args:
        mean: (3, size, size) float32, in grey levels: what is subtracted first.
        text: goes into the file's metadata.
    Raises:
        UserError: more weights than an ONNX file can hold.
    """
    size = 4 * (parameter_count(recipe, classes) + mean.size)
    if size > MOST_BYTES:
        raise UserError(
            f"weights of {size / 2**30:.2f} GiB; an ONNX file holds {MOST_BYTES / 2**30:.2f}; "
            "the checkpoint is a safetensors file, which any program can read too"
        )
    graph = _Graph()
    x = graph.node("Sub", "centred", "pixels", graph.constant("mean", mean))
    kind = ""
    for layer in plan(recipe, classes):
        if layer.recipe.kind == "linear" and kind != "linear":
            x = graph.node("Flatten", "flat", x)
        kind = layer.recipe.kind
        x = {"conv": _conv, "local": _local, "linear": _linear}[kind](graph, layer, weights, x)
        for word in layer.recipe.then:
            x = _then(graph, word, f"{layer.name}.{word}", x, layer.columns, recipe)
    graph.nodes[-1].output[0] = "logits"  # nothing follows the last layer but softmax
    graph.nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], "probabilities", axis=1))
    return _model(graph, recipe.size, classes, text)


def _model(graph: "_Graph", size: int, classes: int, text: Mapping[str, str]) -> ModelProto:
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, size, size])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", classes]) for name in ("probabilities", "logits")
    ]
    whole = helper.make_graph(graph.nodes, "network", [pixels], outputs, graph.constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(whole, opset_imports=opsets, ir_version=IR_VERSION, producer_name="penstock")
    helper.set_model_props(model, dict(text))
    checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and constants in the making. A value has the name of the node that gives it."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._names = {"pixels", "logits", "probabilities"}  # a layer may have any name

    def constant(self, name: str, value: np.ndarray | float) -> str:
        """A tensor of the file, float32; a number has no dimensions."""
        name = self._unique(name)
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def shape(self, name: str, *sides: int) -> str:
        """What Reshape is given; 0: as it was."""
        name = self._unique(f"{name}.shape")
        self.constants.append(numpy_helper.from_array(np.array(sides, np.int64), name))
        return name

    def node(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output, whose name it returns."""
        name = self._unique(name)
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def halves(self, name: str, x: str) -> list[str]:
        """(n, maps, …) → the maps of either column."""
        name = self._unique(f"{name}.split")
        outputs = [f"{name}.{column}" for column in range(2)]
        self.nodes.append(helper.make_node("Split", [x], outputs, name, axis=1))
        return outputs

    def _unique(self, name: str) -> str:
        """A layer may pool twice: the second is `conv1.pool.2`."""
        count, found = 1, name
        while found in self._names:
            count += 1
            found = f"{name}.{count}"
        self._names.add(found)
        return found


def _parameters(graph: _Graph, layer: Layer, weights: Weights) -> tuple[str, str]:
    weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
    return graph.constant(weight, weights[weight]), graph.constant(bias, weights[bias])


def _conv(graph: _Graph, layer: Layer, weights: Weights, x: str) -> str:
    parameters = _parameters(graph, layer, weights)
    return graph.node("Conv", layer.name, x, *parameters, group=layer.groups, **_windows(layer.recipe))


def _local(graph: _Graph, layer: Layer, weights: Weights, x: str) -> str:
    """A convolution whose places do not share weights: the windows side by side, times the weights of their place."""
    name, width, side, places = layer.name, layer.width, layer.side, layer.side**2
    maps, taps = layer.inputs * layer.groups, layer.recipe.kernel**2
    picks = np.tile(np.eye(taps), (maps, 1)).reshape(maps * taps, 1, layer.recipe.kernel, layer.recipe.kernel)
    one_hot = graph.constant(f"{name}.picks", picks)  # for each map, and place in a window: a kernel that picks it
    x = graph.node("Conv", f"{name}.windows", x, one_hot, group=maps, **_windows(layer.recipe))
    shape = graph.shape(f"{name}.grouped", 0, layer.groups, layer.inputs * taps, places)
    x = graph.node("Reshape", f"{name}.grouped", x, shape)
    rows = weights[f"{name}.weight"].reshape(layer.groups, width // layer.groups, layer.inputs * taps, places)
    weight = graph.constant(f"{name}.weight", rows)
    x = graph.node("Einsum", f"{name}.products", x, weight, equation="ngkp,gokp->ngop")
    x = graph.node("Reshape", f"{name}.maps", x, graph.shape(f"{name}.maps", 0, width, side, side))
    return graph.node("Add", name, x, graph.constant(f"{name}.bias", weights[f"{name}.bias"]))


def _linear(graph: _Graph, layer: Layer, weights: Weights, x: str) -> str:
    if layer.groups == 1:
        return graph.node("Gemm", layer.name, x, *_parameters(graph, layer, weights), transB=1)
    found = []
    for column, own in enumerate(graph.halves(layer.name, x)):
        name = f"{layer.name}.column{column}"
        rows = {kind: weights[f"{layer.name}.{kind}"][layer.share(column)] for kind in ("weight", "bias")}
        constants = [graph.constant(f"{name}.{kind}", value) for kind, value in rows.items()]
        found.append(graph.node("Gemm", name, own, *constants, transB=1))
    return graph.node("Concat", layer.name, *found, axis=1)


def _then(graph: _Graph, word: str, name: str, x: str, columns: int, recipe: ModelRecipe) -> str:
    """What follows a layer: as `model.Part` has it."""
    if word in ("relu", "tanh"):
        return graph.node(word.title(), name, x)
    if word == "dropout":
        kept = 1 - recipe.dropout
        return x if kept == 1 else graph.node("Mul", name, x, graph.constant(f"{name}.kept", kept))
    if word == "rnorm":
        return _same_map_norm(graph, name, x)
    if word in ("pool", "mean-pool"):  # a last window that hangs over is the mean of what it sees, in ONNX as in torch
        kind = "MaxPool" if word == "pool" else "AveragePool"
        return graph.node(kind, name, x, ceil_mode=1, **_square(recipe.pool_size, recipe.pool_stride))
    if columns == 1:
        return _lrn(graph, name, x, recipe)
    parts = [_lrn(graph, f"{name}.column{i}", own, recipe) for i, own in enumerate(graph.halves(name, x))]
    return graph.node("Concat", name, *parts, axis=1)


def _lrn(graph: _Graph, name: str, x: str, recipe: ModelRecipe) -> str:
    """x / (bias + alpha / size · Σ x²)^beta over `size` maps of one column: ONNX always divides alpha by size."""
    if recipe.lrn_alpha == 0:  # which ONNX Runtime refuses
        return graph.node("Mul", name, x, graph.constant(f"{name}.factor", math.pow(recipe.lrn_k, -BETA)))
    alpha = recipe.lrn_alpha * (1 if recipe.lrn_divided else recipe.lrn_size)
    return graph.node("LRN", name, x, size=recipe.lrn_size, alpha=alpha, beta=BETA, bias=recipe.lrn_k)


def _same_map_norm(graph: _Graph, name: str, x: str) -> str:
    """x · (1 + α · mean of x² over 5 × 5 neighbours, zero outside)^−β."""
    margin = [SAME_MAP_SIZE // 2] * 4
    squares = graph.node("Mul", f"{name}.squares", x, x)
    mean = graph.node(
        "AveragePool", f"{name}.mean", squares, pads=margin, count_include_pad=1, **_square(SAME_MAP_SIZE, 1)
    )
    scaled = graph.node("Mul", f"{name}.scaled", mean, graph.constant(f"{name}.alpha", SAME_MAP_ALPHA))
    scale = graph.node("Add", f"{name}.scale", scaled, graph.constant(f"{name}.one", 1.0))
    power = graph.node("Pow", f"{name}.power", scale, graph.constant(f"{name}.beta", -BETA))
    return graph.node("Mul", name, x, power)


def _windows(recipe: LayerRecipe) -> dict[str, list[int]]:
    """Of a convolution: what it overhangs is as zero as its padding."""
    end = recipe.padding + recipe.overhang
    return _square(recipe.kernel, recipe.stride) | {"pads": [recipe.padding, recipe.padding, end, end]}


def _square(kernel: int, stride: int) -> dict[str, list[int]]:
    return {"kernel_shape": [kernel, kernel], "strides": [stride, stride]}
