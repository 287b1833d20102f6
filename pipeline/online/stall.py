"""The stall meter: the time that the consumer waited for batches, by cause."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

KNOBS = {  # cause → options of `Loader` to change
    "reading": "readers=4, order='shards', or a faster disk",
    "decoding": "more CPU cores, or on a GPU hardware_share=0.7",
    "transfer": "depth=4",
}
LIMIT = 0.01  # share of the time; a larger stall is reported with its cause


@dataclass(frozen=True)
class Wait:
    """Seconds that the consumer waited, by cause; on a GPU `device` are those in which it had nothing to do."""

    reading: float = 0.0
    decoding: float = 0.0
    transfer: float = 0.0
    device: float | None = None  # None: no GPU; the consumer is the host

    @property
    def seconds(self) -> float:
        """The stall: on a GPU what the device waited, else what the host did."""
        return self.reading + self.decoding + self.transfer if self.device is None else self.device

    def __add__(self, other: "Wait") -> "Wait":
        on_gpu = self.device is not None or other.device is not None
        return Wait(
            self.reading + other.reading,
            self.decoding + other.decoding,
            self.transfer + other.transfer,
            (self.device or 0.0) + (other.device or 0.0) if on_gpu else None,
        )

    def __sub__(self, other: "Wait") -> "Wait":
        device = None if other.device is None else -other.device
        return self + Wait(-other.reading, -other.decoding, -other.transfer, device)

    def shares(self, wall: float) -> dict[str, float]:
        """Return the stall as a share of `wall` seconds, by cause; on a GPU by what the host waited for meanwhile."""
        stall, host = self.seconds / wall if wall > 0 else 0.0, self.reading + self.decoding + self.transfer
        if host <= 0:
            return {cause: stall * (cause == "transfer") for cause in KNOBS}
        return {cause: stall * getattr(self, cause) / host for cause in KNOBS}

    def text(self, wall: float, remedies: Mapping[str, str] = KNOBS) -> str:
        """Return `stall 12.3 % (decoding: remedy)`; the cause only above `LIMIT`. `remedies`: by cause."""
        shares = self.shares(wall)
        stall, worst = sum(shares.values()), max(shares, key=lambda cause: shares[cause])
        return f"stall {100 * stall:4.1f} %" + (f" ({worst}: {remedies[worst]})" if stall > LIMIT else "")


def waited(asked: float, read: float, decoded: float, got: float) -> Wait:
    """Return the waiting for a batch by the moments at which it was asked for, had been read and decoded, and came."""
    read = min(max(asked, read), got)
    decoded = min(max(read, decoded), got)
    return Wait(read - asked, decoded - read, got - decoded)


@dataclass
class Meter:
    """Adds up the waiting of a loader's consumer; on a GPU by CUDA events, so that the host does not wait for it."""

    _total: Wait = Wait()
    _events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

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
        return self._total
