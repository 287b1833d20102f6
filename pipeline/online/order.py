"""Which samples form which batch: a function of (seed, step) alone."""

from dataclasses import dataclass

import numpy as np

from pipeline.online.philox import ORDER, key_of, philox


@dataclass(frozen=True)
class Order:
    """The global batches of a run over `samples` samples.

    Every epoch visits each sample once; the last batch of an epoch is short where the count is not divisible.
    `shuffle` False keeps the order of the ids (evaluation).
    """

    samples: int
    batch_size: int
    seed: int
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """(samples,) int64: the ids in the order of this epoch, by sorting one 64-bit keyed draw per id."""
        ids = np.arange(self.samples)
        if not self.shuffle:
            return ids
        words = philox(key_of(self.seed), (ORDER, epoch, ids & 0xFFFFFFFF, ids >> 32)).astype(np.uint64)
        return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
