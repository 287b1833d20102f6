"""The stall meter: how long the consumer waited for batches, and for what."""

from collections import deque
from dataclasses import dataclass, field, replace

import torch

CAUSES = ("reading", "decoding", "transfer")
KNOBS = {
    "reading": "more readers=, order='shards', or a faster disk",
    "decoding": "more threads=, or on a GPU another hardware_share=",
    "transfer": "a larger depth=",
}
LIMIT = 0.01  # of the time; a stall above it is named with its cause


@dataclass(frozen=True)
class Times:
    """When a batch was read, decoded, and ready, by `time.perf_counter`."""

    read: float
    decoded: float
    ready: float


@dataclass(frozen=True)
class Wait:
    """Seconds that the consumer waited, by cause; on a GPU `device` are those in which it had nothing to do."""

    reading: float = 0.0
    decoding: float = 0.0
    transfer: float = 0.0
    device: float | None = None  # None: no GPU; the consumer is the host

    @property
    def host(self) -> float:
        return self.reading + self.decoding + self.transfer

    @property
    def seconds(self) -> float:
        """The stall: on a GPU what the device waited, else what the host did."""
        return self.host if self.device is None else self.device

    def __add__(self, other: "Wait") -> "Wait":
        device = None if self.device is None and other.device is None else (self.device or 0.0) + (other.device or 0.0)
        return Wait(
            self.reading + other.reading, self.decoding + other.decoding, self.transfer + other.transfer, device
        )

    def __sub__(self, other: "Wait") -> "Wait":
        device = None if self.device is None else self.device - (other.device or 0.0)
        return Wait(
            self.reading - other.reading, self.decoding - other.decoding, self.transfer - other.transfer, device
        )

    def shares(self, wall: float) -> dict[str, float]:
        """The stall as a share of `wall` seconds, by cause; a GPU's by what the host waited for meanwhile."""
        whole = self.seconds / wall if wall > 0 else 0.0
        if self.host <= 0:
            return {cause: whole * (cause == "transfer") for cause in CAUSES}
        return {cause: whole * getattr(self, cause) / self.host for cause in CAUSES}

    def said(self, wall: float) -> str:
        """`stall 12.3 % (decoding: what to turn)`; the cause above `LIMIT` only."""
        shares = self.shares(wall)
        stall, worst = sum(shares.values()), max(CAUSES, key=lambda cause: shares[cause])
        return f"stall {100 * stall:4.1f} %" + (f" ({worst}: {KNOBS[worst]})" if stall > LIMIT else "")


def waited(asked: float, got: float, times: Times) -> Wait:
    """What a consumer who asked at `asked` and got the batch at `got` waited for."""
    read, decoded = max(asked, times.read), max(asked, times.decoded)
    read, decoded = min(read, got), min(max(read, decoded), got)
    return Wait(read - asked, decoded - read, got - decoded)


@dataclass
class Meter:
    """Adds up the waiting of a loader's consumer. On a GPU by CUDA events, which cost the host no waiting."""

    _last: Wait = Wait()
    _total: Wait = Wait()
    _events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)
    _latest: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def add(self, wait: Wait, events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None) -> None:
        """The waiting for one batch; `events` stand on the consumer's stream before and after it."""
        self._last, self._total = wait, self._total + (wait if events is None else replace(wait, device=0.0))
        self._latest = events
        if events is not None:
            self._events.append(events)

    @property
    def last(self) -> Wait:
        """That for the latest batch; on a GPU once the device has come to its step, until then what the host waited."""
        if self._latest is None or not self._latest[1].query():
            return self._last
        before, after = self._latest
        return replace(self._last, device=before.elapsed_time(after) / 1e3)

    @property
    def total(self) -> Wait:
        """All waiting so far; on a GPU, that of the steps which the device has come to."""
        while self._events and self._events[0][1].query():
            before, after = self._events.popleft()
            self._total += Wait(device=before.elapsed_time(after) / 1e3)
        return self._total
