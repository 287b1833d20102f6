"""python -m trainer similar: pictures looked up in an index."""

import logging
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline import UserError, manifest
from pipeline.cli import Command, json_text, printable
from pipeline.decode import ImageError
from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from pipeline.volumes import open_regular
from trainer import checkpoint as checkpoints
from trainer.checkpoint import load_network, note_other_data
from trainer.devices import choose_devices
from trainer.options import CHECKPOINT, DATA, DEVICES, JSON, PATH
from trainer.pictures import Pictures
from trainer.retrieval import search
from trainer.retrieval.index import hidden
from trainer.retrieval.search import Index, digest


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
    index.require(digest(checkpoint.weights), dataset, run)
    note_other_data(checkpoint, dataset)
    network = load_network(checkpoint, dataset, choose_devices(devices, checkpoint.recipe.model.columns), run)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # which reports bad pictures, as this command does
    kind = Pictures(dataset, checkpoint.recipe)
    vectors: dict[Path, np.ndarray] = {}
    answers: dict[Path, dict[str, Any]] = {}
    for path in pictures:
        try:
            with open_regular(path) as file:
                raw = file.read(kind.rules.max_bytes + 1)  # one more is refused
            vectors[path] = hidden(network, kind.views([kind.stored(raw)]))[0]
        except ImageError as error:
            answers[path] = {"error": error.code, "reason": str(error).partition(": ")[2]}
        except OSError as error:
            answers[path] = {"error": "unreadable", "reason": error.strerror or str(error)}
    if vectors:
        queries = np.stack(list(vectors.values()))
        ids, distances = search.nearest(index.rows, queries, count) if exact else search.similar(index, queries, count)
        with SampleReader(dataset, index.meta.split) as reader:
            for path, *row in zip(vectors, ids.tolist(), distances.tolist()):
                answers[path] = {"nearest": [_record(dataset, reader, *pair) for pair in zip(*row)]}
    for path in pictures:
        _print(path, answers[path], as_json)
    if bad := sum(path not in vectors for path in pictures):
        raise UserError(f"{bad:,} could not be used, for the reasons above")


def _record(dataset: Manifest, reader: SampleReader, id: int, distance: float) -> dict[str, Any]:
    label = int(reader.labels(np.array([id]))[0])
    names = {key: getattr(dataset.classes[label], key) if label >= 0 else None for key in ("label", "wnid", "words")}
    return {"id": id, "key": reader.key(id), **names, "distance": distance}


def _print(path: Path, answer: dict[str, Any], as_json: bool) -> None:
    """Print a picture's answer: a line of JSON, or a table for people; why there is none on stderr."""
    if as_json:
        click.echo(json_text({"picture": str(path), **answer}))
    elif "error" in answer:
        click.echo(f"{printable(str(path))}: {answer['error']}: {answer['reason']}", err=True)
    else:
        click.echo(click.style(printable(str(path)), bold=True))
        for image in answer["nearest"]:
            words = printable(image["words"]) if image["words"] is not None else "no label"
            click.echo(f"{image['distance']:10.4g}  {image['id']:>9}  {image['key']}  {words}")
