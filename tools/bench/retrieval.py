"""`bench retrieval`: the time of a search over made-up features, and the recall of codes over real ones."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from pipeline import UserError, manifest
from pipeline.cli import Command
from tools.bench import common
from tools.bench.common import Figures, Row
from trainer import checkpoint as checkpoints
from trainer import recipe as recipes
from trainer.devices import placed
from trainer.network import load_network
from trainer.parallel import Columns
from trainer.retrieval import codes
from trainer.retrieval.codes import AutoEncoder
from trainer.retrieval.features import hidden
from trainer.retrieval.folder import require_room
from trainer.retrieval.hamming import Hamming
from trainer.retrieval.index import FEATURES, Index, Meta, digest, write_meta
from trainer.retrieval.make import sample, write_codes
from trainer.retrieval.recall import NEAREST, queries_of
from trainer.retrieval.rows import Rows, RowWriter
from trainer.retrieval.search import CANDIDATES, exact, similar

UNITS, BITS = 4096, 128  # of the original's last hidden layer; of a code
BLOCK = 4096  # rows made at a time
SHARED = 0.7  # standard deviation of what the rows of a block have in common, where that of the rest is 1
HALF = np.dtype(np.float16)
PATH = click.Path(path_type=Path)
ROWS: dict[str, tuple[Any, ...]] = {  # name → title, function, options
    "codes": ("by codes, in memory", "codes"),
    "exact": ("exact, in memory", "exact"),
    "codes-disk": ("by codes, features on the disk", "codes", {"drop": True}),
    "exact-disk": ("exact, features on the disk", "exact", {"drop": True}),
    "network": ("a picture through the network", "network"),
}


@click.group()
def retrieval() -> None:
    """Measure retrieval: the speed of a search, and the recall of codes."""


@retrieval.command(cls=Command)
@click.option("--rows", "count", type=click.IntRange(min=100), default=1_280_000, show_default=True)
@click.option("--folder", type=PATH, help="For the features.  [default: TMPDIR]")
@common.report_options(list(ROWS))
def speed(count: int, folder: Path | None, only: tuple[str, ...], **report: Any) -> None:
    """Make ROWS features of 4,096 values (8 kB each) and an index of them, search it, and delete it.

    \b
    Example:
      python tools/bench retrieval speed --rows 20000
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder {folder}: no such directory")
    with tempfile.TemporaryDirectory(prefix="penstock-retrieval-", dir=folder) as name:
        index, queries = make_index(Path(name), count, report["repetitions"])
        plan, devices = recipes.load("original").model, [torch.device("cpu")] * 2
        network, picture = Columns(plan, 1000, devices), torch.zeros(1, 3, 224, 224)
        searches: dict[str, Callable[[np.ndarray], Any]] = {
            "codes": lambda query: similar(index, query, NEAREST)[0],
            "exact": lambda query: exact(index, query, NEAREST)[0],
            "network": lambda query: hidden(network, picture),
        }
        answers: dict[str, list[np.ndarray]] = {}

        def run(row: Row) -> Figures:
            query = queries[len(row.runs), None]
            if row.options.get("drop"):
                drop_pages(index)
            else:  # rows take turns: the one before may have emptied the memory
                searches[row.function](query)
            began = time.perf_counter()
            answer = searches[row.function](query)
            seconds = time.perf_counter() - began
            answers.setdefault(row.name, []).append(answer)
            return {"images": 1, "seconds": seconds}

        rows = [Row(key, *words) for key, words in ROWS.items() if not only or key in only]
        common.interleave(rows, run, report["repetitions"])
    seconds = {row.title: [1e3 * run["seconds"] for run in row.runs] for row in rows}
    table = [(title, common.spread(times)) for title, times in seconds.items()]
    facts = [f"{count:,} rows of {UNITS:,} float16, {BITS} bits, one query at a time; torch {torch.__version__}"]
    notes = []
    if answers.keys() >= {"exact", "codes"}:
        shared = np.mean([np.isin(*pair).mean() for pair in zip(answers["exact"], answers["codes"])])
        notes = [f"of the {NEAREST} nearest, codes find {100 * shared:.0f} %"]
    common.publish(("search", "ms, median (min to max)"), table, rows, facts, notes, **report)


