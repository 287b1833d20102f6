"""The ONNX graph: ONNX Runtime against our network in float64, for every recipe."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from networks import HALVES, apart, drawn, images, narrow
from test_export import session
from trainer import onnxgraph
from trainer import recipe as recipes
from trainer.layers import LayerRecipe, ModelRecipe
from trainer.model import Grouped

TWO_LOCAL = ('model.layers.local3={sees="own"}', "model.columns=2", "model.layers.local3.overhang=1")
CASES = [
    *((name, ()) for name in (*recipes.names(), HALVES)),
    ("original", ("model.dropout=0.3", "model.lrn_size=1")),
    ("original", ("model.lrn_size=21",)),  # more maps than a column has
    ("original", ("model.lrn_alpha=0", "model.lrn_k=3.0")),
    *((name, (pool,)) for name in ("tanh", "figure1-tanh") for pool in ("model.pool_size=4", "model.pool_stride=3")),
    ("cifar-13", TWO_LOCAL),
]


def built(model: ModelRecipe, classes: int = 7) -> onnx.ModelProto:
    """Of drawn weights, and a mean of 90 to 110 grey levels."""
    weights = {name: value.numpy() for name, value in drawn(model, classes, torch.float32).items()}
    return onnxgraph.build(model, weights, mean_of(model), classes, {"about": "π"})


def mean_of(model: ModelRecipe) -> np.ndarray:
    return np.linspace(90, 110, 3 * model.size**2, dtype=np.float32).reshape(3, model.size, model.size)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_onnx_runtime_computes_what_the_network_computes_in_float64(name: str, settings: tuple[str, ...]):
    """Logits within 1e-5 of the greatest, of batches of one and of three; probabilities are their softmax."""
    model = narrow(name, *settings).model
    network = Grouped(model, 7).double()
    network.load(drawn(model, 7, torch.float32))
    run = session(built(model).SerializeToString())
    for n in (1, 3):
        pixels = (images(model, n) + torch.from_numpy(mean_of(model))).float()
        logits, probabilities = run.run(["logits", "probabilities"], {"pixels": pixels.numpy()})
        expected = network(pixels.double() - torch.from_numpy(mean_of(model)))
        assert logits.dtype == probabilities.dtype == np.float32
        assert expected.std() > 0.01
        assert apart(torch.from_numpy(logits), expected) < 1e-5
        np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(1), atol=1e-6)


def test_the_graph_of_the_original_is_that_of_the_paper():
    """An operator a layer, and LRN once for each column; one free dimension; nothing but what an old runtime knows."""
    graph = built(narrow("original").model)
    kinds = Counter(node.op_type for node in graph.graph.node)
    layers = {"Conv": 5, "Relu": 7, "MaxPool": 3, "LRN": 4, "Gemm": 3, "Split": 2, "Concat": 2, "Flatten": 1}
    rnorm = {"AveragePool": 1, "Add": 1, "Pow": 1}
    assert kinds == {**layers, **rnorm, "Sub": 1, "Mul": 3 + 2, "Softmax": 1}
    assert (graph.ir_version, [(each.domain, each.version) for each in graph.opset_import]) == (8, [("", 17)])
    run = session(graph.SerializeToString())
    (pixels,), outputs = run.get_inputs(), run.get_outputs()
    assert (pixels.name, pixels.shape) == ("pixels", ["n", 3, 100, 100])
    assert [(each.name, each.shape) for each in outputs] == [("probabilities", ["n", 7]), ("logits", ["n", 7])]
    assert [(each.key, each.value) for each in graph.metadata_props] == [("about", "π")]


def test_layers_may_have_the_names_of_other_values():
    """`pixels`, `mean` and `logits` are what the graph calls values of its own."""
    layers = {
        "pixels": LayerRecipe(kernel=3, width=4, then=("pool", "relu", "pool")),
        "mean": LayerRecipe("linear", width=5),
        "logits": LayerRecipe("linear"),
    }
    model = ModelRecipe(size=12, columns=1, order=tuple(layers), layers=layers)
    network, x = Grouped(model, 7), images(model, 2, torch.float32)
    network.load(drawn(model, 7, torch.float32))
    found = session(built(model).SerializeToString()).run(["logits"], {"pixels": x.numpy() + mean_of(model)})
    assert apart(torch.from_numpy(found[0]), network(x)) < 1e-5
