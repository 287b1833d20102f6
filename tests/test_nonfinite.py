"""A number that is not finite is named by its step and its layer; changes of the weights against numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks import HALVES, drawn, images, masks_of, narrow
from trainer.nonfinite import Diverged, Watch, require_finite, update_ratios
from trainer.optim import Momentum, Rates
from trainer.parallel import TwoColumnNet

CPU = (torch.device("cpu"), torch.device("cpu"))
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


class Run:
    """Steps as trainer/train.py takes them, with a place to do damage before and after the gradients."""

    def __init__(self, name: str = "original") -> None:
        self.model = narrow(name, size=64).model
        self.network = TwoColumnNet(self.model, 7, CPU[: self.model.columns])
        self.network.load(drawn(self.model, 7, torch.float32))
        self.optimiser, self.watch, self.done = Momentum(self.network.parts(), 0.9), Watch(self.network), 0

    def weight(self, name: str, column: int = 0) -> Tensor:
        return self.network.parts()[column][name]

    def step(self, gradient: str = "", column: int = 0, value: float = math.nan, frozen: str = "") -> None:
        """One step; `value` stands in one place of one gradient ("loss": of the loss)."""
        rates = {name: Rates(1e-9, 1e-9, 0.0, name == frozen) for name in self.model.order}
        self.optimiser.freeze(rates)
        x, drop = images(self.model, 3, torch.float32), masks_of(self.model, 3, torch.float32)
        logits = self.network(x, drop)
        losses = F.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="sum")
        losses.backward()
        if gradient and gradient != "loss":
            found = self.weight(gradient, column).grad
            assert found is not None
            found.view(-1)[-1] = value
        self.watch.note(self.done, losses.detach() + (value if gradient == "loss" else 0))
        if not gradient:
            self.optimiser.step(rates)
        else:
            self.network.zero_grad()
        self.done += 1

    def said(self) -> str:
        with pytest.raises(Diverged) as caught:
            self.watch.check()
        return str(caught.value)


def plant(weight: Tensor, value: float) -> None:
    with torch.no_grad():
        weight.view(-1)[0] = value


def test_finite_numbers_are_let_pass():
    run = Run()
    for _ in range(3):
        run.step()
        run.watch.check()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("layer", "column"), [*itertools.product(LAYERS[:-1], (0, 1)), ("fc8", 0)])
def test_damage_in_a_weight_is_named(layer: str, column: int, value: float):
    """By the first layer whose output it spoils, after two healthy steps and before another damaged one."""
    run = Run()
    run.step()
    run.step()
    plant(run.weight(f"{layer}.weight", column), value)
    run.step()
    run.step()
    assert run.said() == f"step 3: the output of {layer} is not a finite number: training has diverged"


@pytest.mark.parametrize("layer", LAYERS)
def test_minus_infinity_is_found_at_its_step(layer: str):
    """ReLU may make zero of it: then the gradient of the layer below is the first that is not finite."""
    run = Run()
    run.step()
    plant(run.weight(f"{layer}.weight"), -math.inf)
    run.step()
    below = LAYERS[max(0, LAYERS.index(layer) - 1)]
    said = run.said().partition(" is not")[0]
    assert said in (f"step 2: the output of {layer}", f"step 2: the gradient of {below}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "column"), [("conv1.weight", 1), ("conv4.bias", 0), ("fc7.weight", 1), ("fc8.bias", 0)]
)
def test_damage_in_a_gradient_is_named(name: str, column: int, value: float):
    run = Run()
    run.step()
    run.step(gradient=name, column=column, value=value)
    run.step()
    layer = name.partition(".")[0]
    assert run.said() == f"step 2: the gradient of {layer} is not a finite number: training has diverged"


def test_the_last_layer_with_a_damaged_gradient_is_named():
    """Which is the first on the way back: what overflows there spoils all below it."""
    run = Run()
    handle = run.network.columns[0].fc7_weight.register_hook(lambda g: g * math.inf)
    run.network.columns[0].conv2_weight.register_hook(lambda g: g * math.inf)
    run.step()
    handle.remove()
    assert run.said() == "step 1: the gradient of fc7 is not a finite number: training has diverged"


def test_damage_in_the_loss_is_named():
    run = Run()
    run.step(gradient="loss", value=math.inf)
    run.step(gradient="conv1.weight")
    assert run.said() == "step 1: the loss is not a finite number: training has diverged"


def test_later_damage_does_not_hide_the_first():
    """Whatever it is: of an earlier layer's output, of the loss, or of every number there is."""
    run = Run()
    run.step()
    run.step(gradient="conv3.bias", column=1)
    run.step(gradient="loss")
    plant(run.weight("conv1.weight"), math.nan)
    for _ in range(5):
        run.step()
    assert run.said() == "step 2: the gradient of conv3 is not a finite number: training has diverged"
    assert run.said().startswith("step 2")  # as often as one asks


