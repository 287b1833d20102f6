"""python -m trainer similar"""

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
from trainer.retrieval.features import hidden
from trainer.retrieval.index import Index, digest
from trainer.retrieval.search import exact as searched_exactly
from trainer.retrieval.search import similar as searched_by_codes


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
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it tells of bad pictures, as we do
    asked = _features(network, Pictures(dataset, checkpoint.recipe), pictures)
    usable = [each for each in asked if isinstance(each, np.ndarray)]
    if usable:
        ids, distances = (searched_exactly if exact else searched_by_codes)(index, np.stack(usable), count)
        answers = iter(_answers(dataset, index.meta.split, ids, distances))
    for path, each in zip(pictures, asked):
        _say(path, next(answers) if isinstance(each, np.ndarray) else each, as_json)
    if len(usable) < len(pictures):
        raise UserError(f"{len(pictures) - len(usable):,} could not be used, for the reasons above")


def _features(network: TwoColumnNet, seen: Pictures, paths: tuple[Path, ...]) -> list[np.ndarray | dict[str, str]]:
    """For each picture its features (units,) float32, or why there are none."""
    found: list[np.ndarray | dict[str, str]] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                raw = file.read(seen.rules.max_bytes + 1)  # one more is refused
            found.append(hidden(network, seen.views([seen.stored(raw)]))[0])
        except ImageError as error:
            found.append({"error": error.code, "reason": str(error).partition(": ")[2]})
        except OSError as error:
            found.append({"error": "unreadable", "reason": error.strerror or str(error)})
    return found


def _answers(data: Manifest, split: str, ids: np.ndarray, distances: np.ndarray) -> list[list[dict[str, Any]]]:
    """Of ids and distances (q, k), for each query what there is to say."""
    with SampleReader(data, split) as reader:
        return [
            [_answer(data, reader, number, distance) for number, distance in zip(*each)]
            for each in zip(ids.tolist(), distances.tolist())
        ]


def _answer(data: Manifest, reader: SampleReader, number: int, distance: float) -> dict[str, Any]:
    label = int(reader.labels(np.array([number]))[0])
    known = data.classes[label] if label >= 0 else None
    return {
        "id": number,
        "key": reader.key(number),
        "label": known.label if known else None,
        "wnid": known.wnid if known else None,
        "words": known.words if known else None,
        "distance": distance,
    }


def _say(path: Path, answer: list[dict[str, Any]] | dict[str, str], as_json: bool) -> None:
    """A picture's answer: a line of JSON, or a table for people, on stderr if there is none."""
    if as_json:
        more = answer if isinstance(answer, dict) else {"nearest": answer}
        click.echo(json.dumps({"picture": str(path), **more}, allow_nan=False))
    elif isinstance(answer, dict):
        click.echo(f"{printable(str(path))}: {answer['error']}: {answer['reason']}", err=True)
    else:
        click.echo(click.style(printable(str(path)), bold=True))
        for each in answer:
            words = printable(each["words"]) if each["words"] is not None else "no label"
            click.echo(f"{each['distance']:10.4g}  {each['id']:>9}  {each['key']}  {words}")
