"""Our loader's start: seconds for the manifest, for the loader, and to its first batch; imports are done before."""

import sys
import time
from itertools import pairwise
from pathlib import Path

from pipeline import manifest
from pipeline.online.loader import Loader
from tools.peers.job import Span, report

STAGES = ("manifest.load", "Loader(…)", "first batch")


def main() -> None:
    dataset, batch = Path(sys.argv[1]), int(sys.argv[2])
    times = [time.monotonic()]
    data = manifest.load(dataset)
    times.append(time.monotonic())
    with Loader(data, "train", batch_size=batch) as loader:
        times.append(time.monotonic())
        images = len(next(loader).images)
        times.append(time.monotonic())
    stages = dict(zip(STAGES, (after - before for before, after in pairwise(times))))
    report(Span(images, times[0], times[-1]), "nvidia-dali-cuda130", "torch", "numpy", stages=stages)


if __name__ == "__main__":
    main()
