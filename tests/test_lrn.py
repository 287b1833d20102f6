"""The two local normalisations against torch and by differences, and dropout masks against Philox on whole numbers."""

import itertools

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
@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("constants", [ORIGINAL, LRN(1, 1e-3, 1.0), LRN(9, 1e-4, 2.0)])
def test_lrn_is_torchs_in_each_column(constants: LRN, count: int, columns: int):
    """Windows of 1 to 9 maps, some wider than a column, and the gradient. Ours takes torch's alpha/n."""
    ours, theirs = maps(count).requires_grad_(), maps(count).requires_grad_()
    size, alpha, k = constants
    expected = torch.cat([F.local_response_norm(x, size, size * alpha, 0.75, k) for x in theirs.chunk(columns, 1)], 1)
    actual, g = lrn(ours, columns, constants), maps(count, 1.0, seed=3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    actual.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_the_norm_within_a_map_is_the_formula():
    """Its window hangs over the edges, and reads zero there."""
    ours, theirs = maps(3, 200).requires_grad_(), maps(3, 200).requires_grad_()
    actual, expected, g = same_map_norm(ours), SameMap()(theirs), maps(3, 1.0, seed=3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert float((actual / ours).detach().min()) < 0.5  # it does something
    actual.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_blocks_of_a_batch_are_its_samples():
    """Bit for bit, of more samples than stay in the cache at a time, and of an uneven rest."""
    x, g = (torch.randn(7, 8, 80, 80, generator=torch.Generator().manual_seed(seed)) * 60 for seed in (2, 3))
    for norm in (lambda value: lrn(value, 2), same_map_norm):
        batch, samples = x.clone().requires_grad_(), x.clone().requires_grad_()
        together, singly = norm(batch), torch.cat([norm(sample) for sample in samples.split(1)])
        assert torch.equal(together, singly)
        together.backward(g)
        singly.backward(g)
        assert torch.equal(batch.grad, samples.grad)


def test_the_mean_within_a_map_has_the_bits_of_average_pooling():
    x = torch.randn(3, 8, 80, 80, generator=torch.Generator().manual_seed(2)) * 60
    scale = 1 + 1e-3 * F.avg_pool2d(x * x, 5, 1, 2)
    assert torch.equal(same_map_norm(x), x * (scale.rsqrt() * scale.rsqrt().sqrt()))


def test_bfloat16_is_reckoned_in_float32():
    """The float32 result and gradient, rounded once."""
    x = maps(6, 300).to(torch.bfloat16)
    for norm in (lambda value: lrn(value, 2), same_map_norm):
        narrow, wide = x.clone().requires_grad_(), x.float().requires_grad_()
        actual, expected = norm(narrow), norm(wide)
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
        actual.backward(g)
        expected.backward(g.float())
        assert actual.dtype == narrow.grad.dtype == torch.bfloat16
        assert torch.equal(actual, expected.to(torch.bfloat16))
        assert torch.equal(narrow.grad, wide.grad.to(torch.bfloat16))


def test_dropout_masks_are_philox_words_and_a_share_of_them_zero():
    """A layer's position among those with dropout is in the counter, not its name."""
    drawn = masks(seed=9, step=4, samples=5, units={"fc6": 10, "fc7": 2048}, probability=0.25)
    assert {name: tuple(mask.shape) for name, mask in drawn.items()} == {"fc6": (5, 10), "fc7": (5, 2048)}
    for layer, position, unit in itertools.product((0, 1), (0, 4), (0, 3, 9)):
        word = philox_words((9, 0), (3 + (layer << 8), 4, position, unit // 4))[unit % 4]
        assert drawn[("fc6", "fc7")[layer]][position, unit] == (word >= 2**30)
    assert abs(float(drawn["fc7"].mean()) - 0.75) < 0.02
    renamed = masks(seed=9, step=4, samples=5, units={"one": 10, "other": 2048}, probability=0.25)
    assert [torch.equal(*pair) for pair in zip(drawn.values(), renamed.values())] == [True, True]


def test_masks_are_those_of_the_position_in_the_global_batch():
    batch, part = (masks(1, 2, n, {"fc6": 64}, 0.5, first=first)["fc6"] for n, first in ((9, 0), (4, 5)))
    assert torch.equal(batch[5:], part)
    assert masks(1, 2, 9, {}, 0.5) == {}


@pytest.mark.proof  # compiles
def test_masks_for_a_gpu_are_those_of_the_host():
    """The same words by torch's integers, eager and compiled, on a CPU; seeds and counters that set every upper bit."""
    for seed, step, threshold in ((9, 4, 2**31), (2**64 - 1, 2**31 - 1, 2**31), (9, 5, 2**30)):
        expected = masks(seed, step, 6, {"fc6": 64}, threshold / 2**32, first=2**31 - 7)["fc6"]
        words = torch.tensor([*key_of(seed), DROPOUT, step, threshold])
        positions, blocks = torch.arange(2**31 - 7, 2**31 - 1)[:, None], torch.arange(16)
        for actual in (mask_on_device(words, positions, blocks), compiled_mask()(words, positions, blocks)):
            assert torch.equal(actual.flatten(1), expected)
