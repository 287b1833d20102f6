"""The DALI graph: a pure function of (JPEG bytes, window, flip) → view."""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipeline.online.windows import Windows


@dataclass(frozen=True)
class GraphOptions:
    """Which graph.

    Args:
        view: pixels of a side of the views.
        resize: the windows differ in shape and are resized to the view, bilinearly with antialiasing.
        normalised: views are (n, 3, view, view) float32, (x − offset) · (1/std); else (n, view, view, 3) uint8.
        threads: of DALI, on the host.
        hardware_share: of the pictures, to the hardware decoder of a GPU that has one; 0 … 1.
    """

    view: int
    resize: bool = False
    normalised: bool = False
    threads: int = 1
    hardware_share: float = 0.9


class Graph:
    """Decodes the windows of batches, on the GPU `device_id` or, where that is None, on the CPU; mirrors where asked.

    Batches come out in the order in which they went in. One that does not decode raises RuntimeError, and leaves the
    graph unusable.
    """

    def __init__(self, options: GraphOptions, batch_size: int, device_id: int | None = None) -> None:
        self._pipeline = _built(options, batch_size, device_id)
        colours = ("offset", "std") if options.normalised else ()
        self._names = ("start", "shape", *(("flip",) if _mirrors(options, device_id) else ()), *colours)
        self._dtype = torch.float32 if options.normalised else torch.uint8
        self._inside: deque[tuple[list[np.ndarray], Windows]] = deque()  # DALI reads their memory, without a copy

    def submit(self, jpegs: list[np.ndarray], windows: Windows) -> None:
        """Begin to decode a batch of at least one JPEG, each (bytes,) uint8."""
        self._inside.append((jpegs, windows))
        self._pipeline.feed_input("jpeg", jpegs)
        for name in self._names:
            self._pipeline.feed_input(name, getattr(windows, name))
        self._pipeline.schedule_run()

    def result(self, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
        """The oldest batch's views, RGB. On a GPU they are ready on `stream` (that of the caller), else on the host."""
        if stream is not None:
            (views,) = self._pipeline.outputs(cuda_stream=stream)
            tensor = torch.empty(views.as_tensor().shape(), dtype=self._dtype, device=stream.device)
            feed_ndarray(views.as_tensor(), tensor, cuda_stream=stream)
            stream.synchronize()  # before DALI may take its memory back
            self._inside.popleft()
            return tensor
        (views,) = self._pipeline.outputs()
        tensor = torch.from_dlpack(views.as_tensor())  # DALI's memory, ours until the tensor is gone
        _, windows = self._inside.popleft()
        if "flip" not in self._names:
            _mirror(tensor.numpy(), windows.flip)
        return tensor


def undecodable(
    jpegs: list[np.ndarray], windows: Windows, options: GraphOptions, device_id: int | None, stopped: Callable[[], bool]
) -> list[int]:
    """The places of JPEGs that do not decode where their windows are, each tried alone; ends early when `stopped`."""
    found, one = [], replace(options, threads=1)
    graph = Graph(one, 1, device_id)
    for place, jpeg in enumerate(jpegs):
        if stopped():
            break
        try:
            graph.submit([jpeg], windows[place : place + 1])
            graph.result(None if device_id is None else torch.cuda.current_stream(device_id))
        except RuntimeError:
            found.append(place)
            graph = Graph(one, 1, device_id)  # after an error DALI's are of no use
    return found


def _built(options: GraphOptions, batch_size: int, device_id: int | None) -> Pipeline:
    # so that DALI keeps host memory of a batch for the next: new pages would cost a twelfth of the time
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")
    # a depth of 1: schedule_run would otherwise want several batches at once, the first time; it queues any number
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
    """Whether the pipeline mirrors views. DALI's flip of bytes on a CPU takes a quarter of the time of decoding."""
    return options.normalised or device_id is not None


def _mirror(views: np.ndarray, flip: np.ndarray) -> None:
    """Mirror those of (n, h, w, 3) uint8 views whose flip is 1, in place: three bytes at a time."""
    pixels = views.view("V3")[..., 0]
    for i in np.flatnonzero(flip):
        pixels[i] = pixels[i, :, ::-1].copy()
