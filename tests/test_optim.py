"""The update rule against numpy, and the rates of every schedule against the numbers of the 2012 log."""

import json
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from networks import drawn, images, narrow
from trainer import recipe as recipes
from trainer.model import Grouped
from trainer.optim import Momentum, Rates, Schedule

PLATEAU = ['optim.schedule="plateau"', "optim.patience=3"]


def schedule(name: str, steps: int, *settings: str) -> Schedule:
    return Schedule(recipes.load(name, settings), steps)


def test_the_update_rule_against_numpy():
    """v ← μv − λεw − ε⟨g⟩, w ← w + v: two layers of rates and decays of their own, which drop, and one that freezes."""
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


def test_a_frozen_layer_is_left_alone_from_its_step_on():
    """No gradient is computed, weights and velocity keep their bytes; the layers above learn on; it can thaw."""
    recipe = narrow("original", "optim.layers.conv1.frozen_from=3", "train.epochs=6", size=64)
    network, x = Grouped(recipe.model, 7).double(), images(recipe.model, 2)
    network.load(drawn(recipe.model, 7))
    rates, optimiser = Schedule(recipe, 6), Momentum([network.weights()], 0.9)
    before: dict[str, torch.Tensor] = {}
    for step in (0, 1, 2, 3, 4, 0):
        optimiser.freeze(rates.rates(step))
        F.cross_entropy(network(x), torch.tensor([1, 2])).backward()
        frozen = step >= 3
        for name, w in network.weights().items():
            assert (w.grad is None) == (frozen and name.startswith("conv1")), (step, name)
        optimiser.step(rates.rates(step))
        now = {name: w.detach().clone() for name, w in network.weights().items()}
        now |= {f"v {name}": velocity.clone() for name, velocity in optimiser.velocity[0].items()}
        for name, value in now.items() if before else ():
            assert torch.equal(value, before[name]) == (frozen and "conv1" in name), (step, name)
        before = now


def stretches(found: Sequence[float]) -> list[float]:
    """Numbers without their repetitions."""
    return [value for i, value in enumerate(found) if i == 0 or value != found[i - 1]]


def test_stretches_are_those_of_configuration_170():
    """0.01, 0.0015874, 0.00025198, 0.00004 by quarters; biases 0.02, then 0.002; conv1 stops at 74 of 90 epochs."""
    found = schedule("automatic", 900)
    rates = [found.rates(step) for step in range(900)]
    weights = [each["conv5"].weights for each in rates]
    assert [round(each, 8) for each in stretches(weights)] == [0.01, 0.0015874, 0.00025198, 0.00004]
    assert [weights.count(each) for each in stretches(weights)] == [225] * 4
    assert stretches([each["fc8"].biases for each in rates]) == pytest.approx([0.02, 0.002])
    assert [each["fc8"].biases for each in rates].count(0.02) == 450
    assert [each["conv1"].frozen for each in rates].index(True) == 740
    assert not any(each[layer].frozen for each in rates for layer in each if layer != "conv1")
    assert [found.lr(step) for step in range(900)] == weights


