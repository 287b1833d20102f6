"""Compute probabilities of a network for every image of a split, and its error rates; the command evaluate."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from pipeline import UserError, manifest
from pipeline.cli import Command, json_text, print_event, print_line, printable, progress_bars
from pipeline.files import write_bytes_aside
from pipeline.manifest import ClassRecord, DatasetError, Manifest
from pipeline.online import Loader
from trainer import checkpoint as checkpoints
from trainer import probabilities
from trainer.checkpoint import Checkpoint, load_network, note_other_data
from trainer.data import STALLED, evaluation
from trainer.devices import choose_devices
from trainer.distributed import SINGLE, World, join
from trainer.nonfinite import require_finite_outputs
from trainer.options import CHECKPOINT, DATA, DEVICES, FEED, JSON, PATH, require_npz, require_writable
from trainer.parallel import TwoColumnNet
from trainer.probabilities import Origin, Probabilities

VIEWS = {"centre": "centre view", "ten": "ten views", "nine": "nine views"}
CENTRE = {"centre": 0, "ten": 2, "nine": 4}  # index of the centre view in those of pipeline.online.augment
LEAST = torch.finfo(torch.float64).tiny  # least probability in logarithms, which it keeps finite
RECORDED = 1000  # confused pairs in evaluation.json, at most


@dataclass(frozen=True)
class Evaluation:
    """Error rates in percent, and the mean negative log-likelihood in nats, over `samples` images."""

    samples: int
    top1_error: float
    top5_error: float
    nll: float


class Tally:
    """Adds up errors by class and counts confused pairs, batch by batch; `sums` of several processes may be added."""

    def __init__(self, classes: int) -> None:
        self.sums = torch.zeros((classes, 4), dtype=torch.float64)  # images, wrong by top-1, wrong by top-5, nats
        self._confused: Counter[tuple[int, int]] = Counter()

    def add(self, labels: Tensor, values: Tensor) -> None:
        """Add labels (n,) int64, none of which is −1, and probabilities (n, classes) float64, both on the CPU."""
        nats = -values.gather(1, labels[:, None])[:, 0].clamp_min(LEAST).log()
        wrong = [top_k_errors(values, labels, k) for k in (1, 5)]
        self.sums.index_add_(0, labels, torch.stack([torch.ones_like(nats), *wrong, nats], 1))
        predicted = values.argmax(1)  # the first of several equal ones
        missed = predicted != labels
        self._confused.update(zip(labels[missed].tolist(), predicted[missed].tolist()))

    def errors(self, label: int | slice = slice(None), unreadable: int = 0) -> Evaluation:
        """Return the errors over all images, or over those of a label; there must be one at least.

        `unreadable`: so many more images count as wrong; the log-likelihood is that of the others.
        """
        images, wrong1, wrong5, nats = self.sums[label].view(-1, 4).sum(0).tolist()
        top1, top5 = (100 * (wrong + unreadable) / (images + unreadable) for wrong in (wrong1, wrong5))
        return Evaluation(int(images) + unreadable, top1, top5, nats / images)

    def details(self, classes: Sequence[ClassRecord]) -> dict[str, Any]:
        """Return, as JSON values, the errors by label, and the pairs confused most often, equally frequent by label."""
        by_class = []
        for label, record in enumerate(classes):
            names = {"label": label, "wnid": record.wnid, "words": record.words}
            by_class.append(names | (asdict(self.errors(label)) if self.sums[label, 0] else {"samples": 0}))
        pairs = sorted(self._confused.items(), key=lambda item: (-item[1], item[0]))[:RECORDED]
        confused = [
            {
                "true": true,
                "predicted": predicted,
                "images": images,
                "share": 100 * images / float(self.sums[true, 0]),  # of the images of the class, in percent
                "true_words": classes[true].words,
                "predicted_words": classes[predicted].words,
            }
            for (true, predicted), images in pairs
        ]
        return {"classes": by_class, "confused": confused}


def top_k_errors(values: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the top-k errors (n,) in [0, 1] of (n, classes) and labels (n,): 1 if k classes or more are likelier.

    Ties share, as in the 2012 code: with `larger` classes likelier than the true one, and `equal` as likely (itself
    included), the credit is (k − larger) / equal, at most 1.
    """
    true = values.gather(1, labels[:, None])
    larger = (values > true).sum(1)
    equal = (values == true).sum(1)
    return 1 - ((k - larger).double() / equal).clamp(0, 1)


