"""The network against plain torch layers, two columns against the grouped network, the update rule against numpy."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import UserError
from pipeline.online.philox import DROPOUT, key_of
from reference import load_plain, philox_words, plain_alexnet
from trainer import recipe as recipes
from trainer.dropout import compiled_mask, mask_on_device, masks
from trainer.model import AlexNet, initial_weights, parameter_count
from trainer.normalisation import lrn, same_map_norm
from trainer.optim import Momentum, rates
from trainer.parallel import TwoColumns, parse_devices
from trainer.recipe import ModelRecipe, OptimRecipe, RecipeError

CPU = (torch.device("cpu"), torch.device("cpu"))
SMALL = ModelRecipe(maps=(8, 16, 24, 24, 16), units=(64, 48), weight_sd=(0.01, 0.05, 0.05, 0.07, 0.07, 0.04, 0.1, 0.1))


def inputs(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 60).to(dtype)


def test_full_width_counts():
    """60,965,224 parameters (specification, section 4.2)."""
    assert parameter_count(ModelRecipe(), 1000) == 60_965_224
    with torch.device("meta"):
        network = AlexNet(ModelRecipe(), 1000)
        columns = TwoColumns(ModelRecipe(), 1000, (torch.device("meta"),) * 2)
    assert sum(p.numel() for p in network.parameters()) == 60_965_224
    assert sum(p.numel() for p in columns.parameters()) == 60_965_224


def test_grouped_network_equals_plain_torch_layers():
    plain = plain_alexnet(SMALL.maps, SMALL.units, 7).double()
    network = AlexNet(SMALL, 7).double()
    weights = {name: value.double() for name, value in initial_weights(SMALL, 7, 5).items()}
    load_plain(plain, weights)
    network.load(weights)
    x = inputs(3)
    ours, theirs = network(x), plain(x)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    layers = [layer for layer in plain if hasattr(layer, "weight")]
    for layer, name in zip(layers, ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"), strict=True):
        mine = network.weights()[f"{name}.weight"].grad
        torch.testing.assert_close(mine, layer.weight.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("training", [False, True])
def test_two_columns_equal_the_grouped_network(dtype: torch.dtype, bound: float, training: bool):
    """Outputs and every gradient, relative to the largest value of the tensor."""
    grouped, columns = AlexNet(SMALL, 7).to(dtype), TwoColumns(SMALL, 7, CPU).to(dtype)
    weights = {name: value.to(dtype) for name, value in initial_weights(SMALL, 7, 5).items()}
    grouped.load(weights)
    columns.load(weights)
    drop = [mask.to(dtype) for mask in masks(3, 11, 6, SMALL.units, 0.5)] if training else None
    x, labels = inputs(6, dtype), torch.tensor([0, 1, 2, 3, 4, 6])
    outputs = grouped(x, drop), columns(x, drop)
    for logits in outputs:
        F.cross_entropy(logits, labels).backward()
    assert (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max() < bound
    gathered = columns.gathered([{name: w.grad for name, w in part.items()} for part in columns.parts()])
    for name, w in grouped.weights().items():
        assert w.grad.abs().max() > 0, name
        assert (w.grad - gathered[name]).abs().max() / w.grad.abs().max() < bound, name


def test_weights_survive_the_way_through_the_columns():
    weights = initial_weights(SMALL, 7, 5)
    columns = TwoColumns(SMALL, 7, CPU)
    columns.load(weights)
    assert weights.keys() == columns.gathered().keys()
    for name, value in columns.gathered().items():
        assert torch.equal(value, weights[name]), name


def test_columns_meet_only_where_the_paper_says():
    """Changing column 1's conv1 leaves column 0's maps alone up to conv2, and reaches them at conv3."""
    grouped = AlexNet(SMALL, 7).double()
    grouped.load({name: value.double() for name, value in initial_weights(SMALL, 7, 5).items()})
    seen: dict[str, list[torch.Tensor]] = {"conv2": [], "conv3": [], "conv4": []}
    original = F.conv2d

    def watch(x: torch.Tensor, weight: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        for name, maps in seen.items():
            if weight is grouped.weights()[f"{name}.weight"]:
                maps.append(x[:, : x.shape[1] // 2].detach().clone())
        return original(x, weight, *rest, **named)

    F.conv2d = watch
    try:
        grouped(inputs(1))
        grouped.weights()["conv1.weight"].data[4:] *= 2
        grouped.weights()["conv2.weight"].data[8:] *= 3
        grouped(inputs(1))
    finally:
        F.conv2d = original
    assert torch.equal(*seen["conv2"])
    assert torch.equal(*seen["conv3"])
    assert not torch.equal(*seen["conv4"])


@pytest.mark.parametrize("columns", [1, 2])
def test_lrn_against_torch_and_its_gradient(columns: int):
    x = (
        torch.randn(2, 12, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 60
    ).requires_grad_()
    expected = torch.cat([F.local_response_norm(part, 5, 1e-4, 0.75, 2.0) for part in x.chunk(columns, 1)], 1)
    torch.testing.assert_close(lrn(x, columns), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda value: lrn(value, columns), x)
    assert torch.autograd.gradcheck(same_map_norm, x)


def test_dropout_masks_are_philox_words_and_half_of_them_zero():
    found = masks(seed=9, step=4, samples=5, units=(10, 2048), probability=0.25)
    assert [tuple(mask.shape) for mask in found] == [(5, 10), (5, 2048)]
    for layer, place, unit in itertools.product((0, 1), (0, 4), (0, 3, 9)):
        word = philox_words((9, 0), (3 + (layer << 8), 4, place, unit // 4))[unit % 4]
        assert found[layer][place, unit] == (word >= 2**30)
    assert abs(float(found[1].mean()) - 0.75) < 0.02


def test_masks_for_a_gpu_are_those_of_the_host():
    """The same words by torch's integers, eager and compiled, on a CPU; seeds and counters that set every upper bit."""
    for seed, step, threshold in ((9, 4, 2**31), (2**64 - 1, 2**31 - 1, 2**31), (9, 5, 2**30)):
        (expected,) = masks(seed, step, 6, (64,), threshold / 2**32, place=2**31 - 7)
        words = torch.tensor([*key_of(seed), DROPOUT, step, threshold])
        places, blocks = torch.arange(2**31 - 7, 2**31 - 1)[:, None], torch.arange(16)
        for found in (mask_on_device(words, places, blocks), compiled_mask(words, places, blocks)):
            assert torch.equal(found.flatten(1), expected)
    whole, part = masks(1, 2, 9, (64,), 0.5)[0], masks(1, 2, 4, (64,), 0.5, place=5)[0]
    assert torch.equal(whole[5:], part)