def make_index(folder: Path, count: int, queries: int) -> tuple[Index, np.ndarray]:
    """Write made-up features and an index of them; return it, and queries (n, UNITS) float32, each near a row."""
    require_room(folder, count * (2 * UNITS + BITS // 8) + 2**26)
    generator = np.random.default_rng(0)
    base = generator.standard_normal((min(count, BLOCK), UNITS), np.float32)
    asked, chosen = [], set(generator.integers(0, -(-count // BLOCK), queries).tolist())
    with RowWriter(folder / FEATURES, (count, UNITS), HALF) as file:
        for i, start in enumerate(range(0, count, BLOCK)):
            common_part = SHARED * generator.standard_normal(UNITS, np.float32)
            block = np.maximum(base[: count - start] + common_part, 0)
            file.add(block.astype(HALF))
            if i in chosen:
                asked.append(block[generator.integers(len(block))])
    meta = Meta(0, "", "", "made up", "fc7", count, UNITS, BITS, HALF.name)
    write_codes(folder, meta, lambda stage, done, total: None)
    write_meta(folder, meta)
    index = Index(folder)
    assert index.hamming is not None  # the codes are in memory now
    near = np.stack([asked[i % len(asked)] for i in range(queries)])
    return index, np.maximum(near + 0.5 * generator.standard_normal(near.shape, np.float32), 0)


def drop_pages(index: Index) -> None:
    """Open the features of an index anew, without a page of them in memory: what is mapped would stay there."""
    index.rows.close()
    meta, path = index.meta, index.folder / FEATURES
    del index.rows
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index.rows = Rows(path, (meta.n, meta.units), HALF)


@retrieval.command(cls=Command)
@click.argument("run", type=PATH)
@click.argument("data", metavar="DATASET", type=PATH)
def recall(run: Path, data: Path) -> None:
    """Compare codes of several kinds and lengths over RUN/index, by up to 200 pictures of the validation split.

    Of the 6 nearest rows: the share in percent that the nearest codes hold, and the share that the nearest 6 codes are.

    \b
    Example:
      python tools/bench retrieval recall runs/1 /data/imagenet-256
    """
    dataset, checkpoint, index = manifest.load(data), checkpoints.load(run), Index(run / "index")
    index.require(digest(checkpoint.weights), dataset.identity, run)
    network = load_network(checkpoint, dataset, placed(None, checkpoint.recipe.model.columns), run)
    queries = queries_of(network, dataset, checkpoint.recipe, "val")
    true = exact(index, queries, NEAREST)[0]
    rows = torch.from_numpy(index.rows.gathered(sample(index.meta.n)).astype(np.float32))
    held = min(CANDIDATES, max(NEAREST, index.meta.n // 10))
    facts = f"{index.meta.n:,} rows of {index.meta.units:,}, {len(queries)} queries"
    click.echo(f"{facts}; {held:,} codes, {NEAREST} codes")
    for bits in (32, 64, 128, 256):
        for name, encode in ENCODERS.items():
            if encode is principal_signs and bits > index.meta.units:
                continue
            encoder = encode(rows, bits)
            nearest = Hamming(encoder.codes(index.rows.mapped)).nearest(encoder.codes(queries), held)
            pairs = [zip(true, nearest[:, :k]) for k in (held, NEAREST)]
            shares = [100 * np.mean([np.isin(*pair).mean() for pair in each]) for each in pairs]
            click.echo(f"{bits:4} bits  {name:24}{shares[0]:7.1f}{shares[1]:7.1f}")


def random_signs(rows: Tensor, bits: int) -> AutoEncoder:
    """Return signs of random projections of the centred rows."""
    return linear(rows, torch.randn(rows.shape[1], bits, generator=torch.Generator().manual_seed(0)))


def principal_signs(rows: Tensor, bits: int) -> AutoEncoder:
    """Return signs of the first principal components."""
    return linear(rows, torch.linalg.eigh(rows.T.cov().double()).eigenvectors[:, -bits:].float())


def linear(rows: Tensor, up: Tensor) -> AutoEncoder:
    mean = rows.mean(0)
    return AutoEncoder(up, -mean @ up, torch.zeros(up.shape[1], len(mean)), mean)


ENCODERS: dict[str, Callable[[Tensor, int], AutoEncoder]] = {
    "random projections": random_signs,
    "principal components": principal_signs,
    "the auto-encoder": codes.learnt,
}
