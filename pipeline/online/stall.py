"""The stall meter: the time that the consumer waited for batches, by cause."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil

import torch

KNOBS = {  # cause → options of `Loader` to change
    "reading": "readers=4, order='shards', or a faster disk",
    "decoding": "a raw tier (tools/raw_tier.py), more CPU cores, or on a GPU hardware_share=0.7",
    "transfer": "depth=4",
    "workers": "a faster network",  # the number of workers is computed
}
LIMIT = 0.01  # share of the time; a larger stall is reported with its cause
MOST = 0.99  # share of the time, from which the workers that are lacking are estimated: at most 99 times as many


@dataclass(frozen=True)
class Wait:
    """Seconds that the consumer waited, by cause; on a GPU `device` are those in which it had nothing to do."""

    reading: float = 0.0
    decoding: float = 0.0
    transfer: float = 0.0
    by_worker: Mapping[str, float] = field(default_factory=dict)  # seconds, by the worker that was waited for
    worker_seconds: float = 0.0  # of these, each times the number of workers that answered then
    device: float | None = None  # None: no GPU; the consumer is the host

    @property
    def workers(self) -> float:
        """Seconds that decoding workers were waited for."""
        return sum(self.by_worker.values())

    @property
    def host(self) -> float:
        """Seconds that the host waited."""
        return self.reading + self.decoding + self.transfer + self.workers

    @property
    def seconds(self) -> float:
        """The stall: on a GPU what the device waited, else what the host did."""
        return self.host if self.device is None else self.device

    def __add__(self, other: "Wait") -> "Wait":
        on_gpu = self.device is not None or other.device is not None
        return Wait(
            self.reading + other.reading,
            self.decoding + other.decoding,
            self.transfer + other.transfer,
            _sum(self.by_worker, other.by_worker),
            self.worker_seconds + other.worker_seconds,
            (self.device or 0.0) + (other.device or 0.0) if on_gpu else None,
        )

    def __sub__(self, other: "Wait") -> "Wait":
        by_worker = {name: -seconds for name, seconds in other.by_worker.items()}
        device = None if other.device is None else -other.device
        parts = -other.reading, -other.decoding, -other.transfer
        return self + Wait(*parts, by_worker, -other.worker_seconds, device)

    def shares(self, wall: float) -> dict[str, float]:
        """Return the stall as a share of `wall` seconds, by cause; on a GPU by what the host waited for meanwhile."""
        stall = self.seconds / wall if wall > 0 else 0.0
        if self.host <= 0:
            return {cause: stall * (cause == "transfer") for cause in KNOBS}
        return {cause: stall * getattr(self, cause) / self.host for cause in KNOBS}

    def text(self, wall: float, remedies: Mapping[str, str] = KNOBS) -> str:
        """Return `stall 12.3 % (decoding: remedy)`; the cause only above `LIMIT`. `remedies`: by cause."""
        shares = self.shares(wall)
        stall, worst = sum(shares.values()), max(shares, key=lambda cause: shares[cause])
        text = f"stall {100 * stall:4.1f} %"
        if stall <= LIMIT:
            return text
        remedy = remedies[worst]
        if worst == "workers":
            slowest = max(self.by_worker, key=lambda name: self.by_worker[name])
            remedy = f"{self._lacking(shares[worst])}, or {remedy}; waited most for {slowest}"
        return f"{text} ({worst}: {remedy})"

    def _lacking(self, share: float) -> str:
        """Return in words how many workers are lacking; the consumer waited for workers for this share of the time.

        W workers make so many batches in the whole time; the consumer takes as many in 1 − share of it.
        """
        count, share = round(self.worker_seconds / self.workers), min(share, MOST)
        return f"{max(1, ceil(count * share / (1 - share)))} more beside {count} at this rate"


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def waited(asked: float, read: float, decoded: float, got: float, worker: str = "", workers: int = 0) -> Wait:
    """Return the waiting for a batch by the moments at which it was asked for, had been read and decoded, and came.

    `worker`: which decoded the part of the batch that came last, at `read`; `workers`: the number that answer.
    """
    read = min(max(asked, read), got)
    decoded = min(max(read, decoded), got)
    if worker:
        return Wait(0.0, decoded - read, got - decoded, {worker: read - asked}, (read - asked) * workers)
    return Wait(read - asked, decoded - read, got - decoded)


@dataclass
class Meter:
    """Adds up the waiting of a loader's consumer; on a GPU by CUDA events, so that the host does not wait for it."""

    _total: Wait = Wait()
    _events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)
    _last: torch.cuda.Event | None = None  # that the device has reached
    _clock: float = 0.0

    def add(self, wait: Wait, events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None) -> None:
        """Add the waiting for one batch; `events` stand on the consumer's stream before and after it."""
        self._total += wait if events is None else replace(wait, device=0.0)
        if events is not None:
            self._events.append(events)

    @property
    def total(self) -> Wait:
        """All waiting so far; on a GPU that for the steps which the device has reached."""
        while self._events and self._events[0][1].query():
            before, after = self._events.popleft()
            self._total += Wait(device=before.elapsed_time(after) / 1e3)
            self._clock += (self._last or before).elapsed_time(after) / 1e3
            self._last = after
        return self._total

    @property
    def clock(self) -> float | None:
        """The device's own seconds from the first batch to the last in `total`; None without a GPU.

        The host runs ahead of it, and so its clock says nothing of the steps.
        """
        return None if self._total.device is None else self._clock
