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


@dataclass(frozen=True)
class GraphOptions:
    """The options that a graph is built with.

    Args:
        view: pixels of a side of the views.
        resize: the crop boxes differ in shape and are resized to the view, bilinearly with antialiasing.
        normalised: views are (n, 3, view, view) float32, (x − offset) · (1/std); else (n, view, view, 3) uint8.
        threads: of DALI, on the host.
        hardware_share: share of the pictures that goes to the hardware decoder of a GPU that has one; 0 … 1.
    """

    view: int
    resize: bool = False
    normalised: bool = False
    threads: int = 1
    hardware_share: float = 0.9


class Graph:
    """Decodes the crop boxes of batches on the GPU `device_id`, or on the CPU if that is None, and mirrors them.

    Batches come out in the order in which they went in. One that does not decode raises RuntimeError, and leaves the
    graph unusable.
    """

    def __init__(self, options: GraphOptions, batch_size: int, device_id: int | None = None) -> None:
        self._pipeline = _built(options, batch_size, device_id)
        colours = ("offset", "std") if options.normalised else ()
        self._names = ("start", "shape", *(("flip",) if _mirrors(options, device_id) else ()), *colours)
        self._dtype = torch.float32 if options.normalised else torch.uint8
        self._inside: deque[tuple[list[np.ndarray], Crops]] = deque()  # DALI reads their memory, without a copy

    def submit(self, jpegs: list[np.ndarray], crops: Crops) -> None:
        """Begin to decode a batch of at least one JPEG, each (bytes,) uint8."""
        self._inside.append((jpegs, crops))
        self._pipeline.feed_input("jpeg", jpegs)
        for name in self._names:
            self._pipeline.feed_input(name, getattr(crops, name))
        self._pipeline.schedule_run()

    def result(self, stream: torch.cuda.Stream | None = None) -> Tensor:
        """Return the oldest batch's views, RGB: on a GPU ready on the caller's `stream`, else on the host."""
        if stream is not None:
            (views,) = self._pipeline.outputs(cuda_stream=stream)
            tensor = torch.empty(views.as_tensor().shape(), dtype=self._dtype, device=stream.device)
            feed_ndarray(views.as_tensor(), tensor, cuda_stream=stream)
            stream.synchronize()  # before DALI may take its memory back
            self._inside.popleft()
            return tensor
        (views,) = self._pipeline.outputs()
        tensor = torch.from_dlpack(views.as_tensor())  # DALI's memory, ours until the tensor is gone
        _, crops = self._inside.popleft()
        if "flip" not in self._names:
            _mirror(tensor.numpy(), crops.flip)
        return tensor