def test_stretches_begin_at_whole_steps():
    """Exactly, whatever the number of steps."""
    for steps in (*range(1, 60), 10_009):
        for count in (1, 2, 3, 4, 7):
            found = schedule("automatic", steps, f"optim.lr_steps={count}", "optim.lr_factor=2")
            for step in range(0, steps, 1 + steps // 60):
                part = min(step * count // steps, count - 1)
                assert found.lr(step) == pytest.approx(0.01 / 2 ** (part / max(1, count - 1)), rel=1e-12)


def test_drops_are_those_of_the_headline_run():
    """At epochs 23, 51 and 78 of 93; conv1 at 68 as well, and frozen at 72: at the first step of each."""
    per_epoch = 10_009
    found = schedule("original", 93 * per_epoch)
    expected = [(0, 1e-2), (23, 1e-3), (51, 1e-4), (78, 1e-5)]
    for i, (epoch, rate) in enumerate(expected):
        step = epoch * per_epoch
        assert found.rates(step)["fc6"].weights == pytest.approx(rate)
        if i:
            assert found.rates(step - 1)["fc6"].weights == pytest.approx(expected[i - 1][1])
    for epoch, rate in ((67.999, 1e-4), (68, 1e-5)):
        assert found.rates(round(epoch * per_epoch))["conv1"].weights == pytest.approx(rate)
        assert found.rates(round(epoch * per_epoch))["conv2"].weights == pytest.approx(1e-4)
    assert [found.rates(72 * per_epoch + i)["conv1"].frozen for i in (-1, 0)] == [False, True]
    assert [found.rates(78 * per_epoch + i)["fc6"].biases for i in (-1, 0)] == pytest.approx([0.02, 0.002])
    assert found.rates(0)["conv1"] == Rates(0.01, 0.02, 0.0005, False)


def test_epochs_begin_at_whole_steps():
    """A time in a recipe is met at its step, however many steps an epoch has: floats do not make it one later."""
    for epochs in (54, 90, 93, 96, 370):
        for per_epoch in (1, 3, 7, 313, 5_004, 10_009):
            found = schedule("original", epochs * per_epoch, f"train.epochs={epochs}")
            for epoch in range(epochs):
                step = epoch * per_epoch
                assert found.epoch(step) == epoch
                assert step == 0 or found.epoch(step - 1) < epoch


def test_epochs_stretch_to_the_steps_of_a_run():
    """`tiny` has 450 steps and speaks of 90 epochs."""
    found = schedule("tiny", 450)
    assert found.epoch(225) == 45
    assert Fraction(found.epoch(5)) == 1
    assert stretches([found.rates(step)["conv1"].weights for step in range(450)]) == pytest.approx([0.01, 0.002])


@pytest.mark.parametrize(("batch", "rate"), [(128, 0.01), (256, 0.02), (64, 0.005)])
def test_rates_grow_with_the_batch(batch: int, rate: float):
    """256 at 0.02 in the log; conv1's drop and the decay's share of the rate stay what they are."""
    found = schedule("original", 93, f"train.batch_size={batch}")
    assert (found.lr(0), found.rates(0)["fc8"].biases, found.rates(0)["fc8"].decay) == (rate, 2 * rate, 0.0005)
    assert found.lr(23) == pytest.approx(rate / 10)


def test_layers_have_rates_of_their_own():
    settings = ["optim.layers.conv2={lr=0.1, bias_lr=0.5, decay=3.0}", "optim.layers.fc8.drops=[10, 30]"]
    found = schedule("original", 93, *settings)
    assert found.rates(0)["conv2"] == Rates(pytest.approx(0.001), pytest.approx(0.01), pytest.approx(0.0015))
    assert [found.rates(step)["fc8"].weights for step in (9, 10, 23, 30)] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])
    assert [found.rates(step)["fc8"].biases for step in (9, 10, 23, 30)] == [0.02] * 4
    assert found.rates(0)["fc7"] == Rates(0.01, 0.02, 0.0005)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_rates_for_every_layer(name: str):
    """At every hundredth of its run; decays of cuda-convnet's CIFAR-10 files are 0, 0, 0.004 …"""
    recipe = recipes.load(name)
    found = Schedule(recipe, 300)
    for step in range(0, 300, 3):
        rates = found.rates(step)
        assert tuple(rates) == recipe.model.order
        assert all(each.weights > 0 and each.biases > 0 for each in rates.values())
    if name == "cifar-13":
        assert [rates[layer].decay for layer in recipe.model.order] == [0, 0, 0.004, 0.004, 0.004]


def test_a_plateau_drops_three_times_and_then_ends():
    """After `patience` validations without improvement, each time; an improvement begins the count anew."""
    found = schedule("paper", 100, *PLATEAU)
    errors = [90, 80, 80, 81, 79.5, 80, 79.5, 80, 85, 90, 79, 80, 80, 80, 79, 79, 79, 79, 79, 79]
    expected = [*[None] * 7, "drop", *[None] * 2, None, *[None] * 2, "drop", *[None] * 2, "drop", *[None] * 2, "end"]
    rates, said = [], []
    for i, error in enumerate(errors):
        improves = error < min(errors[:i], default=100)
        assert found.is_best(error) == improves
        said.append(found.validated(error))
        rates.append(found.lr(i))
    assert said == expected
    assert stretches(rates) == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])
    last = found.rates(99)["fc6"]
    assert (last.weights, last.biases) == pytest.approx((1e-5, 1e-5))  # "equal for all layers": the paper


def test_other_schedules_take_no_notice_of_a_plateau():
    """They remember the best, and neither drop nor end."""
    for name in ("original", "automatic"):
        found = schedule(name, 100)
        assert [found.validated(error) for error in (50, *[60] * 30)] == [None] * 31
        assert found.lr(0) == 0.01
        assert not found.is_best(50)
        assert found.is_best(49)


def test_a_schedule_goes_on_from_its_state():
    """Through JSON, at every point, the untouched one included."""
    errors = [90, 80, 80, 81, 79.5, 80, 79.5, 80, 85, 90, 79, 80, 80, 80, 79, 79, 79, 79]
    whole = schedule("paper", 100, *PLATEAU)
    for i, error in enumerate(errors):
        resumed = schedule("paper", 100, *PLATEAU)
        resumed.load_state(json.loads(json.dumps(whole.state(), allow_nan=False)))
        assert resumed.rates(i) == whole.rates(i)
        assert resumed.is_best(error) == whole.is_best(error)
        assert resumed.validated(error) == whole.validated(error)
        assert resumed.state() == whole.state()
