"""Save and load the probabilities of a network, or of several, for every image of a split: one .npz file."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from pipeline import UserError
from pipeline.files import write_aside
from pipeline.typed import Array, from_npz, from_values
from pipeline.volumes import naming, open_regular

FORMAT = 1
About = TypedDict("About", {"format": int, "dataset": str, "split": str, "views": str, "from": tuple[str, ...]})
ARRAYS: dict[str, Array] = {
    "about": ("<U", ()),
    "classes": ("<U", (None,)),
    "labels": ("<i8", (None,)),
    "probabilities": ("<f8", (None, None)),
}
SLACK = 1e-6  # by which the sum of an image's probabilities may differ from 1


@dataclass(frozen=True)
class Origin:
    """The data set, split, views and networks of probabilities."""

    dataset: str  # identity of the dataset directory
    split: str
    views: str
    networks: tuple[str, ...]  # run and step of each
    classes: tuple[str, ...]  # wnids, by label


@dataclass(frozen=True)
class Probabilities:
    """Labels and probabilities of every image of a split, in the order of the ids."""

    origin: Origin
    labels: np.ndarray  # (n,) int64; −1: none
    values: np.ndarray  # (n, classes) float64

    @classmethod
    def empty(cls, origin: Origin, samples: int) -> "Probabilities":
        """Return arrays of so many samples, to be filled."""
        return cls(origin, np.empty(samples, np.int64), np.empty((samples, len(origin.classes))))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.origin.classes

    def of_labels(self) -> np.ndarray:
        """Return the probability (n,) float64 of each image's label; every image must have one."""
        return np.take_along_axis(self.values, self.labels[:, None], 1)[:, 0]


def save(path: Path, saved: Probabilities) -> None:
    """Write PATH.npz, whole or not at all; the same probabilities give the same bytes.

    The arrays in it: `probabilities` (n, classes) float64, `labels` (n,) int64, −1: none, `classes` (wnids), `about`
    (JSON). Raises OSError: the disk is full.
    """
    origin = saved.origin
    about = {"format": FORMAT, "dataset": origin.dataset, "split": origin.split, "views": origin.views}
    text = np.array(json.dumps(about | {"from": origin.networks}))
    arrays = {"probabilities": saved.values, "labels": saved.labels, "classes": np.array(origin.classes), "about": text}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_aside(path, lambda file: file.write(buffer.getbuffer()))


def load(path: Path) -> Probabilities:
    """Read what `save` wrote. Raises UserError where the file is something else or damaged, or OSError."""
    with naming(path), open_regular(path) as file:
        try:
            return _checked(**from_npz(file, ARRAYS))
        except (ValueError, RecursionError) as error:
            remedy = "write it again with --save-probabilities"
            raise UserError(f"{path}: not saved probabilities, or damaged ({error}); {remedy}") from error


def _checked(about: np.ndarray, classes: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> Probabilities:
    """Raise ValueError where something is not as `save` writes it."""
    facts, values = from_values(json.loads(str(about)), About), probabilities
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
    n, width = labels.size, classes.size
    if values.shape != (n, width) or n == 0:
        raise ValueError(f"shapes {labels.shape}, {classes.shape}, {values.shape}")
    if labels.min() < -1 or labels.max() >= width:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, of {width} classes")
    if not (values >= 0).all() or not (np.abs(values.sum(1) - 1) <= SLACK).all():
        raise ValueError("values that are no probabilities: below 0, or not 1 in sum")
    origin = Origin(facts["dataset"], facts["split"], facts["views"], facts["from"], tuple(classes.tolist()))
    return Probabilities(origin, labels, values)


def top(values: np.ndarray, k: int = 5) -> np.ndarray:
    """Return the labels (…, ≤ k) int64 of the k greatest of (…, classes), the greatest first, equal ones by label."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]
