"""`bench retrieval`: the time of a search by codes, and of an exact one, over made-up features."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline.cli import Command
from pipeline.files import require_writable
from tools.bench import common
from tools.bench.common import Figures, Row
from trainer.retrieval.index import write_codes, write_meta
from trainer.retrieval.search import FEATURES, Index, Meta, nearest, similar

UNITS, BITS = 4096, 128  # of the original's last hidden layer; of a code
NEAREST = 6  # rows that a search returns
BLOCK = 4096  # rows made at a time
SHARED = 0.7  # standard deviation of what the rows of a block have in common, where that of the rest is 1
SEARCHES = {"codes": similar, "exact": lambda index, queries, k: nearest(index.rows, queries, k)}
ROWS = (
    Row("codes", "by codes, in memory", "codes"),
    Row("exact", "exact, in memory", "exact"),
    Row("codes-disk", "by codes, features on the disk", "codes", {"drop": True}),
    Row("exact-disk", "exact, features on the disk", "exact", {"drop": True}),
)


@click.command(cls=Command)
@click.option("--rows", "count", type=click.IntRange(min=100), default=1_280_000, show_default=True)
@click.option("--folder", type=common.FOLDER, help="For the features.  [default: TMPDIR]")
@common.report_options([row.name for row in ROWS])
def retrieval(count: int, folder: Path | None, only: tuple[str, ...], **report: Any) -> None:
    """Make ROWS features of 4,096 values (8 kB each) and an index of them, search it, and delete it.

    \b
    Example:
      python tools/bench retrieval --rows 20000
    """
    rows = [row.fresh() for row in ROWS if not only or row.name in only]
    with tempfile.TemporaryDirectory(prefix="penstock-retrieval-", dir=folder) as name:
        queries = make_index(Path(name), count, report["repetitions"])

        def run(row: Row) -> Figures:
            query, search = queries[len(row.runs), None], SEARCHES[row.function]
            if row.options.get("drop"):
                with open(Path(name, FEATURES), "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            index = Index(Path(name))  # anew: pages that are mapped stay in memory
            assert index.binary.ntotal  # the codes are in memory now
            if not row.options.get("drop"):
                search(index, query, NEAREST)  # the row before may have emptied the memory
            began = time.perf_counter()
            search(index, query, NEAREST)
            seconds = time.perf_counter() - began
            return {"images": 1, "seconds": seconds}

        common.interleave(rows, run, report["repetitions"])
    table = [(row.title, common.spread([1e3 * run["seconds"] for run in row.runs])) for row in rows]
    facts = [f"{count:,} rows of {UNITS:,} float16, {BITS} bits, one query at a time; torch {torch.__version__}"]
    common.publish(("search", "ms, median (min to max)"), table, rows, facts, [], **report)


def make_index(folder: Path, count: int, queries: int) -> np.ndarray:
    """Write made-up features and an index of them; return queries (n, UNITS) float32, each near a row."""
    require_writable(folder, count * (2 * UNITS + BITS // 8) + 2**26)
    generator = np.random.default_rng(0)
    base = generator.standard_normal((min(count, BLOCK), UNITS), np.float32)
    rows = np.lib.format.open_memmap(folder / FEATURES, "w+", np.float16, (count, UNITS))
    for start in range(0, count, BLOCK):
        block = rows[start : start + BLOCK]
        block[:] = np.maximum(base[: len(block)] + SHARED * generator.standard_normal(UNITS, np.float32), 0)
    rows.flush()
    near = rows[generator.integers(0, count, queries)].astype(np.float32)
    del rows, block  # whose pages would stay in memory
    meta = Meta(0, "", "", "made up", "fc7", count, UNITS, BITS, "float16")
    write_codes(folder, meta, lambda stage, done, total: None)
    write_meta(folder, meta)
    return np.maximum(near + 0.5 * generator.standard_normal(near.shape, np.float32), 0)
