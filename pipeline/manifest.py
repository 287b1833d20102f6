"""The contract: the content of a dataset directory, and its manifest, loaded, saved and validated."""

import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import numpy as np
from msgspec import Meta

from pipeline import UserError, storage, volumes
from pipeline.storage import Location
from pipeline.typed import Array, Count, Sha256, from_npy, from_npz, from_values

FORMAT = 1
FILE_NAME = "dataset.json"
STATISTICS_FILE = "statistics.npz"
INFO_FILE = "_info.json"
IDENTITY_KEYS = ("format", "recipe", "classes", "splits", "statistics")

# One line of samples.npy, 40 bytes. offset and size (bytes) locate the JPEG inside the shard; label −1: none;
# crc32 is that of the stored JPEG; digest is the first half of the raw image's SHA-256.
NAMES, FORMATS = ["shard", "offset", "size", "label", "crc32", "digest"], ["<u4", "<u8", "<u4", "<i4", "<u4", "16u1"]
SAMPLE = np.dtype({"names": NAMES, "formats": FORMATS})

T = TypeVar("T")
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Name = Annotated[
    str, Meta(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]{,99}(/|\Z)){1,2}(?<!/)\Z")
]  # of a file below the root
Sums = tuple[Count, Count, Count]  # of red, green, blue
Row = Annotated[list[Annotated[float, Meta(ge=-3 * 255**2, le=3 * 255**2)]], Meta(min_length=3, max_length=3)]
Greys = Annotated[list[Annotated[float, Meta(ge=0, le=255)]], Meta(min_length=3, max_length=3)]
Matrix = Annotated[list[Row], Meta(min_length=3, max_length=3)]


class DatasetError(UserError):
    """A dataset directory that is missing, damaged, or not one."""


@dataclass(frozen=True)
class BuildRecipe:
    """The options that determine the bytes of a dataset directory (together with the raw images and the codecs).

    The fields' metadata hold the permitted values: "choices", or "bounds", least and greatest (None: no bound).
    Raises UserError where a value is none of them.
    """

    size: int = field(default=256, metadata={"bounds": (16, 1024)})  # pixels of the square's, or the shorter, side
    crop: str = field(default="centre", metadata={"choices": ("centre", "none")})  # the square, or the whole picture
    filter: str = field(default="bicubic", metadata={"choices": ("bicubic", "area")})  # antialiased
    quality: int = field(default=95, metadata={"bounds": (1, 100)})  # JPEG, libjpeg's scale
    subsampling: str = field(default="4:2:0", metadata={"choices": ("4:2:0", "4:2:2", "4:4:4")})
    exif: str = field(default="ignore", metadata={"choices": ("ignore", "apply")})  # the tag: ignored as by torchvision
    seed: int = field(default=2012, metadata={"bounds": (0, None)})  # order of the training split
    samples_per_shard: int = field(default=4096, metadata={"bounds": (1, 65536)})
    holdout: int | float = field(default=0.1, metadata={"bounds": (0, 0.5)})  # of the training images, without "val"
    limit: int = field(default=0, metadata={"bounds": (0, None)})  # use at most this many raw images (0: all)
    max_bytes: Positive = 64 * 2**20  # a raw image with more bytes, pixels or JPEG scans is skipped
    max_pixels: Positive = 64 * 10**6
    max_scans: Positive = 100

    def __post_init__(self) -> None:
        for option in fields(self):
            value, (least, most) = getattr(self, option.name), option.metadata.get("bounds", (None, None))
            if not ((least is None or value >= least) and (most is None or value <= most)):  # NaN is neither
                raise UserError(f"{option.name} is {value!s:.80}, not from {least} to {most}")
            if value not in (choices := option.metadata.get("choices", (value,))):
                raise UserError(f"{option.name} is {value!r:.80}, none of {', '.join(choices)}")

    @property
    def statistics_size(self) -> int:
        """Return the side of the mean image in pixels; 1 for whole pictures, whose pixels count as pictures."""
        return self.size if self.crop == "centre" else 1


