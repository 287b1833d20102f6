"""Dropout masks: a function of (seed, step, layer, position in the global batch, unit), for any devices and ranks."""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline.online.philox import DROPOUT, key_of, philox

_LOW = 0xFFFFFFFF  # the lower 32 bits


def masks(
    seed: int,
    step: int,
    samples: int,
    units: Mapping[str, int],
    probability: float,
    device: torch.device | None = None,
    first: int = 0,
) -> dict[str, Tensor]:
    """Return a mask for each layer of `units`, (samples, units) float32: 0 with the given probability, else 1.

    Each number is a word of Philox with the counter (DROPOUT + 256 · layer, step, position, unit div 4). A GPU draws
    them itself: the host would take longer than the GPU's step.

    Args:
        first: position of the first sample in the global batch.
    """
    on_gpu = device is not None and device.type == "cuda"
    threshold, key, result = round(probability * 2**32), key_of(seed), {}
    for layer, (name, width) in enumerate(units.items()):
        stream, positions, blocks = DROPOUT + (layer << 8), np.arange(first, first + samples), np.arange(-(-width // 4))
        if on_gpu:
            words = [np.array([*key, stream, step, threshold]), positions[:, None], blocks]
            # pinned, so that the copy does not wait for the steps before
            copies = [torch.from_numpy(array).pin_memory().to(device, non_blocking=True) for array in words]
            mask = compiled_mask()(*copies)
        else:
            drawn = philox(key, (stream, step, positions[:, None], blocks))
            mask = torch.from_numpy((drawn >= threshold).astype(np.float32))
        result[name] = mask.flatten(1)[:, :width]
    return result


def mask_on_device(words: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
    """Return the masks of the same words as `pipeline.online.philox`, in torch's integers, on the tensors' device.

    No product has more than 48 bits, and nothing is negative: torch has no unsigned product of 64 bits, and what torch
    2.13 compiles of a signed one that overflows was wrong on a CPU.

    Args:
        words: (5,) int64: key (2), stream, step, threshold; a word of Philox below the threshold drops the unit. In a
            tensor, so that it is compiled once and not for every step.
        positions, blocks: (samples, 1) and (blocks,) int64.
    Returns:
        (samples, blocks, 4) float32: 0 or 1.
    """
    k0, k1, stream, step, threshold = words.unbind()
    c0, c1, c2, c3 = torch.broadcast_tensors(stream, step, positions, blocks)
    for _round in range(10):
        (high0, low0), (high1, low1) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return (torch.stack((c0, c1, c2, c3), dim=-1) >= threshold).to(torch.float32)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of the product of two 32-bit integers."""
    lower = (a & 0xFFFF) * b
    upper = (a >> 16) * b + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


@cache
def compiled_mask() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return `mask_on_device` compiled: one kernel in place of some 240 small ones.

    Not at import: torch's compiler takes 2 s to load, and a run on CPUs does not need it.
    """
    return torch.compile(mask_on_device, dynamic=True)
