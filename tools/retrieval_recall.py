"""Which of the nearest rows codes of several kinds and lengths find, over an index of real features."""

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from pipeline import manifest
from pipeline.cli import Command
from trainer import checkpoint as checkpoints
from trainer.commands.options import PATH
from trainer.devices import placed
from trainer.network import load_network
from trainer.retrieval import codes
from trainer.retrieval.codes import AutoEncoder
from trainer.retrieval.hamming import Hamming
from trainer.retrieval.index import Index, digest
from trainer.retrieval.make import sample
from trainer.retrieval.recall import NEAREST, queries_of
from trainer.retrieval.search import CANDIDATES, exact

BITS = (32, 64, 128, 256)


@click.command(cls=Command)
@click.argument("run", type=PATH)
@click.argument("data", metavar="DATASET", type=PATH)
def main(run: Path, data: Path) -> None:
    """For RUN/index and up to 200 pictures of the validation split: of the 6 nearest rows, the share in percent that
    the nearest codes hold, and that the nearest 6 codes are.

    \b
    Example:
      python tools/retrieval_recall.py runs/1 /data/imagenet-256
    """
    dataset, checkpoint, index = manifest.load(data), checkpoints.load(run), Index(run / "index")
    index.require(digest(checkpoint.weights), dataset.identity, run)
    network = load_network(checkpoint, dataset, placed(None, checkpoint.recipe.model.columns), run)
    queries = queries_of(network, dataset, checkpoint.recipe, "val")
    true = exact(index, queries, NEAREST)[0]
    rows = torch.from_numpy(index.rows.gathered(sample(index.meta.n)).astype(np.float32))
    held = min(CANDIDATES, max(NEAREST, index.meta.n // 10))
    click.echo(
        f"{index.meta.n:,} rows of {index.meta.units:,}, {len(queries)} queries; {held:,} codes, {NEAREST} codes"
    )
    for bits in BITS:
        for name, made in KINDS.items():
            if name == "principal components" and bits > index.meta.units:
                continue
            encoder = made(rows, bits)
            found = Hamming(encoder.codes(index.rows.mapped)).nearest(encoder.codes(queries), held)
            shares = [
                100 * np.mean([np.isin(*pair).mean() for pair in zip(true, found[:, :k])]) for k in (held, NEAREST)
            ]
            click.echo(f"{bits:4} bits  {name:24}{shares[0]:7.1f}{shares[1]:7.1f}")


def random_signs(rows: Tensor, bits: int) -> AutoEncoder:
    """Signs of random projections of the centred rows."""
    return _linear(rows, torch.randn(rows.shape[1], bits, generator=torch.Generator().manual_seed(0)))


def principal_signs(rows: Tensor, bits: int) -> AutoEncoder:
    """Signs of the first principal components."""
    return _linear(rows, torch.linalg.eigh(rows.T.cov().double()).eigenvectors[:, -bits:].float())


def _linear(rows: Tensor, up: Tensor) -> AutoEncoder:
    mean = rows.mean(0)
    return AutoEncoder(up, -mean @ up, torch.zeros(up.shape[1], len(mean)), mean)


KINDS: dict[str, Callable[[Tensor, int], AutoEncoder]] = {
    "random projections": random_signs,
    "principal components": principal_signs,
    "the auto-encoder": codes.learnt,
}

if __name__ == "__main__":
    main()