@dataclass(frozen=True)
class ClassRecord:
    """One class. `label` is the rank of `wnid`, by number if all are numbers; `devkit_id` is ILSVRC's own, if any."""

    label: Count
    wnid: str
    words: str
    devkit_id: Count | None


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its path below the dataset directory and the exact sums over its rescaled pixels (RGB grey levels)."""

    name: str  # SPLIT/SPLIT-NNNNNN.tar
    samples: Positive
    bytes: Positive
    sum_color: Sums
    second_moments: tuple[Sums, Sums, Sums]  # (3, 3): sum over pixels of x·xᵀ


@dataclass(frozen=True)
class Split:
    samples: Count
    skipped: Count
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class FileRecord:
    bytes: Count
    sha256: Sha256


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

    def summary(self) -> "Summary":
        """Return what the manifest repeats of the statistics."""
        names = ("mean_color", "covariance", "eigenvalues", "eigenvectors")
        return Summary(n=self.n, **{name: getattr(self, name).tolist() for name in names})  # type: ignore[typeddict-item]


class Summary(TypedDict):
    """The manifest's copy of the statistics: everything but the sums and the mean image."""

    n: Positive
    mean_color: Greys
    covariance: Matrix
    eigenvalues: Row
    eigenvectors: Matrix


class _Content(TypedDict):
    """The keys of dataset.json, but for its checksum."""

    format: Literal[1]
    identity: Sha256
    recipe: BuildRecipe
    classes: tuple[ClassRecord, ...]
    splits: dict[Annotated[str, Meta(pattern=r"^(train|val|test)\Z")], Split]
    statistics: Summary
    files: dict[Name, FileRecord]
    built_with: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """dataset.json, and the directory it stands in."""

    root: Location
    recipe: BuildRecipe
    classes: tuple[ClassRecord, ...]
    splits: Mapping[str, Split]
    statistics_summary: Summary
    files: Mapping[str, FileRecord]
    built_with: Mapping[str, str]

    @cached_property  # which a server asks for at each look
    def identity(self) -> str:
        """Return the SHA-256 (hex) over format, recipe, classes, splits and statistics: equal for equal data."""
        return sha256(canonical_json({key: value for key, value in self._body().items() if key in IDENTITY_KEYS}))

    def split(self, name: str) -> Split:
        if name not in self.splits:
            remedy = "" if name != "train" else "; it is for evaluation alone: name the data set whose classes it has"
            raise DatasetError(f"{self.root}: no split named {name!r}; there are: {', '.join(self.splits)}{remedy}")
        return self.splits[name]

    def samples(self, split: str) -> np.ndarray:
        """Return the records of a split in the order of the sample ids: (n,) of `SAMPLE`, read-only.

        Raises DatasetError where they are damaged, or one is of no class, or lies outside its shard.
        """
        entry, name = self.split(split), f"{split}/samples.npy"
        samples = self._parsed(name, lambda data: from_npy(data, SAMPLE, (entry.samples,)))
        counts, columns = [shard.samples for shard in entry.shards], {key: samples[key] for key in NAMES[:4]}
        shard = np.repeat(np.array([int(shard.name[-10:-4]) for shard in entry.shards], "u4"), counts)
        end = np.repeat(np.array([shard.bytes for shard in entry.shards], "u8"), counts)
        wrong = (columns["shard"] != shard) | (columns["offset"] < 512) | (columns["offset"] > end)
        wrong |= (columns["size"] == 0) | (columns["size"] > end - columns["offset"])
        wrong |= (columns["label"] < (-1 if split == "test" else 0)) | (columns["label"] >= len(self.classes))
        for i in np.flatnonzero(wrong)[:1]:
            values = ", ".join(f"{key} {column[i]}" for key, column in columns.items())
            problem = f"sample {i} is in no shard or class of {FILE_NAME} ({values})"
            raise DatasetError(f"{self.root / name}: {problem}; build it again")
        return samples

    def statistics(self) -> Statistics:
        """Load statistics.npz. Raises DatasetError where it is missing or damaged."""
        image, matrix = (self.recipe.statistics_size, self.recipe.statistics_size, 3), (3, 3)
        sums = {"n": (), "sum_image": image, "second_moments": matrix}
        means = {"mean_image": image, "mean_color": (3,), "covariance": matrix}
        axes = {"eigenvalues": (3,), "eigenvectors": matrix}
        kinds: dict[str, Array] = {name: ("<i8", shape) for name, shape in sums.items()}
        kinds |= {name: ("<f8", shape) for name, shape in (means | axes).items()}
        arrays: dict[str, Any] = self._parsed(STATISTICS_FILE, lambda data: from_npz(io.BytesIO(data), kinds))
        statistics = Statistics(**arrays | {"n": int(arrays["n"])})
        same = statistics.summary() == self.statistics_summary
        problem = "" if same else f"differs from the statistics in {FILE_NAME}"
        if not 0 <= statistics.mean_image.min() <= statistics.mean_image.max() <= 255:
            problem = "the mean image holds no grey levels from 0 to 255"
        if problem:
            raise DatasetError(f"{self.root / STATISTICS_FILE}: {problem}; build it again")
        return statistics

    def _parsed(self, name: str, parse: Callable[[bytes], T]) -> T:
        data = self.read(name)
        try:
            return parse(data)
        except UserError as error:
            raise DatasetError(f"{self.root / name}: damaged ({error}); build it again") from error

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
            raise DatasetError(f"{path}: damaged (its SHA-256 is not the one in {FILE_NAME}); {mending(self.root)}")
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


