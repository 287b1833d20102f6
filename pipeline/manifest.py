"""The contract: the content of a dataset directory, and its manifest, loaded, saved and validated."""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import UserError, storage, volumes
from pipeline.storage import Location

FORMAT = 1
FILE_NAME = "dataset.json"
STATISTICS_FILE = "statistics.npz"
INFO_FILE = "_info.json"
IDENTITY_KEYS = ("format", "recipe", "classes", "splits", "statistics")

# One line of samples.npy, 40 bytes. offset and size (bytes) locate the JPEG inside the shard; label −1: none;
# crc32 is that of the stored JPEG; digest is the first half of the raw image's SHA-256.
NAMES, FORMATS = ["shard", "offset", "size", "label", "crc32", "digest"], ["<u4", "<u8", "<u4", "<i4", "<u4", "16u1"]
SAMPLE = np.dtype({"names": NAMES, "formats": FORMATS})


class DatasetError(UserError):
    """A dataset directory that is missing, damaged, or not one."""


@dataclass(frozen=True)
class BuildRecipe:
    """The options that determine the bytes of a dataset directory (together with the raw images and the codecs).

    The fields' metadata hold the permitted values: "choices", or "bounds", least and greatest (None: no bound).
    """

    size: int = field(default=256, metadata={"bounds": (16, 1024)})  # pixels of the square's, or the shorter, side
    crop: str = field(default="centre", metadata={"choices": ("centre", "none")})  # the square, or the whole picture
    filter: str = field(default="bicubic", metadata={"choices": ("bicubic", "area")})  # antialiased
    quality: int = field(default=95, metadata={"bounds": (1, 100)})  # JPEG, libjpeg's scale
    subsampling: str = field(default="4:2:0", metadata={"choices": ("4:2:0", "4:2:2", "4:4:4")})
    exif: str = field(default="ignore", metadata={"choices": ("ignore", "apply")})  # the tag: ignored as by torchvision
    seed: int = field(default=2012, metadata={"bounds": (0, None)})  # order of the training split
    samples_per_shard: int = field(default=4096, metadata={"bounds": (1, 65536)})
    holdout: float = field(default=0.1, metadata={"bounds": (0, 0.5)})  # of the training images, if RAW lacks "val"
    limit: int = field(default=0, metadata={"bounds": (0, None)})  # use at most this many raw images (0: all)
    max_bytes: int = 64 * 2**20  # a raw image with more bytes, pixels or JPEG scans is skipped
    max_pixels: int = 64 * 10**6
    max_scans: int = 100

    @property
    def statistics_size(self) -> int:
        """Return the side of the mean image in pixels; 1 for whole pictures, whose pixels count as pictures."""
        return self.size if self.crop == "centre" else 1


@dataclass(frozen=True)
class ClassRecord:
    """One class. `label` is the rank of `wnid`, by number if all are numbers; `devkit_id` is ILSVRC's own, if any."""

    label: int
    wnid: str
    words: str
    devkit_id: int | None


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its path below the dataset directory and the exact sums over its rescaled pixels (RGB grey levels)."""

    name: str
    samples: int
    bytes: int
    sum_color: Sequence[int]  # (3,)
    second_moments: Sequence[Sequence[int]]  # (3, 3): sum over pixels of x·xᵀ


@dataclass(frozen=True)
class Split:
    samples: int
    skipped: int
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Statistics:
    """Statistics of the training split's rescaled pixels in RGB grey levels (0 … 255), before JPEG encoding."""

    n: int  # images; pixels where whole pictures are stored
    sum_image: np.ndarray  # (size, size, 3) int64
    second_moments: np.ndarray  # (3, 3) int64: sum over pixels of x·xᵀ
    mean_image: np.ndarray  # (size, size, 3) float64
    mean_color: np.ndarray  # (3,) float64
    covariance: np.ndarray  # (3, 3) float64
    eigenvalues: np.ndarray  # (3,) float64, descending
    eigenvectors: np.ndarray  # (3, 3) float64, one per column, largest component positive

    def summary(self) -> dict[str, Any]:
        """Return what the manifest repeats of the statistics: everything but the sums and the mean image."""
        names = ("mean_color", "covariance", "eigenvalues", "eigenvectors")
        return {"n": self.n} | {name: getattr(self, name).tolist() for name in names}


