"""The two local normalisations of 2012, with their gradients written out: autograd's own take most of a step's time."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.75
SAME_MAP_SIZE, SAME_MAP_ALPHA = 5, 1e-3  # within a map


class LRN(NamedTuple):
    """x · (k + alpha · Σ x²)^−¾ over `size` neighbouring maps; the 2012 code has α/n = 10⁻⁴/5 here, and k = 2."""

    size: int
    alpha: float
    k: float


ORIGINAL = LRN(5, 1e-4 / 5, 2.0)


def lrn(x: Tensor, columns: int, constants: LRN = ORIGINAL) -> Tensor:
    """Across maps, centred and clipped at the ends of a column; of bfloat16 it is reckoned in float32.

    x (batch, maps, height, width) holds the maps of `columns` columns.
    """
    return _AcrossMaps.apply(x, columns, constants)


def same_map_norm(x: Tensor) -> Tensor:
    """Within a map: x · (1 + α/25 · Σ x²)^−β over 5 × 5 neighbours, zero outside. In the code, not in the paper."""
    return _WithinMaps.apply(x)


class _AcrossMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int, constants: LRN) -> Tensor:
        wide = _wide(x)
        scale = _window_sum(wide * wide, columns, constants.size).mul_(constants.alpha).add_(constants.k)
        ctx.save_for_backward(x, scale)
        ctx.columns, ctx.constants = columns, constants
        return (wide * _power(scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """y = x·s^−β, s = k + a·Σx²  ⇒  dx = g·s^−β − 2aβ·x·Σ(g·x·s^−β−1)."""
        (x, scale), g = ctx.saved_tensors, _wide(gradients[0])
        wide, direct = _wide(x), g * _power(scale)
        through_scale = _window_sum((direct * wide).div_(scale), ctx.columns, ctx.constants.size).mul_(wide)
        return direct.sub_(through_scale, alpha=2 * BETA * ctx.constants.alpha).to(x.dtype), None, None


class _WithinMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = _wide(x)
        scale = _window_mean(wide * wide).mul_(SAME_MAP_ALPHA).add_(1.0)
        ctx.save_for_backward(x, scale)
        return (wide * _power(scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x, scale), g = ctx.saved_tensors, _wide(gradients[0])
        wide, direct = _wide(x), g * _power(scale)
        through_scale = _window_mean((direct * wide).div_(scale)).mul_(wide)
        return direct.sub_(through_scale, alpha=2 * BETA * SAME_MAP_ALPHA).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32: the squares of conv1's responses overflow in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _power(scale: Tensor) -> Tensor:
    """scale^−¾, without the slow general power."""
    root = scale.rsqrt()
    return root.mul_(root.sqrt())


def _window_sum(x: Tensor, columns: int, size: int) -> Tensor:
    """Sum over the maps within size / 2 of each map, inside its column."""
    parts = x.unflatten(1, (columns, -1))
    total = parts.clone()
    for distance in range(1, min(size // 2, parts.shape[2] - 1) + 1):
        total[:, :, distance:] += parts[:, :, :-distance]
        total[:, :, :-distance] += parts[:, :, distance:]
    return total.flatten(1, 2)


def _window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, SAME_MAP_SIZE, 1, SAME_MAP_SIZE // 2)
