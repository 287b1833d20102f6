"""The record of a finished shard in DATASET/.build: what the manifest needs of it. It is written after the shard."""

import io
import json
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.files import write_bytes_aside
from pipeline.manifest import ShardRecord, canonical_json
from pipeline.offline.statistics import Sums
from pipeline.storage import Location

BUILD_FOLDER = ".build"


@dataclass(frozen=True)
class Record:
    """A finished shard. One whose images were all skipped has no files."""

    name: str  # SPLIT/SPLIT-NNNNNN
    samples: int
    skipped: list[dict[str, str]]  # key, source, reason
    files: dict[str, dict[str, Any]]  # path below the root → bytes, sha256
    raw: str  # digest of where its raw images lay, and of their sizes
    raw_bytes: int
    sums: Sums

    @property
    def manifest_entry(self) -> ShardRecord | None:
        """What the manifest says of the shard; None where all its images were skipped."""
        if not self.files:
            return None
        red, green, blue = (int(value) for value in self.sums.sum_image.sum(axis=(0, 1)))
        moments: Any = tuple(tuple(row) for row in self.sums.second_moments.tolist())
        tar = f"{self.name}.tar"
        return ShardRecord(tar, self.samples, self.files[tar]["bytes"], (red, green, blue), moments)


def record_path(root: Location, name: str) -> Location:
    return root / BUILD_FOLDER / f"{name.partition('/')[2]}.npz"


def save(root: Location, record: Record, samples: np.ndarray) -> None:
    """Write a record, with the shard's sample records, (n,) of manifest.SAMPLE."""
    told = {key: getattr(record, key) for key in ("name", "samples", "skipped", "files", "raw", "raw_bytes")}
    small = record.sums.sum_image.max() < 2**32  # 255 · samples_per_shard is, the sum over all pixels is not
    buffer = io.BytesIO()
    np.savez(
        buffer,
        meta=np.frombuffer(canonical_json(told), np.uint8),
        samples=samples,
        n=record.sums.n,
        sum_image=record.sums.sum_image.astype(np.uint32 if small else np.int64),
        second_moments=record.sums.second_moments,
    )
    write_bytes_aside(record_path(root, record.name), buffer.getvalue())


def load(root: Location, name: str) -> Record | None:
    """The record of a shard; None where there is none, or none that can be read."""
    try:
        with _opened(root, name) as arrays:
            told = json.loads(arrays["meta"].tobytes())
            sums = Sums(int(arrays["n"]), arrays["sum_image"].astype(np.int64), arrays["second_moments"])
            return Record(**told, sums=sums)
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError):
        return None  # the shard is built again


def load_samples(root: Location, name: str) -> np.ndarray:
    """The sample records of a shard whose record loads: (n,) of manifest.SAMPLE."""
    with _opened(root, name) as arrays:
        return np.asarray(arrays["samples"])


def _opened(root: Location, name: str) -> Any:
    return np.load(io.BytesIO(storage.read_bytes(record_path(root, name))), allow_pickle=False)