@dataclass(frozen=True)
class Manifest:
    """dataset.json, and the directory it stands in."""

    root: Location
    recipe: BuildRecipe
    classes: tuple[ClassRecord, ...]
    splits: Mapping[str, Split]
    statistics_summary: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    built_with: Mapping[str, str]

    @property
    def identity(self) -> str:
        """Return the SHA-256 (hex) over format, recipe, classes, splits and statistics: equal for equal data."""
        body = self._body()
        return sha256(canonical_json({key: body[key] for key in IDENTITY_KEYS}))

    def split(self, name: str) -> Split:
        if name not in self.splits:
            remedy = "" if name != "train" else "; it is for evaluation alone: name the data set whose classes it has"
            raise DatasetError(f"{self.root}: no split named {name!r}; there are: {', '.join(self.splits)}{remedy}")
        return self.splits[name]

    def samples(self, split: str) -> np.ndarray:
        """Return the records of a split in the order of the sample ids: (n,) of `SAMPLE`. Raises DatasetError."""
        promised, name = self.split(split).samples, f"{split}/samples.npy"
        samples: np.ndarray = np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        if samples.shape != (promised,) or samples.dtype != SAMPLE:
            raise DatasetError(f"{self.root / name}: not the {promised} records that {FILE_NAME} promises")
        return samples

    def statistics(self) -> Statistics:
        """Load statistics.npz. Raises DatasetError where it is missing or damaged."""
        with np.load(io.BytesIO(self.read(STATISTICS_FILE)), allow_pickle=False) as arrays:
            fields = {key: arrays[key] for key in Statistics.__dataclass_fields__}
        statistics = Statistics(**{**fields, "n": int(fields["n"])})
        if statistics.summary() != self.statistics_summary:
            raise DatasetError(f"{self.root / STATISTICS_FILE}: differs from the statistics in {FILE_NAME}")
        return statistics

    def read(self, name: str) -> bytes:
        """Read a file of the dataset and verify its SHA-256. Raises DatasetError."""
        path = self.root / name
        try:
            data = storage.read_bytes(path)
        except PermissionError:
            raise  # the file may be undamaged
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}; build it again") from error
        if name not in self.files or sha256(data) != self.files[name].sha256:
            raise DatasetError(f"{path}: damaged (its SHA-256 is not the one in {FILE_NAME}); build it again")
        return data

    def _body(self) -> dict[str, Any]:
        """Return the content of dataset.json, but for its identity and its checksum."""
        body = {"format": FORMAT} | asdict(replace(self, root=Path()))
        body["statistics"] = body.pop("statistics_summary")
        del body["root"]
        return body

    def to_json(self) -> bytes:
        """Return the canonical bytes of dataset.json, with `identity`, and a `checksum` over everything but itself."""
        body = self._body() | {"identity": self.identity}
        return canonical_json(body | {"checksum": sha256(canonical_json(body))})


def load(root: str | os.PathLike[str] | Location) -> Manifest:
    """Load the manifest of the dataset directory `root`, a path or a URL; check that all files have their sizes.

    Their content is checked by tools/verify_shards.py and, for each sample used, by the loader (CRC-32).
    Raises DatasetError, one line that names the file; UserError where the object store of `root` cannot be reached.
    """
    root = storage.location(root)
    path = root / FILE_NAME
    if not storage.is_dir(root):
        remedy = f"build one with: python tools/build_shards.py RAW {root}"
        raise DatasetError(f"{root}: no such directory; {remedy}{volumes.hint(root)}")
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        unfinished = storage.is_dir(root / ".build")
        reason = "its build has not finished; run the same command again" if unfinished else "not a dataset directory"
        raise DatasetError(f"{path}: missing ({reason}){volumes.hint(root)}") from error
    manifest = parse(data, root)
    sizes = storage.sizes(root, manifest.files)
    for name, record in manifest.files.items():
        if sizes.get(name) != record.bytes:
            state = f"has {sizes[name]} bytes" if name in sizes else "missing"
            raise DatasetError(f"{root / name}: {state}, the manifest promises {record.bytes} bytes; build it again")
    return manifest


def parse(data: bytes, root: Location) -> Manifest:
    """Parse the bytes of dataset.json. Raises DatasetError if a byte was changed or the format is another."""
    path = root / FILE_NAME
    try:
        body = json.loads(data)
        checksum = body.pop("checksum")
        if body["format"] != FORMAT:
            known = f"this version of Penstock reads format {FORMAT}"
            raise DatasetError(f"{path}: format {body['format']}, {known}; build it again")
        if data != canonical_json(body | {"checksum": checksum}) or checksum != sha256(canonical_json(body)):
            raise DatasetError(f"{path}: damaged (its checksum does not fit its content); build it again")
        for split in body["splits"].values():
            split["shards"] = tuple(ShardRecord(**shard) for shard in split["shards"])
        return Manifest(
            root=root,
            recipe=BuildRecipe(**body["recipe"]),
            classes=tuple(ClassRecord(**record) for record in body["classes"]),
            splits={name: Split(**split) for name, split in body["splits"].items()},
            statistics_summary=body["statistics"],
            files={name: FileRecord(**record) for name, record in body["files"].items()},
            built_with=body["built_with"],
        )
    except DatasetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest of this version of Penstock ({error}); build it again") from error


def timm_info(splits: Mapping[str, Split]) -> bytes:
    """Return `_info.json`, by which `timm.data.create_dataset("wds/NAME", root=DATASET)` finds shards and counts."""
    infos: dict[str, Any] = {name: {"name": name, "num_samples": split.samples} for name, split in splits.items()}
    for name, split in splits.items():
        infos[name]["filenames"] = [shard.name for shard in split.shards]
        infos[name]["shard_lengths"] = [shard.samples for shard in split.shards]
    return canonical_json({"splits": infos})


def canonical_json(value: Any) -> bytes:
    """Return the one form in which JSON is written and hashed: sorted keys, indented by one, ASCII, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
