"""From numbers to pixels: scales, round ticks, lines of few enough points, labels that do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

DENSE = 4  # points in a stretch of a line, from which on its mean is drawn


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, drawn from pixel `start` to pixel `end`; `log`: equal factors are equally far."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def places(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """(n,) numbers → (n,) float64 pixels; on a log axis, what is not above its low end is there."""
        given, ends = np.asarray(values, np.float64), np.array([self.low, self.high])
        if self.log:
            given, ends = np.log10(np.maximum(given, self.low)), np.log10(ends)
        return self.start + (given - ends[0]) / (ends[1] - ends[0]) * (self.end - self.start)

    def place(self, value: float) -> float:
        return float(self.places([value])[0])


def ticks(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """The multiples of 1, 2 or 5 · 10ⁿ from `low` to `high`, at most `most` ≥ 2 of them, at least `least` apart."""
    power = floor(log10((high - low) / most)) if high > low else 0
    for step in (times * 10.0**n for n in range(power - 1, power + 3) for times in (1, 2, 5)):
        first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
        if step >= least and last - first + 1 <= most:
            return [round(i * step, 12 - floor(log10(step))) for i in range(first, last + 1)]
    raise AssertionError((low, high, most))


def up(value: float, most: int) -> float:
    """The least round number, not below `value` ≥ 0, up to which an axis from 0 has at most `most` ticks; 1 for 0."""
    if value <= 0:
        return 1.0
    power = floor(log10(value / most))
    for step in (times * 10.0**n for n in range(power - 1, power + 3) for times in (1, 2, 5)):
        count = ceil(value / step - 1e-9)
        if count < most:
            return count * step
    raise AssertionError((value, most))


def decades(low: float, high: float) -> list[float]:
    """The powers of ten from the last one not above `low` > 0 to the first one not below `high`: two or more."""
    first, last = floor(log10(low) + 1e-9), ceil(log10(high) - 1e-9)
    return [float(f"1e{n}") for n in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Thinned:
    """A line with few points: of each stretch its mean, its least and its greatest value, (m,) float64 pixels each."""

    x: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    greatest: np.ndarray


def thinned(x: np.ndarray, y: np.ndarray, width: float) -> Thinned | None:
    """A line (n,), (n,) in pixels, x ascending, in stretches of `width` pixels; None: it has too few points for that.

    However long a run is, no peak of it is lost, and its course can be seen through its noise.
    """
    starts = np.flatnonzero(np.diff(np.floor(x / width), prepend=-np.inf))
    if len(x) < DENSE * len(starts):
        return None
    sizes = np.diff(starts, append=len(x))
    mean_x, mean_y = (np.add.reduceat(values, starts) / sizes for values in (x, y))
    return Thinned(mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def spread(places: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Where labels go that belong at `places`: at least `gap` apart, in the same order, between `low` and `high`.

    They move as little as they can (least squares): less i · gap, the i-th in order must not be below the one before
    it, which is isotonic regression; neighbours that are, share their mean. Closer together where there is no room.
    """
    order = np.argsort(places, kind="stable")
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    pools: list[tuple[float, int]] = []
    for value in np.asarray(places, np.float64)[order] - gap * np.arange(len(order)):
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (one, n), (other, m) = pools[-2:]
            pools[-2:] = [((one * n + other * m) / (n + m), n + m)]
    level = np.repeat([value for value, _ in pools], [n for _, n in pools])
    found = np.empty(len(order))
    found[order] = np.clip(level, low, high - gap * (len(order) - 1)) + gap * np.arange(len(order))
    return found


def number(value: float) -> str:
    """A tick's number: 12,000 or 0.25."""
    return f"{value:,.10g}"
