"""The grouped network: its counts against the specification, its numbers against torch's own layers."""

import math

import pytest
import torch
import torch.nn.functional as F

from networks import HALVES, apart, drawn, images, masks_of, narrow
from reference import Halving, plain_network
from trainer import recipe as recipes
from trainer.layers import ModelRecipe, multiply_adds, parameter_count, plan, pooled, shapes
from trainer.model import Grouped, initial_weights
from trainer.parallel import TwoColumnNet

TABLE = {  # specification, section 4.2: weights, biases, multiply-adds of one image
    "conv1": (34_848, 96, 105_415_200),
    "conv2": (307_200, 256, 223_948_800),
    "conv3": (884_736, 384, 149_520_384),
    "conv4": (663_552, 384, 112_140_288),
    "conv5": (442_368, 256, 74_760_192),
    "fc6": (37_748_736, 4_096, 37_748_736),
    "fc7": (16_777_216, 4_096, 16_777_216),
    "fc8": (4_096_000, 1_000, 4_096_000),
}
PLAIN = [
    *(("original", 224, 6), ("paper", 100, 3), ("half", 100, 3), ("pretrain-2011", 100, 3), (HALVES, 100, 3)),
    *(("tanh", 100, 3), ("without-overlap", 100, 2), ("figure1-relu", 24, 3), ("cifar-11", 24, 3), ("cifar-13", 24, 3)),
]  # recipe, sides of the image and of the last maps


def model(name: str) -> ModelRecipe:
    return recipes.load(name).model


def test_the_original_has_the_counts_of_the_specification():
    """Section 4.2, layer by layer and in all; section 4.3's half network and sixth convolution."""
    counts = {
        layer.name: (math.prod(layer.weight), math.prod(layer.bias), layer.multiply_adds)
        for layer in plan(model("original"), 1000)
    }
    assert counts == TABLE
    assert parameter_count(model("original"), 1000) == 60_965_224
    assert multiply_adds(model("original"), 1000) == 724_406_816
    assert parameter_count(model("half"), 1000) == 59_798_312
    assert round(multiply_adds(model("half"), 1000) / 1e6, 1) == 391.5
    assert parameter_count(model("six-conv"), 1000) == 60_965_224 + 590_080
    assert multiply_adds(model("six-conv"), 1000) == 724_406_816 + 36 * 9 * 256 * 256


def test_pooled_sides_are_those_of_torch():
    for side in range(1, 30):
        for size in range(1, min(side, 5) + 1):
            for stride in range(1, size + 1):
                expected = F.max_pool2d(torch.zeros(1, 1, side, side), size, stride, ceil_mode=True).shape[-1]
                assert pooled(side, size, stride) == expected, (side, size, stride)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_builds_what_it_counts(name: str):
    """Real modules at full width, without memory: grouped, and as columns, whose shares add up."""
    recipe = model(name)
    classes = recipe.classes or 1000
    devices = [torch.device("meta")] * recipe.columns
    with torch.device("meta"):
        grouped, columns = Grouped(recipe, classes), TwoColumnNet(recipe, classes, devices)
    expected = shapes(recipe, classes)
    assert {key: tuple(w.shape) for key, w in grouped.weights().items()} == expected
    for network in (grouped, columns):
        assert sum(w.numel() for w in network.parameters()) == parameter_count(recipe, classes)
    for key, shape in expected.items():
        parts = [part[key].shape for part in columns.parts() if key in part]
        assert (sum(part[0] for part in parts), *parts[0][1:]) == shape
        assert len(parts) == recipe.columns or key.startswith(recipe.order[-1])
        assert max(part[0] for part in parts) - min(part[0] for part in parts) <= 1


@pytest.mark.parametrize(("name", "size", "side"), PLAIN)
def test_the_network_is_that_of_plain_torch_layers(name: str, size: int, side: int):
    """Outputs, and the gradients of every weight and of the image, of a network written out without a recipe."""
    recipe = narrow(name, size=size).model
    network, plain = Grouped(recipe, 7).double(), plain_network(name, 7, side).double()
    weights = drawn(recipe, 7)
    network.load(weights)
    plain.load_state_dict(weights)
    masks = masks_of(recipe, 2)
    for drop in (None, masks) if masks else (None,):
        for layer, mask in zip((module for module in plain if isinstance(module, Halving)), (drop or {}).values()):
            layer.mask = mask
        ours, theirs = images(recipe, 2).requires_grad_(), images(recipe, 2).requires_grad_()
        outputs = network(ours, drop), plain(theirs)
        assert outputs[1].std() > 0.1
        assert apart(*outputs) < 1e-10
        for logits in outputs:
            logits.square().sum().backward()
        assert apart(ours.grad, theirs.grad) < 1e-10
        for key, expected in plain.named_parameters():
            assert apart(network.weights()[key].grad, expected.grad) < 1e-10, key
        network.zero_grad()
        plain.zero_grad()


def test_first_weights():
    """Of each layer's own deviation and bias; a function of the seed."""
    recipe = narrow("original", "model.layers.conv3.sd=0.2", "model.layers.conv4.bias=0.25").model
    weights, again, other = (initial_weights(recipe, 7, seed) for seed in (5, 5, 6))
    expected = {"conv1": 0.01, "conv2": 0.01, "conv3": 0.2, "conv4": 0.03, "conv5": 0.03, "fc6": 0.01, "fc7": 0.01}
    for name, sd in expected.items():
        w = weights[f"{name}.weight"]
        assert abs(float(w.std()) / sd - 1) < 4 / math.sqrt(2 * w.numel()), name
        assert abs(float(w.mean()) / sd) < 4 / math.sqrt(w.numel()), name
        assert torch.equal(w, again[f"{name}.weight"])
        assert not torch.equal(w, other[f"{name}.weight"])
    biases = [set(weights[f"{name}.bias"].tolist()) for name in recipe.order]
    assert biases == [{0}, {1}, {0}, {0.25}, {1}, {1}, {1}, {0}]
    assert {key: tuple(w.shape) for key, w in weights.items()} == shapes(recipe, 7)