@torch.inference_mode()
def predictions(
    network: TwoColumnNet,
    loader: Loader,
    views: Sequence[str],
    world: World = SINGLE,
    gather: bool = True,
    among: Tensor | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield labels (n,) int64, −1: none, and by views probabilities (n, classes) float64, on the CPU, batch by batch.

    Every image comes exactly once, in the order of the ids: all in the first process, its share in others. One that the
    loader has replaced, within its `max_bad`, has the label −1.

    Args:
        loader: from `data.evaluation`.
        views: the loader's, whose probabilities are averaged; before them perhaps "centre", which is one of them.
        gather: False: the first process, too, gets its share alone.
        among: (classes,) bool: the softmax is over these alone, and the others have probability 0; None: over all.
    Raises:
        Diverged: an output is not a finite number.
    """
    for batch in loader:
        rows = torch.zeros(0, 1 + network.classes * len(views), dtype=torch.float64)  # of a label and probabilities
        if len(batch.ids):  # a process may have none of a short last batch
            values = view_probabilities(network, batch.replicas)
            if among is not None:
                values = values * among.to(values.device)
                values = values / values.sum(-1, keepdim=True)
            by_views = [values[:, CENTRE[views[-1]]] if name == "centre" else values.mean(1) for name in views]
            rows = torch.cat([batch.labels.cpu()[:, None].double(), *(values.cpu() for values in by_views)], 1)
            require_finite_outputs(rows, network.name)
        if gather:
            rows = world.gather_rows(rows)
        yield rows[:, 0].long(), dict(zip(views, rows[:, 1:].chunk(len(views), 1)))


def labelled(dataset: Manifest, split: str) -> bool:
    """Return True if every image of the split has a label."""
    return bool((dataset.samples(split)["label"] >= 0).all())


def present(dataset: Manifest, split: str) -> Tensor:
    """Return which classes have an image in the split, (classes,) bool."""
    labels = torch.from_numpy(dataset.samples(split)["label"].astype("int64"))
    return torch.bincount(labels[labels >= 0], minlength=len(dataset.classes)) > 0


def require_labels(dataset: Manifest, split: str) -> None:
    """Raise UserError if an image of the split has no label."""
    if not labelled(dataset, split):
        remedy = "they can be predicted (--save-probabilities, or the command ensemble), not evaluated"
        raise UserError(f"{dataset.root}: the split {split!r} has images without a label; {remedy}")


def view_probabilities(network: TwoColumnNet, images: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the softmax (n, views, classes) float64 of (n, views, 3, size, size), or of one view (n, 3, size, size).

    `images` may be a sequence: the same images on each column's device.
    """
    replicas = [images] * len(network.devices) if isinstance(images, Tensor) else images
    flat = [replica.reshape(-1, *replica.shape[-3:]) for replica in replicas]
    return network(flat).double().softmax(1).unflatten(0, (len(replicas[0]), -1))


@click.command(cls=Command)
@DATA
@CHECKPOINT
@click.option("--split", default="val", show_default=True)
@click.option("--views", default="centre,ten", show_default=True, help="centre, ten, nine; or centre and another.")
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**20),
    help="Images of all processes at a time.  [default: each 128; of views 16]",
)
@click.option("--confused", default=10, show_default=True, type=click.IntRange(0), help="Pairs of classes to show.")
@click.option(
    "--among-present", is_flag=True, help="Predict only classes that the split has, as for ImageNet-A and -R."
)
@click.option("--per-class", is_flag=True, help="Show the errors of each class.")
@click.option("--save-probabilities", "saved", type=PATH, metavar="OUT.npz", help="Write every image's.")
@JSON
@FEED
@DEVICES
def evaluate(
    data: Path,
    run: Path,
    split: str,
    views: str,
    batch_size: int | None,
    confused: int,
    among_present: bool,
    per_class: bool,
    saved: Path | None,
    as_json: bool,
    workers: tuple[str, ...],
    devices: str | None,
) -> None:
    """Compute top-1 and top-5 error over every image of a split, for the centre view and the ten views.

    \b
    Examples:
      python -m trainer evaluate --data /data/imagenet-256 --checkpoint runs/1
      torchrun --nproc-per-node 4 -m trainer evaluate --data /data/imagenet-256 --checkpoint runs/1
    """
    with ExitStack() as stack:
        world = stack.enter_context(join())
        with world.raise_together():
            names, dataset = _parse_views(views), manifest.load(data, shards=not workers)
            checkpoint = checkpoints.load(run)
            samples = dataset.split(split).samples
            if samples == 0:
                raise DatasetError(f"{data}: the split {split!r} is empty; there is nothing to evaluate")
            has_labels = labelled(dataset, split)
            recorded = has_labels and run.is_dir() and names == ["centre", "ten"]
            file = _file(run, checkpoint, dataset, split, among_present) if recorded else None
            if world.is_main:
                require_npz(saved, samples * (len(checkpoint.classes) + 1) * 8)
                require_writable(file)
                note_other_data(checkpoint, dataset)
            if not saved or among_present:
                require_labels(dataset, split)
            among = present(dataset, split) if among_present else None
            network = load_network(checkpoint, dataset, choose_devices(devices, checkpoint.recipe.model.columns), run)
        inputs = {"the data set": dataset.identity, "the checkpoint of step": checkpoint.step}
        world.require_equal_settings(
            inputs | {"--split": split, "--views": names, "--batch-size": batch_size, "--among-present": among_present}
        )
        origin = Origin(dataset.identity, split, names[-1], (f"{run}, step {checkpoint.step}",), checkpoint.classes)
        keep = Probabilities.empty(origin, samples if saved and world.is_main else 0)
        tallies, done = {name: Tally(network.classes) for name in names}, 0
        progress = stack.enter_context(progress_bars(as_json)) if world.is_main else None
        loader = stack.enter_context(
            evaluation(dataset, checkpoint.recipe, split, names[-1], network.devices, batch_size, world, 0, workers)
        )
        began = time.perf_counter()
        for labels, by_views in predictions(network, loader, names, world, among=among):
            if saved and world.is_main:
                keep.labels[done : done + len(labels)] = labels
                keep.values[done : done + len(labels)] = by_views[names[-1]]
            for name in names if has_labels else ():
                tallies[name].add(labels, by_views[name])
            done += len(labels)
            if progress:
                progress(split, done, samples)
        seconds = time.perf_counter() - began
        stall = loader.meter.total.text(seconds, STALLED) + (" in the first process" if world.size > 1 else "")
    if not world.is_main:
        return
    if saved:
        probabilities.save(saved, keep)
    result: dict[str, Any] = {"step": checkpoint.step, "split": split, "dataset": dataset.identity}
    if not has_labels:
        text = f"the probabilities of {samples:,} images; not all have a label, so there are no errors"
        return print_line(as_json, f"{printable(str(saved))}: {text}", "done", **result, samples=samples)
    result |= {name: asdict(tally.errors()) for name, tally in tallies.items()}
    result |= {"classes_present": int(present(dataset, split).sum()), "among_present": among_present}
    result |= {"details_of": names[-1], **tallies[names[-1]].details(dataset.classes)}
    text = json_text(result, indent=1) + "\n"
    try:
        if as_json:
            print_event("done", **result)
        else:
            _print(result, names, per_class, confused)
            click.echo(f"{samples:,} images in {seconds:.1f} s, {samples / seconds:,.0f} images/s, {stall}")
    finally:  # write the evaluation even if stdout is closed (`| head`), and print it even if the disk is full by now
        if file:
            write_bytes_aside(file, text.encode())


