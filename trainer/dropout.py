"""Dropout masks: a function of (seed, step, layer, place in the global batch, unit), whatever the devices and ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.online.philox import DROPOUT, key_of, philox

_LOW = 0xFFFFFFFF


def masks(
    seed: int,
    step: int,
    samples: int,
    units: Sequence[int],
    probability: float,
    device: torch.device | None = None,
    place: int = 0,
) -> list[Tensor]:
    """One mask per layer, (samples, units) float32: 0 with the given probability, else 1.

    The words are those of the Philox counter (DROPOUT + 256 · layer, step, place, unit div 4): drawn on the host for a
    CPU, and on a GPU there, because the host would take longer than the GPU's whole step. `place` is that
    of the first sample in the global batch.
    """
    on_gpu = device is not None and device.type == "cuda"
    threshold, key, result = round(probability * 2**32), key_of(seed), []
    for layer, width in enumerate(units):
        use, places, blocks = DROPOUT + (layer << 8), np.arange(place, place + samples), np.arange(-(-width // 4))
        if on_gpu:
            where = [torch.from_numpy(each).to(device) for each in (places[:, None], blocks)]
            mask = mask_on_device(*key, use, step, *where, threshold)
        else:
            mask = torch.from_numpy((philox(key, (use, step, places[:, None], blocks)) >= threshold).astype(np.float32))
        result.append(mask.flatten(1)[:, :width])
    return result


def mask_on_device(k0: int, k1: int, use: int, step: int, places: Tensor, blocks: Tensor, threshold: int) -> Tensor:
    """(samples, 1), (blocks,) int64 → (samples, blocks, 4) float32: `pipeline.online.philox` in torch's integers.

    torch has no unsigned product of 64 bits; that of int64 has the same bits, and what its sign smears over the upper
    half is masked away.
    """
    c0 = torch.full_like(places, use)
    c1, c2, c3 = torch.full_like(places, step), places, blocks
    for _round in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
    return (words >= threshold).to(torch.float32)
