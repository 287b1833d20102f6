"""python -m trainer predict"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.text import Text

from pipeline import UserError, manifest
from pipeline.cli import Command, printable
from pipeline.manifest import ClassRecord
from trainer import checkpoint as checkpoints
from trainer.checkpoint import load_network
from trainer.devices import choose_devices
from trainer.options import CHECKPOINT, DATA, DEVICES, JSON
from trainer.pictures import Pictures
from trainer.predict import Prediction
from trainer.predict import predict as predicted
from trainer.raw import Failure, LeftOut, locations
from trainer.raw import pictures as pictures_at

BAR = 12  # characters
EIGHTHS = " ▏▎▍▌▋▊▉"


@click.command(cls=Command)
@click.argument("where", metavar="PICTURES...", nargs=-1, required=True)
@DATA
@CHECKPOINT
@click.option("--views", type=click.Choice(["centre", "ten"]), default="centre", show_default=True)
@JSON
@DEVICES
def predict(where: tuple[str, ...], data: Path, run: Path, views: str, as_json: bool, devices: str | None) -> None:
    """Print the five most probable labels of each picture. DATA is the data set that RUN was trained on.

    PICTURES are files, folders, tars of pictures, or shards, as paths or as URLs of an object store. Pictures of any
    size are rescaled as the builder does it. With --json, each is a line of its own.

    \b
    Examples:
      python -m trainer predict cat.jpg holidays/ --data /data/imagenet-256 --checkpoint runs/1
      python -m trainer predict s3://bucket/set/val/val-000000.tar --json --data … --checkpoint …
    """
    found = locations(where)
    dataset, checkpoint = manifest.load(data), checkpoints.load(run)
    network = load_network(checkpoint, dataset, choose_devices(devices, checkpoint.recipe.model.columns), run)
    pictures, left_out = Pictures(dataset, checkpoint.recipe), LeftOut()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it tells of bad pictures, as we do
    done = failed = 0
    for each in predicted(network, pictures, pictures_at(found, dataset.recipe, left_out), views):
        failed += isinstance(each, Failure)
        done += isinstance(each, Prediction)
        if as_json:
            click.echo(json.dumps(_plain(each, dataset.classes), allow_nan=False))
        elif isinstance(each, Prediction):
            click.echo(_text(each, dataset.classes))
        else:
            click.echo(f"{printable(each.name)}: {each.code}: {printable(each.reason)}", err=True)
    _end(done, failed, left_out)


def _end(done: int, failed: int, left_out: LeftOut) -> None:
    """Tell what was left out. Raises UserError where a picture was not predicted, or a place had none."""
    others = f"left out: {printable(str(left_out))}" if left_out.kinds else ""
    empty = f"no pictures in {', '.join(map(printable, left_out.empty))}" if left_out.empty else ""
    if not done and not failed:
        raise UserError(f"{empty}; name files, folders or tars of pictures" + (f" ({others})" if others else ""))
    if others:
        click.echo(others, err=True)
    if failed:
        empty = f"{failed:,} could not be predicted, for the reasons above; {done:,} were" + (empty and f"; {empty}")
    if empty:
        raise UserError(empty)


def _plain(each: Prediction | Failure, classes: Sequence[ClassRecord]) -> dict[str, object]:
    if isinstance(each, Failure):
        return {"picture": each.name, "error": each.code, "reason": each.reason}
    labels = [(classes[label], chance) for label, chance in each.labels]
    return {
        "picture": each.name,
        "labels": [{"label": c.label, "wnid": c.wnid, "words": c.words, "probability": p} for c, p in labels],
    }


def _text(each: Prediction, classes: Sequence[ClassRecord]) -> str:
    """The picture's name and a line for each label, no wider than the terminal, if it is one."""
    shell = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed
    width = os.get_terminal_size(sys.stdout.fileno()).columns if shell else 0
    lines = [click.style(printable(each.name), bold=True)]
    for label, chance in each.labels:
        words, wnid = printable(classes[label].words), printable(classes[label].wnid)
        start = f"{100 * chance:6.1f} %  {_bar(chance)}  "
        end = f" ({wnid})" if wnid != words else ""
        if width:
            words = _cut(words, width - len(start) - len(end))
        lines.append(start + words + end)
    return "\n".join(lines)


def _bar(chance: float) -> str:
    eighths = round(8 * BAR * chance)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).ljust(BAR)[:BAR]


def _cut(words: str, width: int) -> str:
    """At most so many cells of a terminal: some letters take two."""
    text = Text(words)
    text.truncate(max(width, 8), overflow="ellipsis")
    return text.plain
