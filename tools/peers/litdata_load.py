"""LitData's StreamingDataLoader on chunks of the same JPEGs: a process a core reads, decodes and makes batches."""

import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from PIL import Image

from tools.peers.litdata_optimize import own_folders
from tools.peers.loadjob import LoadJob, measure
from tools.peers.pillow_view import view


def main() -> None:
    job = LoadJob.from_command()
    own_folders(job.converted)
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found,unused-ignore]

    mean = torch.tensor(job.mean_colour()).reshape(3, 1, 1)
    dataset = StreamingDataset(
        str(job.converted / "chunks"), shuffle=True, drop_last=True, transform=partial(sample, mean=mean)
    )
    loader = StreamingDataLoader(dataset, batch_size=job.batch, num_workers=job.workers, drop_last=True)
    measure(job, images(loader), "litdata", "pillow", "torch")


def sample(stored: dict[str, Any], mean: torch.Tensor) -> tuple[torch.Tensor, int]:
    with Image.open(io.BytesIO(stored["image"])) as image:
        return view(image.convert("RGB"), mean), stored["label"]


def images(loader: Any) -> Iterator[torch.Tensor]:
    for batch, _ in loader:
        yield batch


if __name__ == "__main__":
    main()
