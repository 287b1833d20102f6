"""The queue of the parts that are under way: who is asked for which, again where it is late, and what came of it.

Each source, a worker or local decoding, takes the first part that it may, so that it gets what it can do. A part that
is late is taken a second time, by another source; the first answer counts, and so no part is lost.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

from pipeline import UserError
from pipeline.cli import printable
from pipeline.online.batch import NoWorkerError
from pipeline.online.connection import Failure
from pipeline.online.parts import Answer, Request
from pipeline.online.samples import BadSample, BadSamples

FIRST_DEADLINE, LEAST_DEADLINE = 5.0, 0.25  # seconds: before an answer has come, and whatever the recent ones took
SLACK = 4  # × the median of the recent answers' times: then a part is late
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds for which a worker that fails is left alone; doubled each time
REMEDY = "start workers (penstock feed), raise the patience, or leave workers out where the shards are"
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


class PartQueue:
    """Parts without an outcome, in their order, and the sources that are asked for them. Threads share it.

    `changed` guards its attributes.
    """

    def __init__(self, bad: BadSamples) -> None:
        self.changed = threading.Condition()
        self.workers: dict[str, Source] = {}  # by URI
        self.local: Source | None = None
        self.unknown: dict[str, str] = {}  # addresses without workers → why
        self._bad, self._closed = bad, False
        self._alone = False  # local decoding has taken over
        self._over = False  # the patience: the batches ahead do not have one more each
        self._waiting: list[Part] = []
        self._recent: deque[float] = deque(maxlen=64)  # seconds that answers took
        self._progress = time.monotonic()  # when a part last had an outcome

    def replace(self, workers: dict[str, Source], unknown: dict[str, str]) -> list[Source]:
        """Set the workers by URI, but those that are known stay as they are; return the new ones.

        Those of an address stay, too, that is `unknown` now: address → why.
        """
        with self.changed:
            if self._closed:
                return []
            for uri, worker in list(self.workers.items()):
                if uri not in workers and worker.address not in unknown:
                    worker.gone = True
                    del self.workers[uri]
            new = {uri: worker for uri, worker in workers.items() if uri not in self.workers}
            self.workers |= new
            for address in unknown.keys() - self.unknown.keys():
                _log.warning("%s; it is looked up again and again", unknown[address])
            self.unknown = unknown
            self.changed.notify_all()
        return list(new.values())

    def add(self, parts: list[Part]) -> None:
        """Add parts behind the others."""
        with self.changed:
            self._waiting += parts
            self.changed.notify_all()

    def close(self) -> None:
        """Let `take` return None, and `wait` raise RuntimeError."""
        with self.changed:
            self._closed = True
            self._waiting.clear()
            self.workers.clear()  # and with them their connections, at once
            self.changed.notify_all()

    def usable(self) -> int:
        """Return how many workers answer now."""
        with self.changed:
            return sum(worker.usable(self._late()) for worker in self.workers.values())

    def wait(self, parts: list[Part], patience: float) -> list[Answer]:
        """Wait for the answers.

        Raises BadSample: more samples have failed than may; NoWorkerError: no answer came for `patience` seconds, or
        all workers refuse; RuntimeError: closed.
        """
        with self.changed:
            began = time.monotonic()
            while any(piece.outcome is None for piece in parts):
                if self._closed:
                    raise RuntimeError("the loader is closed")
                for piece in parts:
                    if piece.outcome is None and piece.doubted is not None and self._nobody_else(piece):
                        self._believe(piece)
                if not self.local and self.workers and all(worker.refused for worker in self.workers.values()):
                    raise NoWorkerError(f"every decoding worker refuses: {self._reasons()}")
                if self._over or time.monotonic() - max(began, self._progress) > patience:
                    self._over = True
                    raise NoWorkerError(
                        f"no decoding worker has answered for {patience:g} s: {self._reasons()}; {REMEDY}"
                    )
                self.changed.wait(TICK)
            outcomes = [piece.outcome for piece in parts]
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Answer)]

    def take(self, source: Source) -> Part | None:
        """Wait for a part that the source should be asked for; None: no more."""
        with self.changed:
            while not (self._closed or source.gone):
                now = time.monotonic()
                wait: float | None = source.resumes - now
                if source.resumes <= now:
                    piece, wait = self._chosen(source, now)
                    if piece:
                        self._announce(source)
                        piece.asked[source.name] = source.asked[piece] = now
                        return piece
                self.changed.wait(wait)
        return None

    def give(self, source: Source, piece: Part, outcome: "Answer | Failure", seconds: float) -> None:
        """Take in what came of asking a source for a part, after so many seconds."""
        with self.changed:
            piece.asked.pop(source.name, None)
            source.asked.pop(piece, None)
            if isinstance(outcome, Answer):
                self._recent.append(seconds)
                self._answered(source, piece, outcome)
            else:
                self._failed(source, piece, outcome)
            self.changed.notify_all()

    def _reasons(self) -> str:
        """Return each worker and its last failure."""
        reasons = dict(self.unknown)
        for source in [*self.workers.values(), *([self.local] if self.local and self.local.reason else [])]:
            silent = "no answer yet" if source.asked else "not asked"
            reasons[source.name] = source.reason or silent
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no address names one"

    def _announce(self, source: Source) -> None:
        """Log once that local decoding begins because no worker answers; it may be asked for a doubtful part, too."""
        alone = source.fallback and not any(worker.usable(self._late()) for worker in self.workers.values())
        if alone and not self._alone:
            _log.warning("no decoding worker answers (%s); decoding locally until one does", self._reasons())
        self._alone = self._alone or alone

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
        return any(w.usable(late) and w.name not in piece.doubts for w in self.workers.values())

    def _deadline(self) -> float:
        return max(LEAST_DEADLINE, SLACK * median(self._recent)) if self._recent else FIRST_DEADLINE

    def _late(self) -> float:
        """Return the time: what was asked before it is late."""
        return time.monotonic() - self._deadline()

    def _answered(self, source: Source, piece: Part, answer: Answer) -> None:
        if source.failures:
            _log.warning("%s: answers again", source.name)
        source.failures, source.resumes, source.reason, source.refused = 0, 0.0, "", False
        self._alone = self._alone and source.fallback
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
        self.leave_alone(source, failure)

    def leave_alone(self, source: Source, failure: Failure) -> None:
        """Ask the source again after a pause, which grows."""
        refused = failure.kind == "refused"
        news = not source.failures or refused > source.refused  # a worker that is begun anew may have other data
        if news and not (self._closed or failure.kind == "closed"):
            _log.warning("%s: %s; its parts are asked of others", source.name, failure.reason)
        now = time.monotonic()
        source.reason, source.refused = failure.reason, refused
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
        local = self.local is not None and self.local.name not in piece.doubts and not self.local.failures
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
