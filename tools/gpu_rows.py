"""Rows of the GPU bench: how one is timed, what it is compared with, and what it says where it cannot be measured."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import truediv
from typing import Any

import torch
from pipeline.online.meter import Meter

from tools.failures import FAILURES, reason

REPETITIONS = 5
WARM_UP = 8  # steps before the first that is timed: more than a loader has ahead
TRAINED = ("grouped", "torchvision", "step", "fed")  # parts whose memory is noted


@dataclass
class Row:
    part: str
    what: str
    batch: int
    rates: list[float] = field(default_factory=list)  # images/s of each repetition
    images_per_second: float | None = None  # their median
    host_cores: float | None = None  # seconds of this process on a core, per second
    ceiling: str = ""  # an earlier row
    share: float | None = None  # of the ceiling
    found: dict[str, float] = field(default_factory=dict)
    not_measured: str = ""

    def cells(self) -> tuple[str, ...]:
        """Text for `HEADER`."""
        rate = f"not measured: {self.not_measured}" if self.not_measured else ""
        if self.rates:
            rate = f"{self.images_per_second:,.0f} ({min(self.rates):,.0f} to {max(self.rates):,.0f})"
        cores = "" if self.host_cores is None else f"{self.host_cores:.1f}"
        share = "" if self.share is None else f"{100 * self.share:.0f} % of {self.ceiling}"
        found = ", ".join(f"{key} {value:.3g}" for key, value in self.found.items())
        return self.part, self.what, f"{self.batch:,}", rate, share, cores, found


class Rows:
    """The rows so far of a device, in the order of measuring."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device, self._seconds, self._cuda = device, seconds, device.type == "cuda"
        self.done = list[Row]()

    def _row(self, part: str, what: str, batch: int, measure: Callable[..., None], *arguments: object) -> Row:
        row = Row(part, what, batch)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            measure(row, *arguments)
        except FAILURES as error:
            row.not_measured = reason(error)
        if self._cuda and part in TRAINED:
            row.found["GiB"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()  # DALI takes its memory elsewhere
        self.done.append(row)
        return row

    def fastest(self, part: str, what: str, batch: int) -> Row:
        """Of the rows so far with these names; one without figures where there is none."""
        rows = [row for row in self.done if (row.part, row.what, row.batch) == (part, what, batch)]
        return max(rows, key=lambda row: row.images_per_second or 0.0, default=Row(part, what, batch))

    def _time(self, row: Row, step: Callable[[], int], ceiling: Row | None = None, loader: Any = None) -> None:
        """Repetitions of `step`, which returns its images; the device is waited for at the end of each alone."""
        each = self._seconds / REPETITIONS
        step()  # alone: it may compile
        self._repetition(step, each, WARM_UP)
        meter = loader.meter if loader else Meter()
        waited, cpu, began = meter.total, time.process_time(), time.perf_counter()
        row.rates = [self._repetition(step, each, 1) for _ in range(REPETITIONS)]
        wall, row.images_per_second = time.perf_counter() - began, statistics.median(row.rates)
        row.host_cores = (time.process_time() - cpu) / wall
        if ceiling and ceiling.images_per_second:
            row.ceiling = f"{ceiling.part}, {ceiling.what}"
            row.share = row.images_per_second / ceiling.images_per_second
        if loader:
            shares = (meter.total - waited).shares(wall)
            row.found |= {"stall": sum(shares.values()), **shares}

    def _repetition(self, step: Callable[[], int], seconds: float, least: int) -> float:
        """Images/s of at least so many steps and seconds."""
        images, steps, began = 0, 0, time.perf_counter()
        while steps < least or time.perf_counter() < began + seconds:
            images, steps = images + step(), steps + 1
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
        return images / (time.perf_counter() - began)

    def _against(
        self, row: Row, part: str, what: str, key: str, figure: Callable[[float, float], float] = truediv
    ) -> None:
        """Note a figure of this row's rate and an earlier row's, where there are both."""
        other = self.fastest(part, what, row.batch).images_per_second
        if row.images_per_second and other:
            row.found[key] = figure(row.images_per_second, other)
