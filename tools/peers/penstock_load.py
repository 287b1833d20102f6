"""Ours: the loader itself, with the options of the contestant."""

import json
import sys

from pipeline.online.loader import Loader
from tools.peers.loadjob import LoadJob, measure


def main() -> None:
    job, options = LoadJob.from_command(), json.loads(sys.argv[6])
    with Loader(job.dataset, "train", batch_size=job.batch, threads=job.workers, **options) as loader:
        measure(job, (batch.images for batch in loader), "nvidia-dali-cuda130", "torch", "numpy")


if __name__ == "__main__":
    main()
