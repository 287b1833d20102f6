"""Rows of supply: decoding alone, a batch's arithmetic alone, the loader from each tier. Nobody trains on them."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import manifest
from pipeline.offline.raw_tier import build
from pipeline.online import Loader
from pipeline.online.batch import Batch
from pipeline.online.loader import recipe_of
from pipeline.online.normalise import fused, normalise
from pipeline.records import record_bytes
from tools.bench.common import CORES, Figures, Row
from tools.bench.peers_build import Job
from tools.bench.peers_load import dali_windows, stored_jpegs
from trainer import data as loaders
from trainer import recipe as recipes

FP32 = "fp32"  # the variant that the others are compared with
AHEAD = 6  # batches that a loader may have ready


@dataclass
class Timed:
    """A row that is set up: `step` returns its images (the operations of a matrix product)."""

    step: Callable[[], int]
    loader: Loader | None = None
    precision: str = FP32
    cudnn: str = ""  # "deterministic", "benchmark": how it chooses its algorithms
    losses: Tensor = field(default_factory=lambda: torch.zeros(()))  # of the last step


def job_devices(job: Job) -> list[torch.device]:
    return [torch.device(name) for name in job.options["devices"]]


def dali(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Decode random windows of JPEGs in memory by DALI alone, a share of them by a GPU's hardware decoder."""
    jpegs = list(islice(stored_jpegs(job.source), AHEAD * job.batch))
    windows = dali_windows(jpegs, job.batch, CORES, job_devices(job)[0].index, row.options["hardware_share"])
    return Timed(lambda: next(windows).shape[0])


def decode(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Decode JPEGs in memory by our decoder on the first device; the row's options are those of `GraphOptions`."""
    from pipeline.online import graph  # slow

    recipe, size = alexnet(job)
    jpegs = [np.frombuffer(jpeg, np.uint8) for jpeg in islice(stored_jpegs(job.source), AHEAD * job.batch)]
    crops = recipe.crops(0, 0, np.arange(len(jpegs)), None, np.full((len(jpegs), 2), size))
    options = graph.GraphOptions(recipe.decoded, threads=CORES, **row.options)
    decoder = graph.Decoder((job_devices(job)[0],), options, job.batch, False)
    stack.callback(decoder.close)
    starts = cycle(range(0, len(jpegs), job.batch))

    def submit() -> None:
        positions = slice(start := next(starts), start + job.batch)
        batch = Batch(0, 0, 0, job.batch, np.arange(job.batch))
        batch.jpegs, batch.crops = jpegs[positions], crops[positions]
        decoder.submit(batch)

    def step() -> int:
        submit()
        return len(decoder.result()[0].ids)

    for _ in range(decoder.under_way - 1):
        submit()
    return Timed(step)


def alexnet(job: Job) -> tuple[Any, int]:
    """Return the recipe of 2012 for the job's data set, and the side of its pictures."""
    data = manifest.load(job.source)
    return recipe_of(data, "alexnet", 0, {}), data.recipe.size


def views(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Make bfloat16 network input of random bytes: of records by the one kernel, of views by torch.compile's."""
    (recipe, size), device, kind = alexnet(job), job_devices(job)[0], row.options["kind"]
    crops = recipe.crops(0, 0, np.arange(job.batch), None, np.full((job.batch, 2), size))
    names = ("offset", "std", "start", "flip")
    offset, std, start, flip = (torch.from_numpy(getattr(crops, name)).to(device) for name in names)
    deviation = torch.from_numpy(recipe.mean_deviations[recipe.divisor(0)]).to(device)
    colours, dtype = (offset, std, deviation), torch.bfloat16
    random = partial(torch.randint, 256, dtype=torch.uint8, device=device)
    if kind == "views":
        function = fused(normalise) if device.type == "cuda" else normalise
        run = partial(function, random((job.batch, recipe.view, recipe.view, 3)), *colours, dtype)
    else:
        from pipeline.online import kernel  # needs Triton

        records = random((job.batch, record_bytes("yuv420" if kind == "yuv420" else "rgb", size)))
        run = partial(kernel.views, records, kind, size, start, flip, recipe.view, *colours, recipe.aligned, dtype)
    return Timed(lambda: len(run()))


def load(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Take batches from the loader, on every device of the group; nobody looks at them.

    Option `records`: the kind that the raw tier holds, which is made first. Tier "device" has all that fits before.
    """
    options: Figures = {"batch_size": job.batch, "threads": CORES, "readers": 4, **row.options}
    kind = options.pop("records", "")
    root = with_records(job.source, kind, stack) if kind else job.source
    loader = stack.enter_context(Loader(root, device=tuple(dict.fromkeys(job_devices(job))), **options))
    for _ in range(loader.steps_per_epoch if loader.tier == "device" else 0):
        next(loader)
    return Timed(lambda: len(next(loader).ids), loader)


def with_records(source: str, kind: str, stack: ExitStack) -> Path:
    """Return a data set of links to another's files, with a raw tier of its own, until `stack` ends."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
    for path in Path(source).iterdir():
        (root / path.name).symlink_to(path.resolve())
    build(manifest.load(root), kind, CORES, lambda done, total: None)
    return root


def supply(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Take the batches of a run of this recipe, on its devices; nobody looks at them."""
    plan = recipes.load(job.options["recipe"], (f"train.batch_size={job.batch}",))
    loader = stack.enter_context(loaders.training(manifest.load(job.source), plan, job_devices(job)))
    return Timed(lambda: len(next(loader).ids), loader)
