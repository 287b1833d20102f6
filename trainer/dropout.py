"""Dropout masks: a function of (seed, step, layer, place in the global batch, unit), whatever the devices and ranks."""

import numpy as np
import torch

from pipeline.online.philox import DROPOUT, key_of, philox


def masks(seed: int, step: int, samples: int, units: tuple[int, ...], probability: float) -> list[torch.Tensor]:
    """One mask per layer, (samples, units) float32 on the CPU: 0 with the given probability, else 1."""
    result = []
    for layer, width in enumerate(units):
        place, block = np.arange(samples)[:, None], np.arange(-(-width // 4))[None, :]
        words = philox(key_of(seed), (DROPOUT + (layer << 8), step, place, block)).reshape(samples, -1)[:, :width]
        result.append(torch.from_numpy((words >= round(probability * 2**32)).astype(np.float32)))
    return result
