"""JPEG bytes and crop boxes to views on GPUs: the DALI graph of one device, and the decoder of a batch on several.

On a CPU the graph gives the bytes of `turbo`, the CPU's own decoder, but for resized views; only tests run it there.
A GPU's hardware decoder takes whole pictures only: decoded as such, they are records of kind "pixels" (`yuv.cut`).
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from pipeline.online.batch import Batch, Crops, Undecodable
from pipeline.online.devices import Streams
from pipeline.online.order import part
from pipeline.online.turbo import undecodable
from pipeline.records import record_of

INPUTS = ("start", "shape", "flip")  # fields of `Crops`


@dataclass(frozen=True)
class GraphOptions:
    """The options that a graph is built with."""

    view: int  # pixels of a side of the views
    resize: bool = False  # crop boxes differ in shape and are resized to the view, bilinearly with antialiasing
    threads: int = 1  # of DALI, on the host
    hardware_share: float = 0.9  # of the pictures, to the hardware decoder of a GPU that has one
    size: int | None = None  # pixels of a side of every stored picture, so that a GPU has memory ready; None: unknown
    whole: bool = False  # decode whole pictures, all of `size`; neither cut nor mirrored


class Graph:
    """Decodes the crop boxes of batches on a device, and mirrors them; or whole pictures, as they are.

    Batches come out in the order in which they went in. One that does not decode raises RuntimeError, and leaves the
    graph unusable.
    """

    def __init__(self, options: GraphOptions, batch_size: int, device: torch.device) -> None:
        assert options.size or not options.whole
        self._side, self._device = options.size if options.whole and options.size else options.view, device
        self._inputs = () if options.whole else INPUTS
        self._pipeline = _built(options, batch_size, device.index if device.type == "cuda" else None)
        self._inside: deque[tuple[list[np.ndarray], Crops]] = deque()  # DALI reads their memory, without a copy

    def submit(self, jpegs: list[np.ndarray], crops: Crops) -> None:
        """Begin to decode a batch of JPEGs, each (bytes,) uint8. It may be empty."""
        self._inside.append((jpegs, crops))
        if jpegs:
            self._pipeline.feed_input("jpeg", jpegs)
            for name in self._inputs:
                self._pipeline.feed_input(name, getattr(crops, name))
            self._pipeline.schedule_run()

    def result(self) -> Tensor:
        """Return the oldest batch's views, (n, h, w, 3) uint8, RGB: on a GPU ready on its current stream.

        Raises RuntimeError: one does not decode, or a whole picture has another size.
        """
        jpegs, _ = self._inside[0]
        views = torch.empty((len(jpegs), self._side, self._side, 3), dtype=torch.uint8, device=self._device)
        if jpegs:
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            (output,) = self._pipeline.outputs(cuda_stream=stream)
            decoded = output.as_tensor()
            if tuple(decoded.shape()) != views.shape:
                raise RuntimeError(f"pictures of {decoded.shape()}, not {tuple(views.shape)}")
            feed_ndarray(decoded, views, cuda_stream=stream)
            if stream:
                stream.synchronize()  # before DALI may take its memory back
        self._inside.popleft()
        return views


class Decoder:
    """Batches in, views on every device out, in the same order; see `prefetch.Decoder`.

    With several devices each decodes its part of a batch, and the parts are exchanged from device to device; or each
    decodes everything (`replicate`).
    """

    under_way = 3  # batches that it has at a time: DALI never waits for the next

    def __init__(self, devices: tuple[torch.device, ...], options: GraphOptions, most: int, replicate: bool) -> None:
        self._devices, self._options, self._replicate = devices, options, replicate
        self._most = most if replicate else -(-most // len(devices))
        self._streams = Streams(devices)
        self._inside: deque[Batch] = deque()
        self._graphs: list[Graph] = []
        self.retry()

    def submit(self, batch: Batch) -> None:
        """Begin to decode a batch; it may be empty."""
        self._inside.append(batch)
        n = len(batch.ids)
        for i, graph in enumerate(self._graphs):
            positions = slice(0, n) if self._replicate else part(n, i, len(self._graphs))
            graph.submit(batch.jpegs[positions], batch.crops[positions])

    def streams(self) -> AbstractContextManager[None]:
        """Make streams of the decoder current on every GPU; what is computed there is ready when the context ends."""
        return self._streams.current()

    def result(self) -> tuple[Batch, list[Tensor]]:
        """Return the oldest batch, and on each device its views, uint8 (n, h, w, 3); of whole pictures (n, bytes).

        Raises Undecodable where pictures do not decode on a CPU either: mend that batch and `retry`; RuntimeError for
        what else DALI reports.
        """
        batch = self._inside[0]
        try:
            parts = [graph.result() for graph in self._graphs]
        except RuntimeError as error:  # DALI does not tell which pictures
            if positions := list(self._other_than_whole(batch)) if self._options.whole else undecodable(batch):
                raise Undecodable(batch, positions) from error
            raise
        if len(parts) > 1 and not self._replicate:
            parts = [torch.cat([part.to(device, non_blocking=True) for part in parts]) for device in self._devices]
        self._inside.popleft()
        batch.jpegs = []  # the consumer may keep the batch
        if self._options.whole:
            batch.kind, parts = "pixels", [part.flatten(1) for part in parts]
        return batch, parts

    def _other_than_whole(self, batch: Batch) -> Iterator[int]:
        """Yield the positions of what a CPU does not decode to a picture of the graph's size."""
        for i, jpeg in enumerate(batch.jpegs):
            try:
                record_of(jpeg, "rgb", self._options.size or 0)
            except ValueError:
                yield i

    def retry(self) -> None:
        """Decode all batches again, with new graphs: after an error DALI's are of no use."""
        self._graphs.clear()  # before others are made: a GPU may not have room for both
        self._graphs = [Graph(self._options, self._most, device) for device in self._devices]
        batches, self._inside = self._inside, deque()
        for batch in batches:
            self.submit(batch)

    def stop(self) -> None:
        """Do nothing: a GPU's batch is soon done."""

    def close(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._inside.clear()


def _built(options: GraphOptions, batch_size: int, device_id: int | None) -> Pipeline:
    # With a larger depth the first schedule_run would want several batches at once; with 1 it queues any number.
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=options.threads, device_id=device_id, prefetch_queue_depth=1, seed=0
    )
    hint = options.size if device_id is not None else None  # of a CPU DALI takes none of these
    decoding: dict[str, Any] = {
        "device": "cpu" if device_id is None else "mixed",
        "adjust_orientation": False,
        "hw_decoder_load": None if device_id is None else options.hardware_share,
        "preallocate_width_hint": hint,
        "preallocate_height_hint": hint,
    }
    with pipeline:
        jpeg: Any = fn.external_source(name="jpeg", no_copy=True)
        if options.whole:
            pipeline.set_outputs(fn.decoders.image(jpeg, **decoding))
        else:
            start, shape, flip = (fn.external_source(name=name, no_copy=True) for name in INPUTS)
            view: Any = fn.decoders.image_slice(jpeg, start=start, shape=shape, axis_names="HW", **decoding)
            if options.resize:
                view = fn.resize(view, size=[options.view] * 2, interp_type=types.DALIInterpType.INTERP_LINEAR)
            pipeline.set_outputs(fn.flip(view, horizontal=flip, vertical=0))
    pipeline.build()
    return pipeline
