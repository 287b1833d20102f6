"""python -m trainer index"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress

from pipeline import UserError, manifest
from pipeline.cli import Command
from pipeline.manifest import Manifest
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint, load_network
from trainer.devices import choose_devices
from trainer.options import DEVICES, PATH, RUN
from trainer.parallel import TwoColumnNet
from trainer.retrieval.hamming import require_faiss
from trainer.retrieval.index import LEAST_BITS, MOST_BITS, Index
from trainer.retrieval.make import Tell, make
from trainer.retrieval.recall import measured, queries_of, spread


@click.command(cls=Command, interrupted="an older index stays as it was")
@RUN
@click.argument("data", metavar="DATASET", type=PATH)
@click.option("--split", default="train", show_default=True)
@click.option("--bits", type=int, default=128, show_default=True, help="Of a code: 32 to 256, a multiple of 8.")
@click.option("--out", type=PATH, help="The index directory.  [default: RUN/index]")
@click.option("--float32", is_flag=True, help="Features of 4 bytes, where 2 are too few.")
@DEVICES
def index(run: Path, data: Path, split: str, bits: int, out: Path | None, float32: bool, devices: str | None) -> None:
    """Write the features of every image of a split, from the last hidden layer, and short codes of them, to search in.

    \b
    Examples:
      python -m trainer index runs/1 /data/imagenet-256
      python -m trainer index runs/1 photos-256 --split val --bits 64 --out runs/1/index-val
    """
    if not LEAST_BITS <= bits <= MOST_BITS or bits % 8:
        raise UserError(f"--bits {bits}: a multiple of 8 from {LEAST_BITS} to {MOST_BITS}")
    if out is None and run.is_file():
        raise UserError(f"{run}: is a file; name the index directory: --out")
    out = out or run / "index"
    require_faiss("trainer index")
    dataset, checkpoint = manifest.load(data), checkpoints.load(run)
    network = load_network(checkpoint, dataset, choose_devices(devices, checkpoint.recipe.model.columns), run)
    with _telling() as tell:
        said = make(network, checkpoint, dataset, split, out, bits, "float32" if float32 else "float16", tell)
    click.echo(said)
    made = Index(out)
    recall = measured(made, *_queries(made, network, dataset, checkpoint))
    if recall:
        click.echo(str(recall))
    click.echo(f"index: {out}")


def _queries(
    made: Index, network: TwoColumnNet, dataset: Manifest, checkpoint: Checkpoint
) -> tuple[np.ndarray, np.ndarray | None]:
    """Features to look for: of the validation split, or of the index's own rows, and which these are."""
    held = dataset.splits.get("val")
    if made.meta.split != "val" and held and held.samples:
        return queries_of(network, dataset, checkpoint.recipe, "val"), None
    own = spread(made.meta.n)
    return made.rows.gathered(own).astype(np.float32), own


@contextmanager
def _telling() -> Iterator[Tell]:
    """A bar for each part on a terminal; elsewhere nothing."""
    console = Console(highlight=False)
    with Progress(console=console, disable=not (console.is_interactive and sys.stdout.isatty())) as bars:
        rows = {}

        def tell(what: str, done: int, whole: int) -> None:
            if what not in rows:
                rows[what] = bars.add_task(what, total=whole)
            bars.update(rows[what], completed=done)

        yield tell
