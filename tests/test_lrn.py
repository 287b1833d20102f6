"""The two local normalisations against torch and by differences, and dropout masks against Philox on whole numbers."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.online.philox import DROPOUT, key_of
from reference import SameMap, philox_words
from trainer.dropout import compiled_mask, mask_on_device, masks
from trainer.lrn import LRN, ORIGINAL, lrn, same_map_norm


def maps(n: int, scale: float = 60.0, seed: int = 2) -> Tensor:
    return torch.randn(2, n, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("count", [2, 4, 6, 12])
@pytest.mark.parametrize("constants", [ORIGINAL, LRN(3, 1e-3, 1.0), LRN(1, 0.01, 2.0), LRN(9, 1e-4, 2.0)])
def test_lrn_is_torchs_in_each_column(constants: LRN, count: int, columns: int):
    """Windows of 1 to 9 maps, some wider than a column; its gradient is torch's too. alpha/n is what ours takes."""
    ours, theirs = maps(count).requires_grad_(), maps(count).requires_grad_()
    size, alpha, k = constants
    expected = torch.cat([F.local_response_norm(x, size, size * alpha, 0.75, k) for x in theirs.chunk(columns, 1)], 1)
    found, g = lrn(ours, columns, constants), maps(count, 1.0, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_lrn_by_the_formula():
    """a · (2 + 2·10⁻⁵ · Σ a²)^−¾ over five maps, clipped at the ends of a column (specification, section 4.1)."""
    x = maps(8)
    a = x.numpy()
    for i in range(8):
        first, last = (0, 4) if i < 4 else (4, 8)
        window = a[:, max(first, i - 2) : min(last, i + 3)]
        expected = a[:, i] * (2 + 1e-4 / 5 * (window**2).sum(1)) ** -0.75
        np.testing.assert_allclose(lrn(x, 2)[:, i], expected, rtol=1e-12)


def test_the_norm_within_a_map_is_the_formula():
    """Its window hangs over the edges, and reads zero there."""
    ours, theirs = maps(3, 200).requires_grad_(), maps(3, 200).requires_grad_()
    found, expected, g = same_map_norm(ours), SameMap()(theirs), maps(3, 1.0, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert float((found / ours).detach().min()) < 0.5  # it does something
    found.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_differences():
    x = maps(6).requires_grad_()
    for columns, constants in itertools.product((1, 2), (ORIGINAL, LRN(3, 1e-3, 1.0))):
        assert torch.autograd.gradcheck(partial(lrn, columns=columns, constants=constants), x)
    assert torch.autograd.gradcheck(same_map_norm, x)


def test_bfloat16_is_reckoned_in_float32():
    """The float32 result and gradient, rounded once."""
    x = maps(6, 300).to(torch.bfloat16)
    for norm in (lambda value: lrn(value, 2), same_map_norm):
        narrow, wide = x.clone().requires_grad_(), x.float().requires_grad_()
        found, expected = norm(narrow), norm(wide)
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
        found.backward(g)
        expected.backward(g.float())
        assert found.dtype == narrow.grad.dtype == torch.bfloat16
        assert torch.equal(found, expected.to(torch.bfloat16))
        assert torch.equal(narrow.grad, wide.grad.to(torch.bfloat16))


def test_dropout_masks_are_philox_words_and_a_share_of_them_zero():
    """A layer's place among those with dropout is in the counter, not its name."""
    found = masks(seed=9, step=4, samples=5, units={"fc6": 10, "fc7": 2048}, probability=0.25)
    assert {name: tuple(mask.shape) for name, mask in found.items()} == {"fc6": (5, 10), "fc7": (5, 2048)}
    for layer, place, unit in itertools.product((0, 1), (0, 4), (0, 3, 9)):
        word = philox_words((9, 0), (3 + (layer << 8), 4, place, unit // 4))[unit % 4]
        assert found[("fc6", "fc7")[layer]][place, unit] == (word >= 2**30)
    assert abs(float(found["fc7"].mean()) - 0.75) < 0.02
    renamed = masks(seed=9, step=4, samples=5, units={"one": 10, "other": 2048}, probability=0.25)
    assert [torch.equal(*pair) for pair in zip(found.values(), renamed.values())] == [True, True]


def test_masks_are_those_of_the_place_in_the_global_batch():
    whole, part = (masks(1, 2, n, {"fc6": 64}, 0.5, first=first)["fc6"] for n, first in ((9, 0), (4, 5)))
    assert torch.equal(whole[5:], part)
    assert masks(1, 2, 9, {}, 0.5) == {}


@pytest.mark.proof  # compiles
def test_masks_for_a_gpu_are_those_of_the_host():
    """The same words by torch's integers, eager and compiled, on a CPU; seeds and counters that set every upper bit."""
    for seed, step, threshold in ((9, 4, 2**31), (2**64 - 1, 2**31 - 1, 2**31), (9, 5, 2**30)):
        expected = masks(seed, step, 6, {"fc6": 64}, threshold / 2**32, first=2**31 - 7)["fc6"]
        words = torch.tensor([*key_of(seed), DROPOUT, step, threshold])
        places, blocks = torch.arange(2**31 - 7, 2**31 - 1)[:, None], torch.arange(16)
        for found in (mask_on_device(words, places, blocks), compiled_mask()(words, places, blocks)):
            assert torch.equal(found.flatten(1), expected)
