"""The two local normalisations of 2012, with their gradients written out: autograd's own take most of a step's time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, ALPHA, BETA, K = 5, 1e-4, 0.75, 2.0  # across maps
SAME_MAP_SIZE, SAME_MAP_ALPHA = 5, 1e-3  # within a map


def lrn(x: Tensor, columns: int) -> Tensor:
    """Across maps: x · (k + α/n · Σ x²)^−β over n = 5 neighbouring maps of the same column, clipped at its ends.

    x (batch, maps, height, width) holds the maps of `columns` columns. α is divided by n, as in the 2012 code (the
    paper's formula has no such division); torch's LocalResponseNorm has the same convention.
    """
    return _AcrossMaps.apply(x, columns)


def same_map_norm(x: Tensor) -> Tensor:
    """Within a map: x · (1 + α/25 · Σ x²)^−β over 5 × 5 neighbours, zero outside. In the code, not in the paper."""
    return _WithinMaps.apply(x)


class _AcrossMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int) -> Tensor:
        scale = _window_sum(x * x, columns).mul_(ALPHA / SIZE).add_(K)
        ctx.save_for_backward(x, scale)
        ctx.columns = columns
        return x * _power(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """y = x·s^−β, s = k + a·Σx²  ⇒  dx = g·s^−β − 2aβ·x·Σ(g·x·s^−β−1)."""
        (x, scale), (g,) = ctx.saved_tensors, gradients
        direct = g * _power(scale)
        through_scale = _window_sum((direct * x).div_(scale), ctx.columns).mul_(x)
        return direct.sub_(through_scale, alpha=2 * BETA * ALPHA / SIZE), None


class _WithinMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = _window_mean(x * x).mul_(SAME_MAP_ALPHA).add_(1.0)
        ctx.save_for_backward(x, scale)
        return x * _power(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x, scale), (g,) = ctx.saved_tensors, gradients
        direct = g * _power(scale)
        through_scale = _window_mean((direct * x).div_(scale)).mul_(x)
        return direct.sub_(through_scale, alpha=2 * BETA * SAME_MAP_ALPHA)


def _power(scale: Tensor) -> Tensor:
    """scale^−¾, without the slow general power."""
    root = scale.rsqrt()
    return root.mul_(root.sqrt())


def _window_sum(x: Tensor, columns: int) -> Tensor:
    """Sum over the maps within 2 of each map, inside its column."""
    parts = x.unflatten(1, (columns, -1))
    total = parts.clone()
    for distance in range(1, SIZE // 2 + 1):
        total[:, :, distance:] += parts[:, :, :-distance]
        total[:, :, :-distance] += parts[:, :, distance:]
    return total.flatten(1, 2)


def _window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, SAME_MAP_SIZE, 1, SAME_MAP_SIZE // 2)
