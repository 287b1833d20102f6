"""Two columns on two devices against the grouped network: numbers, training, where they meet, and what is saved."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks import HALVES, TWO_COLUMNS, apart, drawn, images, masks_of, narrow
from pipeline import UserError
from trainer import recipe as recipes
from trainer.devices import choose_devices
from trainer.layers import Layer, ModelRecipe
from trainer.model import Column, Grouped, Masks
from trainer.optim import Momentum, Schedule
from trainer.parallel import TwoColumnNet
from trainer.recipe import Recipe

CPU = (torch.device("cpu"), torch.device("cpu"))
CLASSES = 7  # an odd number: halves of a last layer are uneven
COMPARED = ("original", "paper", "without-exchange", "pretrain-2011", HALVES, "six-conv", "without-conv3")
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def both(model: ModelRecipe, dtype: torch.dtype, classes: int = CLASSES) -> tuple[Grouped, TwoColumnNet]:
    """The same network, whole and cut."""
    pair = Grouped(model, classes).to(dtype), TwoColumnNet(model, classes, CPU[: model.columns]).to(dtype)
    for network in pair:
        network.load(drawn(model, classes, dtype))
    return pair


def gradients(network: Grouped | TwoColumnNet) -> dict[str, Tensor]:
    """In the grouped layout."""
    if isinstance(network, Grouped):
        return {name: w.grad for name, w in network.weights().items() if w.grad is not None}
    return network.gathered([{name: w.grad for name, w in part.items()} for part in network.parts()])


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize("name", COMPARED)
def test_columns_equal_the_grouped_network(name: str, dtype: torch.dtype, bound: float):
    """Outputs and every gradient, in training and in testing, of an odd batch and of one image."""
    model = narrow(name).model
    for n, drop in ((5, masks_of(model, 5, dtype)), (5, None), (1, masks_of(model, 1, dtype))):
        pair, x, labels = both(model, dtype), images(model, n, dtype), torch.arange(n)
        outputs = [network(x, drop) for network in pair]
        assert apart(outputs[1], outputs[0]) < bound
        for logits in outputs:
            F.cross_entropy(logits, labels).backward()
        expected, found = (gradients(network) for network in pair)
        assert expected.keys() == found.keys() == drawn(model, CLASSES).keys()
        for key, gradient in expected.items():
            assert apart(found[key], gradient) < bound, (n, key)


@pytest.mark.parametrize("name", [*COMPARED, "cifar-11"])
def test_what_the_last_layer_sees(name: str):
    """Its input in the grouped network, from which the last layer alone makes the outputs."""
    model = narrow(name).model
    (grouped, columns), x = both(model, torch.float64), images(model, 3)
    before = grouped.layers[:-1]
    with torch.no_grad():
        seen = columns.hidden(x)
        assert apart(seen, grouped.run(before, x, [None] * len(before))[0].flatten(1)) < 1e-10
        assert apart(grouped.layer(grouped.layers[-1], seen, None), columns(x)) < 1e-10


def trained(network: Grouped | TwoColumnNet, recipe: Recipe, dtype: torch.dtype, steps: int = 20) -> dict[str, Tensor]:
    """The weights after so many steps on images that differ from step to step, with dropout."""
    parts = [network.weights()] if isinstance(network, Grouped) else network.parts()
    optimiser, schedule = Momentum(parts, recipe.optim.momentum), Schedule(recipe, steps)
    for step in range(steps):
        rates = schedule.rates(step)
        optimiser.freeze(rates)
        x = images(recipe.model, 4, dtype) * (1 + step / 10)
        logits = network(x, masks_of(recipe.model, 4, dtype, seed=step))
        F.cross_entropy(logits, torch.tensor([0, 2, 4, 6])).backward()
        optimiser.step(rates)
    return network.gathered() if isinstance(network, TwoColumnNet) else network.weights()


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize("name", COMPARED)
def test_twenty_steps_of_columns_end_at_the_grouped_networks_weights(name: str, dtype: torch.dtype, bound: float):
    """Dropout, weight decay, a drop of both rates, and a first layer that stops learning."""
    settings = ['optim.schedule="drops"', "optim.drops=[10]", "optim.bias_drops=[15]", "optim.decay=0.05"]
    layers = ["optim.layers.conv1={drops=[5], frozen_from=12}", "optim.lr=0.001", "optim.bias_lr=0.001"]
    recipe = narrow(name, "train.epochs=20", "model.size=64", *settings, *layers)
    begun = drawn(recipe.model, CLASSES, dtype)
    expected, found = (trained(network, recipe, dtype) for network in both(recipe.model, dtype))
    for key, w in expected.items():
        assert apart(found[key], w) < bound, key
        assert apart(found[key], begun[key]) > 1e-4, key  # it has learned


@pytest.mark.parametrize("name", [*recipes.names(), HALVES])
def test_weights_survive_the_way_through_the_columns(name: str):
    """What either saves, the other loads: the same bytes, and the same outputs, for every recipe."""
    model = narrow(name).model
    weights = drawn(model, CLASSES, torch.float32)
    columns, whole = TwoColumnNet(model, CLASSES, CPU[: model.columns]), Grouped(model, CLASSES)
    columns.load(weights)
    saved = columns.gathered()
    assert list(saved) == list(weights)
    for key, value in saved.items():
        assert torch.equal(value, weights[key]), key
        assert value.is_contiguous()
    whole.load(saved)
    again = columns.gathered(columns.scatter({key: w.detach() for key, w in whole.weights().items()}))
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert apart(columns(images(model, 2, torch.float32)), whole(images(model, 2, torch.float32))) < 1e-5
    saved["conv1.weight"].zero_()  # copies: what is saved does not change under the saver's hands
    assert columns.gathered()["conv1.weight"].any()


def spied(seen: dict[tuple[int | None, str], Tensor]) -> AbstractContextManager[object]:
    """Write down what each layer of each column gives."""
    original = Column.layer

    def layer(self: Column, layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
        seen[self.column, layer.name] = original(self, layer, x, mask)
        return seen[self.column, layer.name].detach()

    return mock.patch.object(Column, "layer", layer)


@pytest.mark.parametrize("name", [*TWO_COLUMNS, HALVES])
def test_columns_meet_only_where_the_recipe_says(name: str):
    """Other weights of column 1's first layer reach column 0 with the first layer that sees both, and not before."""
    model = narrow(name).model
    meeting = next(i for i, layer in enumerate(model.order) if i and model.layers[layer].sees == "both")
    for network in both(model, torch.float64):
        before: dict[tuple[int | None, str], Tensor] = {}
        after: dict[tuple[int | None, str], Tensor] = {}
        with spied(before):
            network(images(model, 1))
        weights = drawn(model, CLASSES)
        weights["conv1.weight"][len(weights["conv1.weight"]) // 2 :] *= 2
        network.load(weights)
        with spied(after):
            network(images(model, 1))
        for i, layer in enumerate(model.order):
            for (column, seen), value in before.items():
                if seen == layer and isinstance(network, TwoColumnNet):
                    assert torch.equal(value, after[column, seen]) == (column == 0 and i < meeting), (column, seen)
                elif seen == layer and i < len(model.order) - 1:
                    one, other = value.chunk(2, 1), after[None, seen].chunk(2, 1)
                    assert torch.equal(one[0], other[0]) == (i < meeting), seen
                    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("original", "conv1 conv2 | conv3 conv4 conv5 | fc6 | fc7 | fc8"),
        ("half", "conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8"),
        ("without-exchange", "conv1 conv2 conv3 conv4 conv5 fc6 fc7 | fc8"),
        ("pretrain-2011", "conv1 conv2 | conv3 conv4 conv5 | conv6 | fc6 | fc7 | bottleneck | fc8"),
        (HALVES, "conv1 conv2 | conv3 conv4 conv5 | conv6 | fc6 | fc7 | bottleneck fc8"),
    ],
)
def test_segments_end_where_a_layer_sees_both(name: str, expected: str):
    model = narrow(name).model
    segments = TwoColumnNet(model, CLASSES, CPU[: model.columns]).segments
    assert " | ".join(" ".join(layer.name for layer in segment) for segment in segments) == expected


