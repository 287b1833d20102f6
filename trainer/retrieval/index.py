"""An index: the directory that holds the features of a split and their codes. Loaded, and refused where it is no use.

features.npy             (n, units) float16 or float32, row i being sample i; mapped, never read whole
codes.npy                (n, bits / 8) uint8
autoencoder.safetensors  what makes codes of features
index.json               what it is of, and the files; written last
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline import UserError
from pipeline.manifest import canonical_json, sha256
from trainer.retrieval.codes import AutoEncoder
from trainer.retrieval.hamming import Hamming
from trainer.retrieval.rows import Rows

FORMAT = 1
META, FEATURES, CODES, ENCODER = "index.json", "features.npy", "codes.npy", "autoencoder.safetensors"
FILES = (META, FEATURES, CODES, ENCODER)
SMALL = (CODES, ENCODER)  # files that are read whole, and have their SHA-256 in index.json
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
LEAST_BITS, MOST_BITS = 32, 256  # of a code, a multiple of 8


class BadIndex(UserError):
    """An index that is missing, damaged, or of another network or data set."""


@dataclass(frozen=True)
class Meta:
    """What an index is of. `weights` and `dataset` are the digests of the network's weights and of the data set."""

    step: int
    weights: str
    dataset: str
    split: str
    layer: str
    n: int
    units: int
    bits: int
    dtype: str


class Index:
    """A loaded index; its features stay on disk. Raises BadIndex where it is missing or damaged, in one line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta, digests = _read(folder)
        small = {name: _intact(folder / name, digests[name]) for name in SMALL}
        meta = self.meta
        self.rows = _features(folder / FEATURES, meta)
        self.codes = Rows(folder / CODES, (meta.n, meta.bits // 8), np.dtype(np.uint8)).mapped
        self.encoder = AutoEncoder.from_bytes(small[ENCODER])

    @cached_property
    def hamming(self) -> Hamming:
        """The codes, to be searched. Raises UserError where the package faiss is missing."""
        return Hamming(self.codes)

    def require(self, weights: str, dataset: str, where: object) -> None:
        """Raise BadIndex where the index is not of these weights and this data set; `where` names the network."""
        if self.meta.dataset != dataset:
            raise BadIndex(
                f"{self.folder}: of the data set {self.meta.dataset[:12]}…, this one is {dataset[:12]}…; "
                "name the DATASET that it was made of, or make another: python -m trainer index"
            )
        if self.meta.weights != weights:
            raise BadIndex(
                f"{self.folder}: of another network than that of {where} (it was made at step {self.meta.step:,}); "
                "make it again: python -m trainer index"
            )


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the names, shapes and values of a checkpoint's weights."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.contiguous().numpy().data)
    return found.hexdigest()


def write_meta(folder: Path, meta: Meta) -> None:
    """Write index.json of a folder that holds the other files."""
    files: dict[str, Any] = {FEATURES: {"bytes": (folder / FEATURES).stat().st_size}}
    for name in SMALL:
        data = (folder / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": sha256(data)}
    body = {"format": FORMAT, **asdict(meta), "files": files}
    (folder / META).write_bytes(canonical_json(body | {"checksum": sha256(canonical_json(body))}))


def require_replaceable(folder: Path) -> None:
    """Raise UserError where `folder` is something else than an index, or nothing: it would be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a directory as --out")
    if folder.samefile("."):
        raise UserError(f"{folder}: is the folder that you are in, and cannot be replaced; name another --out")
    if os.path.ismount(folder):
        raise UserError(f"{folder}: is where a disk is mounted, and cannot be replaced; name a folder in it as --out")
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if others:
        raise UserError(f"{folder}: exists and is not an index (it has {others[0]}); name another --out")


def _read(folder: Path) -> tuple[Meta, dict[str, str]]:
    """index.json: what it says, and the SHA-256 of the small files."""
    path = folder / META
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadIndex(f"{folder}: no index there; make one: python -m trainer index RUN DATASET") from error
    try:
        body = json.loads(data)
        version, checksum = body.pop("format"), body.pop("checksum")
        signed = {"format": version, **body}
        intact = checksum == sha256(canonical_json(signed)) and data == canonical_json(signed | {"checksum": checksum})
        digests = {name: str(body["files"][name]["sha256"]) for name in SMALL}
        values = {name: body[name] for name in Meta.__dataclass_fields__}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadIndex(f"{path}: damaged, or of another version; make it again: python -m trainer index") from error
    if version != FORMAT:
        raise BadIndex(f"{path}: format {version!r}, this version of Penstock reads format {FORMAT}; make it again")
    if not intact:
        raise BadIndex(f"{path}: damaged (its checksum does not fit its content); make it again")
    return Meta(**values), digests


def _features(path: Path, meta: Meta) -> Rows:
    try:
        return Rows(path, (meta.n, meta.units), DTYPES[meta.dtype])
    except FileNotFoundError as error:
        raise BadIndex(f"{path}: missing; make the index again: python -m trainer index") from error
    except UserError as error:
        raise BadIndex(f"{error}; make the index again: python -m trainer index") from error


def _intact(path: Path, promised: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadIndex(f"{path}: missing; make the index again: python -m trainer index") from error
    if sha256(data) != promised:
        raise BadIndex(f"{path}: damaged (its SHA-256 is not that in {META}); make the index again")
    return data
