"""Load an index of features, refuse one that is of no use, and search it: exactly, or by codes.

An index is a directory:
features.npy             (n, units) float16 or float32, row i being sample i; mapped, never read whole
codes.npy                (n, bits / 8) uint8
autoencoder.safetensors  the layers that make codes of features
index.json               what it is an index of, and the digests of its files; written last
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline import UserError, storage
from pipeline.manifest import Manifest, canonical_json, sha256
from pipeline.typed import Count, from_npy, from_values
from pipeline.volumes import open_regular
from trainer.retrieval.codes import AutoEncoder

FORMAT = 1
META, FEATURES, CODES, ENCODER = "index.json", "features.npy", "codes.npy", "autoencoder.safetensors"
FILES = (FEATURES, CODES, ENCODER)
REMAKE = "make it again: python -m trainer index --force"
CHUNK = 2**18  # numbers of a scan in memory at a time, as float64: 2 MiB, which a cache holds
SPARE = 16  # rows beyond the nearest whose distances are computed, too
CANDIDATES = 1000  # rows that codes choose, whose distances are then computed
RECALLED, TIMED = 6, 3  # rows looked for to measure recall, as in the paper's figure 4; exact searches that are timed


class BadIndex(UserError):
    """An index that is missing, damaged, or of another network or data set."""


@dataclass(frozen=True)
class Meta:
    """The content of index.json. `weights` and `dataset` are the digests of the network's weights and the data set."""

    step: Count
    weights: str
    dataset: str
    split: str
    layer: str
    n: Annotated[int, msgspec.Meta(ge=1)]
    units: Annotated[int, msgspec.Meta(ge=1)]
    bits: Annotated[int, msgspec.Meta(ge=8, multiple_of=8)]
    dtype: Literal["float16", "float32"]

    def features_header(self) -> bytes:
        """Return the beginning of features.npy, before (n, units) numbers."""
        header, descr = io.BytesIO(), np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        facts = {"descr": descr, "fortran_order": False, "shape": (self.n, self.units)}
        np.lib.format.write_array_header_1_0(header, facts)
        return header.getvalue()


def digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) over the names, shapes and values of a checkpoint's weights."""
    hashed = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        hashed.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        hashed.update(value.contiguous().numpy().data)
    return hashed.hexdigest()


class Index:
    """A loaded index: `meta`, `rows` (n, units), mapped, `codes` (n, bits / 8) uint8, and `encoder`, which makes codes.

    Raises BadIndex if it is missing or damaged. The length and header of the features' file are checked, not the rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, path = folder, folder / META
        try:
            body = json.loads(storage.read_bytes(path))
            version, checksum = body["format"], body.pop("checksum")
            whole = checksum == sha256(canonical_json(body))
            self.meta, files = from_values(body, Meta), from_values(body["files"], dict[str, dict[str, int | str]])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadIndex(f"{folder}: no index there; make one: python -m trainer index RUN DATASET") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadIndex(f"{path}: damaged, or of another version ({error}); {REMAKE}") from error
        if version != FORMAT:
            raise BadIndex(f"{path}: format {version!r:.80}, this version of Penstock reads format {FORMAT}; {REMAKE}")
        if not whole:
            raise BadIndex(f"{path}: damaged (its checksum does not fit its content); {REMAKE}")
        shape, dtype = (self.meta.n, self.meta.units), np.dtype(self.meta.dtype)
        with _damage(path := folder / FEATURES), open_regular(path) as file:
            header = self.meta.features_header()
            start, size = file.read(len(header)), file.seek(0, os.SEEK_END)
            if start != header or size != len(header) + shape[0] * shape[1] * dtype.itemsize:
                raise UserError(f"not {dtype} of shape {shape}")
            self.rows = np.memmap(path, dtype, "r", len(header), shape)
        with _damage(path := folder / CODES):
            self.codes = from_npy(_read(path, files), np.dtype("u1"), (self.meta.n, self.meta.bits // 8))
        with _damage(path := folder / ENCODER):
            self.encoder = AutoEncoder.of(load(_read(path, files)), self.meta.units, self.meta.bits)

    @cached_property
    def binary(self) -> Any:
        """The codes, to be searched: see `binary_index`."""
        return binary_index(self.codes)

    def require(self, weights: str, dataset: Manifest, network: object) -> None:
        """Raise BadIndex if the index is not of these weights and this data set; `network` names the weights' file."""
        if self.meta.dataset != (identity := dataset.identity):
            raise BadIndex(
                f"{self.folder}: of the data set {self.meta.dataset[:12]}…, this one is {identity[:12]}…; "
                "name the DATASET that it was made of, or make another: python -m trainer index"
            )
        if self.meta.weights != weights:
            raise BadIndex(
                f"{self.folder}: of another network than that of {network} (it was made at step {self.meta.step:,}); "
                f"{REMAKE}"
            )
        if (samples := dataset.split(self.meta.split).samples) != self.meta.n:
            raise BadIndex(f"{self.folder}: of {self.meta.n:,} images, {self.meta.split} has {samples:,}; {REMAKE}")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Raise BadIndex where a file of an index is missing, or not what it should be."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadIndex(f"{path}: missing; {REMAKE}") from error
    except (UserError, SafetensorError) as error:
        raise BadIndex(f"{path}: damaged ({error}); {REMAKE}") from error


def _read(path: Path, files: Mapping[str, Mapping[str, int | str]]) -> bytes:
    data = storage.read_bytes(path)
    if sha256(data) != files.get(path.name, {}).get("sha256"):
        raise UserError(f"its SHA-256 is not that in {META}")
    return data