def load(root: str | os.PathLike[str] | Location, shards: bool = True) -> Manifest:
    """Load the manifest of the dataset directory `root`, a path or a URL; check that all files have their sizes.

    `shards=False`: they and their indices may be missing. Raises DatasetError, which names the file, and StorageError.
    """
    path = (root := storage.location(root)) / FILE_NAME
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not storage.is_dir(root):
            build = f"build one with: python tools/build_shards.py RAW {root}{volumes.hint(root)}"
            remedy = "correct the URL" if storage.is_served(root) else build
            raise DatasetError(f"{root}: no such directory; {remedy}") from error
        unfinished = storage.is_dir(root / ".build")
        reason = "its build has not finished; run the same command again" if unfinished else "not a dataset directory"
        raise DatasetError(f"{path}: missing ({reason}){volumes.hint(root)}") from error
    except PermissionError:
        raise  # the file may be undamaged
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}; build it again") from error
    manifest = parse(data, root)
    sizes = storage.sizes(root, manifest.files)
    for name, record in manifest.files.items():
        needed = shards or not name.endswith((".tar", ".idx")) or name in sizes
        if needed and sizes.get(name) != record.bytes:
            state = f"has {sizes[name]} bytes" if name in sizes else "missing, or not a regular file"
            raise DatasetError(f"{root / name}: {state}, the manifest promises {record.bytes} bytes; {mending(root)}")
    return manifest


def parse(data: bytes, root: Location) -> Manifest:
    """Parse the bytes of dataset.json. Raises DatasetError if a byte was changed or the format is another."""
    path, remedy = root / FILE_NAME, mending(root)
    try:
        body = json.loads(data)
        checksum = body.pop("checksum")
        if body["format"] != FORMAT:
            known = f"this version of Penstock reads format {FORMAT}; build it again"
            raise DatasetError(f"{path}: format {body['format']!r:.80}, {known}")
        if data != canonical_json(body | {"checksum": checksum}) or checksum != sha256(canonical_json(body)):
            raise DatasetError(f"{path}: damaged (its checksum does not fit its content); {remedy}")
        remedy = "build it again"
        content = from_values(body, _Content)
        parts = content["recipe"], content["classes"], content["splits"], content["statistics"]
        manifest = Manifest(root, *parts, content["files"], content["built_with"])
        for contradiction in _contradictions(manifest):
            raise UserError(contradiction)
        if manifest.to_json() != data:
            raise UserError("an unknown key, another kind of number, or an identity that is not that of its content")
        return manifest
    except DatasetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest of this version of Penstock ({error}); {remedy}") from error


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Yield what does not fit together in a manifest whose types are right."""
    wnids = {record.wnid for record in manifest.classes}
    if [record.label for record in manifest.classes] != [*range(len(wnids))]:
        yield "the labels are not the ranks 0, 1, 2 … of different classes"
    promised: dict[str, int] = {}
    for name, split in manifest.splits.items():
        names = [shard.name for shard in split.shards]
        if names != sorted({*names}) or not all(re.fullmatch(rf"{name}/{name}-[0-9]{{6}}\.tar", x) for x in names):
            yield f"the shards of {name} are not {name}/{name}-NNNNNN.tar in their order"
        if split.samples != sum(shard.samples for shard in split.shards):
            yield f"the shards of {name} do not add up to its {split.samples} samples"
        promised |= {shard.name: shard.bytes for shard in split.shards}
    for name, size in promised.items():
        if name not in manifest.files or manifest.files[name].bytes != size:
            yield f"{name}: {size} bytes in splits, another number or none in files"
    for name in (STATISTICS_FILE, *(f"{split}/samples.npy" for split in manifest.splits)):
        if name not in manifest.files:
            yield f"{name}: not in files"


def mending(root: Location) -> str:
    """Return the remedy for a data set of which bytes have changed."""
    return f"mend it: python tools/verify_shards.py {shlex.quote(str(root))} --repair RAW"


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
