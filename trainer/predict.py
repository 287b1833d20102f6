"""The most probable labels of single pictures, raw or stored: each is seen exactly as if the builder had stored it."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch

from pipeline.decode import ImageError, decode
from pipeline.manifest import BuildRecipe
from pipeline.storage import read_ahead
from trainer.evaluate import probabilities
from trainer.nonfinite import Diverged
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures
from trainer.raw import Failure, Raw, unreadable, useless

BATCH_SIZE = {"centre": 32, "ten": 8}  # pictures; results come a batch at a time
THREADS = min(4, os.cpu_count() or 1)  # that decode, each with as much memory as the builder's worker
SHOWN = 5  # labels
JPEG = b"\xff\xd8"  # how one begins


@dataclass(frozen=True)
class Prediction:
    """A picture's most probable labels, the first first: (label, probability) each; all where there are fewer."""

    name: str
    labels: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class _Ready:
    name: str
    jpeg: bytes


def predict(
    network: TwoColumnNet, pictures: Pictures, raws: Iterable[Raw | Failure], views: str
) -> Iterator[Prediction | Failure]:
    """Each of `raws` in its order: predicted, or why it cannot be. Few are in memory at a time.

    Args:
        views: "centre", or "ten", whose probabilities are averaged.
    Raises:
        Diverged: an output is not a finite number.
        StorageError: the object store fails.
    """
    ready = (found for _, found in read_ahead(raws, partial(_ready, pictures), THREADS, _bytes))
    while batch := list(islice(ready, BATCH_SIZE[views])):
        jpegs = [each.jpeg for each in batch if isinstance(each, _Ready)]
        rows = iter(_chances(network, pictures, jpegs, views) if jpegs else ())
        for each in batch:
            yield _prediction(each.name, next(rows)) if isinstance(each, _Ready) else each


@torch.inference_mode()
def _chances(network: TwoColumnNet, pictures: Pictures, jpegs: list[bytes], views: str) -> np.ndarray:
    """Stored JPEGs → (n, classes) float64."""
    found = probabilities(network, pictures.views(jpegs, views)).cpu().numpy()
    if not np.isfinite(found).all():
        raise Diverged("the network's outputs are not finite numbers: its training has diverged")
    return found


def _prediction(name: str, chances: np.ndarray) -> Prediction:
    return Prediction(name, tuple((int(label), float(chances[label])) for label in top(chances)))


def top(chances: np.ndarray, k: int = SHOWN) -> np.ndarray:
    """(classes,) → the labels of the k most probable, the first first, equal ones by label; (≤ k,) int64."""
    return np.argsort(-chances, kind="stable")[:k]


def _bytes(raw: Raw | Failure) -> int:
    return raw.size if isinstance(raw, Raw) else 0


def _ready(pictures: Pictures, raw: Raw | Failure) -> _Ready | Failure:
    if isinstance(raw, Failure):
        return raw
    try:
        data = raw.read()
        kept = raw.stored and fits(data, pictures.rules)
        return _Ready(raw.name, data if kept else pictures.stored(data))
    except ImageError as error:
        return useless(raw.name, error.code)
    except OSError as error:
        return unreadable(raw.name, error)


def fits(data: bytes, rules: BuildRecipe) -> bool:
    """Whether a picture is a JPEG as the builder stores it: RGB of size × size, and not gzipped. Raises ImageError."""
    image = decode(data, max_bytes=rules.max_bytes, max_pixels=rules.max_pixels, max_scans=rules.max_scans)
    return data.startswith(JPEG) and image.format == "JPEG" and image.size == (rules.size, rules.size)
