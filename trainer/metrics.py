"""Metrics of a run: sums since the last log line, metrics.jsonl, and the same as TensorBoard's scalars."""

import errno
import json
import math
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import UserError
from pipeline.files import write_bytes_aside
from pipeline.online.stall import Meter
from trainer.distributed import World
from trainer.recipe import flat

FILE_NAME, FOLDER_NAME = "metrics.jsonl", "tensorboard"


class LogInterval:
    """Loss, speed and stall of the steps since the last log line, over all processes.

    Every process calls `state` and `close`. A checkpoint holds the sums of the loss.
    """

    def __init__(self, device: torch.device, meter: Meter, world: World, state: dict[str, Any] | None) -> None:
        self._device, self._meter, self._world = device, meter, world
        self._restart()
        if state and world.is_main:
            self._losses.fill_(state["losses"])
            self._images = state["images"]

    def _restart(self) -> None:
        # In float64 sums of float32 losses are exact: a run that goes on has the sum of one that was not interrupted.
        self._losses = torch.zeros((), dtype=torch.float64, device=self._device)
        self._images = self._timed = 0
        self._since, self._waited = time.perf_counter(), self._meter.total

    def add(self, losses: Tensor, images: int) -> None:
        """Add the sum of the losses, in nats, of so many images."""
        self._losses += losses
        self._images += images
        self._timed += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the steps that were started belong to the interval
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """Return the sums of all processes, to go on with."""
        own = {"losses": float(self._losses), "images": self._images}
        ranks = self._world.all_gather(own)
        return {key: sum(rank[key] for rank in ranks) for key in own}

    def close(self) -> tuple[dict[str, Any], str]:
        """Return {"loss": mean, "time": images/s and stall} and the stall in words, and begin anew. Waits for the GPU.

        Processes wait for each other, so the stall is that of the one that waited most for its batches.
        """
        seconds = time.perf_counter() - self._since
        own: dict[str, Any] = {"losses": float(self._losses), "images": self._images, "timed": self._timed}
        waited = self._meter.total - self._waited
        own |= {"stall": waited.shares(seconds), "text": waited.said(seconds)}
        self._restart()
        ranks = self._world.all_gather(own)
        losses, images, timed = (sum(rank[key] for rank in ranks) for key in ("losses", "images", "timed"))
        stalls = [sum(rank["stall"].values()) for rank in ranks]
        worst = stalls.index(max(stalls))
        speed = {"images_per_second": timed / seconds, "stall": stalls[worst], "stall_by": ranks[worst]["stall"]}
        if self._world.size > 1:
            speed["stall_of_process"] = worst
        return {"loss": losses / images, "time": speed}, ranks[worst]["text"]


class Metrics:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. Values that depend on the machine's speed are under `time`.

    A line is the operating system's as soon as it is written. Nothing waits for the disk, and no thread is started.
    """

    def __init__(self, run: Path, step: int) -> None:
        """Drop the lines past `step`, which a resumed run writes again; 0 for a new run.

        Raises UserError: a line of an earlier run is damaged; the disk is full.
        """
        path = run / FILE_NAME
        if path.exists():  # without a line that a kill cut off: the next one starts on a line of its own
            text = "".join(json.dumps(line) + "\n" for line in read(run) if line["step"] <= step)
            with _room(path):
                write_bytes_aside(path, text.encode())
        with ExitStack() as stack:
            self._events = _Events(stack.enter_context(_event_file(run / FOLDER_NAME)), step + 1)
            self._lines = stack.enter_context(FileIO(path, "ab"))
            self._open = stack.pop_all()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Nothing is lost without it."""
        self._open.close()

    def train(self, line: dict[str, Any]) -> None:
        """Write a line of training.

        Args:
            line: {"step": steps done, "epoch", "loss": nats per image, "lr", "layers": {name: {"weight": mean |w|,
                "update": mean |Δw| of a step, "ratio": of these two}}, "time": {"images_per_second",
                "stall": share of the time, "stall_by": shares by cause}}.
        Raises:
            UserError: a number is not finite; the disk is full.
        """
        scalars = {"loss": line["loss"], "lr": line["lr"]}
        scalars |= {key: line["time"][key] for key in ("images_per_second", "stall")}
        scalars |= {f"update_ratio/{name}": layer["ratio"] for name, layer in line["layers"].items()}
        self._write("train", line, scalars)

    def validation(self, line: dict[str, Any]) -> None:
        """Write a validation. Raises as `train`.

        Args:
            line: {"step": steps done, "epoch", "samples", "top1_error": %, "top5_error": %, "nll": nats per image}.
        """
        self._write("validation", line, {f"validation/{key}": line[key] for key in ("top1_error", "top5_error", "nll")})

    def _write(self, kind: str, line: dict[str, Any], scalars: dict[str, float]) -> None:
        for name, value in flat(line).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(
                    f"step {line['step']}: {name} is {value}: training has diverged; lower optim.lr "
                    "(--set optim.lr=…) and start a new run"
                )
        _append(self._lines, (json.dumps({"kind": kind, **line}, allow_nan=False) + "\n").encode())
        self._events.scalars(line["step"], scalars)


def read(run: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl, if there is one; a last line that a kill cut off does not count.

    Raises UserError: a line is damaged.
    """
    path = run / FILE_NAME
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or line["kind"] not in ("train", "validation"):
                raise ValueError("not a line of ours")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is damaged ({error}); delete that line") from error
        lines.append(line)
    return lines


@contextmanager
def _room(path: Path | str) -> Iterator[None]:
    """Raise UserError if the disk of `path` is full; other errors of the system as they are.

    Not left to `pipeline.cli`: the system's error does not say which file it is about, nor what saves the run.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path}: {error.strerror}; make room, then go on with the run by --resume") from error


def _append(file: FileIO, data: bytes) -> None:
    """Write all of `data`. `file` has no buffer of its own: a failed write is not tried again when it is closed."""
    with _room(str(file.name)):
        while data:  # a disk that fills up takes a part first
            data = data[file.write(data) :]


def _event_file(folder: Path) -> FileIO:
    """Open a new file of TensorBoard events, which sorts behind the older ones: TensorBoard reads them in order."""
    with _room(folder):
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.glob("*.tfevents.*"))
        return FileIO(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{number:06}", "xb")


class _Events:
    """Writes TensorBoard events; of the files before this one, TensorBoard hides all from step `purge` on.

    tensorboardX's own writer is not used, its messages and checksums are: that writer's thread dies of a full disk, and
    the training waits for ever for room in the thread's queue; a run resumed in the same second overwrites its file.
    """

    def __init__(self, file: FileIO, purge: int) -> None:
        # 0.3 s, which commands that write no events need not wait for
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c

        self._file, self._checksum = file, masked_crc32c
        self._Event, self._Summary = Event, Summary
        self._write(file_version="brain.Event:2")
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write values by name, all of one step."""
        pairs = [self._Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._Summary(value=pairs))

    def _write(self, **fields: Any) -> None:
        """Write an event as a TFRecord: the message's length and its checksum, the message and its checksum."""
        data = self._Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        _append(self._file, length + checksums[0] + data + checksums[1])
