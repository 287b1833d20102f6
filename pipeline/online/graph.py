"""JPEG bytes and crop boxes to views: the DALI graph of one device, and the decoder of a batch on several devices."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from pipeline.online.batch import Batch, Crops
from pipeline.online.order import part

CPU = torch.device("cpu")


@dataclass(frozen=True)
class GraphOptions:
    """The options that a graph is built with."""

    view: int  # pixels of a side of the views
    resize: bool = False  # crop boxes differ in shape and are resized to the view, bilinearly with antialiasing
    normalised: bool = False  # (n, 3, view, view) float32, (x − offset) · (1/std); else (n, view, view, 3) uint8
    threads: int = 1  # of DALI, on the host
    hardware_share: float = 0.9  # of the pictures, to the hardware decoder of a GPU that has one


class Graph:
    """Decodes the crop boxes of batches on a device, and mirrors them.

    Batches come out in the order in which they went in. One that does not decode raises RuntimeError, and leaves the
    graph unusable.
    """

    def __init__(self, options: GraphOptions, batch_size: int, device: torch.device = CPU) -> None:
        self._options, self._device = options, device
        # On a CPU DALI's flip of bytes takes a quarter of the decoding time: `_mirror` is faster.
        self._flips = options.normalised or device.type == "cuda"
        self._names = ["start", "shape"] + ["flip"] * self._flips + ["offset", "std"] * options.normalised
        self._pipeline = _built(options, batch_size, device.index if device.type == "cuda" else None, self._flips)
        self._inside: deque[tuple[list[np.ndarray], Crops]] = deque()  # DALI reads their memory, without a copy

    def submit(self, jpegs: list[np.ndarray], crops: Crops) -> None:
        """Begin to decode a batch of JPEGs, each (bytes,) uint8. It may be empty."""
        self._inside.append((jpegs, crops))
        if jpegs:
            self._pipeline.feed_input("jpeg", jpegs)
            for name in self._names:
                self._pipeline.feed_input(name, getattr(crops, name))
            self._pipeline.schedule_run()

    def result(self) -> Tensor:
        """Return the oldest batch's views, RGB: on a GPU ready on its current stream, else on the host."""
        jpegs, crops = self._inside[0]
        side, dtype = self._options.view, torch.float32 if self._options.normalised else torch.uint8
        if not jpegs:
            shape = (0, 3, side, side) if self._options.normalised else (0, side, side, 3)
            views = torch.empty(shape, dtype=dtype, device=self._device)
        elif self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            (output,) = self._pipeline.outputs(cuda_stream=stream)
            views = torch.empty(output.as_tensor().shape(), dtype=dtype, device=self._device)
            feed_ndarray(output.as_tensor(), views, cuda_stream=stream)
            stream.synchronize()  # before DALI may take its memory back
        else:
            (output,) = self._pipeline.outputs()
            views = torch.from_dlpack(output.as_tensor())  # DALI's memory, ours until the tensor is gone
            if not self._flips:
                _mirror(views.numpy(), crops.flip)
        self._inside.popleft()
        return views


class Decoder:
    """Batches in, views on every device out, in the same order.

    With several devices each decodes its part of a batch, and the parts are exchanged from device to device; or each
    decodes everything (`replicate`).
    """

    def __init__(self, devices: tuple[torch.device, ...], options: GraphOptions, most: int, replicate: bool) -> None:
        self._devices, self._options, self._replicate = devices, options, replicate
        self._most = most if replicate else -(-most // len(devices))
        self._streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]
        self._inside: deque[Batch] = deque()
        self._stopped = False
        self._graphs: list[Graph] = []
        self.restart()

    def submit(self, batch: Batch) -> None:
        """Begin to decode a batch; it may be empty."""
        self._inside.append(batch)
        n = len(batch.ids)
        for i, graph in enumerate(self._graphs):
            positions = slice(0, n) if self._replicate else part(n, i, len(self._graphs))
            graph.submit(batch.jpegs[positions], batch.crops[positions])

    @contextmanager
    def streams(self) -> Iterator[None]:
        """Make streams of the decoder current on every GPU; what is computed there is ready when the context ends."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
            for stream in self._streams:
                stream.synchronize()

    def result(self) -> tuple[Batch, list[Tensor]]:
        """Return the oldest batch, and its views on each device: uint8 (n, h, w, 3), or float32 (n, 3, h, w).

        Raises RuntimeError where it does not decode: mend it and `restart`, or give this decoder up.
        """
        parts = [graph.result() for graph in self._graphs]
        if len(parts) > 1 and not self._replicate:
            parts = [torch.cat([part.to(device, non_blocking=True) for part in parts]) for device in self._devices]
        batch = self._inside.popleft()
        batch.jpegs = []  # the consumer may keep the batch
        return batch, parts

    def undecodable(self) -> tuple[Batch, list[int]]:
        """Return the oldest batch, and the positions of what does not decode, each tried alone; none once stopped."""
        batch, positions, graph = self._inside[0], list[int](), None
        for i, jpeg in enumerate(batch.jpegs):
            if self._stopped:
                break
            graph = graph or Graph(replace(self._options, threads=1), 1, self._devices[0])
            try:
                graph.submit([jpeg], batch.crops[i : i + 1])
                graph.result()
            except RuntimeError:
                positions.append(i)
                graph = None  # as in `restart`
        return batch, positions

    def restart(self) -> None:
        """Decode all batches again, with new graphs: after an error DALI's are of no use."""
        self._graphs.clear()  # before others are made: a GPU may not have room for both
        self._graphs = [Graph(self._options, self._most, device) for device in self._devices]
        batches, self._inside = self._inside, deque()
        for batch in batches:
            self.submit(batch)

    def stop(self) -> None:
        """Let a search for what does not decode end."""
        self._stopped = True

    def close(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._inside.clear()


def _built(options: GraphOptions, batch_size: int, device_id: int | None, flips: bool) -> Pipeline:
    # DALI then keeps the host memory of a batch for the next one: new pages would cost a twelfth of the time.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")
    # With a larger depth the first schedule_run would want several batches at once; with 1 it queues any number.
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=options.threads, device_id=device_id, prefetch_queue_depth=1, seed=0
    )
    with pipeline:
        jpeg, start, shape, flip, offset, std = (
            fn.external_source(name=name, no_copy=True) for name in ("jpeg", "start", "shape", "flip", "offset", "std")
        )
        view: Any = fn.decoders.image_slice(
            jpeg,
            start=start,
            shape=shape,
            axis_names="HW",
            device="cpu" if device_id is None else "mixed",
            adjust_orientation=False,
            hw_decoder_load=None if device_id is None else options.hardware_share,
        )
        if options.resize:
            view = fn.resize(view, size=[options.view] * 2, interp_type=types.DALIInterpType.INTERP_LINEAR)
        if options.normalised:
            view = fn.crop_mirror_normalize(view, mirror=flip, mean=offset, std=std, output_layout="CHW")
        elif flips:
            view = fn.flip(view, horizontal=flip, vertical=0)
        pipeline.set_outputs(view)
    pipeline.build()
    return pipeline


def _mirror(views: np.ndarray, flip: np.ndarray) -> None:
    """Mirror, in place, the (n, h, w, 3) uint8 views whose flip is 1: three bytes at a time."""
    pixels = views.view("V3")[..., 0]
    for i in np.flatnonzero(flip):
        pixels[i] = pixels[i, :, ::-1].copy()
