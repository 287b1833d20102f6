"""What a run takes over: its directory; its own checkpoint, where it fits; another's layers; and its history."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline import UserError
from pipeline.files import ASIDE, sweep
from pipeline.manifest import Manifest
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.model import Weights
from trainer.recipe import Recipe, difference

# what the weights and the sequence of batches stand for; all else may change on resume
FIXED = ("model.", "data.", "train.seed", "train.batch_size")
FREE = ("model.dropout", "model.lrn_", "data.lighting_until", "data.max_bad")
OURS = ("recipe.json", "history.json", "metrics.jsonl", "tensorboard", "checkpoints", "report.html", "evaluation.json")
REMEMBERED = {"schedule", "window", "steps", "over"}  # of a checkpoint's `progress`


def require_fresh(run: Path) -> None:
    """A new run takes a new or empty directory, or that of a run which left no checkpoint."""
    if not run.exists():
        return
    if not run.is_dir():
        raise UserError(f"{run}: is a file; name a directory as --out")
    if checkpoints.files(run) or checkpoints.best_file(run).exists():
        raise UserError(f"{run}: exists already; go on with it by --resume, or name another --out")
    others = [path.name for path in run.iterdir() if path.name not in OURS and path.suffix != ASIDE]
    if others:
        raise UserError(f"{run}: exists and is not a run directory (it has {min(others)}); name another --out")


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """A run directory, made if it is not there, for this process alone; what a killed one left half-written goes.

    Raises:
        UserError: another process trains there.
    """
    run.mkdir(parents=True, exist_ok=True)
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{run}: another process trains there; wait for its end, or name another --out") from error
        sweep(run)
        yield
    finally:
        os.close(folder)


def require_classes(recipe: Recipe, dataset: Manifest) -> None:
    """Raises UserError where a recipe is meant for another number of classes than the data set has."""
    meant, there = recipe.model.classes, len(dataset.classes)
    if meant and meant != there:
        raise UserError(
            f"{dataset.root}: has {there:,} classes, the recipe is meant for {meant:,} (model.classes); "
            "name its data set, or --set model.classes=0"
        )


def require_labels(dataset: Manifest, recipe: Recipe) -> bool:
    """Whether there are validation images, with labels. Raises UserError where the run cannot do without what lacks."""
    labels = {name: dataset.samples(name)["label"] for name in ("train", "val") if name in dataset.splits}
    unlabelled = int((labels["train"] < 0).sum())
    if unlabelled:
        raise UserError(f"{dataset.root}: {unlabelled:,} training images have no label; build from labelled ones")
    found = "val" in labels and len(labels["val"]) > 0 and int(labels["val"].min()) >= 0  # all of them, or none
    if recipe.optim.schedule == "plateau" and not found:
        raise UserError(
            f"{dataset.root}: has no labelled validation images, and optim.schedule = 'plateau' looks at their error; "
            "take 'drops'"
        )
    return found


def require_same(resumed: Checkpoint, recipe: Recipe, dataset: Manifest, run: Path, other_data: bool) -> None:
    """Raises UserError where data or recipe changed in what cannot change on resume."""
    if not other_data:
        checkpoints.require_same_data(resumed, dataset.identity, run)
    classes = tuple(record.wnid for record in dataset.classes)
    if resumed.classes != classes:
        raise UserError(
            f"{run}: has learned {len(resumed.classes):,} classes, {dataset.root} has {len(classes):,}, and not the "
            "same; start a new run from its layers: --init"
        )
    if missing := REMEMBERED - resumed.progress.keys():
        raise checkpoints.CheckpointError(f"{run}: its newest checkpoint lacks {', '.join(sorted(missing))}; delete it")
    for key, (old, new) in difference(resumed.recipe, recipe).items():
        if key.startswith(FIXED) and not key.startswith(FREE):
            raise UserError(f"{run}: --set {key}: cannot change on resume ({old} → {new}); start a new run")


def require_unfinished(resumed: Checkpoint, recipe: Recipe, steps: int, run: Path) -> None:
    """Raises UserError where there is nothing left to do."""
    if resumed.step >= steps:
        remedy = "--set train.epochs=N goes on"
        if recipe.train.steps:
            remedy = "--set train.steps=N goes on, and the times of its schedule stretch to that"
        raise UserError(f"{run}: has done {resumed.step} steps, and {steps} are asked for; {remedy}")
    if resumed.progress["over"]:
        raise UserError(f"{run}: ended on its last plateau after {resumed.step} steps; start a new run from it: --init")


def taken_over(
    weights: Weights, source: Checkpoint | None, layers: tuple[str, ...], classes: tuple[str, ...]
) -> Weights:
    """The weights that a new network takes from a checkpoint: of the layers named, or of all that fit.

    A last layer fits only where the classes are the same.

    Raises:
        UserError: a layer that was named does not fit, or is not there; or none fits.
    """
    if source is None:
        return {}
    there = {name.partition(".")[0] for name in source.weights}
    here = list(dict.fromkeys(name.partition(".")[0] for name in weights))
    fitting = [
        layer
        for layer in here
        if all(f"{layer}.{kind}" in source.weights for kind in ("weight", "bias"))
        and all(
            source.weights[f"{layer}.{kind}"].shape == weights[f"{layer}.{kind}"].shape for kind in ("weight", "bias")
        )
        and (layer != here[-1] or source.classes == classes)
    ]
    for layer in layers:
        if layer not in fitting:
            reason = "its shape or its classes differ" if layer in there & set(here) else "not in both networks"
            raise UserError(f"--init-layers {layer}: {reason}; those that fit are {', '.join(fitting) or 'none'}")
    if not fitting:
        raise UserError("--init: no layer of that network has the name and shape of one of this; name another")
    names = layers or fitting
    return {name: value for name, value in source.weights.items() if name.partition(".")[0] in names}


def entry(
    resumed: Checkpoint | None,
    init: Checkpoint | None,
    recipe: Recipe,
    dataset: Manifest,
    devices: tuple[torch.device, ...],
    processes: int,
) -> dict[str, Any]:
    """What the history of a run notes at each of its starts: from where, on what, and what changed."""
    before = resumed.recipe if resumed else recipe
    return {
        "step": resumed.step if resumed else 0,
        "devices": [str(device) for device in devices],
        "processes": processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dataset": dataset.identity,
        "init": {"step": init.step, "dataset": init.dataset} if init else None,
        "changed": {key: list(values) for key, values in difference(before, recipe).items()},
    }


def said(history: tuple[dict[str, Any], ...]) -> list[str]:
    """Lines about what a resumed run has changed; "the same bytes" holds only without."""
    if len(history) < 2:
        return []
    before, now = history[-2:]
    lines = [f"from step {now['step']}: {key} {old} → {new}" for key, (old, new) in now["changed"].items()]
    for key in ("devices", "processes", "threads", "torch", "dataset"):
        was = before.get(key, 1)  # older checkpoints know of one process only
        if was != now[key]:
            old, new = (", ".join(value) if isinstance(value, list) else value for value in (was, now[key]))
            lines.append(f"from step {now['step']}: {key} {old} → {new}: the last bits of the weights may differ")
    return lines
