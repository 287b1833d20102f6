"""python -m trainer similar: pictures looked up in an index."""

import json
import logging
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline import UserError, manifest
from pipeline.cli import Command, printable
from pipeline.decode import ImageError
from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer import checkpoint as checkpoints
from trainer.checkpoint import load_network
from trainer.devices import choose_devices
from trainer.options import CHECKPOINT, DATA, DEVICES, JSON, PATH
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures
from trainer.retrieval import search
from trainer.retrieval.index import hidden
from trainer.retrieval.search import Index, digest

CLASS_KEYS = ("label", "wnid", "words")


@click.command(cls=Command)
@click.argument("pictures", metavar="PICTURE...", type=PATH, nargs=-1, required=True)
@CHECKPOINT
@DATA
@click.option("--index", "folder", type=PATH, metavar="DIR", help="An index directory.  [default: RUN/index]")
@click.option("--count", type=click.IntRange(min=1), default=6, show_default=True, help="Images for each picture.")
@click.option("--exact", is_flag=True, help="Compare with every image, not with those of the nearest codes.")
@JSON
@DEVICES
def similar(
    pictures: tuple[Path, ...],
    run: Path,
    data: Path,
    folder: Path | None,
    count: int,
    exact: bool,
    as_json: bool,
    devices: str | None,
) -> None:
    """Find the images of an index nearest to each PICTURE, by the Euclidean distance of their features (of the last
    hidden layer). First make the index: python -m trainer index.

    \b
    Example:
      python -m trainer similar cat.jpg --checkpoint runs/1 --data /data/imagenet-256
    """
    if folder is None and run.is_file():
        raise UserError(f"{run}: is a file; name the index directory: --index")
    dataset, checkpoint, index = manifest.load(data), checkpoints.load(run), Index(folder or run / "index")
    index.require(digest(checkpoint.weights), dataset.identity, run)
    network = load_network(checkpoint, dataset, choose_devices(devices, checkpoint.recipe.model.columns), run)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # which reports bad pictures, as this command does
    vectors = _features(network, Pictures(dataset, checkpoint.recipe), pictures)
    usable = [vector for vector in vectors if isinstance(vector, np.ndarray)]
    if usable:
        queries = np.stack(usable)
        nearest = search.nearest(index.rows, queries, count) if exact else search.similar(index, queries, count)
        answers = iter(_answers(dataset, index.meta.split, *nearest))
    for path, vector in zip(pictures, vectors):
        _print(path, next(answers) if isinstance(vector, np.ndarray) else vector, as_json)
    if len(usable) < len(pictures):
        raise UserError(f"{len(pictures) - len(usable):,} could not be used, for the reasons above")


def _features(network: TwoColumnNet, pictures: Pictures, paths: tuple[Path, ...]) -> list[np.ndarray | dict[str, str]]:
    """Return for each picture its features (units,) float32, or why there are none."""
    vectors: list[np.ndarray | dict[str, str]] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                raw = file.read(pictures.rules.max_bytes + 1)  # one more is refused
            vectors.append(hidden(network, pictures.views([pictures.stored(raw)]))[0])
        except ImageError as error:
            vectors.append({"error": error.code, "reason": str(error).partition(": ")[2]})
        except OSError as error:
            vectors.append({"error": "unreadable", "reason": error.strerror or str(error)})
    return vectors


def _answers(dataset: Manifest, split: str, ids: np.ndarray, distances: np.ndarray) -> list[list[dict[str, Any]]]:
    """Return for each query, of ids and distances (q, k), the records of its nearest images."""
    with SampleReader(dataset, split) as reader:

        def record(id: int, distance: float) -> dict[str, Any]:
            label = int(reader.labels(np.array([id]))[0])
            names = {key: getattr(dataset.classes[label], key) if label >= 0 else None for key in CLASS_KEYS}
            return {"id": id, "key": reader.key(id), **names, "distance": distance}

        return [list(map(record, *row)) for row in zip(ids.tolist(), distances.tolist())]


def _print(path: Path, answer: list[dict[str, Any]] | dict[str, str], as_json: bool) -> None:
    """Print a picture's answer: a line of JSON, or a table for people; why there is none on stderr."""
    if as_json:
        fields = answer if isinstance(answer, dict) else {"nearest": answer}
        click.echo(json.dumps({"picture": str(path), **fields}, allow_nan=False))
    elif isinstance(answer, dict):
        click.echo(f"{printable(str(path))}: {answer['error']}: {answer['reason']}", err=True)
    else:
        click.echo(click.style(printable(str(path)), bold=True))
        for image in answer:
            words = printable(image["words"]) if image["words"] is not None else "no label"
            click.echo(f"{image['distance']:10.4g}  {image['id']:>9}  {image['key']}  {words}")
