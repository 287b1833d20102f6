"""Average several networks: the weighted mean of their probabilities (paper, section 6); the command ensemble."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline import UserError, manifest
from pipeline.cli import Command, json_text, printable, progress_bars
from pipeline.files import write_bytes_aside
from pipeline.manifest import Manifest
from trainer import checkpoint as checkpoints
from trainer import probabilities
from trainer.checkpoint import Checkpoint, load_network, note_other_data, require_classes
from trainer.data import evaluation, require_pictures
from trainer.devices import choose_devices
from trainer.evaluate import LEAST, VIEWS, Evaluation, Tally, labelled, predictions
from trainer.options import DEVICES, JSON, PATH, require_npz, require_writable
from trainer.probabilities import Origin, Probabilities, top

ROUNDS, CHANGE = 10_000, 1e-10  # of fitting: at most so many, until no weight changes by more


@dataclass(frozen=True)
class Ensemble:
    """Members, which are networks or saved probabilities of networks, and the options of computing these."""

    members: list[tuple[Path, Checkpoint | Probabilities]]
    dataset: Manifest | None  # None: all members are saved probabilities
    views: str
    devices: str | None
    progress: Callable[..., None]

    def require(self, split: str, with_labels: bool) -> None:
        """Raise UserError, before anything is computed, if the split or a member cannot be used."""
        path, source = self.members[0]
        root, classes, identity, unlabelled = str(path), source.classes, "", False
        if self.dataset is not None:
            root, identity = str(self.dataset.root), self.dataset.identity
            classes = tuple(record.wnid for record in self.dataset.classes)
            if not self.dataset.split(split).samples:
                raise UserError(f"{root}: the split {split!r} is empty; name another")
            unlabelled = not labelled(self.dataset, split)
        for path, source in self.members:
            require_classes(source.classes, classes, path, root)
            if isinstance(source, Checkpoint):
                if self.dataset is None:
                    raise UserError(f"{path}: name the data set that it is to see, too: --data DATASET")
                require_pictures(self.dataset, source.recipe)
                choose_devices(self.devices, source.recipe.model.columns)
                note_other_data(source, self.dataset)
                continue
            origin, unlabelled = source.origin, unlabelled or source.labels.min() < 0
            identity = identity or origin.dataset
            if origin.split != split:
                remedy = f"save those with evaluate --split {split} --save-probabilities, or name the run"
                raise UserError(f"{path}: probabilities of the split {origin.split!r}, not of {split!r}; {remedy}")
            if origin.dataset != identity:
                sets = f"the data set {origin.dataset[:12]}, not of {identity[:12]}"
                raise UserError(f"{path}: probabilities of {sets}; save them anew")
        if with_labels and unlabelled:
            raise UserError(f"{root}: the split {split!r} has images without a label; fit on one that has")

    def probabilities(self, split: str) -> Iterator[Probabilities]:
        """Yield the probabilities of each member, in order; those of a network are computed only then.

        Raises:
            UserError: the labels of two members differ.
            Diverged: a network's outputs are not finite numbers.
        """
        labels = None
        for path, source in self.members:
            part = self._computed(path, source, split) if isinstance(source, Checkpoint) else source
            labels = part.labels if labels is None else labels
            if not np.array_equal(part.labels, labels):
                raise UserError(f"{path}: has other labels than {self.members[0][0]}; save both anew")
            yield part

    def _computed(self, path: Path, checkpoint: Checkpoint, split: str) -> Probabilities:
        dataset, recipe, batches, done = self.dataset, checkpoint.recipe, [], 0
        assert dataset is not None
        network = load_network(checkpoint, dataset, choose_devices(self.devices, recipe.model.columns), path)
        with evaluation(dataset, recipe, split, self.views, network.devices) as loader:
            for labels, by_views in predictions(network, loader, [self.views]):
                batches.append((labels.numpy(), by_views[self.views].numpy()))
                done += len(labels)
                self.progress(split, done, dataset.split(split).samples)
        origin = Origin(dataset.identity, split, self.views, (), checkpoint.classes)
        return Probabilities(origin, *(np.concatenate(arrays) for arrays in zip(*batches)))


def errors(part: Probabilities) -> Evaluation | None:
    """Return the error rates; None if not every image has a label."""
    if part.labels.min() < 0:
        return None
    tally = Tally(part.values.shape[1])
    tally.add(torch.from_numpy(part.labels), torch.from_numpy(part.values))
    return tally.errors()


def parse_weights(text: str, members: int) -> np.ndarray:
    """Return a text such as "2,1,1" as (members,) float64 of sum 1. Raises UserError if it is no such text."""
    try:
        weights = np.array([float(word) for word in text.split(",")])
    except ValueError as error:
        raise UserError(f"--weights {text}: give numbers, such as 2,1,1") from error
    if len(weights) != members:
        raise UserError(f"--weights {text}: {len(weights)} numbers for {members} networks; give one for each")
    if not np.isfinite(weights).all() or weights.min() < 0 or not 0 < sum(weights.tolist()) < np.inf:
        raise UserError(f"--weights {text}: give numbers of at least 0, and one above it, whose sum is finite")
    return weights / weights.sum()


def fitted_weights(true: np.ndarray) -> np.ndarray:
    """Return the weights of the mixture that makes the true labels likeliest, by expectation and maximisation.

    The likelihood is concave in the weights, and every round raises it: w_m ← mean over the images of
    w_m p_m / Σ w p (Dempster, Laird and Rubin, 1977), from equal weights.

    Args:
        true: (members, n) float64: each network's probability of each image's true label.
    Returns:
        (members,) float64, of sum 1.
    """
    true = np.maximum(true, LEAST)
    weights = np.full(len(true), 1 / len(true))
    for _ in range(ROUNDS):
        parts = weights[:, None] * true
        after = (parts / parts.sum(0)).mean(1)
        change, weights = np.abs(after - weights).max(), after
        if change < CHANGE:
            break
    return weights


def devkit_ids(dataset: Manifest, split: str) -> np.ndarray:
    """Return the devkit ids (classes,) int64, by label.

    Raises UserError if classes have none, or if images of the split are missing or shuffled: the lines of a submission
    are in the order of the images' file names.
    """
    ids, root = np.array([record.devkit_id or 0 for record in dataset.classes]), dataset.root
    skipped, limit = dataset.split(split).skipped, dataset.recipe.limit
    if not ids.all():
        remedy = "and a submission is made of them; build from ILSVRC's archives with their devkit"
        raise UserError(f"{root}: its classes have no devkit ids, {remedy}")
    if split == "train":
        raise UserError(
            f"{root}: the split 'train' is shuffled; a submission is of val or test, in the order of the files"
        )
    if skipped or limit:
        reason = f"{skipped} of its images were skipped" if skipped else f"it was built with --limit {limit}"
        raise UserError(f"{root}: the split {split!r} is not whole ({reason}); a submission has a line for each image")
    return ids


@click.command(cls=Command)
@click.argument("members", nargs=-1, required=True, type=PATH, metavar="RUN…")
@click.option("--data", type=PATH, help="A dataset directory; of saved probabilities alone, only for --submission.")
@click.option("--split", default="val", show_default=True)
@click.option("--views", type=click.Choice(list(VIEWS)), default="ten", show_default=True)
@click.option("--weights", "numbers", metavar="2,1,…", help="How much each counts.  [default: all alike]")
@click.option("--fit", metavar="SPLIT", help="Take the weights that make the true labels of this split likeliest.")
@click.option("--submission", type=PATH, metavar="OUT.txt", help="Write five devkit ids an image, for ILSVRC.")
@click.option("--save-probabilities", "saved", type=PATH, metavar="OUT.npz", help="Write the mean of every image's.")
@JSON
@DEVICES
def ensemble(
    members: tuple[Path, ...],
    data: Path | None,
    split: str,
    views: str,
    numbers: str | None,
    fit: str | None,
    submission: Path | None,
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
    if numbers and fit:
        raise UserError(f"--weights {numbers}, --fit {fit}: give one of the two")
    dataset = None if data is None else manifest.load(data)
    if submission is not None:
        if dataset is None:
            raise UserError(f"--submission {submission}: name the data set, whose devkit ids it needs: --data DATASET")
        devkit_ids(dataset, split)  # raises before anything is computed
    require_writable(submission)
    weights = np.full(len(members), 1 / len(members)) if numbers is None else parse_weights(numbers, len(members))
    sources = [probabilities.load(path) if path.suffix == ".npz" else checkpoints.load(path) for path in members]
    size = dataset.split(split).samples * (len(dataset.classes) + 1) * 8 if dataset else 1
    require_npz(saved, size)
    with progress_bars() as progress:
        networks = Ensemble(list(zip(members, sources)), dataset, views, devices, progress)
        for name in dict.fromkeys([split, fit or split]):
            networks.require(name, with_labels=name == fit)
        parts: Iterable[Probabilities] = networks.probabilities(split)
        if fit:
            parts = list(parts) if fit == split else parts  # all in memory, but computed once
            fitted_on = parts if fit == split else networks.probabilities(fit)
            weights = fitted_weights(np.stack([part.of_labels() for part in fitted_on]))
        alone, views_seen, values = [], [], np.zeros(())
        for weight, part in zip(weights, parts):
            alone.append(errors(part))
            views_seen.append(part.origin.views)
            values = values + weight * part.values
    names = [f"{p}, step {s.step}" if isinstance(s, Checkpoint) else str(p) for p, s in zip(members, sources)]
    origin = replace(part.origin, networks=tuple(names), views=", ".join(dict.fromkeys(views_seen)))
    mean = Probabilities(origin, part.labels, values)
    together = errors(mean)
    rows = [{"network": n, "weight": w, "errors": e and asdict(e)} for n, w, e in zip(names, weights.tolist(), alone)]
    result = {"split": split, "dataset": origin.dataset, "samples": len(mean.labels), "fitted_on": fit}
    result |= {"networks": rows, "together": together and asdict(together)}
    try:
        click.echo(json_text(result, indent=1) if as_json else _text(result))
    finally:  # the files are written even if stdout is closed (`| head`), and errors printed even if the disk is full
        if submission is not None and dataset is not None:
            lines = [" ".join(map(str, row)) + "\n" for row in devkit_ids(dataset, split)[top(mean.values)].tolist()]
            write_bytes_aside(submission, "".join(lines).encode())
        if saved is not None:
            probabilities.save(saved, mean)
    if as_json:
        return
    if fit == split:
        click.echo(f"The weights are fitted on {split!r} itself: on other images the errors will be larger.")
    for kind, path in (("submission", submission), ("probabilities", saved)):
        if path is not None:
            click.echo(f"{kind}: {printable(str(path))}")


def _text(result: dict[str, Any]) -> str:
    """Return the errors in columns; the names come last, because they may be longer than a line."""
    head = f"{'weight':>6}{'top-1 error':>13}{'top-5 error':>13}{'log-likelihood':>16}"
    lines = [f"{head}   ({result['split']}, {result['samples']:,} images)"]
    rows = [(f"{row['weight']:6.3f}", row["errors"], printable(row["network"])) for row in result["networks"]]
    for weight, rates, name in [*rows, (" " * 6, result["together"], "together")]:
        columns = f"{rates['top1_error']:11.1f} %{rates['top5_error']:11.1f} %{-rates['nll']:16.4f}" if rates else ""
        lines.append(f"{weight}{columns:42}   {name}")
    if result["together"] is None:
        lines.append("Not every image has a label, so there are no errors.")
    return "\n".join(lines)
