"""Batches from decoding workers: cuts each into parts, has these answered by way of one queue, joins the answers."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

import msgspec
import numpy as np
import torch
from torch import Tensor

from pipeline import UserError
from pipeline.online.batch import Batch, NoWorkerError
from pipeline.online.connection import Connection, Failure, secrets
from pipeline.online.devices import Streams
from pipeline.online.endpoints import LOCAL, Address, Endpoint
from pipeline.online.order import part
from pipeline.online.partqueue import Part, PartQueue, Source
from pipeline.online.parts import KNOWN, MOST, Answer, Parts, Request
from pipeline.online.samples import BadSample, BadSamples, SampleReader

PULLERS = 2  # requests to a worker at a time, so that it decodes one while another's views travel
FEWEST = 8  # samples of a part, unless the batch is smaller
HELLO = 3.0  # seconds that a worker has for the first answer, until it counts as one that may come later
REFRESH, ALL_IS_WELL = 5.0, 6  # seconds between two looks at the addresses; so many times as many where all answer


class Decoder:
    """Batches in, views out, in the same order; see `prefetch.Decoder`. Workers read what they decode.

    `template` is a request without samples. `local` makes local decoding, None where the shards are not here; without
    `mixed` it begins only where no worker answers. Raises NoWorkerError: a worker refuses; UserError, OSError: secrets.
    """

    def __init__(
        self,
        template: Request,
        side: int,  # pixels of a side of a view
        addresses: tuple[Address, ...],
        local: Callable[[], Parts] | None,
        mixed: bool,
        bad: BadSamples,
        reader: SampleReader,  # for the labels
        devices: tuple[torch.device, ...],
        depth: int,
        patience: float,
    ) -> None:
        self._template, self._side, self._addresses, self._bad = template, side, addresses, bad
        self._reader, self._devices, self._patience = reader, devices, patience
        self.under_way = self._depth = depth
        self._streams = Streams(devices)
        self._token, self._ca = secrets()
        self._queue = PartQueue(bad)
        self._closed = threading.Event()
        self._batches: deque[tuple[Batch, list[Part]]] = deque()
        self._parts: Parts | None = None
        workers = self._look()
        self._greet(workers)
        if local:
            self._parts = local()
            self._queue.local = Source(LOCAL, partial(_decode, self._parts), fallback=not mixed)
            self._start(self._queue.local, 1)
        for worker in workers:
            self._start(worker, PULLERS)
        threading.Thread(target=self._refresh, name="penstock-workers", daemon=True).start()

    # The interface of a decoder

    def submit(self, batch: Batch) -> None:
        """Begin to ask for a batch; it may be empty."""
        n, owners = len(batch.ids), batch.crop_owner_ids
        count = max(1, -(-n // MOST), min(-(-PULLERS * len(self._queue.workers) // self._depth), n // FEWEST))
        parts = []
        for i in range(count if n else 0):
            positions = part(n, i, count)
            request = msgspec.structs.replace(
                self._template,
                step=batch.step,
                epoch=batch.epoch,
                ids=tuple(batch.requested_ids[positions].tolist()),
                owners=None if owners is None else tuple(owners[positions].tolist()),
            )
            parts.append(Part(request, positions))
        self._batches.append((batch, parts))
        self._queue.add(parts)

    def result(self) -> tuple[Batch, list[Tensor]]:
        """Return the oldest batch with its ids and labels, and its views on each device: uint8 (n, h, w, 3).

        Raises BadSample: more samples have failed than may; NoWorkerError: nobody answers, or all refuse.
        """
        batch, parts = self._batches[0]
        answers = self._queue.wait(parts, self._patience)
        for piece, answer in zip(parts, answers):
            batch.ids[piece.positions] = answer.ids
        labels = np.concatenate([np.empty(0, np.int64), *(answer.labels for answer in answers)])
        batch.labels = torch.from_numpy(labels)
        views = [self._on(device, len(batch.ids), parts, answers) for device in self._devices]
        if parts:
            last = max(parts, key=lambda piece: piece.at)
            batch.read_at, batch.worker = last.at, last.source
        batch.workers = self._queue.usable()
        self._batches.popleft()
        return batch, views

    def retry(self) -> None:
        """Do nothing: workers replace what does not decode."""

    def streams(self) -> AbstractContextManager[None]:
        """Make streams of the decoder current on every GPU; what is copied there is ready when the context ends."""
        return self._streams.current()

    def stop(self) -> None:
        """Let the threads end; `result` then raises RuntimeError."""
        self._closed.set()
        self._queue.close()

    def close(self) -> None:
        """End local decoding, and free the memory. A thread that waits for a worker ends with its request."""
        self.stop()
        if self._parts:
            self._parts.close()
        self._batches.clear()

    def _on(self, device: torch.device, n: int, parts: list[Part], answers: list[Answer]) -> Tensor:
        if device.type == "cpu" and len(answers) == 1:
            return torch.from_numpy(answers[0].views)  # the memory that came from the network
        views = torch.empty((n, self._side, self._side, 3), dtype=torch.uint8, device=device)
        for piece, answer in zip(parts, answers):
            views[piece.positions].copy_(torch.from_numpy(answer.views))
        return views

    def _start(self, source: Source, threads: int) -> None:
        for _ in range(threads):
            threading.Thread(target=self._pull, args=(source,), name="penstock-puller", daemon=True).start()

    def _pull(self, source: Source) -> None:
        """Ask a source for one part after another, until the end."""
        while piece := self._queue.take(source):
            known = tuple(sorted(self._bad.ids)[:KNOWN])  # saves work; the replacements are the same without
            request, began = msgspec.structs.replace(piece.request, bad=known), time.monotonic()
            try:
                answer = source.ask(request, timeout=self._patience)
                answer.verify(request, self._reader, self._bad.training)
                outcome: Answer | Failure = answer
            except Failure as failure:
                outcome = failure
            except UserError as error:
                outcome = Failure("wrong", str(error))
            self._queue.give(source, piece, outcome, time.monotonic() - began)

    # The addresses

    def _refresh(self) -> None:
        """Look at the addresses again and again: workers come and go."""
        rounds = 0
        while not self._closed.wait(REFRESH):
            rounds += 1
            well = not self._queue.unknown and self._queue.usable() == len(self._queue.workers)
            if not well or rounds % ALL_IS_WELL == 0:
                for worker in self._look():
                    self._start(worker, PULLERS)

    def _look(self) -> list[Source]:
        """Resolve the addresses; return the workers that are new."""
        endpoints: dict[str, tuple[str, Endpoint]] = {}
        unknown = {}
        for address in self._addresses:
            try:
                endpoints |= {endpoint.uri: (address.text, endpoint) for endpoint in address.endpoints()}
            except UserError as error:
                unknown[address.text] = str(error)
        workers = {}
        for uri, (text, endpoint) in endpoints.items():
            ask = partial(Connection(endpoint, self._token, self._ca).ask, side=self._side)
            workers[uri] = Source(endpoint.name, ask, text)
        return self._queue.replace(workers, unknown)

    def _greet(self, workers: list[Source]) -> None:
        """Say hello to each worker, with a request of no samples. Raises NoWorkerError: one refuses."""

        def greet(worker: Source) -> Failure | None:
            try:
                worker.ask(self._template, timeout=HELLO)
            except Failure as failure:
                return failure
            return None

        with ThreadPoolExecutor(16, "penstock-hello") as pool:
            for worker, failure in zip(workers, pool.map(greet, workers)):
                if failure and failure.kind == "refused":
                    raise NoWorkerError(f"{worker.name}: {failure.reason}")
                if failure:
                    self._queue.leave_alone(worker, failure)


def _decode(parts: Parts, request: Request, timeout: float) -> Answer:
    """Decode a part here. Raises Failure, as `Connection.ask`."""
    try:
        return parts.decode(request)
    except BadSample as error:
        raise Failure("bad", str(error)) from error
    except RuntimeError as error:
        raise Failure("closed", str(error)) from error
    except (UserError, OSError, MemoryError) as error:
        raise Failure("data", str(error)) from error
