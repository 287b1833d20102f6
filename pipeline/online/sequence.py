"""All that the batches are a function of: which samples come at which step on which rank, and what they become."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.online.order import Order, part
from pipeline.online.samples import picture_size
from pipeline.online.windows import Recipe, Windows


@dataclass(frozen=True)
class Prepared:
    """A rank's part of a global batch: read and drawn, not yet decoded."""

    step: int
    epoch: int
    place: int  # of its first sample in the global batch
    whole: int  # samples of the global batch
    ids: np.ndarray  # (n,) int64: `planned`, but for those that others stand in for
    planned: np.ndarray  # (n,) int64: whose draws are used
    heads: np.ndarray | None  # (n,) int64: whose crop and flip are used, where several share them
    windows: Windows
    jpegs: list[np.ndarray]
    read: float  # when, by time.perf_counter


@dataclass(frozen=True)
class Sequence:
    """The batches of one rank of `ranks`.

    Args:
        chunk: so many samples in a row of a global batch share crop and flip.
        size: (height, width) of every stored picture; None: each has its own.
    """

    order: Order
    recipe: Recipe
    rank: int = 0
    ranks: int = 1
    chunk: int = 1
    size: tuple[int, int] | None = None

    @property
    def most(self) -> int:
        """Samples of the rank's largest part of a batch."""
        mine = part(self.order.batch_size, self.rank, self.ranks)
        return mine.stop - mine.start

    def epoch(self, step: int) -> int:
        return step // self.order.steps_per_epoch

    def places(self, step: int) -> tuple[slice, int]:
        """The rank's places in the global batch of `step`, and how many samples that has."""
        start = step % self.order.steps_per_epoch * self.order.batch_size
        whole = min(self.order.batch_size, self.order.samples - start)
        return part(whole, self.rank, self.ranks), whole

    def ids(self, step: int, permutation: np.ndarray) -> np.ndarray:
        """(n,) int64: the rank's samples, in the order of the global batch."""
        return self.order.batch(step, permutation)[self.places(step)[0]]

    def prepared(
        self, step: int, permutation: np.ndarray, stand_ins: Mapping[int, int], jpegs: list[np.ndarray]
    ) -> Prepared:
        """The batch of `step`, once its samples are read; `stand_ins`: place → the id of what is there instead."""
        (mine, whole), planned = self.places(step), self.ids(step, permutation)
        heads = None
        if self.chunk > 1:
            heads = self.order.batch(step, permutation)[np.arange(whole) // self.chunk * self.chunk][mine]
        ids = planned.copy()
        for place, sample in stand_ins.items():
            ids[place] = sample
        windows = self._windows(step, planned, heads, jpegs)
        now = time.perf_counter()
        return Prepared(step, self.epoch(step), mine.start, whole, ids, planned, heads, windows, jpegs, now)

    def replaced(self, batch: Prepared, place: int, sample: int, jpeg: np.ndarray) -> Prepared:
        """Another sample in one place, with the draws of the one that was planned there."""
        ids, jpegs = batch.ids.copy(), batch.jpegs.copy()
        ids[place], jpegs[place] = sample, jpeg
        return replace(
            batch, ids=ids, jpegs=jpegs, windows=self._windows(batch.step, batch.planned, batch.heads, jpegs)
        )

    def _windows(self, step: int, planned: np.ndarray, heads: np.ndarray | None, jpegs: list[np.ndarray]) -> Windows:
        sizes = np.array([self.size or picture_size(jpeg) for jpeg in jpegs], np.int64).reshape(-1, 2)
        return self.recipe.windows(step, self.epoch(step), planned, heads, sizes)
