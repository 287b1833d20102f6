"""The DALI graph: a pure function of (JPEG bytes, crop, flip) → uint8 view."""

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

# One batch: n JPEGs (bytes,) uint8; crop (n, 2) int32, top and left in pixels; flip (n,) int32, 0 or 1
Inputs = tuple[list[np.ndarray], np.ndarray, np.ndarray]


def build_graph(
    source: Callable[[], Inputs], view: int, batch_size: int, threads: int, device_id: int | None
) -> Pipeline:
    """Build the pipeline: decode only the region of the view, mirror it where asked.

    `source` is called for every batch, one batch ahead of the one being waited for, and raises StopIteration at the
    end. Each `run()` gives (n, view, view, 3) uint8 RGB, on the GPU `device_id` or, where that is None, on the CPU.
    """
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=2, seed=0)
    with pipeline:
        inputs: Any = fn.external_source(
            source=source,
            num_outputs=3,
            dtype=[types.DALIDataType.UINT8, types.DALIDataType.INT32, types.DALIDataType.INT32],
            ndim=[1, 1, 0],
        )
        jpeg, crop, flip = inputs
        image = fn.decoders.image_slice(
            jpeg,
            start=crop,
            shape=[view, view],
            axis_names="HW",
            device="cpu" if device_id is None else "mixed",
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
        )
        pipeline.set_outputs(fn.flip(image, horizontal=flip, vertical=0))
    pipeline.build()
    return pipeline