class Decoder:
    """Batches in, views on every device out, in the same order.

    With several devices each decodes its part of a batch, and the parts are exchanged from device to device; or each
    decodes everything (`replicate`).
    """

    def __init__(
        self, devices: tuple[torch.device, ...], options: GraphOptions, most: int, replicate: bool = False
    ) -> None:
        self._devices, self._options, self._replicate = devices, options, replicate
        self._most = max(1, most if replicate else part(most, 0, len(devices)).stop)
        self._streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for device in devices]
        self._inside: deque[Batch] = deque()
        self._stopped = False
        self._graphs = self._build()

    def submit(self, batch: Batch) -> None:
        """Begin to decode a batch; it may be empty."""
        self._inside.append(batch)
        self._start(batch)

    @contextmanager
    def streams(self) -> Iterator[None]:
        """Make streams of the decoder current on every GPU; what is computed there is ready when the context ends."""
        streams = [stream for stream in self._streams if stream is not None]
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
            for stream in streams:
                stream.synchronize()

    @property
    def oldest(self) -> Batch:
        """The batch that `result` gives next."""
        return self._inside[0]

    def result(self) -> tuple[Batch, list[Tensor]]:
        """Return the oldest batch, and its views on each device: uint8 (n, h, w, 3), or float32 (n, 3, h, w).

        Raises:
            RuntimeError: it does not decode; mend it and `restart`, or give this decoder up.
        """
        batch = self.oldest
        parts = [
            graph.result(self._streams[i]) if self._positions(i, batch) else self._no_views(self._devices[i])
            for i, graph in enumerate(self._graphs)
        ]
        if len(parts) > 1 and not self._replicate:
            parts = [torch.cat([part.to(device, non_blocking=True) for part in parts]) for device in self._devices]
        self._inside.popleft()
        batch.jpegs = []  # the consumer may keep the batch
        return batch, parts

    def undecodable(self) -> list[int]:
        """Return the positions in the oldest batch whose samples do not decode, each tried alone; none once stopped."""
        batch, positions = self.oldest, []
        device_id, one = _device_id(self._devices[0]), replace(self._options, threads=1)
        graph = Graph(one, 1, device_id)
        for i, jpeg in enumerate(batch.jpegs):
            if self._stopped:
                break
            try:
                graph.submit([jpeg], _crops(batch)[i : i + 1])
                graph.result(None if device_id is None else torch.cuda.current_stream(device_id))
            except RuntimeError:
                positions.append(i)
                graph = Graph(one, 1, device_id)  # after an error DALI's pipeline is of no use
        return positions

    def restart(self) -> None:
        """Decode all batches again, with new graphs: after an error DALI's are of no use."""
        self._graphs = []  # before others are made: a GPU may not have room for both
        self._graphs = self._build()
        for batch in self._inside:
            self._start(batch)

    def stop(self) -> None:
        """Let a search for what does not decode end."""
        self._stopped = True

    def close(self) -> None:
        """Free the graphs and their memory."""
        self._graphs = []
        self._inside.clear()

    def _build(self) -> list[Graph]:
        return [Graph(self._options, self._most, _device_id(device)) for device in self._devices]

    def _start(self, batch: Batch) -> None:
        for i, graph in enumerate(self._graphs):
            if positions := self._positions(i, batch):
                chosen = slice(positions.start, positions.stop)
                graph.submit(batch.jpegs[chosen], _crops(batch)[chosen])

    def _positions(self, graph: int, batch: Batch) -> range:
        """Return the positions in the batch that a graph decodes."""
        n = len(batch.ids)
        return range(n) if self._replicate else range(n)[part(n, graph, len(self._graphs))]

    def _no_views(self, device: torch.device) -> Tensor:
        side = self._options.view
        if self._options.normalised:
            return torch.empty((0, 3, side, side), device=device)
        return torch.empty((0, side, side, 3), dtype=torch.uint8, device=device)


def _built(options: GraphOptions, batch_size: int, device_id: int | None) -> Pipeline:
    # DALI then keeps the host memory of a batch for the next one: new pages would cost a twelfth of the time.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")
    # With a larger depth the first schedule_run would want several batches at once; with 1 it queues any number.
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=options.threads, device_id=device_id, prefetch_queue_depth=1, seed=0
    )
    integer, real = types.DALIDataType.INT32, types.DALIDataType.FLOAT
    with pipeline:
        jpeg, start, shape, flip, offset, std = (
            fn.external_source(name=name, dtype=dtype, ndim=ndim, no_copy=True)
            for name, dtype, ndim in (
                ("jpeg", types.DALIDataType.UINT8, 1),
                ("start", integer, 1),
                ("shape", integer, 1),
                ("flip", integer, 0),
                ("offset", real, 1),
                ("std", real, 1),
            )
        )
        image: Any = fn.decoders.image_slice(
            jpeg,
            start=start,
            shape=shape,
            axis_names="HW",
            device="cpu" if device_id is None else "mixed",
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
            hw_decoder_load=None if device_id is None else options.hardware_share,
        )
        if options.resize:
            image = fn.resize(image, size=[options.view] * 2, interp_type=types.DALIInterpType.INTERP_LINEAR)
        if options.normalised:
            view = fn.crop_mirror_normalize(image, mirror=flip, mean=offset, std=std, dtype=real, output_layout="CHW")
        else:
            view = fn.flip(image, horizontal=flip, vertical=0) if _mirrors(options, device_id) else image
        pipeline.set_outputs(view)
    pipeline.build()
    return pipeline


def _mirrors(options: GraphOptions, device_id: int | None) -> bool:
    """Return whether the pipeline mirrors views. DALI's flip of bytes on a CPU takes a quarter of the decoding time."""
    return options.normalised or device_id is not None


def _mirror(views: np.ndarray, flip: np.ndarray) -> None:
    """Mirror, in place, the (n, h, w, 3) uint8 views whose flip is 1: three bytes at a time."""
    pixels = views.view("V3")[..., 0]
    for i in np.flatnonzero(flip):
        pixels[i] = pixels[i, :, ::-1].copy()


def _crops(batch: Batch) -> Crops:
    assert batch.crops is not None, "drawn before the batch is submitted"
    return batch.crops


def _device_id(device: torch.device) -> int | None:
    return None if device.type == "cpu" else device.index or 0
