"""python -m trainer ensemble"""

import json
from pathlib import Path

import click
import numpy as np

from pipeline import UserError, manifest
from pipeline.cli import Command, printable
from pipeline.files import write_bytes_aside
from trainer import ensemble as ensembles
from trainer import probabilities
from trainer.ensemble import Ensemble, Mean, parse_weights
from trainer.evaluate import VIEWS
from trainer.options import DEVICES, JSON, PATH, followed, require_writable
from trainer.submission import devkit_ids, submission
from trainer.tally import Evaluation


@click.command(cls=Command)
@click.argument("members", nargs=-1, required=True, type=PATH, metavar="RUN…")
@click.option("--data", type=PATH, help="A dataset directory; of saved probabilities alone, only for --submission.")
@click.option("--split", default="val", show_default=True)
@click.option("--views", type=click.Choice(VIEWS), default="ten", show_default=True)
@click.option("--weights", "given", metavar="2,1,…", help="How much each counts.  [default: all alike]")
@click.option("--fit", metavar="SPLIT", help="Take the weights that make the true labels of this split likeliest.")
@click.option(
    "--submission", "submitted", type=PATH, metavar="OUT.txt", help="Write five devkit ids an image, for ILSVRC."
)
@click.option("--save-probabilities", "saved", type=PATH, metavar="OUT.npz", help="Write the mean of every image's.")
@JSON
@DEVICES
def ensemble(
    members: tuple[Path, ...],
    data: Path | None,
    split: str,
    views: str,
    given: str | None,
    fit: str | None,
    submitted: Path | None,
    saved: Path | None,
    as_json: bool,
    devices: str | None,
) -> None:
    """Average the probabilities of several networks: run directories, checkpoints, or what evaluate saved of them.

    \b
    Examples:
      python -m trainer ensemble runs/1 runs/2 runs/3 --data /data/imagenet-256
      python -m trainer ensemble runs/1 runs/2 --data D --fit val --split test --submission test.txt
      python -m trainer ensemble val-1.npz val-2.npz --weights 2,1
    """
    if given and fit:
        raise UserError(f"--weights {given}, --fit {fit}: give one of the two")
    if saved is not None and saved.suffix != ".npz":
        raise UserError(f"--save-probabilities {saved}: give a name that ends in .npz")
    dataset = None if data is None else manifest.load(data)
    if submitted is not None:
        if dataset is None:
            raise UserError(f"--submission {submitted}: name the data set, whose devkit ids it needs: --data DATASET")
        devkit_ids(dataset, split)  # what it would refuse, now
    require_writable(submitted)
    require_writable(saved)
    with followed() as progress:
        networks = Ensemble(ensembles.load(members), dataset, views, devices, progress)
        weights = np.full(len(members), 1 / len(members)) if given is None else parse_weights(given, len(members))
        for each in dict.fromkeys([split, fit or split]):
            networks.require_split(each, labels=each == fit)
        if fit:
            weights = networks.fitted(fit, keep=fit == split)
        found = networks.mean(weights, split)
    whole = found.whole
    try:
        if as_json:
            click.echo(json.dumps(_plain(found, weights, fit), indent=1, allow_nan=False))
        else:
            _print(found, weights)
    finally:  # neither who has left (`| head`) nor a full disk keeps the other from what took long
        if submitted is not None and dataset is not None:
            write_bytes_aside(submitted, submission(whole.values, dataset, split))
        if saved is not None:
            probabilities.save(saved, whole.origin, len(whole.labels), lambda add: add(whole.labels, whole.values))
    if as_json:
        return
    if fit == split:
        click.echo(f"The weights are fitted on {split!r} itself: on other images the errors will be larger.")
    for what, path in (("submission", submitted), ("probabilities", saved)):
        if path is not None:
            click.echo(f"{what}: {printable(str(path))}")


def _print(found: Mean, weights: np.ndarray) -> None:
    """The names come last: they may be longer than a line."""
    origin = found.whole.origin
    head = f"{'weight':>6}{'top-1 error':>13}{'top-5 error':>13}{'log-likelihood':>16}   "
    click.echo(f"{head}({origin.split}, {len(found.whole.labels):,} images)")
    for name, weight, errors in zip(origin.networks, weights, found.alone):
        click.echo(f"{weight:6.3f}{_errors(errors)}   {printable(name)}")
    click.echo(f"{'':6}{_errors(found.together)}   together")
    if found.together is None:
        click.echo("Not every image has a label, so there are no errors.")


def _errors(found: Evaluation | None) -> str:
    """Three columns."""
    return f"{found.top1_error:11.1f} %{found.top5_error:11.1f} %{-found.nll:16.4f}" if found else " " * 42


def _plain(found: Mean, weights: np.ndarray, fit: str | None) -> dict[str, object]:
    """What --json prints."""
    networks = []
    for name, weight, errors in zip(found.whole.origin.networks, weights.tolist(), found.alone):
        networks.append({"network": name, "weight": weight, "errors": errors.to_dict() if errors else None})
    origin, together = found.whole.origin, found.together
    about = {"split": origin.split, "dataset": origin.dataset, "samples": len(found.whole.labels), "fitted_on": fit}
    return about | {"networks": networks, "together": together.to_dict() if together else None}