def require_faiss(purpose: str) -> ModuleType:
    """Return the package faiss. Raises UserError if it is missing, which `purpose` needs."""
    try:
        import faiss  # here, because only this needs it, and it takes a while to import
    except ImportError as error:
        raise UserError(f"{purpose} needs the package faiss: pip install 'penstock-imagenet[retrieval]'") from error
    module: ModuleType = faiss
    return module


def binary_index(codes: np.ndarray) -> Any:
    """Return faiss's index of codes (n, bytes) uint8. Raises UserError if the package faiss is missing."""
    index = require_faiss("a search by codes").IndexBinaryFlat(8 * codes.shape[1])
    index.use_heap = False  # by counting: of codes that are equally far, the first are returned
    index.add(np.ascontiguousarray(codes))
    return index


def similar(index: Index, features: np.ndarray, k: int, candidates: int = CANDIDATES) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` nearest of the rows that have the nearest codes: as `nearest`, but for rows that codes hide.

    Args:
        features: (q, units) float32.
        candidates: number of rows that the codes choose; at least `k`.
    Raises:
        UserError: the package faiss is missing.
    """
    count = min(max(candidates, k), index.meta.n)
    return _ranked(index.rows, index.binary.search(index.encoder.codes(features), count)[1], features, k)


def nearest(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` rows nearest to each query by Euclidean distance, the nearest first.

    Products in float64 choose the `k` nearest and `SPARE` more, which covers their rounding; their distances are then
    computed by differences. Of equal rows the first come first, if they are few. The memory used does not grow with n.

    Args:
        rows: (n, units) float16 or float32, finite.
        queries: (q, units) float32, finite.
    Returns:
        ids (q, min(k, n)) int64, distances (q, min(k, n)) float64, which holds those of float32's greatest numbers.
    """
    step, q = max(1, CHUNK // rows.shape[1]), torch.from_numpy(queries).double()
    least, ids = q.new_zeros(len(q), 0), torch.zeros(len(q), 0, dtype=torch.int64)
    for start in range(0, len(rows), step):
        x = _float64(rows[start : start + step])
        squared = x.square().sum(1) - 2 * (q @ x.T)  # less |query|², which all rows have in common
        more = torch.arange(start, start + len(x)).expand(len(q), -1)
        least, positions = torch.cat([least, squared], 1).sort(dim=1, stable=True)
        least, ids = least[:, : k + SPARE], torch.cat([ids, more], 1).gather(1, positions[:, : k + SPARE])
    return _ranked(rows, ids.numpy(), queries, k)


def _ranked(rows: np.ndarray, ids: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` nearest of the rows `ids` (q, c) of each query, and their distances in float64."""
    ids, distances = np.sort(ids, 1), np.empty(ids.shape)
    for i, query in enumerate(queries):
        _read_ahead(rows, ids[i])
        x, q = _float64(rows[ids[i]]), torch.from_numpy(query[None]).double()
        # not by products, whose rounding would give a row a distance from itself
        distances[i] = torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist")[0].numpy()
    first = np.argsort(distances, 1, kind="stable")[:, :k]
    return np.take_along_axis(ids, first, 1), np.take_along_axis(distances, first, 1)


def _float64(rows: np.ndarray) -> Tensor:
    """Return a copy in float64; by float32, because torch converts float16 to float64 at half the speed."""
    return torch.from_numpy(np.array(rows)).float().double()


def _read_ahead(rows: np.ndarray, ids: np.ndarray) -> None:
    """Ask the disk for all rows of a map at once; the map itself would wait for one after the other."""
    if isinstance(rows, np.memmap) and rows.filename:
        size = rows.itemsize * rows.shape[1]
        with open(rows.filename, "rb") as file:
            for i in ids.tolist():
                os.posix_fadvise(file.fileno(), rows.offset + i * size, size, os.POSIX_FADV_WILLNEED)


def recall(index: Index, queries: np.ndarray, own: np.ndarray | None = None) -> str:
    """Return in words how much of the exact answer codes find, and how much faster; "" if there is nothing to find.

    Args:
        queries: (q, units) float32.
        own: (q,) the rows that the queries are, which are not looked for.
    """
    beside = 0 if own is None else 1
    n, k = index.meta.n - beside, min(RECALLED, index.meta.n - beside)
    if k < 1 or not len(queries):
        return ""
    candidates = min(CANDIDATES, max(index.meta.n // 10, k), n)
    true, _ = nearest(index.rows, queries, k + beside)
    chosen = index.binary.search(index.encoder.codes(queries), candidates + beside)[1]
    answered, _ = similar(index, queries, k + beside, candidates + beside)

    def others(ids: np.ndarray) -> list[np.ndarray]:
        """Return the ids of each query without its own; if that is not among them, without the last."""
        return list(ids) if own is None else [row[row != i][: ids.shape[1] - 1] for row, i in zip(ids, own)]

    shares = [np.mean([np.isin(*pair).mean() for pair in zip(others(true), others(ids))]) for ids in (chosen, answered)]
    slow = _seconds(lambda query: nearest(index.rows, query, k), queries[:TIMED])
    fast = _seconds(lambda query: similar(index, query, k, candidates), queries)
    return (
        f"{len(queries):,} queries: of the {k} nearest, the nearest {candidates:,} codes hold "
        f"{100 * shares[0]:.1f} %, the answer {100 * shares[1]:.1f} %\n"
        f"by codes {1e3 * fast:,.1f} ms a query, exactly {1e3 * slow:,.1f} ms ({slow / fast:,.1f} times as long)"
    )


def _seconds(search: Callable[[np.ndarray], object], queries: np.ndarray) -> float:
    """Return the median time of a search for one query."""
    times = []
    for query in queries:
        began = time.perf_counter()
        search(query[None])
        times.append(time.perf_counter() - began)
    return median(times)
