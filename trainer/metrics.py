"""Metrics of a run: sums since the last log line, metrics.jsonl, and the same as TensorBoard's scalars."""

import errno
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from pipeline import UserError, storage
from pipeline.files import write_bytes_aside
from pipeline.online.stall import Meter
from pipeline.typed import Count, from_json, from_values
from pipeline.volumes import naming
from trainer.distributed import World
from trainer.recipe import flat

FILE_NAME, FOLDER_NAME = "metrics.jsonl", "tensorboard"


class Line(TypedDict):
    step: Count
    kind: Literal["train", "validation"]  # each kind has more keys


class LogInterval:
    """Loss, error, speed and stall of the steps since the last log line, over all processes.

    Every process calls `state` and `close`. A checkpoint holds `state`, which a resumed run begins with.
    """

    def __init__(
        self,
        device: torch.device,
        meter: Meter,
        world: World,
        state: dict[str, Any] | None,
        remedies: Mapping[str, str],
    ) -> None:
        """`remedies`: for a stall, by its cause."""
        self._device, self._meter, self._world, self._remedies = device, meter, world, remedies
        self._restart()
        if state and world.is_main:  # which are sums of all processes
            wrong = state.get("wrong", math.nan)  # which earlier versions did not count
            self._sums.copy_(torch.tensor([state["losses"], wrong], dtype=torch.float64))
            self._images = state["images"]

    def _restart(self) -> None:
        # In float64 sums of float32 losses are exact: a resumed run has the sum of one that was not interrupted.
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # of losses, and of wrong images
        self._images = self._timed = 0  # the images of the losses; those since the start of this process
        self._since, self._waited = time.perf_counter(), self._meter.total

    def add(self, sums: Tensor, images: int) -> None:
        """Add the sums (2,) of so many images: their losses in nats, and how many were wrong."""
        self._sums += sums
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
        ranks = self._world.all_gather(self._own())
        totals = {key: sum(rank[key] for rank in ranks) for key in self._own()}
        return {key: total for key, total in totals.items() if key != "wrong" or not math.isnan(total)}

    def _own(self) -> dict[str, Any]:
        losses, wrong = self._sums.tolist()
        return {"losses": losses, "wrong": wrong, "images": self._images}

    def close(self) -> tuple[dict[str, Any], str]:
        """Return a log line's figures and the stall in words; begin anew. Waits for the GPU.

        The figures are {"loss": mean in nats, "top1_error": % of the images as trained on, "time": speed and stall}.
        Processes wait for each other, so the stall is that of the process that waited longest for its batches.
        """
        seconds = time.perf_counter() - self._since
        own = self._own() | {"timed": self._timed}
        waited = self._meter.total - self._waited
        own |= {"stall": waited.shares(seconds), "text": waited.text(seconds, self._remedies)}
        self._restart()
        ranks = self._world.all_gather(own)
        losses, wrong, images, timed = (sum(rank[key] for rank in ranks) for key in (*self._own(), "timed"))
        stalls = [sum(rank["stall"].values()) for rank in ranks]
        worst = stalls.index(max(stalls))
        speed = {"images_per_second": timed / seconds, "stall": stalls[worst], "stall_by": ranks[worst]["stall"]}
        if self._world.size > 1:
            speed["stall_of_process"] = worst
        error = {} if math.isnan(wrong) else {"top1_error": 100 * wrong / images}
        return {"loss": losses / images, **error, "time": speed}, ranks[worst]["text"]


class Metrics(ExitStack):
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. Values that depend on the machine's speed are under `time`.

    Each line is handed to the operating system at once, so that nothing is lost without `close`. No thread is started,
    and nothing waits for the disk.
    """

    def __init__(self, run: Path, step: int, pending: bool = False) -> None:
        """Drop the lines past `step`, which a resumed run writes again; 0 for a new run.

        `pending`: it repeats the validation of `step`, too.
        Raises UserError: a line of an earlier run is damaged; the disk is full.
        """
        super().__init__()
        path = run / FILE_NAME
        if path.exists():  # a last line that a kill cut off is dropped, too: the next one starts on a line of its own
            last = {"train": step, "validation": step - pending}
            text = "".join(json.dumps(line) + "\n" for line in read(run) if line["step"] <= last[line["kind"]])
            with _room(path):
                write_bytes_aside(path, text.encode())
        with ExitStack() as stack:
            self._events = _Events(stack.enter_context(_event_file(run / FOLDER_NAME)), step + 1)
            self._lines = stack.enter_context(FileIO(path, "ab"))
            self.push(stack.pop_all())

    def train(self, line: dict[str, Any]) -> None:
        """Write a line of training.

        Args:
            line: {"step": steps done, "epoch", "loss": nats per image, "top1_error": %, or missing, "lr", "layers":
                {name: {"weight": mean |w|, "update": mean |Δw| of a step, "ratio": of these two}}, "time":
                {"images_per_second", "stall": share of the time, "stall_by": shares by cause}}.
        Raises:
            UserError: a number is not finite; the disk is full.
        """
        scalars: dict[str, float] = {key: line[key] for key in ("loss", "top1_error", "lr") if key in line}
        scalars |= {key: line["time"][key] for key in ("images_per_second", "stall")}
        scalars |= {f"update_ratio/{name}": layer["ratio"] for name, layer in line["layers"].items()}
        self._write("train", line, scalars)

    def validation(self, line: dict[str, Any]) -> None:
        """Write a validation. Raises as `train`.

        Args:
            line: {"step": steps done, "epoch", "samples", "top1_error": %, "top5_error": %, "nll": nats per image},
                and of these samples "unreadable": how many count as wrong unseen; "plateau": "drop" or "end", at one.
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
    for number, text in enumerate(storage.read_bytes(path).split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            line = from_json(text, dict[str, Any])
            from_values(line, Line)
        except UserError as error:
            raise UserError(f"{path}: line {number} is damaged ({error}); delete that line") from error
        lines.append(line)
    return lines


@contextmanager
def _room(path: Path | str) -> Iterator[None]:
    """Raise UserError if the disk of `path` is full; its OSError names neither the file nor the remedy."""
    try:
        with naming(path):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path}: {error.strerror}; make room, then go on with the run by --resume") from error


def _append(file: FileIO, data: bytes) -> None:
    """Write all of `data`. A FileIO has no buffer, which would be written again when the file is closed."""
    if not os.path.exists(str(file.name)):
        raise UserError(f"{file.name}: deleted while the run writes it; what is left of the run goes on by --resume")
    with _room(str(file.name)):
        while data:  # before a disk is full, it takes a part
            data = data[file.write(data) :]


def _event_file(folder: Path) -> FileIO:
    """Open a new file of TensorBoard events, which sorts behind the older ones: TensorBoard reads them in order."""
    with _room(folder):
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.glob("*.tfevents.*"))
        return FileIO(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{number:06}", "xb")


class _Events:
    """Writes TensorBoard events; TensorBoard hides events of earlier files from step `purge` on.

    With tensorboardX's messages and checksums, but not by its writer: on a full disk its thread dies, and the training
    waits for ever for room in the thread's queue; and a run resumed within the same second overwrites its file.
    """

    def __init__(self, file: FileIO, purge: int) -> None:
        # these imports take 0.3 s, for which commands that write no events need not wait
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