def test_frozen_layers_have_no_gradient_to_watch():
    """And are watched all the same: their outputs are."""
    run = Run()
    for frozen in ("conv1", "conv1", "fc8"):
        run.step(frozen=frozen)
    run.watch.check()
    run.step(gradient="conv2.weight", frozen="conv1")
    assert "step 4: the gradient of conv2" in run.said()
    other = Run()
    plant(other.weight("conv1.weight"), math.nan)
    other.step(frozen="conv1")
    assert "step 1: the output of conv1" in other.said()


@pytest.mark.parametrize("name", ["half", HALVES, "cifar-13", "without-exchange"])
def test_other_networks_are_watched(name: str):
    """One column, or halves of a last layer: damage in its last weight is named."""
    run = Run(name)
    run.step()
    run.watch.check()
    last = run.model.order[-1]
    column = 1 if name == HALVES else 0
    plant(run.weight(f"{last}.weight", column), math.nan)
    run.step()
    assert run.said() == f"step 2: the output of {last} is not a finite number: training has diverged"


def test_sums_of_damaged_outputs_are_found_in_bf16():
    run = Run()
    plant(run.weight("conv4.weight", 1), math.nan)
    with torch.autocast("cpu", torch.bfloat16):
        run.step()
    assert "step 1: the output of conv4" in run.said()


@pytest.mark.parametrize("name", ["original", HALVES, "cifar-13"])
def test_changes_against_numpy(name: str):
    """The means of |w| and of |Δw| of the whole layer, over both columns, uneven ones included; and their ratio."""
    run = Run(name)
    before = {key: value.numpy().copy() for key, value in run.network.gathered().items()}
    rates = {layer: Rates(1e-4, 1e-4, 0.1) for layer in run.model.order}
    logits = run.network(images(run.model, 2, torch.float32))
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    run.optimiser.step(rates)
    after = {key: value.numpy() for key, value in run.network.gathered().items()}
    found = update_ratios(run.network.parts(), run.optimiser.velocity, rates)
    assert list(found) == list(run.model.order)
    for layer, numbers in found.items():
        w, update = after[f"{layer}.weight"], after[f"{layer}.weight"] - before[f"{layer}.weight"]
        assert numbers["weight"] == pytest.approx(np.abs(w).mean(), rel=1e-5)
        assert numbers["update"] == pytest.approx(np.abs(update).mean(), rel=1e-2)  # w + v is rounded
        assert numbers["ratio"] == pytest.approx(numbers["update"] / numbers["weight"])


def test_changes_of_weights_that_are_zero():
    network = TwoColumnNet(narrow("half").model, 7, CPU[:1])
    rates = {layer.name: Rates(1.0, 1.0, 0.0) for layer in network.layers}
    found = update_ratios(network.parts(), Momentum(network.parts(), 0.9).velocity, rates)
    assert found["conv1"] == {"weight": 0, "update": 0, "ratio": 0}


def test_a_frozen_layer_does_not_change():
    run = Run("original")
    for velocity in run.optimiser.velocity:
        velocity["conv1.weight"].fill_(1.0)  # of its last update, which will not be repeated
    rates = {layer: Rates(1.0, 1.0, 0.0, frozen=layer == "conv1") for layer in run.model.order}
    found = update_ratios(run.network.parts(), run.optimiser.velocity, rates)["conv1"]
    assert (found["update"], found["ratio"]) == (0, 0)
    assert found["weight"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(value: float):
    weights = {"conv1.weight": torch.ones(3), "fc8.bias": torch.ones(3)}
    require_finite(7, weights)
    weights["fc8.bias"][1] = value
    with pytest.raises(Diverged, match=r"step 7: fc8\.bias is not a finite number"):
        require_finite(7, weights)