def test_a_column_may_be_given_its_own_copies():
    """Of the images and of the masks, as the loader and the Philox words of each device come."""
    model = narrow("original").model
    x, drop = images(model, 3), masks_of(model, 3)
    network = both(model, torch.float64)[1]
    copies: Sequence[Masks] = [{name: mask.clone() for name, mask in drop.items()} for _ in CPU]
    assert torch.equal(network([x, x.clone()], copies), network(x, drop))
    assert not torch.equal(network(x, masks_of(model, 3, seed=4)), network(x, drop))
    assert not torch.equal(network(x), network(x, drop))


def test_sums_are_those_of_each_layers_outputs():
    model = narrow(HALVES).model
    seen: dict[tuple[int | None, str], Tensor] = {}
    network = both(model, torch.float64)[1]
    with spied(seen):
        _, sums = network.watched(images(model, 2), None)
    for column in (0, 1):
        expected = [float(seen[column, layer].detach().sum()) for layer in model.order]
        assert sums[column].tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("cpu", 2, "1 given; the network has two columns"),
        ("cpu,cpu", 1, "2 given; the network has one column"),
        ("cpu,tpu9", 2, "not a device"),
        ("cpu,meta", 2, "not supported"),
        ("cuda:63,cpu", 2, "cuda:63.*or name cpu"),
        ("cuda:63", 1, "cuda:63.*or name cpu"),
        ("", 2, "not a device"),
    ],
)
def test_impossible_devices(text: str, columns: int, message: str):
    with pytest.raises(UserError, match=message):
        choose_devices(text, columns)


def test_devices():
    assert choose_devices("cpu, cpu") == CPU
    assert choose_devices("cpu", 1) == CPU[:1]
