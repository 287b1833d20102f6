"""A contestant's job and its result. Runs in every peer's environment: it imports the standard library alone."""

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

SIDE = 256  # pixels of a side of the stored square
QUALITY = 95  # JPEG, libjpeg's scale


class Picture(NamedTuple):
    """One raw picture. `label` is the rank of its folder's name, `key` is its name in what is written."""

    path: str
    label: int
    key: str


@dataclass(frozen=True)
class Job:
    """Write the pictures of `folder`, which holds one folder per class, to `out`, which does not exist yet."""

    folder: Path
    out: Path
    workers: int
    per_shard: int

    @classmethod
    def from_command(cls) -> "Job":
        folder, out, workers, per_shard = sys.argv[1:5]
        return cls(Path(folder), Path(out), int(workers), int(per_shard))

    def pictures(self) -> list[Picture]:
        classes = sorted(entry.name for entry in self.folder.iterdir())
        return [
            Picture(str(path), label, path.stem)
            for label, name in enumerate(classes)
            for path in sorted((self.folder / name).iterdir())
        ]

    def share(self, worker: int) -> list[Picture]:
        """Every `workers`-th picture, so that the shares are alike in size."""
        return self.pictures()[worker :: self.workers]


class Span(NamedTuple):
    """How many pictures were written from when to when, in seconds of the one monotonic clock of all processes."""

    images: int
    began: float
    ended: float


Work = Callable[[list[Picture], Path, int], int]  # pictures, a folder to write to, per_shard → pictures written


def run_shares(job: Job, work: Work) -> Span:
    """`work` on equal shares in `job.workers` processes. They are forked, so what was imported is there already."""
    job.out.mkdir(parents=True)
    with ProcessPoolExecutor(job.workers, multiprocessing.get_context("fork")) as pool:
        spans = list(pool.map(partial(_timed, job, work), range(job.workers)))
    return Span(sum(s.images for s in spans), min(s.began for s in spans), max(s.ended for s in spans))


def _timed(job: Job, work: Work, worker: int) -> Span:
    pictures, out = job.share(worker), job.out / str(worker)
    out.mkdir()
    began = time.monotonic()
    return Span(work(pictures, out, job.per_shard), began, time.monotonic())


def report(span: Span, *packages: str, **more: object) -> None:
    """The result, and `more`, as the last line on stdout; `rss` is the peak of the largest process, in bytes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # KiB
    result = {
        "images": span.images,
        "seconds": span.ended - span.began,
        "rss": 1024 * max(own_peak(), children),
        "versions": {package: version(package) for package in packages},
        **more,
    }
    print("\n" + json.dumps(result), flush=True)


def own_peak() -> int:
    """The highest resident memory of this process, in KiB. Not from getrusage, which has that of its parent too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
