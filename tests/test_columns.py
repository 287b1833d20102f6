"""Two columns on two devices against the grouped network; then other precisions, layouts and compiled segments."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks import HALVES, apart, drawn, images, masks_of, narrow
from trainer import recipe as recipes
from trainer.layers import ModelRecipe
from trainer.model import Grouped, Masks
from trainer.nonfinite import Diverged, Watch
from trainer.parallel import TwoColumnNet, reference_precision

CPU = (torch.device("cpu"), torch.device("cpu"))
CLASSES = 7  # an odd number: halves of a last layer are uneven
COMPARED = ("original", "half", "without-exchange", HALVES, "cifar-11")


def cut(model: ModelRecipe, dtype: torch.dtype, compile: str = "no", channels_last: bool = False) -> TwoColumnNet:
    network = TwoColumnNet(model, CLASSES, CPU[: model.columns], compile, channels_last).to(dtype)
    network.load(drawn(model, CLASSES, dtype))
    return network


def both(model: ModelRecipe) -> tuple[Grouped, TwoColumnNet]:
    """The same network without columns and with them, in float64."""
    grouped = Grouped(model, CLASSES).double()
    grouped.load(drawn(model, CLASSES))
    return grouped, cut(model, torch.float64)


def gradients(network: Grouped | TwoColumnNet) -> dict[str, Tensor]:
    """In the grouped layout."""
    if isinstance(network, Grouped):
        return {name: w.grad for name, w in network.weights().items() if w.grad is not None}
    return network.gathered([{name: w.grad for name, w in part.items()} for part in network.parts()])


@pytest.mark.parametrize("name", COMPARED)
def test_columns_equal_the_grouped_network(name: str):
    """Outputs, every gradient, and the last layer's input; in training and testing, of an odd batch and one image."""
    model = narrow(name).model
    for n, drop in ((5, masks_of(model, 5)), (5, None), (1, masks_of(model, 1))):
        (grouped, columns), x, labels = both(model), images(model, n), torch.arange(n)
        outputs = [network(x, drop) for network in (grouped, columns)]
        assert apart(outputs[1], outputs[0]) < 1e-10
        for logits in outputs:
            F.cross_entropy(logits, labels).backward()
        expected, actual = gradients(grouped), gradients(columns)
        assert expected.keys() == actual.keys() == drawn(model, CLASSES).keys()
        for key, gradient in expected.items():
            assert apart(actual[key], gradient) < 1e-10, (n, key)
        with torch.no_grad():
            hidden = grouped.run(grouped.layers[:-1], x, [None] * (len(grouped.layers) - 1)).flatten(1)
            assert apart(columns.hidden(x), hidden) < 1e-10
            assert apart(grouped.layer(grouped.layers[-1], columns.hidden(x), None), columns(x)) < 1e-10


@pytest.mark.parametrize("name", [*recipes.names(), HALVES])
def test_weights_survive_the_way_through_the_columns(name: str):
    """What either saves, the other loads: the same bytes, and the same outputs, for every recipe."""
    model = narrow(name).model
    weights = drawn(model, CLASSES, torch.float32)
    columns, grouped = cut(model, torch.float32), Grouped(model, CLASSES)
    saved = columns.gathered()
    assert list(saved) == list(weights)
    for key, value in saved.items():
        assert torch.equal(value, weights[key]), key
        assert value.is_contiguous()
    grouped.load(saved)
    again = columns.gathered(columns.scatter({key: w.detach() for key, w in grouped.weights().items()}))
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert apart(columns(images(model, 2, torch.float32)), grouped(images(model, 2, torch.float32))) < 1e-5
    saved["conv1.weight"].zero_()  # copies: what is saved does not change while it is written
    assert columns.gathered()["conv1.weight"].any()


def test_a_column_may_be_given_its_own_copies():
    """Of the images and of the masks, as the loader and the Philox words of each device come."""
    model = narrow("original").model
    x, drop = images(model, 3), masks_of(model, 3)
    network = cut(model, torch.float64)
    copies: Sequence[Masks] = [{name: mask.clone() for name, mask in drop.items()} for _ in CPU]
    assert torch.equal(network([x, x.clone()], copies), network(x, drop))
    assert not torch.equal(network(x, masks_of(model, 3, seed=4)), network(x, drop))
    assert not torch.equal(network(x), network(x, drop))


