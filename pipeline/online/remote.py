"""Batches from decoding workers: their parts, in one queue, are asked of whichever worker is free; none is lost.

Two threads for each worker take parts from the queue, so that each worker gets what it can do, and so does local
decoding. A part that is late is taken a second time by another worker; the first answer counts.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import msgspec
import numpy as np
import torch
from torch import Tensor

from pipeline import UserError
from pipeline.cli import printable
from pipeline.online.batch import Batch, NoWorkerError
from pipeline.online.connection import Connection, Failure, secrets
from pipeline.online.devices import Streams
from pipeline.online.endpoints import LOCAL, Address, Endpoint
from pipeline.online.order import part
from pipeline.online.parts import MOST, Answer, Parts, Request
from pipeline.online.samples import BadSample, BadSamples

PULLERS = 2  # requests to a worker at a time, so that it decodes one while another's views travel
FEWEST = 8  # samples of a part, unless the batch is smaller
FIRST_DEADLINE, LEAST_DEADLINE = 5.0, 0.25  # seconds: before an answer has come, and whatever the recent ones took
SLACK = 4  # × the median of the recent answers' times: then a part is late
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds for which a worker that fails is left alone; doubled each time
HELLO = 3.0  # seconds that a worker has for the first answer, until it counts as one that may come later
REFRESH, ALL_IS_WELL = 5.0, 6  # seconds between two looks at the addresses; so many times as many where all answer
TICK = 0.1  # seconds between two looks at what time alone changes
_log = logging.getLogger("penstock")


@dataclass(eq=False)
class Part:
    """Samples in a row of a batch, until their views are there."""

    request: Request
    positions: slice
    asked: dict[str, float] = field(default_factory=dict)  # sources that are asked now → since when
    doubts: set[str] = field(default_factory=set)  # sources that found bad samples, of which the others are asked
    doubted: "Answer | BadSample | None" = None  # the last of their answers
    outcome: "Answer | UserError | None" = None
    source: str = ""  # of the outcome
    at: float = 0.0  # by time.perf_counter


@dataclass(eq=False)
class Source:
    """A worker, or local decoding."""

    name: str
    ask: Callable[..., Answer]  # (request, *, timeout in seconds), which raises Failure
    address: str = ""
    fallback: bool = False  # local decoding that begins where no worker answers
    failures: int = 0  # in a row
    resumes: float = 0.0  # when it is asked again, by time.monotonic
    reason: str = ""  # of the last failure
    refused: bool = False
    gone: bool = False  # no address names it any more
    asked: dict[Part, float] = field(default_factory=dict)

    def usable(self, late: float) -> bool:
        """Return whether it answers; what was asked before `late` is late."""
        return not (self.failures or self.gone) and all(since > late for since in self.asked.values())


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
        devices: tuple[torch.device, ...],
        depth: int,
        patience: float,
    ) -> None:
        self._template, self._side, self._addresses, self._bad = template, side, addresses, bad
        self._devices, self._patience = devices, patience
        self.under_way = self._depth = depth
        self._streams = Streams(devices)
        self._token, self._ca = secrets()
        self._changed = threading.Condition()  # guards all that follows
        self._closed = threading.Event()
        self._batches: deque[tuple[Batch, list[Part]]] = deque()
        self._waiting: list[Part] = []  # parts without an outcome, in order
        self._workers: dict[str, Source] = {}  # by URI
        self._unknown: dict[str, str] = {}  # addresses without workers → why
        self._recent: deque[float] = deque(maxlen=64)  # seconds that answers took
        self._progress = time.monotonic()  # when a part last had an outcome
        self._local: Source | None = None
        self._parts: Parts | None = None
        workers = self._look()
        self._greet(workers)
        if local:
            self._parts = local()
            self._local = Source(LOCAL, partial(_decode, self._parts), fallback=not mixed)
            self._start(self._local, 1)
        for worker in workers:
            self._start(worker, PULLERS)
        threading.Thread(target=self._refresh, name="penstock-workers", daemon=True).start()

    # The interface of a decoder

    def submit(self, batch: Batch) -> None:
        """Begin to ask for a batch; it may be empty."""
        n, owners = len(batch.ids), batch.crop_owner_ids
        with self._changed:
            pullers = PULLERS * len(self._workers) + (self._local is not None and not self._local.fallback)
            count = max(1, -(-n // MOST), min(-(-pullers // self._depth), n // FEWEST))
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
            self._waiting += parts
            self._changed.notify_all()

    def result(self) -> tuple[Batch, list[Tensor]]:
        """Return the oldest batch with its ids and labels, and its views on each device: uint8 (n, h, w, 3).

        Raises BadSample: more samples have failed than may; NoWorkerError: nobody answers, or all refuse.
        """
        batch, parts = self._batches[0]
        answers = self._await(parts)
        for piece, answer in zip(parts, answers):
            batch.ids[piece.positions] = answer.ids
        labels = np.concatenate([np.empty(0, np.int64), *(answer.labels for answer in answers)])
        batch.labels = torch.from_numpy(labels)
        views = [self._on(device, len(batch.ids), parts, answers) for device in self._devices]
        if parts:
            last = max(parts, key=lambda piece: piece.at)
            batch.read_at, batch.worker = last.at, last.source
        with self._changed:
            batch.workers = sum(worker.usable(self._late()) for worker in self._workers.values())
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
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End local decoding, and free the memory. A thread that waits for a worker ends with its request."""
        self.stop()
        if self._parts:
            self._parts.close()
        with self._changed:
            self._batches.clear()
            self._waiting.clear()

    # The consumer's side

    def _await(self, parts: list[Part]) -> list[Answer]:
        """Wait for the outcomes; return them, or raise the first that is an error."""
        with self._changed:
            began = time.monotonic()
            while any(piece.outcome is None for piece in parts):
                if self._closed.is_set():
                    raise RuntimeError("the loader is closed")
                for piece in parts:
                    if piece.outcome is None and piece.doubted is not None and self._nobody_else(piece):
                        self._believe(piece)
                if not self._local and self._workers and all(worker.refused for worker in self._workers.values()):
                    raise NoWorkerError(f"every decoding worker refuses: {self._reasons()}")
                if time.monotonic() - max(began, self._progress) > self._patience:
                    raise NoWorkerError(f"no decoding worker has answered for {self._patience:g} s: {self._reasons()}")
                self._changed.wait(TICK)
            outcomes = [piece.outcome for piece in parts]
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Answer)]

    def _on(self, device: torch.device, n: int, parts: list[Part], answers: list[Answer]) -> Tensor:
        if device.type == "cpu" and len(answers) == 1:
            return torch.from_numpy(answers[0].views)  # the memory that came from the network
        views = torch.empty((n, self._side, self._side, 3), dtype=torch.uint8, device=device)
        for piece, answer in zip(parts, answers):
            views[piece.positions].copy_(torch.from_numpy(answer.views))
        return views

    def _reasons(self) -> str:
        """Return each worker and its last failure."""
        reasons = dict(self._unknown)
        for source in [*self._workers.values(), *filter(None, [self._local])]:
            silent = "no answer yet" if source.asked else "not asked"
            reasons[source.name] = source.reason or silent
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no address names one"

    # The threads of the sources. The lock is held in what follows `_pull`.

    def _start(self, source: Source, threads: int) -> None:
        for _ in range(threads):
            threading.Thread(target=self._pull, args=(source,), name="penstock-puller", daemon=True).start()

    def _pull(self, source: Source) -> None:
        """Ask a source for one part after another, until the end."""
        while piece := self._take(source):
            known = tuple(sorted(self._bad.ids)[: 4 * MOST])  # saves work; the replacements are the same without
            began = time.monotonic()
            try:
                outcome: Answer | Failure = source.ask(
                    msgspec.structs.replace(piece.request, bad=known), timeout=self._patience
                )
            except Failure as failure:
                outcome = failure
            with self._changed:
                piece.asked.pop(source.name, None)
                source.asked.pop(piece, None)
                if isinstance(outcome, Answer):
                    self._recent.append(time.monotonic() - began)
                    self._answered(source, piece, outcome)
                else:
                    self._failed(source, piece, outcome)
                self._changed.notify_all()

    def _take(self, source: Source) -> Part | None:
        """Wait for a part that the source should be asked for; None: no more."""
        with self._changed:
            while not (self._closed.is_set() or source.gone):
                now = time.monotonic()
                wait: float | None = source.resumes - now
                if source.resumes <= now:
                    piece, wait = self._chosen(source, now)
                    if piece:
                        piece.asked[source.name] = source.asked[piece] = now
                        return piece
                self._changed.wait(wait)
        return None

    def _chosen(self, source: Source, now: float) -> tuple[Part | None, float | None]:
        """Return the first part that nobody is asked for, or that is late; else the time until one may be late."""
        deadline, wait = self._deadline(), None
        for piece in self._waiting:
            if source.name in piece.asked or source.name in piece.doubts:
                continue
            if source.fallback and self._asks_workers(piece, now - deadline):
                due = now + TICK
            else:
                due = max(piece.asked.values(), default=now - deadline) + deadline
            if due <= now:
                return piece, None
            wait = min(due - now, wait or due - now)
        return None, wait

    def _asks_workers(self, piece: Part, late: float) -> bool:
        """Return whether a worker may still answer."""
        return any(w.usable(late) and w.name not in piece.doubts for w in self._workers.values())

    def _deadline(self) -> float:
        return max(LEAST_DEADLINE, SLACK * median(self._recent)) if self._recent else FIRST_DEADLINE

    def _late(self) -> float:
        """Return the time: what was asked before it is late."""
        return time.monotonic() - self._deadline()

    def _answered(self, source: Source, piece: Part, answer: Answer) -> None:
        source.failures, source.resumes, source.reason, source.refused = 0, 0.0, "", False
        if piece.outcome is not None:
            return
        new = {sample: where for sample, where in answer.bad.items() if sample not in self._bad.ids}
        if new and answer.damaged:
            self._doubt(source, piece, Answer(answer.views, answer.ids, answer.labels, new))
        else:
            self._finish(source.name, piece, answer)

    def _failed(self, source: Source, piece: Part, failure: Failure) -> None:
        if failure.kind == "bad":
            return self._doubt(source, piece, BadSample(f"{source.name}: {failure.reason}"))
        self._leave_alone(source, failure)

    def _leave_alone(self, source: Source, failure: Failure) -> None:
        """Ask the source again after a pause, which grows."""
        if not source.failures:
            _log.warning("%s: %s; its parts are asked of others", source.name, failure.reason)
        now = time.monotonic()
        source.reason, source.refused = failure.reason, failure.kind == "refused"
        if source.resumes <= now:  # else the other thread of this worker has failed just before
            source.resumes = now + min(LONGEST_PAUSE, FIRST_PAUSE * 2**source.failures)
            source.failures += 1

    def _doubt(self, source: Source, piece: Part, doubted: "Answer | BadSample") -> None:
        """Ask the others, whose copies of the data set may be whole, before bad samples are believed."""
        if piece.outcome is None:
            piece.doubts.add(source.name)
            piece.doubted, piece.source = doubted, source.name
            if self._nobody_else(piece):
                self._believe(piece)

    def _nobody_else(self, piece: Part) -> bool:
        local = self._local is not None and LOCAL not in piece.doubts and not self._local.failures
        return not (local or self._asks_workers(piece, self._late()))

    def _believe(self, piece: Part) -> None:
        assert piece.doubted is not None
        self._finish(piece.source, piece, piece.doubted)

    def _finish(self, name: str, piece: Part, outcome: "Answer | BadSample") -> None:
        if isinstance(outcome, Answer):
            try:
                for sample, where in sorted(outcome.bad.items()):
                    if sample not in self._bad.ids:
                        self._bad.add(sample, f"{name}: {printable(where, 500)}")
            except BadSample as error:
                outcome = error
        piece.outcome, piece.source, piece.at = outcome, name, time.perf_counter()
        self._progress = time.monotonic()
        with suppress(ValueError):  # closed
            self._waiting.remove(piece)

    # The addresses

    def _refresh(self) -> None:
        """Look at the addresses again and again: workers come and go."""
        rounds = 0
        while not self._closed.wait(REFRESH):
            rounds += 1
            with self._changed:
                late = self._late()
                well = not self._unknown and all(worker.usable(late) for worker in self._workers.values())
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
        new = []
        with self._changed:
            self._unknown = unknown
            for uri, worker in list(self._workers.items()):
                if uri not in endpoints and worker.address not in unknown:
                    worker.gone = True
                    del self._workers[uri]
            for uri, (text, endpoint) in endpoints.items():
                if uri not in self._workers:
                    ask = partial(Connection(endpoint, self._token, self._ca).ask, side=self._side)
                    self._workers[uri] = Source(endpoint.name, ask, text)
                    new.append(self._workers[uri])
            self._changed.notify_all()
        return new

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
                    self._leave_alone(worker, failure)


def _decode(parts: Parts, request: Request, timeout: float) -> Answer:
    """Decode a part here. Raises Failure, as `Connection.ask`."""
    try:
        return parts.decode(request)
    except BadSample as error:
        raise Failure("bad", str(error)) from error
    except (UserError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: closed
        raise Failure("data", str(error)) from error
