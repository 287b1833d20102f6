"""Which samples form which batch, at which step, on which rank: a function of (seed, step) alone."""

from dataclasses import dataclass, field

import numpy as np

from pipeline import UserError
from pipeline.online.philox import ORDER, SHARDS, key_of, philox

KINDS = ("uniform", "shards", "fixed")
LAST = ("short", "drop")
_BLOCK = 2**14  # draws at a time: their arrays stay in the cache


@dataclass(frozen=True)
class Order:
    """The global batches of a run over `samples` samples, the same for any number of ranks.

    Every epoch visits each sample once. Kinds:
        uniform: every permutation is equally likely, as far as 64-bit draws go.
        shards: the shards are shuffled, and then the samples inside each window of so many in a row; so only the
            shards that a window touches are in use at a time, which suits disks and object stores.
        fixed: the order of the build, in every epoch, as in 2012.

    Args:
        batch_size: samples of a global batch.
        last: where the samples are not divisible, the last batch of an epoch is "short", or dropped.
        shards: samples in each shard, in the order of the ids; used by the kind "shards" alone.
        window: samples that the kind "shards" shuffles at a time.
    Raises:
        UserError: an impossible value, or fewer samples than one batch where short ones are dropped.
    """

    samples: int
    batch_size: int
    seed: int
    kind: str = "uniform"
    last: str = "short"
    shards: tuple[int, ...] = field(default=(), repr=False)
    window: int = 16_384

    def __post_init__(self) -> None:
        for name, value, known in (("order", self.kind, KINDS), ("last", self.last, LAST)):
            if value not in known:
                raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
        for name, number in (("batch_size", self.batch_size), ("window", self.window)):
            if number < 1:
                raise UserError(f"{name}={number}: must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed}: must be between 0 and 2⁶⁴ − 1")
        if self.last == "drop" and self.samples < self.batch_size:
            raise UserError(
                f"batch_size={self.batch_size}: the split has {self.samples} samples, and last='drop' leaves no batch; "
                "take a smaller batch_size, or last='short'"
            )

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and self.last == "short")

    def permutation(self, epoch: int) -> np.ndarray:
        """(samples,) int64: the ids in the order of this epoch."""
        if self.kind == "fixed":
            return np.arange(self.samples)
        if self.kind == "uniform":
            return np.argsort(self._draws(ORDER, epoch, self.samples), kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.shards)])
        assert starts[-1] == self.samples
        shuffled = np.argsort(self._draws(SHARDS, epoch, len(self.shards)), kind="stable")
        ids = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shuffled])
        draws = self._draws(ORDER, epoch, self.samples)  # one for each place
        for start in range(0, self.samples, self.window):
            inside = slice(start, start + self.window)
            ids[inside] = ids[inside][np.argsort(draws[inside], kind="stable")]
        return ids

    def batch(self, step: int, permutation: np.ndarray) -> np.ndarray:
        """(n,) int64: the ids of the global batch of `step`; `permutation` is that of its epoch."""
        place = step % self.steps_per_epoch * self.batch_size
        return permutation[place : place + self.batch_size]

    def _draws(self, use: int, epoch: int, count: int) -> np.ndarray:
        """(count,) uint64, one keyed draw each."""
        draws = np.empty(count, np.uint64)
        for start in range(0, count, _BLOCK):
            numbers = np.arange(start, min(start + _BLOCK, count))
            words = philox(key_of(self.seed), (use, epoch, numbers & 0xFFFFFFFF, numbers >> 32))
            draws[numbers] = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]
        return draws


def part(count: int, rank: int, ranks: int) -> slice:
    """The places of a global batch of `count` samples that are `rank`'s: in a row, and one more in the first ranks."""
    each, more = divmod(count, ranks)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))
