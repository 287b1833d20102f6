"""The ceiling: DALI decodes a random window of each JPEG, from bytes in memory; nothing else."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from tools.peers.job import SIDE
from tools.peers.loadjob import VIEW, LoadJob, measure


class Batch:
    """What stays in DALI's memory, as `measure` looks at it."""

    def __init__(self, views: Any) -> None:
        self.shape, self.dtype = (len(views), *views.at(0).shape), views.at(0).dtype

    def __len__(self) -> int:
        return self.shape[0]


def main() -> None:
    job = LoadJob.from_command()
    jpegs = [np.frombuffer(picture.jpeg(), np.uint8) for picture in islice(job.pictures(), job.images)]
    pipeline = build(job, jpegs)
    measure(job, batches(pipeline), "nvidia-dali-cuda130")


def batches(pipeline: Pipeline) -> Iterator[Batch]:
    while True:
        (views,) = pipeline.run()
        yield Batch(views)


def build(job: LoadJob, jpegs: list[np.ndarray]) -> Pipeline:
    rng = np.random.default_rng(0)
    size = np.full((job.batch, 2), VIEW, np.int32)

    def source() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        chosen = rng.integers(len(jpegs), size=job.batch)
        return [jpegs[i] for i in chosen], rng.integers(SIDE - VIEW + 1, size=(job.batch, 2), dtype=np.int32), size

    pipeline = Pipeline(batch_size=job.batch, num_threads=job.workers, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        integer = types.DALIDataType.INT32
        inputs: Any = fn.external_source(
            source, num_outputs=3, dtype=[types.DALIDataType.UINT8, integer, integer], ndim=[1, 1, 1], no_copy=True
        )
        jpeg, start, shape = inputs
        pipeline.set_outputs(fn.decoders.image_slice(jpeg, start=start, shape=shape, axis_names="HW", device="cpu"))
    pipeline.build()
    return pipeline


if __name__ == "__main__":
    main()
