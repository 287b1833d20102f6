"""No pictures: a new tensor of the loader's shape for each batch, filled with one number."""

from collections.abc import Iterator
from statistics import fmean

import torch

from tools.peers.loadjob import VIEW, LoadJob, measure


def main() -> None:
    job = LoadJob.from_command()
    torch.set_num_threads(job.workers)
    measure(job, batches(job.batch, fmean(job.mean_colour())), "torch")


def batches(batch: int, level: float) -> Iterator[torch.Tensor]:
    while True:
        yield torch.empty(batch, 3, VIEW, VIEW, memory_format=torch.channels_last).fill_(level)


if __name__ == "__main__":
    main()
