"""The rows nearest to queries by Euclidean distance: exactly, or the exact order of those whose codes are nearest."""

from typing import Any

import numpy as np
import torch

from trainer.retrieval.index import Index

CHUNK = 2**22  # numbers of a scan in memory at a time, as float32: 16 MiB
CANDIDATES = 1000  # rows that codes choose, whose distances are then computed
AT_ONCE = 64  # rows compared in float64 at a time: 2 MiB of 4096 units, which a cache holds
EPSILON = float(np.finfo(np.float32).eps)  # twice the unit roundoff
TINY = float(np.finfo(np.float32).tiny)


def exact(index: Index, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` rows of an index that are nearest to each of `features`, (q, units) float32: see `nearest`."""
    return nearest(index.rows.mapped, features, k)


def similar(index: Index, features: np.ndarray, k: int, candidates: int = CANDIDATES) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest of the rows that have the nearest codes: as `exact`, but for rows that their codes hide.

    Args:
        features: (q, units) float32.
        candidates: how many rows the codes choose; `k` at least.
    Raises:
        UserError: the package faiss is missing.
    """
    chosen = index.hamming.nearest(index.encoder.codes(features), max(candidates, k))
    found = []
    for query, ids in zip(features, np.sort(chosen, 1)):
        distances = squared(index.rows.gathered(ids), query)
        found.append(merged(np.zeros(0, np.int64), np.zeros(0), ids, distances, k))
    return _answer(found, len(features), min(k, chosen.shape[1]))


def nearest(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` rows nearest to each query by Euclidean distance, the nearest first; of equal ones the first.

    The result is that of float64 over all rows. A product in float32 leaves out the rows that are too far for its
    rounding to matter: n units of |x|·|q| are added with a relative error of at most n · 2⁻²⁴ (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), in whatever order. The memory used does not grow with the rows.

    Args:
        rows: (n, units) float16 or float32, finite.
        queries: (q, units) float32, finite.
    Returns:
        ids (q, min(k, n)) int64, distances (q, min(k, n)) float32.
    """
    step = max(1, CHUNK // max(1, rows.shape[1]))
    best: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0)) for _ in queries]
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        worst = np.array([distances[k - 1] if len(distances) >= k else np.inf for _, distances in best])
        possible = _possible(chunk, queries, k, worst)
        for i in np.flatnonzero(possible.any(1)).tolist():
            near = np.flatnonzero(possible[i])
            best[i] = merged(*best[i], start + near, squared(chunk[near], queries[i]), k)
    return _answer(best, len(queries), min(k, len(rows)))


def _possible(chunk: np.ndarray, queries: np.ndarray, k: int, worst: np.ndarray) -> np.ndarray:
    """(q, rows) bool: False for rows that are not among the `k` nearest of their query, whatever the rounding.

    Args:
        worst: (q,) float64, the squared distance of the k-th nearest so far.
    """
    x, q = torch.from_numpy(np.array(chunk)).float(), torch.from_numpy(np.array(queries))
    norms, lengths = x.square().sum(1), q.double().square().sum(1)
    estimated = (norms - 2 * (q @ x.T)).double() + lengths[:, None]
    units = x.shape[1]
    sizes = norms.double().sqrt() + lengths.sqrt()[:, None]
    slack = (units + 16) * (EPSILON * sizes.square() + TINY)
    limit = torch.from_numpy(worst)
    if k <= len(x):
        limit = limit.minimum((estimated + slack).kthvalue(k, 1).values)
    return (~(estimated - slack > limit[:, None])).numpy()  # where a number is not finite, the row stays


def squared(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(n, units), (units,) → squared Euclidean distances (n,) float64."""
    found, exactly = np.empty(len(rows)), query.astype(np.float64)
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE].astype(np.float64)
        part -= exactly
        part *= part
        found[start : start + AT_ONCE] = part.sum(1)
    return found


def merged(
    ids: np.ndarray, distances: np.ndarray, new: np.ndarray, more: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest of `ids`, the nearest first, and `new`, which are greater and ascend; with their distances."""
    ids, distances = np.concatenate([ids, new]), np.concatenate([distances, more])
    first = np.argsort(distances, kind="stable")[:k]
    return ids[first], distances[first]


def _answer(found: list[tuple[np.ndarray, np.ndarray]], queries: int, k: int) -> tuple[Any, Any]:
    """Of each query ids and squared distances → (q, k) int64 and distances (q, k) float32."""
    ids = np.array([each for each, _ in found], np.int64).reshape(queries, k)
    return ids, np.sqrt(np.array([each for _, each in found], np.float64).reshape(queries, k)).astype(np.float32)
