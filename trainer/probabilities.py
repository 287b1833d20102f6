"""Save and load the probabilities of a network, or of several, for every image of a split: one .npz file."""

import errno
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np

from pipeline import UserError
from pipeline.files import write_aside
from pipeline.volumes import naming

FORMAT = 1
ABOUT = {"format": int, "dataset": str, "split": str, "views": str, "from": list}
ARRAYS = ("about", "classes", "labels", "probabilities")
SLACK = 1e-6  # by which the sum of an image's probabilities may differ from 1
DAMAGE = (zipfile.BadZipFile, TokenError, ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError, OSError)


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
    with naming(path), open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("a member is compressed")  # it could fill the memory
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return _checked(*(np.asarray(arrays[name]) for name in ARRAYS))
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a seek to a negative offset
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path}: not saved probabilities, or damaged ({reason}); write it again with --save-probabilities"
            ) from error


def _checked(about: np.ndarray, classes: np.ndarray, labels: np.ndarray, values: np.ndarray) -> Probabilities:
    """Raise ValueError, KeyError or TypeError where something is not as `save` writes it."""
    facts = json.loads(str(about))
    for key, kind in ABOUT.items():
        if type(facts[key]) is not kind:
            raise ValueError(f"{key} is {facts[key]!r}")
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
    n, width = labels.size, classes.size
    if (labels.shape, classes.shape, values.shape) != ((n,), (width,), (n, width)) or n == 0:
        raise ValueError(f"shapes {labels.shape}, {classes.shape}, {values.shape}")
    if (labels.dtype, values.dtype, classes.dtype.kind) != (np.int64, np.float64, "U"):
        raise ValueError(f"types {labels.dtype}, {values.dtype}, {classes.dtype}")
    if labels.min() < -1 or labels.max() >= width:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, of {width} classes")
    if not (values >= 0).all() or not (np.abs(values.sum(1) - 1) <= SLACK).all():
        raise ValueError("values that are no probabilities: below 0, or not 1 in sum")
    origin = Origin(facts["dataset"], facts["split"], facts["views"], tuple(facts["from"]), tuple(classes.tolist()))
    return Probabilities(origin, labels, values)


def top(values: np.ndarray, k: int = 5) -> np.ndarray:
    """Return the labels (…, ≤ k) int64 of the k greatest of (…, classes), the greatest first, equal ones by label."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]