def step(network: TwoColumnNet, n: int, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step in float32, or in bfloat16 where autocast has it."""
    x, drop = images(network.recipe, n, torch.float32), masks_of(network.recipe, n, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = network(x, drop)
    F.cross_entropy(logits.float(), torch.arange(n)).backward()
    result = gradients(network)
    network.zero_grad()
    return logits.detach(), result


@pytest.mark.parametrize("name", ["original", "cifar-11"])
def test_bf16_is_near_float32(name: str):
    """Products of 8 bits: within a few per cent. Gradients are as long, and point the same way; weights are float32."""
    network = cut(narrow(name).model, torch.float32)
    (logits, rounded), (expected, exact) = (step(network, 5, bf16=bf16) for bf16 in (True, False))
    assert 1e-4 < apart(logits, expected) < 0.05  # not the same, for then it would not be bfloat16
    for key, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        if float(exact[key].norm()) > 0:
            assert F.cosine_similarity(gradient.flatten(), exact[key].flatten(), dim=0) > 0.9, key
            assert 0.8 < float(gradient.norm() / exact[key].norm()) < 1.25, key


@pytest.mark.parametrize("name", ["original", "cifar-13"])
def test_channels_last_gives_the_same_numbers(name: str):
    """But for the order of float32 sums; weights of kernels are laid out so, and saved as ever."""
    model = narrow(name).model
    plain, other = cut(model, torch.float32), cut(model, torch.float32, channels_last=True)
    for part in other.parts():
        for key, w in part.items():
            assert w.is_contiguous(memory_format=torch.channels_last) or w.dim() != 4, key
    assert not other.parts()[0]["conv2.weight"].is_contiguous()
    assert all(saved.is_contiguous() for saved in other.gathered().values())
    (expected, exact), (logits, actual) = step(plain, 3), step(other, 3)
    assert apart(logits, expected) < 1e-5
    for key, gradient in actual.items():
        assert apart(gradient, exact[key]) < 1e-4, key


@pytest.mark.proof  # compiles
def test_compiled_segments_give_the_same_numbers_and_are_watched():
    """Each segment is compiled whole, and once: for a training step, and not for testing another size of the batch."""
    model = narrow("original", 'model.order=["conv1", "conv2", "fc8"]', "model.size=40").model
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, compiled = cut(model, torch.float32), cut(model, torch.float32, "segments")
    watch = Watch(compiled)
    for number in range(3):
        (expected, exact), (logits, actual) = step(plain, 3), step(compiled, 3)
        assert apart(logits, expected) < 1e-5
        for key, gradient in actual.items():
            assert apart(gradient, exact[key]) < 1e-4, key
        with torch.no_grad():
            x = images(model, 2, torch.float32)
            assert apart(compiled(x), plain(x)) < 1e-5
        watch.note(number, torch.zeros(()))
        assert counters["stats"]["unique_graphs"] == 3  # conv1 and conv2 of either column, and fc8
    assert not counters["graph_break"]
    watch.check()
    with torch.no_grad():
        compiled.parts()[1]["conv2.weight"].view(-1)[0] = math.nan
    step(compiled, 3)
    watch.note(3, torch.zeros(()))
    with pytest.raises(Diverged, match="step 4: the output of conv2"):
        watch.check()


def test_reference_precision():
    """Only fp32 has products of whole float32 on a GPU."""
    for name in ("tf32", "bf16", "fp32"):
        reference_precision(name)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (name != "fp32")


@pytest.mark.parametrize("compile", ["no", "segments"])
def test_the_empty_part_of_a_batch_gives_gradients_of_zero(compile: str):
    """A rank's part of a batch that is smaller than the number of ranks."""
    network = cut(narrow("original", size=64).model, torch.float32, compile)
    logits = network(torch.zeros(0, 3, 64, 64))
    assert logits.shape == (0, network.classes)
    logits.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
