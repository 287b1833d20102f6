"""How long a build would take and how large it would be, from a few of its images."""

import time
from typing import Any

import numpy as np

from pipeline.decode import ImageError
from pipeline.image import encode, rescaled
from pipeline.offline.plan import Plan
from pipeline.offline.shards import BLOCK

TRIED = 64  # images
ROUNDED_UP = 2 * BLOCK  # bytes of the tar around a JPEG: a header, and half a block of padding; twice, for the label


def estimate(plan: Plan, workers: int) -> dict[str, Any]:
    """Rescale a few training images, drawn evenly, and multiply. Writes nothing.

    Returns:
        tried, skipped (images), images_per_second (of one worker), seconds, bytes.
    """
    recipe = plan.recipe
    count = len(plan.splits["train"])
    places = np.unique(np.linspace(0, count - 1, min(TRIED, count)).astype(int))
    started, size, skipped = time.perf_counter(), 0, 0
    for place in places.tolist():
        (image,) = plan.part("train", place, place + 1)
        try:
            pixels = rescaled(image.raw.read(), recipe)
        except ImageError:
            skipped += 1
            continue
        jpeg = encode(pixels, quality=recipe.quality, subsampling=recipe.subsampling)
        size += len(jpeg) + 2 * ROUNDED_UP
    seconds = (time.perf_counter() - started) / len(places)
    images = sum(map(len, plan.splits.values()))
    return {
        "tried": len(places),
        "skipped": skipped,
        "images_per_second": 1 / seconds,
        "seconds": images * seconds / workers,
        "bytes": images * size // len(places),
    }
