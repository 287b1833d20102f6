"""Loss, speed and stall of the steps since the last log line, over all processes of a job."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.online.stall import Meter
from trainer.distributed import World


class LogInterval:
    """Adds up a process's own; `state` and `close` are called by every process, and have the sums.

    A checkpoint holds what the loss is made of.
    """

    def __init__(self, device: torch.device, meter: Meter, world: World, state: dict[str, Any] | None) -> None:
        self._device, self._meter, self._world = device, meter, world
        self._restart()
        if state and world.is_main:
            self._losses.fill_(state["losses"])
            self._images = state["images"]

    def _restart(self) -> None:
        # in float64 sums of float32 losses are exact: a run that goes on has the sum of one that was not interrupted
        self._losses = torch.zeros((), dtype=torch.float64, device=self._device)
        self._images = self._timed = 0
        self._since, self._waited = time.perf_counter(), self._meter.total

    def add(self, losses: Tensor, images: int) -> None:
        """`losses`: their sum over so many images, in nats."""
        self._losses += losses
        self._images += images
        self._timed += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here takes no time of the window."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the steps that were started belong to it
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        own = {"losses": float(self._losses), "images": self._images}
        return {key: sum(each[key] for each in self._told(own)) for key in own}

    def close(self) -> tuple[dict[str, Any], str]:
        """{"loss": its mean, "time": images/s and stall}, and what is said of the stall. Waits for the device.

        World wait for each other, so the stall is that of the one that waited most for its batches.
        """
        own: dict[str, Any] = {"losses": float(self._losses), "images": self._images, "timed": self._timed}
        seconds = time.perf_counter() - self._since
        waited = self._meter.total - self._waited
        own |= {"stall": waited.shares(seconds), "said": waited.said(seconds)}
        self._restart()
        told = self._told(own)
        losses, images, timed = (sum(each[key] for each in told) for key in ("losses", "images", "timed"))
        stalls = [sum(each["stall"].values()) for each in told]
        worst = stalls.index(max(stalls))
        speed = {"images_per_second": timed / seconds, "stall": stalls[worst], "stall_by": told[worst]["stall"]}
        if self._world.size > 1:
            speed["stall_of_process"] = worst
        return {"loss": losses / images, "time": speed}, told[worst]["said"]

    def _told(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        return self._world.all_gather(own)
