"""FFCV's Loader: whole pictures, then a random window and flip in numba, to uint8 tensors."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from ffcv.fields import RGBImageField  # type: ignore[import-not-found,unused-ignore]
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder  # type: ignore[import-not-found,unused-ignore]
from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found,unused-ignore]
from ffcv.pipeline.allocation_query import AllocationQuery  # type: ignore[import-not-found,unused-ignore]
from ffcv.pipeline.compiler import Compiler  # type: ignore[import-not-found,unused-ignore]
from ffcv.pipeline.operation import Operation  # type: ignore[import-not-found,unused-ignore]
from ffcv.reader import Reader  # type: ignore[import-not-found,unused-ignore]
from ffcv.transforms import RandomHorizontalFlip, ToTensor  # type: ignore[import-not-found,unused-ignore]

from tools.peers.loadjob import VIEW, LoadJob, measure


class RandomWindow(Operation):  # type: ignore[misc,unused-ignore]
    """(n, side, side, 3) → (n, 224, 224, 3): FFCV's own random crop is one that resizes."""

    def generate_code(self) -> Callable[..., Any]:
        indices = Compiler.get_iterator()

        def windows(images, out):  # type: ignore[no-untyped-def]  # for numba
            n, side = images.shape[0], images.shape[1]
            starts = np.random.randint(0, side - VIEW + 1, (n, 2))
            for i in indices(n):
                top, left = starts[i]
                out[i] = images[i, top : top + VIEW, left : left + VIEW]
            return out[:n]

        windows.is_parallel = True  # type: ignore[attr-defined]
        return windows

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        shape = (VIEW, VIEW, 3)
        return replace(previous_state, shape=shape, jit_mode=True), AllocationQuery(shape, previous_state.dtype)


def main() -> None:
    job = LoadJob.from_command()
    beton, custom = str(job.converted / "pictures.beton"), {"image": RGBImageField}
    stored = Reader(beton, custom).num_samples
    loader = Loader(
        beton,
        batch_size=job.batch,
        num_workers=job.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.resize(np.arange(stored, dtype=np.uint64), job.images),  # one epoch, as long as the run
        pipelines={
            "image": [SimpleRGBImageDecoder(), RandomWindow(), RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
        custom_fields=custom,
    )
    measure(job, images(loader), "ffcv", "numba", "torch")


def images(loader: Any) -> Iterator[Any]:
    for batch, _ in loader:
        yield batch


if __name__ == "__main__":
    main()
