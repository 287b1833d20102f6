"""The sample ids of each batch, by step and rank: a function of (seed, step) alone."""

from dataclasses import dataclass, field

import numpy as np

from pipeline import UserError
from pipeline.online.batch import require_at_least, require_one_of
from pipeline.online.philox import ORDER, SHARDS, keyed_words

_BLOCK = 2**14  # draws at a time: their arrays stay in the cache


@dataclass(frozen=True)
class Order:
    """The global batches of a run over `samples` samples, the same for any number of ranks.

    Every epoch visits each sample once. Kinds:
        uniform: every permutation is equally likely, as far as 64-bit draws go.
        shards: the shards are shuffled, and then the samples inside each window of so many in a row; so only the
            shards that a window touches are in use at a time, which suits disks and object stores.
        fixed: the order of the build, in every epoch, as in 2012.
    Raises UserError: an impossible value, or fewer samples than one batch where short ones are dropped.
    """

    samples: int
    batch_size: int  # samples of a global batch
    seed: int
    kind: str = "uniform"
    last: str = "short"  # where the samples are not divisible, the last batch of an epoch is "short"; or "drop"
    shards: tuple[int, ...] = field(default=(), repr=False)  # samples in each, in the order of the ids
    window: int = 16_384  # samples that the kind "shards" shuffles at a time

    def __post_init__(self) -> None:
        require_one_of(("uniform", "shards", "fixed"), order=self.kind)
        require_one_of(("short", "drop"), last=self.last)
        require_at_least(1, batch_size=self.batch_size, window=self.window)
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed}: must be between 0 and 2⁶⁴ − 1")
        if self.last == "drop" and self.samples < self.batch_size:
            reason = f"the split has {self.samples} samples, and last='drop' leaves no batch"
            raise UserError(f"batch_size={self.batch_size}: {reason}; take a smaller one, or last='short'")

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size if self.last == "drop" else -(-self.samples // self.batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the ids in the order of this epoch, (samples,) int64."""
        if self.kind == "fixed":
            return np.arange(self.samples)
        if self.kind == "uniform":
            return np.argsort(self._draws(ORDER, epoch, self.samples), kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.shards)])
        assert starts[-1] == self.samples
        shuffled = np.argsort(self._draws(SHARDS, epoch, len(self.shards)), kind="stable")
        ids = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shuffled])
        draws = self._draws(ORDER, epoch, self.samples)  # one for each position
        for start in range(0, self.samples, self.window):
            inside = slice(start, start + self.window)
            ids[inside] = ids[inside][np.argsort(draws[inside], kind="stable")]
        return ids

    def batch(self, step: int, permutation: np.ndarray) -> np.ndarray:
        """Return the ids of the global batch of `step`, (n,) int64; `permutation` is that of its epoch."""
        start = step % self.steps_per_epoch * self.batch_size
        return permutation[start : start + self.batch_size]

    def _draws(self, use: int, epoch: int, count: int) -> np.ndarray:
        """Return `count` keyed draws, uint64."""
        draws = np.empty(count, np.uint64)
        for start in range(0, count, _BLOCK):
            numbers = np.arange(start, min(start + _BLOCK, count))
            words = keyed_words(self.seed, use, epoch, numbers)
            draws[numbers] = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]
        return draws


def part(count: int, rank: int, ranks: int) -> slice:
    """Return the positions of `rank` in a global batch of `count` samples: in a row, one more in the first ranks."""
    share, more = divmod(count, ranks)
    start = rank * share + min(rank, more)
    return slice(start, start + share + (rank < more))
