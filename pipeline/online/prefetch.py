"""Batches ahead of use: sample ids and crops, then reading in one thread, then decoding in another."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.online.batch import Batch, Transform, Undecodable
from pipeline.online.order import Order, part
from pipeline.online.samples import UNDECODABLE, Pictures

if TYPE_CHECKING:
    from pipeline.online import graph, remote, turbo  # slow, and most programs have no need of all

Decoder: TypeAlias = "turbo.Decoder | graph.Decoder | remote.Decoder"  # of a CPU, of GPUs, of workers


@dataclass(frozen=True)
class Sampler:
    """Maps (step, rank) to sample ids."""

    order: Order
    recipe: Transform
    rank: int
    ranks: int
    side: int  # pixels that crops are drawn for, where nobody here sees the pictures

    def batch(self, step: int, permutation: np.ndarray) -> Batch:
        """Return the rank's part of the batch of `step` by its ids; `permutation` is that of its epoch."""
        ids, chunk = self.order.batch(step, permutation), self.recipe.chunk
        positions = part(len(ids), self.rank, self.ranks)
        owners = ids[np.arange(len(ids)) // chunk * chunk][positions] if chunk > 1 else None
        requested, epoch = ids[positions], step // self.order.steps_per_epoch
        batch = Batch(step, epoch, positions.start, len(ids), requested.copy())
        batch.requested_ids, batch.crop_owner_ids = requested, owners
        return batch


class Prefetch:
    """The batches of a sampler from `step` on, up to `end` if there is one, each ready before it is asked for."""

    def __init__(
        self,
        sampler: Sampler,
        pictures: Pictures | None,  # None: the decoder's workers read them
        decoder: Decoder,
        prepare: Callable[[Batch, list[Tensor]], list[tuple[Tensor, ...]]],  # views on each device → `Batch.tensors`
        *,
        step: int,
        end: int | None,
        depth: int,  # batches that are made ready ahead of use
        upcoming: Callable[[list[int]], None] | None,  # takes the shards of the samples that come, in order
    ) -> None:
        self._sampler, self._pictures, self._decoder = sampler, pictures, decoder
        self._prepare, self._end, self._depth, self._upcoming = prepare, end, depth, upcoming
        self._next_decode = self._next_submit = self._next_read = step
        self._reading: dict[int, Future[Batch]] = {}  # by step, until they are submitted to the decoder
        self._ahead: deque[Future[Batch]] = deque()
        self._permutations: dict[int, Future[np.ndarray]] = {}
        self._announced: list[int] = []  # the epochs that `upcoming` knows
        self._closed = False
        # Decoding waits for reading, and reading for a permutation; never the other way round.
        names = ("penstock-decode", "penstock-read", "penstock-order")
        self._decodes, self._reads, self._orders = self._pools = [ThreadPoolExecutor(1, name) for name in names]
        self._fill()

    def next(self) -> Batch:
        """Wait for the next batch, or raise what its preparation raised; it stays the next one until `taken`."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        if not self._ahead:
            raise StopIteration
        return self._ahead[0].result()

    def taken(self) -> None:
        """Give up the next batch, which the consumer has now, and prepare another."""
        self._ahead.popleft()
        self._fill()

    def close(self) -> None:
        """End the threads, each after its current task, and free the decoder's memory."""
        self._closed = True
        self._decoder.stop()
        for wait in (False, True):
            for pool in self._pools:
                pool.shutdown(wait=wait, cancel_futures=True)
        self._ahead.clear()
        self._reading.clear()
        self._decoder.close()

    def _fill(self) -> None:
        while len(self._ahead) < self._depth and not self._past_end(self._next_decode):
            while self._next_read < self._next_decode + self._decoder.under_way and not self._past_end(self._next_read):
                self._reading[self._next_read] = self._reads.submit(self._read, self._next_read)
                self._next_read += 1
            self._ahead.append(self._decodes.submit(self._decode, self._next_decode))
            self._next_decode += 1

    def _past_end(self, step: int) -> bool:
        return self._end is not None and step >= self._end

    # The reading thread

    def _read(self, step: int) -> Batch:
        batch = self._sampler.batch(step, self._permutation(step))
        if self._pictures:
            self._pictures.read(batch)
        else:  # crop boxes that depend on the pictures' sizes are a worker's business, and colours do not
            side = self._sampler.side
            batch.draw(self._sampler.recipe, np.full((len(batch.ids), 2), side))
        batch.read_at = time.perf_counter()
        return batch

    def _permutation(self, step: int) -> np.ndarray:
        """Return that of the step's epoch. The next one is begun half-way, so that nobody waits for it."""
        order, steps = self._sampler.order, self._sampler.order.steps_per_epoch
        epoch, batch = divmod(step, steps)
        following = [epoch + 1] if 2 * batch + 2 > steps and not self._past_end((epoch + 1) * steps) else []
        self._permutations = {
            number: self._permutations.get(number) or self._orders.submit(order.permutation, number)
            for number in [epoch, *following]
        }
        permutation = self._permutations[epoch].result()
        known = [number for number, future in self._permutations.items() if future.done()]
        if self._pictures and self._upcoming and known != self._announced:
            self._announced = known
            ids = np.concatenate([self._permutations[number].result() for number in known])
            self._upcoming(self._pictures.reader.records["shard"][ids[batch * order.batch_size :]].tolist())
        return permutation

    # The decoding thread

    def _decode(self, step: int) -> Batch:
        self._submit(step)
        with self._decoder.streams():
            batch, views = self._views()
            assert batch.step == step
            batch.decoded_at = time.perf_counter()
            if self._pictures:
                batch.labels = torch.from_numpy(self._pictures.labels(batch))
            batch.labels = batch.labels.to(views[0].device)
            batch.tensors = self._prepare(batch, views)
        if batch.labels.device.type == "cpu":
            batch.decoded_at = time.perf_counter()  # nothing is transferred: preparing counts as decoding
        return batch

    def _submit(self, step: int) -> None:
        """Give the decoder the batch of `step`, unless it has it, and those after it that have been read."""
        while (future := self._reading.get(self._next_submit)) and self._next_submit < step + self._decoder.under_way:
            if self._next_submit > step and not (future.done() and not future.exception()):
                break
            self._decoder.submit(future.result())
            del self._reading[self._next_submit]
            self._next_submit += 1

    def _views(self) -> tuple[Batch, list[Tensor]]:
        """Return the decoder's oldest batch and its views; what does not decode is replaced first."""
        while True:
            try:
                return self._decoder.result()
            except Undecodable as error:
                assert self._pictures
                self._pictures.replace(error.batch, error.positions, UNDECODABLE)
                self._decoder.retry()
