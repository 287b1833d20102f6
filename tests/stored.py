"""Stored pictures, and their views through a decoder."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline import manifest
from pipeline.online.batch import Batch, Crops


def jpegs(root: Path, split: str) -> list[bytes]:
    """The stored pictures in the order of the ids, by the manifest's records."""
    found = []
    for record in manifest.load(root).samples(split):
        shard = (root / split / f"{split}-{record['shard']:06d}.tar").read_bytes()
        found.append(shard[record["offset"] :][: record["size"]])
    return found


def decoded(decoder: Any, pictures: list[bytes], crops: Crops) -> np.ndarray:
    """The views that a decoder makes of a batch of pictures."""
    batch = Batch(0, 0, 0, len(pictures), np.arange(len(pictures)))
    batch.jpegs, batch.crops = [np.frombuffer(data, np.uint8) for data in pictures], crops
    decoder.submit(batch)
    _, (views, *_) = decoder.result()
    return np.asarray(views.cpu())
