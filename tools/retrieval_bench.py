"""How long a search takes over made-up features, by codes and exactly, in memory and from the disk."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import TypeVar

import click
import numpy as np
import torch

from pipeline import UserError
from pipeline.cli import Command
from tools.peers.facts import machine
from trainer import recipe as recipes
from trainer.parallel import Columns
from trainer.retrieval.features import hidden
from trainer.retrieval.folder import require_room
from trainer.retrieval.index import FEATURES, Index, Meta, write_meta
from trainer.retrieval.make import write_codes
from trainer.retrieval.rows import Rows, RowWriter
from trainer.retrieval.search import exact, similar

UNITS, BITS, NEAREST = 4096, 128, 6  # of the original's last hidden layer; of a code; looked for
BLOCK = 4096  # rows made at a time
DISTINCT = 0.7  # standard deviation of what the rows of a block have in common, where that of the rest is 1
HALF = np.dtype(np.float16)

Made = TypeVar("Made")


@click.command(cls=Command)
@click.option("--rows", type=click.IntRange(min=100), default=1_280_000, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to make them.  [default: TMPDIR]")
@click.option("--repetitions", type=click.IntRange(min=5), default=5, show_default=True)
def main(rows: int, folder: Path | None, repetitions: int) -> None:
    """Make ROWS features of 4,096 values (8 kB each) and an index of them, search it, and delete it.

    \b
    Example:
      python tools/retrieval_bench.py --rows 20000
    """
    with _folder(folder) as place:
        require_room(place, rows * (2 * UNITS + BITS // 8) + 2**26)
        queries = _timed("features made", lambda: _make(place, rows, repetitions))
        meta = Meta(0, "", "", "made up", "fc7", rows, UNITS, BITS, HALF.name)
        _timed("auto-encoder and codes", lambda: write_codes(place, meta, lambda what, done, whole: None))
        write_meta(place, meta)
        _report(place, queries)


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    if parent is not None and not parent.is_dir():
        raise UserError(f"--folder {parent}: no such directory")
    place = Path(mkdtemp(prefix="penstock-retrieval-", dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def _make(place: Path, rows: int, queries: int) -> np.ndarray:
    """Write features; return (queries, UNITS) float32, each near a row."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((min(rows, BLOCK), UNITS), np.float32)
    asked, chosen = [], set(generator.integers(0, -(-rows // BLOCK), queries).tolist())
    with RowWriter(place / FEATURES, (rows, UNITS), HALF) as file:
        for i, start in enumerate(range(0, rows, BLOCK)):
            common = DISTINCT * generator.standard_normal(UNITS, np.float32)
            block = np.maximum(base[: rows - start] + common, 0)
            file.add(block.astype(HALF))
            if i in chosen:
                asked.append(block[generator.integers(len(block))])
    found = np.stack([asked[i % len(asked)] for i in range(queries)])
    return np.maximum(found + 0.5 * generator.standard_normal(found.shape, np.float32), 0)


def _report(place: Path, queries: np.ndarray) -> None:
    index = _timed("index loaded", lambda: _opened(place))
    searches: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "by codes": lambda query: similar(index, query[None], NEAREST)[0],
        "exact": lambda query: exact(index, query[None], NEAREST)[0],
    }
    click.echo(
        f"\n{index.meta.n:,} rows of {UNITS:,} float16, {BITS} bits; {len(queries)} queries, median (least, most)"
    )
    answers = {}
    for name, search in searches.items():
        cold = []
        for query in queries:
            index.rows = _dropped(index)
            cold += _seconds(search, query[None])[0]
        warm, answers[name] = _seconds(search, queries)
        for state, found in (("from the disk", cold), ("in memory", warm)):
            click.echo(f"{name:10}{state:15}{1e3 * median(found):>10,.1f} ms  ({_span(found)})")
    recipe = recipes.load("original").model
    network, picture = Columns(recipe, 1000, [torch.device("cpu")] * 2), torch.zeros(1, 3, 224, 224)
    taken, _ = _seconds(lambda _: hidden(network, picture), queries)
    click.echo(f"{'a picture through the network':25}{1e3 * median(taken):>10,.1f} ms  ({_span(taken)})")
    shared = np.mean([np.isin(*pair).mean() for pair in zip(answers["exact"], answers["by codes"])])
    click.echo(f"of the {NEAREST} nearest, codes found {100 * shared:.0f} %; {machine()}, torch {torch.__version__}")


def _opened(place: Path) -> Index:
    """An index whose codes are in memory."""
    index = Index(place)
    assert index.hamming is not None
    return index


def _dropped(index: Index) -> Rows:
    """The features of an index, without a page of them in memory: what is mapped or not yet written stays there."""
    index.rows.close()
    meta, path = index.meta, index.folder / FEATURES
    del index.rows
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Rows(path, (meta.n, meta.units), HALF)


def _seconds(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """Of each query by itself."""
    taken, answers = [], []
    for query in queries:
        began = time.perf_counter()
        answers.append(search(query))
        taken.append(time.perf_counter() - began)
    return taken, answers


def _span(seconds: list[float]) -> str:
    return f"{1e3 * min(seconds):,.1f} … {1e3 * max(seconds):,.1f}"


def _timed(what: str, made: Callable[[], Made]) -> Made:
    began = time.perf_counter()
    found = made()
    click.echo(f"{what}: {time.perf_counter() - began:,.1f} s")
    return found


if __name__ == "__main__":
    main()
