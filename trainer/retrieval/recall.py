"""How much of the exact answer the codes find, and how much faster."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures
from trainer.recipe import Recipe
from trainer.retrieval.features import hidden
from trainer.retrieval.index import Index
from trainer.retrieval.search import CANDIDATES, exact, similar

NEAREST = 6  # the paper's figure 4 shows so many
QUERIES, AT_ONCE = 200, 32
TIMED = 3  # exact searches


@dataclass(frozen=True)
class Recall:
    """Shares of the exact nearest rows, in [0, 1], and seconds for one query."""

    queries: int
    nearest: int  # rows looked for, for each query
    candidates: int  # chosen by the codes
    chosen: float  # are among the candidates
    found: float  # are in the answer of the two stages; with as many candidates less than 1 only by rounding
    exact_seconds: float
    codes_seconds: float

    def __str__(self) -> str:
        ratio = self.exact_seconds / self.codes_seconds
        return (
            f"{self.queries:,} queries: of the {self.nearest} nearest, the nearest {self.candidates:,} codes hold "
            f"{100 * self.chosen:.1f} %, the answer {100 * self.found:.1f} %\n"
            f"by codes {1e3 * self.codes_seconds:,.1f} ms a query, exactly {1e3 * self.exact_seconds:,.1f} ms "
            f"({ratio:,.1f} times as long)"
        )


def measured(index: Index, queries: np.ndarray, own: np.ndarray | None = None) -> Recall | None:
    """The recall of an index over queries (q, units) float32; None where there is nothing to find.

    Args:
        own: (q,) the rows that the queries are, which are not looked for.
    """
    n, beside = index.meta.n, 0 if own is None else 1
    k = min(NEAREST, n - beside)
    if k < 1 or not len(queries):
        return None
    candidates = min(CANDIDATES, max(n // 10, k), n - beside)
    chosen = index.hamming.nearest(index.encoder.codes(queries), candidates + beside)
    answers = exact(index, queries, k + beside)[0], similar(index, queries, k + beside, candidates + beside)[0], chosen
    true, found, held = (_without(answer, own) for answer in answers)
    return Recall(
        len(queries),
        k,
        candidates,
        _share(true, held),
        _share(true, found),
        _seconds(lambda query: exact(index, query, k), queries[:TIMED]),
        _seconds(lambda query: similar(index, query, k, candidates), queries),
    )


def queries_of(network: TwoColumnNet, dataset: Manifest, recipe: Recipe, split: str) -> np.ndarray:
    """Features (q, units) float32 of up to `QUERIES` pictures of `split`, spread evenly over it."""
    pictures, n = Pictures(dataset, recipe), dataset.split(split).samples
    ids = spread(n)
    with SampleReader(dataset, split) as reader:
        found = [
            hidden(network, pictures.views([jpeg.tobytes() for jpeg in reader.read(ids[start : start + AT_ONCE])]))
            for start in range(0, len(ids), AT_ONCE)
        ]
    return np.concatenate(found)


def spread(n: int) -> np.ndarray:
    """Up to `QUERIES` of n ids, spread evenly."""
    return np.arange(min(QUERIES, n)) * n // min(QUERIES, n)


def _without(answer: np.ndarray, own: np.ndarray | None) -> list[np.ndarray]:
    """Each query's ids without its own; where that was not found, without the last."""
    if own is None:
        return list(answer)
    return [ids[ids != each][: answer.shape[1] - 1] for ids, each in zip(answer, own)]


def _share(true: list[np.ndarray], found: list[np.ndarray]) -> float:
    return float(np.mean([np.isin(each, ids).mean() for each, ids in zip(true, found)]))


def _seconds(search: Callable[[np.ndarray], object], queries: np.ndarray) -> float:
    """The median of one query at a time."""
    found = []
    for query in queries:
        began = time.perf_counter()
        search(query[None])
        found.append(time.perf_counter() - began)
    return median(found)
