"""The update rule against numpy, and the rates of every schedule against the numbers of the 2012 log."""

import itertools
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from trainer import recipe as recipes
from trainer.optim import Momentum, Rates, Schedule

PLATEAU = ['optim.schedule="plateau"', "optim.patience=3"]


def schedule(name: str, steps: int, *settings: str) -> Schedule:
    return Schedule(recipes.load(name, settings), steps)


def test_the_update_rule_against_numpy():
    """v ← μv − λεw − ε⟨g⟩, w ← w + v: two layers with rates of their own, which drop; one freezes."""
    random = np.random.default_rng(0)
    shapes = {"conv1.weight": (3, 2, 2, 2), "conv1.bias": (3,), "fc2.weight": (4, 5), "fc2.bias": (4,)}
    w = {name: random.normal(size=shape) for name, shape in shapes.items()}
    v = {name: np.zeros(shape) for name, shape in shapes.items()}
    parameters = {name: torch.tensor(value, requires_grad=True) for name, value in w.items()}
    optimiser = Momentum([parameters], 0.9)
    for step in range(12):
        rate = 0.1 if step < 5 else 0.01
        frozen = step >= 8
        rates = {"conv1": Rates(rate / 10, 0.2, 0.0, frozen), "fc2": Rates(rate, 0.02, 0.05)}
        optimiser.freeze(rates)
        g = {name: random.normal(size=shape) for name, shape in shapes.items()}
        for name in w:
            layer, kind = name.split(".")
            assert parameters[name].requires_grad == (layer == "fc2" or not frozen)
            if layer == "conv1" and frozen:
                continue
            parameters[name].grad = torch.tensor(g[name])
            now = rates[layer].weights if kind == "weight" else rates[layer].biases
            decay = rates[layer].decay if kind == "weight" else 0.0
            v[name] = 0.9 * v[name] - decay * now * w[name] - now * g[name]
            w[name] = w[name] + v[name]
        optimiser.step(rates)
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach(), w[name], rtol=1e-12)
            np.testing.assert_allclose(optimiser.velocity[0][name], v[name], rtol=1e-12)
            assert parameter.grad is None


def stretches(numbers: Sequence[float]) -> list[float]:
    """Numbers without their repetitions."""
    return [value for value, _ in itertools.groupby(numbers)]