def test_update_rule_against_numpy_over_a_drop_of_the_rate():
    recipe = OptimRecipe(lr=0.1, lr_factor=10.0, lr_steps=2, bias_lr=0.2, bias_lr_steps=1, momentum=0.9, decay=0.05)
    random = np.random.default_rng(0)
    w, b = random.normal(size=(3, 4)), random.normal(size=3)
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    parameters = {"fc.weight": torch.tensor(w, requires_grad=True), "fc.bias": torch.tensor(b, requires_grad=True)}
    optimiser = Momentum([parameters], recipe)
    for step in range(10):
        rate = 0.1 if step < 5 else 0.01
        gw, gb = random.normal(size=w.shape), random.normal(size=b.shape)
        vw = 0.9 * vw - 0.05 * rate * w - rate * gw
        vb = 0.9 * vb - 0.2 * gb
        w, b = w + vw, b + vb
        parameters["fc.weight"].grad, parameters["fc.bias"].grad = torch.tensor(gw), torch.tensor(gb)
        optimiser.step(rates(recipe, step, 10))
        np.testing.assert_allclose(parameters["fc.weight"].detach(), w, rtol=1e-12)
        np.testing.assert_allclose(parameters["fc.bias"].detach(), b, rtol=1e-12)


def test_rates_are_those_of_configuration_170():
    """0.01, 0.0015874, 0.00025198, 0.00004 by quarters; biases 0.02 then 0.002 (specification, section 5)."""
    found = [rates(OptimRecipe(), step, 100) for step in (0, 24, 25, 50, 75, 99)]
    assert [round(rate.weights, 8) for rate in found] == [0.01, 0.01, 0.0015874, 0.00025198, 0.00004, 0.00004]
    assert [rate.biases for rate in found] == pytest.approx([0.02, 0.02, 0.02, 0.002, 0.002, 0.002])


def test_recipes():
    original = recipes.load("original")
    assert original.model.maps == (96, 256, 384, 384, 256)
    tiny = recipes.load("tiny", ["train.steps=4", "optim.lr=1", "model.units=[8, 16]", "train.lighting=false"])
    assert (tiny.train.steps, tiny.optim.lr, tiny.model.units, tiny.train.lighting) == (4, 1.0, (8, 16), False)
    assert all(8 * narrow >= full for narrow, full in zip(tiny.model.maps, original.model.maps))
    assert recipes.from_dict(recipes.to_dict(tiny), recipes.Recipe(), "") == tiny


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stepz=4", "unknown key train.stepz; known: train.seed, train.batch_size"),
        ("other.key=4", "unknown key other; known: model, optim, train"),
        ("train.steps=0", "train.steps = 0: must be at least 1"),
        ("train.steps=four", "the value is not TOML"),
        ("train.steps=1.5", "train.steps = 1.5: must be int"),
        ("model.maps=[1, 2]", "must be five even numbers"),
        ("model.maps=3", "must be a list of int"),
        ("model=3", "not of the form"),
        ("train.lighting=1", "must be bool"),
    ],
)
def test_impossible_recipes(setting: str, message: str):
    with pytest.raises(RecipeError) as caught:
        recipes.load("tiny", [setting])
    assert message in str(caught.value)


def test_missing_recipe_names_those_there_are():
    with pytest.raises(RecipeError, match="original, tiny"):
        recipes.load("huge")


@pytest.mark.parametrize(
    ("text", "message"),
    [("cpu", "1 given"), ("cpu,tpu9", "not a device"), ("cpu,meta", "not supported"), ("cuda:63,cpu", "CUDA devices")],
)
def test_impossible_devices(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_devices(text)
