"""The two local normalisations of 2012. Their gradients are written out: autograd's took most of a step's time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.75
SAME_MAP_SIZE, SAME_MAP_ALPHA = 5, 1e-3  # within a map
CACHED = 2**18  # elements of a block: 1 MB of float32, so that a CPU's cache holds the few blocks in use


class LRN(NamedTuple):
    """x · (k + alpha · Σ x²)^−¾ over `size` neighbouring maps; the 2012 code has α/n = 10⁻⁴/5 here, and k = 2."""

    size: int
    alpha: float
    k: float


ORIGINAL = LRN(5, 1e-4 / 5, 2.0)


def lrn(x: Tensor, columns: int, constants: LRN = ORIGINAL) -> Tensor:
    """Normalise x (n, maps, height, width) across maps; a map's neighbours are of its own column.

    x holds the maps of `columns` columns. If it is bfloat16, sums are in float32.
    """
    neighbours = partial(_sum_over_maps, columns=columns, size=constants.size)
    return _Normalised.apply(x, neighbours, constants.alpha, constants.k)


def same_map_norm(x: Tensor) -> Tensor:
    """Normalise within a map: x · (1 + α/25 · Σ x²)^−β over 5 × 5 neighbours, zero outside.

    In the 2012 code, and not in the paper.
    """
    return _Normalised.apply(x, _mean_over_pixels, SAME_MAP_ALPHA, 1.0)


class _Normalised(torch.autograd.Function):
    """x · (k + alpha · neighbours(x²))^−β, where `neighbours` is a sum that is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, neighbours: Callable[[Tensor], Tensor], alpha: float, k: float) -> Tensor:
        def block(x: Tensor) -> tuple[Tensor, Tensor]:
            wide = _wide(x)
            scale = neighbours(wide * wide).mul_(alpha).add_(k)
            return (wide * _power(scale)).to(x.dtype), scale

        y, scale = _by_blocks(block, x)
        ctx.save_for_backward(x, scale)
        ctx.neighbours, ctx.alpha = neighbours, alpha
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """y = x·s^−β, s = k + α·Σx²  ⇒  dx = g·s^−β − 2αβ·x·Σ(g·x·s^−β−1)."""

        def block(x: Tensor, scale: Tensor, g: Tensor) -> tuple[Tensor]:
            wide, direct = _wide(x), _wide(g) * _power(scale)
            through_scale = ctx.neighbours((direct * wide).div_(scale)).mul_(wide)
            return (direct.sub_(through_scale, alpha=2 * BETA * ctx.alpha).to(x.dtype),)

        (dx,) = _by_blocks(block, *ctx.saved_tensors, gradients[0])
        return dx, None, None, None


def _in_blocks(x: Tensor) -> bool:
    """Return True on a CPU: on a GPU each operation of each block would be a kernel launch."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _by_blocks(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return function(*tensors), computed on a CPU for as many samples at a time as fit in its cache.

    The tensors and the results have one shape, of which the first dimension is the samples.
    """
    x = tensors[0]
    if not _in_blocks(x) or x.numel() <= CACHED:
        return function(*tensors)
    samples = max(1, CACHED // x[0].numel())
    results: tuple[Tensor, ...] = ()
    for i, block in enumerate(zip(*(tensor.split(samples) for tensor in tensors))):
        values = function(*block)
        results = results or tuple(torch.empty_like(x, dtype=value.dtype) for value in values)
        for result, value in zip(results, values):
            result[i * samples : (i + 1) * samples] = value
    return results


def _wide(x: Tensor) -> Tensor:
    """Return x in float32 at least: the squares of conv1's responses overflow float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _power(scale: Tensor) -> Tensor:
    """Return scale^−¾ by two roots: a general power is slow."""
    root = scale.rsqrt()
    return root.mul_(root.sqrt())


def _sum_over_maps(x: Tensor, columns: int, size: int) -> Tensor:
    """Return the sums over the `size` maps around each map, in its own column."""
    maps = x.unflatten(1, (columns, -1))
    total, count = maps.clone(), maps.shape[2]
    for distance in range(1, min(size // 2, count - 1) + 1):
        total[:, :, distance:] += maps[:, :, :-distance]
        total[:, :, :-distance] += maps[:, :, distance:]
    return total.flatten(1, 2)


def _mean_over_pixels(x: Tensor) -> Tensor:
    """Return the mean over 5 × 5 neighbours within a map: `F.avg_pool2d`, and on a CPU its bits in half of its time.

    Sums of rows first, then of columns, would take half of that again, in another order of additions: the last bits of
    the weights would change, and with them the run.
    """
    if not _in_blocks(x):
        return F.avg_pool2d(x, SAME_MAP_SIZE, 1, SAME_MAP_SIZE // 2)
    height, width = x.shape[2:]
    padded, offsets = F.pad(x, (SAME_MAP_SIZE // 2,) * 4), range(SAME_MAP_SIZE)
    shifted = (padded[:, :, i : i + height, j : j + width] for i in offsets for j in offsets)
    total = next(shifted).clone()
    for neighbours in shifted:
        total += neighbours
    return total.div_(SAME_MAP_SIZE**2)