def test_stretches_are_those_of_configuration_170():
    """0.01, 0.0015874, 0.00025198, 0.00004 by quarters; biases 0.02, then 0.002; conv1 stops at 74 of 90 epochs."""
    automatic = schedule("automatic", 900)
    rates = [automatic.rates(step) for step in range(900)]
    weights, biases = [by_layer["conv5"].weights for by_layer in rates], [by_layer["fc8"].biases for by_layer in rates]
    assert [round(rate, 8) for rate in stretches(weights)] == [0.01, 0.0015874, 0.00025198, 0.00004]
    assert [weights.count(rate) for rate in stretches(weights)] == [225] * 4
    assert stretches(biases) == pytest.approx([0.02, 0.002])
    assert biases.count(0.02) == 450
    assert [by_layer["conv1"].frozen for by_layer in rates].index(True) == 740
    assert not any(by_layer[layer].frozen for by_layer in rates for layer in by_layer if layer != "conv1")
    assert [automatic.lr(step) for step in range(900)] == weights
    for steps in range(1, 60):  # a stretch begins at a whole step, whatever their number
        automatic = schedule("automatic", steps, "optim.lr_steps=7", "optim.lr_factor=2")
        expected = [0.01 / 2 ** (step * 7 // steps / 6) for step in range(steps)]
        assert [automatic.lr(step) for step in range(steps)] == pytest.approx(expected, rel=1e-12)


def test_drops_are_those_of_the_headline_run():
    """At epochs 23, 51 and 78 of 93; conv1 at 68 as well, and frozen at 72: at the first step of each."""
    per_epoch = 10_009
    original = schedule("original", 93 * per_epoch)

    def around(epoch: int, layer: str) -> tuple[Rates, Rates]:
        return original.rates(epoch * per_epoch - 1)[layer], original.rates(epoch * per_epoch)[layer]

    for epoch, before in ((23, 1e-2), (51, 1e-3), (78, 1e-4)):
        assert [rates.weights for rates in around(epoch, "fc6")] == pytest.approx([before, before / 10])
    assert [rates.weights for rates in around(68, "conv1")] == pytest.approx([1e-4, 1e-5])
    assert [rates.weights for rates in around(68, "conv2")] == pytest.approx([1e-4, 1e-4])
    assert [rates.frozen for rates in around(72, "conv1")] == [False, True]
    assert [rates.biases for rates in around(78, "fc6")] == pytest.approx([0.02, 0.002])
    assert original.rates(0)["conv1"] == Rates(0.01, 0.02, 0.0005, False)


def test_epochs_begin_at_whole_steps():
    """A time in a recipe is met at its step, however many steps an epoch has: floats do not make it one later."""
    for epochs, per_epoch in itertools.product((54, 90, 93, 96, 370), (1, 3, 7, 313, 10_009)):
        stretched = schedule("original", epochs * per_epoch, f"train.epochs={epochs}")
        for epoch in range(epochs):
            step = epoch * per_epoch
            assert stretched.epoch(step) == epoch
            assert step == 0 or stretched.epoch(step - 1) < epoch


def test_rates_grow_with_the_batch_and_layers_have_their_own():
    """256 at 0.02 in the log; the decay's share of the rate stays what it is."""
    settings = ["optim.layers.conv2={lr=0.1, bias_lr=0.5, decay=3.0}", "optim.layers.fc8.drops=[10, 30]"]
    own = schedule("original", 93, "train.batch_size=256", *settings)
    assert own.lr(23) == pytest.approx(0.002)
    assert own.rates(0)["fc7"] == Rates(0.02, 0.04, 0.0005)
    assert own.rates(0)["conv2"] == Rates(pytest.approx(0.002), pytest.approx(0.02), pytest.approx(0.0015))
    assert [own.rates(step)["fc8"].weights for step in (9, 10, 23, 30)] == pytest.approx([2e-2, 2e-3, 2e-4, 2e-5])
    assert [own.rates(step)["fc8"].biases for step in (9, 10, 23, 30)] == [0.04] * 4
    decays = [rate.decay for rate in schedule("cifar-13", 1).rates(0).values()]
    assert decays == [0, 0, 0.004, 0.004, 0.004]  # cuda-convnet's


ERRORS = [90, 80, 80, 81, 79.5, 80, 79.5, 80, 85, 90, 79, 80, 80, 80, 79, 79, 79, 79, 79, 79]


def test_a_plateau_drops_three_times_and_then_ends():
    """After `patience` validations without improvement, each time; an improvement begins the count anew."""
    paper, rates = schedule("paper", 100, *PLATEAU), []
    expected = [*[None] * 7, "drop", *[None] * 2, None, *[None] * 2, "drop", *[None] * 2, "drop", *[None] * 2, "end"]
    for i, (error, consequence) in enumerate(zip(ERRORS, expected, strict=True)):
        assert paper.is_best(error) == (error < min(ERRORS[:i], default=100))
        assert paper.validated(error) == consequence
        rates.append(paper.lr(i))
    assert stretches(rates) == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])
    other = schedule("original", 100)  # remembers the best, and neither drops nor ends
    assert [other.validated(error) for error in (50, *[60] * 30)] == [None] * 31
    assert (other.lr(0), other.is_best(50), other.is_best(49)) == (0.01, False, True)
    last = paper.rates(99)["fc6"]
    assert (last.weights, last.biases) == pytest.approx((1e-5, 1e-5))  # "equal for all layers": the paper


def test_a_schedule_goes_on_from_its_state():
    """Through JSON, at every point, the untouched one included."""
    unbroken = schedule("paper", 100, *PLATEAU)
    for i, error in enumerate(ERRORS[:-2]):
        resumed = schedule("paper", 100, *PLATEAU)
        resumed.load_state(json.loads(json.dumps(unbroken.state(), allow_nan=False)))
        assert resumed.rates(i) == unbroken.rates(i)
        assert resumed.is_best(error) == unbroken.is_best(error)
        assert resumed.validated(error) == unbroken.validated(error)
        assert resumed.state() == unbroken.state()
