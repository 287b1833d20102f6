"""Batches ahead of use: one thread reads them, one has them decoded, and hands them to the consumer."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.online.decode import Decoder
from pipeline.online.faults import DAMAGED, UNDECODABLE, Replacements
from pipeline.online.meter import Times
from pipeline.online.samples import SampleReader
from pipeline.online.sequence import Prepared, Sequence

IN_GRAPH = 3  # batches that DALI has at a time: it never waits for the next


@dataclass(frozen=True)
class Ready:
    """A batch on the devices."""

    prepared: Prepared
    labels: Tensor  # (n,) int64, on the first device
    tensors: list[tuple[Tensor, ...]]  # for each device, what `finish` made of its views
    times: Times


class Feed:
    """The batches of a sequence from `step` on, up to `end` if there is one.

    Args:
        finish: makes of a batch and its views on each device what the consumer gets, in the decoding thread.
        depth: batches that are made ready ahead of use.
        upcoming: is told the ids of each epoch in their order, before its first batch is read.
    """

    def __init__(
        self,
        sequence: Sequence,
        reader: SampleReader,
        decoder: Decoder,
        faults: Replacements,
        finish: Callable[[Prepared, list[Tensor]], list[tuple[Tensor, ...]]],
        *,
        step: int,
        end: int | None,
        depth: int,
        upcoming: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self._sequence, self._reader, self._decoder, self._faults = sequence, reader, decoder, faults
        self._finish, self._end, self._depth, self._upcoming = finish, end, depth, upcoming
        self._asked = self._submitted = self._read_next = step
        self._reading: dict[int, Future[Prepared]] = {}  # until they are submitted to the decoder
        self._ahead: deque[Future[Ready]] = deque()
        self._permutations: dict[int, Future[np.ndarray]] = {}
        self._closed = False
        self._told = (-1, False)  # the latest epoch that `upcoming` knows of, and whether of the next one, too
        # decoding waits for reading, and reading for a permutation; never the other way round
        names = ("decode", "read", "order")
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"penstock-{name}") for name in names]
        self._decodes, self._reads, self._orders = self._pools
        self._ask()

    def next(self) -> Ready | None:
        """Wait for the next batch, which stays the next one until `taken`. None: there is none.

        What its preparation raised is raised here, again and again.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        return self._ahead[0].result() if self._ahead else None

    def taken(self) -> None:
        """The consumer has the next batch; prepare another."""
        self._ahead.popleft()
        self._ask()

    def close(self) -> None:
        """End the threads, each after what it is at, and free the graphs."""
        self._closed = True
        self._decoder.stop()
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.shutdown(wait=True)
        self._ahead.clear()
        self._reading.clear()
        self._decoder.close()

    def _ask(self) -> None:
        while len(self._ahead) < self._depth and not self._over(self._asked):
            while self._read_next < self._asked + IN_GRAPH and not self._over(self._read_next):
                self._reading[self._read_next] = self._reads.submit(self._read, self._read_next)
                self._read_next += 1
            self._ahead.append(self._decodes.submit(self._decode, self._asked))
            self._asked += 1

    def _over(self, step: int) -> bool:
        return self._end is not None and step >= self._end

    # What follows runs in the reading thread.

    def _read(self, step: int) -> Prepared:
        permutation, faults = self._permutation(step), self._faults
        planned = self._sequence.ids(step, permutation)
        damaged: list[int] = []
        jpegs = self._reader.read(planned, damaged if faults.most else None)
        stand_ins = {}
        for place, sample in enumerate(planned.tolist()):
            if place in damaged or faults.known(sample):
                stand_ins[place], jpegs[place] = faults.of(sample, DAMAGED)
        return self._sequence.prepared(step, permutation, stand_ins, jpegs)

    def _permutation(self, step: int) -> np.ndarray:
        """That of the step's epoch. The next one is begun in the middle of it, so that nobody waits for it."""
        order, steps = self._sequence.order, self._sequence.order.steps_per_epoch
        epoch, place = divmod(step, steps)
        soon = [epoch + 1] if 2 * place + 2 > steps and not self._over((epoch + 1) * steps) else []
        self._permutations = {
            each: self._permutations.get(each) or self._orders.submit(order.permutation, each)
            for each in [epoch, *soon]
        }
        found = self._permutations[epoch].result()
        known = [each for each in soon if self._permutations[each].done()]
        if self._upcoming and self._told != (news := (epoch, bool(known))):
            self._told = news
            rest = [found[place * order.batch_size :]]
            self._upcoming(np.concatenate(rest + [self._permutations[each].result() for each in known]))
        return found

    # What follows runs in the decoding thread.

    def _decode(self, step: int) -> Ready:
        self._submit(step)
        with self._decoder.streams():
            batch, views = self._decoded()
            assert batch.step == step
            decoded = time.perf_counter()
            labels = torch.from_numpy(self._reader.labels(batch.ids)).to(views[0].device)
            tensors = self._finish(batch, views)
        if labels.device.type == "cpu":
            decoded = time.perf_counter()  # nothing is transferred: what finishing takes is part of decoding
        return Ready(batch, labels, tensors, Times(batch.read, decoded, time.perf_counter()))

    def _submit(self, step: int) -> None:
        """Give the decoder the batch of `step`, if it has not got it, and those after it that have been read."""
        while (future := self._reading.get(self._submitted)) and self._submitted < step + IN_GRAPH:
            if self._submitted > step and not (future.done() and not future.exception()):
                break
            self._decoder.submit(future.result())
            del self._reading[self._submitted]
            self._submitted += 1

    def _decoded(self) -> tuple[Prepared, list[Tensor]]:
        while True:
            try:
                return self._decoder.result()
            except RuntimeError:
                batch = self._decoder.oldest
                places = self._decoder.undecodable()
                if not places:
                    raise
                for place in places:
                    stand_in = self._faults.of(int(batch.ids[place]), UNDECODABLE)
                    batch = self._sequence.replaced(batch, place, *stand_in)
                self._decoder.replace(batch)
