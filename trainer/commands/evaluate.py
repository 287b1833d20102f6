"""python -m trainer evaluate"""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import UserError, manifest
from pipeline.cli import Command, printable
from pipeline.files import write_bytes_aside
from pipeline.manifest import DatasetError, Manifest
from trainer import checkpoint as checkpoints
from trainer import probabilities
from trainer.checkpoint import load_network
from trainer.devices import choose_devices
from trainer.distributed import join
from trainer.evaluate import VIEWS, Pace, labelled, predictions, require_labels
from trainer.options import CHECKPOINT, DATA, DEVICES, JSON, PATH, followed, require_writable
from trainer.probabilities import Add, Origin
from trainer.tally import Tally

NAMES = {"centre": "centre view", "ten": "ten views", "nine": "nine views"}
RECORDED = 1000  # confused pairs in evaluation.json


@click.command(cls=Command)
@DATA
@CHECKPOINT
@click.option("--split", default="val", show_default=True)
@click.option(
    "--views",
    default="centre,ten",
    show_default=True,
    help="centre, ten, nine (of CIFAR-10), or centre and one of the others.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Images at a time, of all processes.  [default: for each 128, or 16 of several views]",
)
@click.option("--confused", default=10, show_default=True, type=click.IntRange(0), help="Pairs of classes to show.")
@click.option("--per-class", is_flag=True, help="Show the errors of each class.")
@click.option(
    "--save-probabilities", "saved", type=PATH, metavar="OUT.npz", help="Write every image's, of the last of --views."
)
@JSON
@DEVICES
def evaluate(
    data: Path,
    run: Path,
    split: str,
    views: str,
    batch_size: int | None,
    confused: int,
    per_class: bool,
    saved: Path | None,
    as_json: bool,
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
            shown, dataset, checkpoint = _views(views), manifest.load(data), checkpoints.load(run)
            where = choose_devices(devices, checkpoint.recipe.model.columns)
            samples = dataset.split(split).samples
            if samples == 0:
                raise DatasetError(f"{data}: the split {split!r} is empty; there is nothing to evaluate")
            if saved is not None and saved.suffix != ".npz":
                raise UserError(f"--save-probabilities {saved}: give a name that ends in .npz")
            if world.is_main:
                require_writable(saved)
            has_labels = labelled(dataset, split)
            if not saved:
                require_labels(dataset, split)
            network = load_network(checkpoint, dataset, where, run)
        facts = {"the data set": dataset.identity, "the checkpoint of step": checkpoint.step}
        options = {"--split": split, "--views": shown, "--batch-size": batch_size}
        world.require_equal_settings({**facts, **options})
        tallies, pace = {name: Tally(network.classes) for name in shown}, Pace()
        origin = Origin(dataset.identity, split, shown[-1], (f"{run}, step {checkpoint.step}",), checkpoint.classes)
        progress = stack.enter_context(followed()) if world.is_main else None

        def go_through(add: Add | None) -> None:
            for batch in predictions(
                network, dataset, checkpoint.recipe, split, shown, batch_size, world, pace, progress
            ):
                if add:
                    add(batch.labels.numpy(), batch.chances[shown[-1]].numpy())
                for name in shown if has_labels else ():
                    tallies[name].add(batch.labels, batch.chances[name])

        if saved and world.is_main:
            probabilities.save(saved, origin, samples, go_through)
        else:
            go_through(None)
    if not world.is_main:
        return
    result: dict[str, Any] = {"step": checkpoint.step, "split": split, "dataset": dataset.identity}
    if not has_labels:
        file = printable(str(saved))
        said = f"{file}: the probabilities of {samples:,} images; not all have a label, so there are no errors"
        click.echo(json.dumps(result | {"samples": samples}, indent=1) if as_json else said)
        return
    result |= {name: tally.whole().to_dict() for name, tally in tallies.items()}
    result |= {"details_of": shown[-1], **_details(tallies[shown[-1]], dataset)}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    try:
        if as_json:
            click.echo(text, nl=False)
        else:
            _print(result, shown, per_class, confused)
            click.echo(pace.said() + (f"; of {world.size} processes, the first's" if world.size > 1 else ""))
    finally:  # neither who has left (`| head`) nor a run that cannot be written to keeps the other from what took long
        if run.is_dir() and shown == ["centre", "ten"]:
            name = "evaluation.json" if split == "val" else f"evaluation-{split}.json"
            write_bytes_aside(run / name, text.encode())


def _print(result: dict[str, Any], shown: list[str], per_class: bool, confused: int) -> None:
    samples = result[shown[0]]["samples"]
    click.echo(
        f"{'':12}{'top-1 error':>12}{'top-5 error':>12}{'log-likelihood':>16}   "
        f"({result['split']}, {samples:,} images, step {result['step']})"
    )
    for name in shown:
        whole = result[name]
        click.echo(
            f"{NAMES[name]:12}{whole['top1_error']:>10.1f} %{whole['top5_error']:>10.1f} %{-whole['nll']:>16.4f}"
        )
    if per_class:
        _print_classes(result["classes"], NAMES[shown[-1]])
    _print_confused(result["confused"][:confused], NAMES[shown[-1]])


def _views(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in VIEWS]
    if wrong or len(set(names)) != len(names) or {"ten", "nine"} <= set(names):
        raise UserError(
            f"--views {text}: give centre, ten or nine, or centre and one of the others, such as centre,ten"
        )
    return sorted(names, key=VIEWS.index)


def _details(tally: Tally, dataset: Manifest) -> dict[str, Any]:
    """The errors of each class, and the pairs that are confused most often."""
    classes = []
    for record, found in zip(dataset.classes, tally.by_class()):
        errors = found.to_dict() if found else {"samples": 0}
        classes.append({"label": record.label, "wnid": record.wnid, "words": record.words, **errors})
    confused = []
    for pair in tally.confused(RECORDED):
        words = {f"{key}_words": dataset.classes[getattr(pair, key)].words for key in ("true", "predicted")}
        confused.append({**asdict(pair), **words})
    return {"classes": classes, "confused": confused}


def _print_confused(pairs: list[dict[str, Any]], views: str) -> None:
    if not pairs:
        return
    table = Table("images", "of its class", "true", "taken for", title=f"most confused ({views})", title_justify="left")
    for pair in pairs:
        share = f"{pair['share']:.1f} %"
        table.add_row(str(pair["images"]), share, _plain(pair["true_words"]), _plain(pair["predicted_words"]))
    Console().print(table)


def _print_classes(classes: list[dict[str, Any]], views: str) -> None:
    table = Table("class", "images", "top-1 error", "top-5 error", title=f"by class ({views})", title_justify="left")
    for each in classes:
        errors = [f"{each[key]:.1f} %" if each["samples"] else "" for key in ("top1_error", "top5_error")]
        name = each["words"] if each["words"] == each["wnid"] else f"{each['wnid']} {each['words']}"
        table.add_row(_plain(name), f"{each['samples']:,}", *errors)
    Console().print(table)


def _plain(words: str) -> Text:
    """What a terminal may show of a class's words: as they are, without control characters."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in words))
