"""How long a build would take and how large it would be, from a few of its images."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.image import ImageError, encode, rescaled
from pipeline.offline.parquet import spool
from pipeline.offline.plan import Plan
from pipeline.offline.shards import BLOCK

TRIED = 64  # images
ROUNDED_UP = 2 * BLOCK  # bytes of the tar around a JPEG: a header, and half a block of padding; twice, for the label


def estimate(plan: Plan, workers: int) -> dict[str, Any]:
    """Rescale a few training images, drawn evenly, and multiply. Writes nothing.

    Returns:
        tried, skipped (images), images_per_second (of one worker), seconds, bytes.
    """
    count = len(plan.splits["train"])
    positions = np.unique(np.linspace(0, count - 1, min(TRIED, count)).astype(int))
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        plan = replace(plan, images=spool(plan.images, plan.splits["train"][positions], Path(folder)))
        return _tried(plan, positions, workers)


def _tried(plan: Plan, positions: np.ndarray, workers: int) -> dict[str, Any]:
    recipe = plan.recipe
    started, size, skipped = time.perf_counter(), 0, 0
    for position in positions.tolist():
        (image,) = plan.part("train", position, position + 1)
        try:
            pixels = rescaled(image.raw.read(), recipe)
        except ImageError:
            skipped += 1
            continue
        jpeg = encode(pixels, quality=recipe.quality, subsampling=recipe.subsampling)
        size += len(jpeg) + 2 * ROUNDED_UP
    seconds = (time.perf_counter() - started) / len(positions)
    images = sum(map(len, plan.splits.values()))
    return {
        "tried": len(positions),
        "skipped": skipped,
        "images_per_second": 1 / seconds,
        "seconds": images * seconds / workers,
        "bytes": images * size // len(positions),
    }
