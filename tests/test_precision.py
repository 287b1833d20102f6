"""Other precisions, memory layouts and compiled segments against the plain run in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks import HALVES, apart, drawn, images, masks_of, narrow
from trainer import model as models
from trainer.layers import ModelRecipe
from trainer.lrn import lrn
from trainer.parallel import TwoColumnNet, reference_precision

CPU = (torch.device("cpu"), torch.device("cpu"))


def columns(model: ModelRecipe, compile: str = "no", channels_last: bool = False) -> TwoColumnNet:
    network = TwoColumnNet(model, 7, CPU[: model.columns], compile, channels_last)
    network.load(drawn(model, 7, torch.float32))
    return network


def step(network: TwoColumnNet, n: int, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step as trainer/train.py takes it."""
    x, drop = images(network.recipe, n, torch.float32), masks_of(network.recipe, n, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = network(x, drop)
    F.cross_entropy(logits.float(), torch.arange(n)).backward()
    found = network.gathered([{name: w.grad for name, w in part.items()} for part in network.parts()])
    network.zero_grad()
    return logits.detach(), found


@pytest.mark.parametrize("name", ["original", "half", HALVES, "cifar-11"])
def test_bf16_is_near_float32(name: str):
    """Products of 8 bits: within a few per cent. Gradients are as long, and point the same way; weights are float32."""
    model = narrow(name).model
    (logits, gradients), (expected, exact) = (step(columns(model), 5, bf16=bf16) for bf16 in (True, False))
    assert 1e-4 < apart(logits, expected) < 0.05  # not the same, for then it would not be bfloat16
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        if float(exact[key].norm()) > 0:
            assert F.cosine_similarity(gradient.flatten(), exact[key].flatten(), dim=0) > 0.9, key
            assert 0.8 < float(gradient.norm() / exact[key].norm()) < 1.25, key


def test_in_bf16_norms_and_sums_are_reckoned_in_float32(monkeypatch: pytest.MonkeyPatch):
    """Products are of bfloat16; what the norm across maps gives is its float32 result, rounded once."""
    found: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor, *rest: object) -> Tensor:
        y = lrn(x, *rest)
        found.append((x, y))
        return y

    monkeypatch.setattr(models, "lrn", watched)
    network = columns(narrow("original").model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images(network.recipe, 2, torch.float32))
    assert logits.dtype == torch.bfloat16
    assert len(found) == 4  # two layers, two columns
    for x, y in found:
        assert (x.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)
        norm = lrn(x.float(), 1)
        assert norm.dtype == torch.float32
        assert torch.equal(y, norm.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cross_entropy(logits.float(), torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.parametrize("name", ["original", "paper", "half", "cifar-13", "figure1-relu"])
def test_channels_last_gives_the_same_numbers(name: str):
    """But for the order of float32 sums; weights of kernels are laid out so, and saved as ever."""
    model = narrow(name).model
    plain, other = columns(model), columns(model, channels_last=True)
    for part in other.parts():
        for key, w in part.items():
            assert w.is_contiguous(memory_format=torch.channels_last) or w.dim() != 4, key
    assert not other.parts()[0]["conv2.weight"].is_contiguous()
    for one, saved in zip(plain.gathered().values(), other.gathered().values(), strict=True):
        assert torch.equal(one, saved)
        assert saved.is_contiguous()
    (expected, exact), (logits, gradients) = step(plain, 3), step(other, 3)
    assert apart(logits, expected) < 1e-5
    for key, gradient in gradients.items():
        assert apart(gradient, exact[key]) < 1e-4, key


@pytest.mark.proof  # compiles
def test_compiled_segments_give_the_same_numbers():
    """Two columns of two segments, each whole: a training step, and testing with another size of the batch."""
    model = narrow("original", 'model.order=["conv1", "fc8"]', "model.size=40").model
    torch._dynamo.utils.counters.clear()
    plain, compiled = columns(model), columns(model, "segments")
    (expected, exact), (logits, gradients) = step(plain, 3), step(compiled, 3)
    assert apart(logits, expected) < 1e-5
    for key, gradient in gradients.items():
        assert apart(gradient, exact[key]) < 1e-4, key
    with torch.no_grad():
        x = images(model, 2, torch.float32)
        assert apart(compiled(x), plain(x)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # conv1 of either column, and fc8
    assert not torch._dynamo.utils.counters["graph_break"]


def test_reference_precision():
    """Only fp32 has products of whole float32 on a GPU."""
    for name in ("tf32", "bf16", "fp32"):
        reference_precision(name)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (name != "fp32")


@pytest.mark.parametrize("compile", ["no", "segments"])
def test_the_empty_part_of_a_batch_gives_gradients_of_zero(compile: str):
    """What a process has of a batch that is smaller than the job."""
    network = columns(narrow("original", size=64).model, compile)
    logits = network(torch.zeros(0, 3, 64, 64))
    assert logits.shape == (0, network.classes)
    logits.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
