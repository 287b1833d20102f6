"""WebDataset in a DataLoader, as its documentation has it: a process a core reads, decodes and makes batches."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from tools.peers.loadjob import LoadJob, measure
from tools.peers.pillow_view import view


def main() -> None:
    job = LoadJob.from_command()
    mean = torch.tensor(job.mean_colour()).reshape(3, 1, 1)
    dataset = (
        webdataset.WebDataset(job.shards(), resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map(partial(sample, mean=mean))
        .batched(job.batch)
    )
    measure(job, images(DataLoader(dataset, batch_size=None, num_workers=job.workers)), "webdataset", "pillow", "torch")


def sample(pair: tuple[Image.Image, int], mean: torch.Tensor) -> tuple[torch.Tensor, int]:
    return view(pair[0], mean), pair[1]


def images(loader: Any) -> Iterator[torch.Tensor]:
    for batch, _ in loader:
        yield batch


if __name__ == "__main__":
    main()
