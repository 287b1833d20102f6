"""A number that is not finite is named by its step and its layer; update ratios against numpy."""

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


class Run:
    """Steps as trainer/train.py takes them, with damage to a gradient or to the loss where a test asks for it."""

    def __init__(self, name: str = "original") -> None:
        self.model = narrow(name, size=64).model
        self.network = TwoColumnNet(self.model, 7, CPU[: self.model.columns])
        self.network.load(drawn(self.model, 7, torch.float32))
        self.optimiser, self.watch, self.done = Momentum(self.network.parts(), 0.9), Watch(self.network), 0

    def weight(self, name: str, column: int = 0) -> Tensor:
        return self.network.parts()[column][name]

    def step(self, gradient: str = "", column: int = 0, value: float = math.nan, frozen: str = "") -> None:
        """One step; `value` is the last number of one gradient (or, "loss", is added to the loss)."""
        rates = {name: Rates(1e-9, 1e-9, 0.0, name == frozen) for name in self.model.order}
        self.optimiser.freeze(rates)
        logits = self.network(images(self.model, 3, torch.float32), masks_of(self.model, 3, torch.float32))
        losses = F.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="sum")
        losses.backward()
        if gradient and gradient != "loss":
            damaged = self.weight(gradient, column).grad
            assert damaged is not None
            damaged.view(-1)[-1] = value
        self.watch.note(self.done, losses.detach() + (value if gradient == "loss" else 0))
        if gradient:
            self.network.zero_grad()
        else:
            self.optimiser.step(rates)
        self.done += 1

    def plant(self, name: str, value: float, column: int = 0) -> None:
        with torch.no_grad():
            self.weight(name, column).view(-1)[0] = value

    def origin(self) -> str:
        with pytest.raises(Diverged) as caught:
            self.watch.check()
        origin, _, rest = str(caught.value).partition(" is not ")
        assert rest == "a finite number: training has diverged"
        return origin


def test_finite_numbers_pass_and_an_evaluation_between_steps_is_not_noted():
    run = Run()
    for _ in range(3):
        run.step()
        with torch.no_grad():
            run.network(images(run.model, 1, torch.float32) * math.nan)
        run.watch.check()


@pytest.mark.parametrize(
    ("name", "layer", "column", "value"),
    [
        *(("original", "conv1", 0, math.nan), ("original", "conv2", 1, math.inf)),
        *(("half", "fc8", 0, math.nan), ("cifar-13", "local3", 0, math.inf), (HALVES, "fc8", 1, math.nan)),
    ],
)
def test_damage_in_a_weight_is_named(name: str, layer: str, column: int, value: float):
    """By the first layer whose output it spoils, after two healthy steps and before another damaged one."""
    run = Run(name)
    run.step()
    run.step()
    run.plant(f"{layer}.weight", value, column)
    run.step()
    run.step()
    assert run.origin() == f"step 3: the output of {layer}"


@pytest.mark.parametrize(
    ("name", "column", "value"), [("conv4.bias", 0, math.inf), ("fc7.weight", 1, -math.inf), ("fc8.bias", 0, math.nan)]
)
def test_damage_in_a_gradient_is_named(name: str, column: int, value: float):
    run = Run()
    run.step()
    run.step(gradient=name, column=column, value=value)
    run.step()
    assert run.origin() == f"step 2: the gradient of {name.partition('.')[0]}"


def test_the_last_layer_with_a_damaged_gradient_is_named():
    """Which is the first on the way back: what overflows there spoils all below it."""
    run = Run()
    for name in ("fc7.weight", "conv2.weight"):
        run.weight(name).register_hook(lambda g: g * math.inf)
    run.step()
    assert run.origin() == "step 1: the gradient of fc7"


def test_later_damage_does_not_hide_the_first():
    """Whatever it is: of an earlier layer's output, of the loss, or of every number there is."""
    run = Run()
    run.step()
    run.step(gradient="loss", value=math.inf)
    run.step(gradient="conv3.bias", column=1)
    run.plant("conv1.weight", math.nan)
    for _ in range(3):
        run.step()
    assert run.origin() == "step 2: the loss"
    assert run.origin() == "step 2: the loss"  # as often as one asks


def test_frozen_layers_have_no_gradient_to_watch():
    """And are watched all the same: their outputs are."""
    run = Run()
    for frozen in ("conv1", "conv1", "fc8"):
        run.step(frozen=frozen)
    run.watch.check()
    run.plant("conv1.weight", math.nan)
    run.step(frozen="conv1")
    assert run.origin() == "step 4: the output of conv1"


@pytest.mark.parametrize("name", ["original", HALVES])
def test_update_ratios_against_numpy(name: str):
    """The means of |w| and of |Δw| over both columns, uneven ones included, and their ratio; 0 of a frozen layer."""
    run = Run(name)
    before = {key: value.numpy().copy() for key, value in run.network.gathered().items()}
    rates = {layer: Rates(1e-4, 1e-4, 0.1) for layer in run.model.order}
    F.cross_entropy(run.network(images(run.model, 2, torch.float32)), torch.tensor([0, 1])).backward()
    run.optimiser.step(rates)
    after = {key: value.numpy() for key, value in run.network.gathered().items()}
    ratios = update_ratios(run.network.parts(), run.optimiser.velocity, rates)
    assert list(ratios) == list(run.model.order)
    for layer, numbers in ratios.items():
        w, update = after[f"{layer}.weight"], after[f"{layer}.weight"] - before[f"{layer}.weight"]
        assert numbers["weight"] == pytest.approx(np.abs(w).mean(), rel=1e-5)
        assert numbers["update"] == pytest.approx(np.abs(update).mean(), rel=1e-2)  # w + v is rounded
        assert numbers["ratio"] == pytest.approx(numbers["update"] / numbers["weight"])
    frozen = rates | {"conv1": Rates(1e-4, 1e-4, 0.1, frozen=True)}
    numbers = update_ratios(run.network.parts(), run.optimiser.velocity, frozen)["conv1"]
    assert numbers == {"weight": ratios["conv1"]["weight"], "update": 0, "ratio": 0}


def test_update_ratios_of_weights_that_are_zero():
    network = TwoColumnNet(narrow("half").model, 7, CPU[:1])
    rates = {layer.name: Rates(1.0, 1.0, 0.0) for layer in network.layers}
    ratios = update_ratios(network.parts(), Momentum(network.parts(), 0.9).velocity, rates)
    assert ratios["conv1"] == {"weight": 0, "update": 0, "ratio": 0}


def test_weights_that_are_not_finite_are_not_saved():
    weights = {"conv1.weight": torch.ones(3), "fc8.bias": torch.ones(3)}
    require_finite(7, weights)
    weights["fc8.bias"][1] = -math.inf
    with pytest.raises(Diverged, match=r"step 7: fc8\.bias is not a finite number"):
        require_finite(7, weights)
