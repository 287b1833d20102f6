"""Ours: the loader itself, with the options of the contestant."""

import json
import sys

from pipeline.online.meter import CAUSES

from pipeline.online.loader import Loader
from tools.peers.loadjob import LoadJob, measure


def main() -> None:
    job, options = LoadJob.from_command(), json.loads(sys.argv[6])
    with Loader(job.dataset, "train", batch_size=job.batch, threads=job.workers, **options) as loader:
        packages = ("nvidia-dali-cuda130", "torch", "numpy")
        measure(job, (batch.images for batch in loader), *packages, more=lambda: waits(loader))


def waits(loader: Loader) -> dict[str, dict[str, float]]:
    """Seconds of waiting by cause, with the warm-up."""
    return {"waits": {cause: getattr(loader.meter.total, cause) for cause in CAUSES}}


if __name__ == "__main__":
    main()