def _file(run: Path, checkpoint: Checkpoint, dataset: Manifest, split: str, among_present: bool) -> Path:
    """Return the path of the evaluation in a run directory, by what it is of."""
    name = "evaluation" if split == "val" else f"evaluation-{split}"
    name += "" if dataset.identity == checkpoint.dataset else f"-{dataset.identity[:12]}"
    return run / f"{name}{'-among-present' if among_present else ''}.json"


def _parse_views(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not {*names} <= VIEWS.keys() or len({*names}) < len(names) or {"ten", "nine"} <= {*names}:
        raise UserError(f"--views {text}: give centre, ten or nine, or centre and another, such as centre,ten")
    return sorted(names, key=list(VIEWS).index)


def _print(result: dict[str, Any], names: list[str], per_class: bool, confused: int) -> None:
    head = f"{'':12}{'top-1 error':>12}{'top-5 error':>12}{'log-likelihood':>16}"
    click.echo(f"{head}   ({result['split']}, {result[names[0]]['samples']:,} images, step {result['step']})")
    for name in names:
        top1, top5, nll = (result[name][key] for key in ("top1_error", "top5_error", "nll"))
        click.echo(f"{VIEWS[name]:12}{top1:>10.1f} %{top5:>10.1f} %{-nll:>16.4f}")
    if (count := result["classes_present"]) < (classes := len(result["classes"])):
        among = f"these {count:,} alone" if result["among_present"] else f"all {classes:,}"
        click.echo(f"{count:,} of {classes:,} classes present; predictions are among {among}")
    if per_class:
        rows = [["class", "images", "top-1 error", "top-5 error"]]
        for record in (record for record in result["classes"] if record["samples"]):
            name = record["words"] if record["words"] == record["wnid"] else f"{record['wnid']} {record['words']}"
            errors = [f"{record[key]:.1f} %" for key in ("top1_error", "top5_error")]
            rows.append([name, f"{record['samples']:,}", *errors])
        _print_table(f"by class ({VIEWS[names[-1]]})", rows)
    rows = [["images", "of its class", "true", "taken for"]]
    for pair in result["confused"][:confused]:
        rows.append([str(pair["images"]), f"{pair['share']:.1f} %", pair["true_words"], pair["predicted_words"]])
    _print_table(f"most confused ({VIEWS[names[-1]]})", rows)


def _print_table(title: str, rows: list[list[str]]) -> None:
    """Print rows below a header, the first row; nothing where there is no other."""
    from rich.console import Console  # here, for training, which prints no table
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))  # Text: the words of a class hold no markup
    if rows[1:]:
        Console().print(table)
