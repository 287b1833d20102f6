"""A run and its directory: checks of a new and of a resumed run, the lock, the history, the first weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import UserError
from pipeline.files import ASIDE, content, locked, sweep, write_bytes_aside
from pipeline.manifest import Manifest
from pipeline.online import Loader
from pipeline.online.endpoints import parse
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint, CheckpointWriter
from trainer.layers import multiply_adds, parameter_count
from trainer.metrics import Metrics
from trainer.model import Weights, initial_weights
from trainer.recipe import Recipe, difference
from trainer.terminal import Terminal

# Prefixes of keys that may not change on resume, for weights and batches depend on them; all other keys may, and FREE
FIXED = ("model.", "data.", "train.seed", "train.batch_size")
FREE = (
    *("model.dropout", "model.lrn_"),
    *("data.lighting_until", "data.max_bad", "data.readers", "data.depth", "data.workers"),
    *("data.tier", "data.device_bytes", "data.max_stall", "data.hardware_share"),
)
FILES = ("recipe.json", "history.json", "metrics.jsonl", "tensorboard", "checkpoints", "report.html", "evaluation.json")
Taken = dict[str, Any]  # "taken": layers of another run; "new": each other layer, and why; empty without --init
History = tuple[dict[str, Any], ...]  # an entry for each start of the run


@dataclass(frozen=True)
class Settings:
    """A run to start: a new one, perhaps with layers of another (`init`), or one that goes on (`resumed`)."""

    data: Path
    run: Path
    recipe: Recipe
    devices: tuple[torch.device, ...]  # of this process, one for each column
    resumed: Checkpoint | None = None  # its tensors are in the main process alone
    other_data: bool = False  # the data set may be another than the resumed checkpoint's
    init: Checkpoint | None = None  # in the main process alone
    init_layers: tuple[str, ...] = ()  # to take from `init`; empty: all that fit
    as_json: bool = False  # standard output is for programs

    @property
    def pending(self) -> bool:
        """Return True if the resumed checkpoint was saved before the validation of its step."""
        return bool(self.resumed and self.resumed.progress.get("pending"))

    @property
    def start(self) -> int:
        """Return the number of steps that are done before this start."""
        return self.resumed.step if self.resumed else 0


@dataclass(frozen=True)
class Writers:
    """The outputs of an open run directory, and of the terminal."""

    metrics: Metrics
    checkpoints: CheckpointWriter
    console: Terminal


@contextmanager
def opened(settings: Settings, history: History, steps: int) -> Iterator[Writers]:
    """Make and lock the run directory until the context ends, write recipe.json and history.json, open the outputs.

    `steps` is the length of the run. Raises UserError: another process trains there; a disk is full.
    """
    run, keep, start = settings.run, settings.recipe.train.keep, settings.start
    run.mkdir(parents=True, exist_ok=True)
    with locked(run, "another process trains there; wait for its end, or name another --out"):
        sweep(run)  # files that a killed process left half-written
        for name, value in (("recipe.json", asdict(settings.recipe)), ("history.json", history)):
            write_bytes_aside(run / name, (json.dumps(value, indent=1) + "\n").encode())
        metrics = Metrics(run, start, settings.pending)
        console = Terminal(steps, start, str(run), settings.as_json)
        with metrics, CheckpointWriter(run, keep) as writer, console:
            yield Writers(metrics, writer, console)


def require_fresh(run: Path, data: Path) -> None:
    """Raise UserError unless a new run may start here: no or an empty directory, or a run's without checkpoints.

    The directory must not be part of the data set, whose files are all listed in its manifest.
    """
    if data.resolve() in run.resolve().parents:
        raise UserError(f"{run}: lies inside DATASET, {data}, and would be a fault of that; name another --out")
    if not run.exists():
        return
    if not run.is_dir():
        raise UserError(f"{run}: is a file; name a directory as --out")
    if checkpoints.files(run) or checkpoints.best_file(run).exists():
        raise UserError(f"{run}: exists already; go on with it by --resume, or name another --out")
    others = [name for name in content(run) if name not in FILES and not name.endswith(ASIDE)]
    if others:
        raise UserError(f"{run}: exists and is not a run directory (it has {min(others)}); name another --out")


def require_trainable(dataset: Manifest, recipe: Recipe, validated: bool) -> None:
    """Raise UserError if the recipe cannot train on the data set, or an address of a worker is none.

    `validated`: the data set has labelled validation images.
    """
    parse(recipe.data.workers)
    classes = len(dataset.classes)
    if recipe.model.classes not in (0, classes):
        raise UserError(
            f"{dataset.root}: has {classes:,} classes, the recipe is meant for {recipe.model.classes:,} "
            "(model.classes); name its data set, or --set model.classes=0"
        )
    unlabelled = int((dataset.samples("train")["label"] < 0).sum())
    if unlabelled:
        raise UserError(f"{dataset.root}: {unlabelled:,} training images have no label; build from labelled ones")
    if recipe.optim.schedule == "plateau" and not validated:
        raise UserError(
            f"{dataset.root}: has no labelled validation images, and optim.schedule = 'plateau' looks at their error; "
            "take 'drops'"
        )


def require_resumable(settings: Settings, resumed: Checkpoint, dataset: Manifest, steps: int) -> None:
    """Raise UserError if the data set or a fixed key of the recipe has changed, or if no steps are left to do."""
    run, recipe = settings.run, settings.recipe
    if not settings.other_data:
        checkpoints.require_same_data(resumed, dataset.identity, run, ", or say --other-data")
    if resumed.classes != tuple(record.wnid for record in dataset.classes):
        raise UserError(
            f"{run}: has learned {len(resumed.classes):,} classes, {dataset.root} has {len(dataset.classes):,}, and "
            "not the same; start a new run from its layers: --init"
        )
    for key, (old, new) in difference(resumed.recipe, recipe).items():
        if key.startswith(FIXED) and not key.startswith(FREE):
            raise UserError(f"{run}: --set {key}: cannot change on resume ({old} → {new}); start a new run")
    if resumed.step >= steps + settings.pending:
        remedy = "--set train.epochs=N goes on"
        if recipe.train.steps:
            remedy = "--set train.steps=N goes on, and the times of its schedule stretch to that"
        raise UserError(f"{run}: has done {resumed.step} steps, and {steps} are asked for; {remedy}")
    if resumed.progress["over"]:
        raise UserError(f"{run}: ended on its last plateau after {resumed.step} steps; start a new run from it: --init")


def set_loader(settings: Settings, resumed: Checkpoint, loader: Loader) -> None:
    """Let the loader go on where the checkpoint was taken; on other data only the step is the checkpoint's.

    Raises UserError: the checkpoint's loader does not fit its recipe.
    """
    state = {**loader.state_dict(), "step": settings.start} if settings.other_data else resumed.loader
    try:
        loader.load_state_dict(state)
    except UserError as error:
        file = checkpoints.step_file(settings.run, resumed.step)
        raise UserError(f"{file}: damaged, or of another version ({error}); delete it to use the one before") from error


def first_weights(settings: Settings, classes: tuple[str, ...]) -> tuple[Weights, Taken]:
    """Return the weights of a new run, drawn or from `init`: of the layers in `init_layers`, or of all that fit.

    A layer fits if name and shape are equal, and the last one only if the classes are, too.
    Raises UserError: a layer of `init_layers` does not fit or is missing; or none fits.
    """
    weights = initial_weights(settings.recipe.model, len(classes), settings.recipe.train.seed)
    source, names = settings.init, settings.init_layers
    if source is None:
        return weights, {}
    layers = list(dict.fromkeys(name.partition(".")[0] for name in weights))
    shapes = {name: w.shape for name, w in source.weights.items()}
    new = {}
    for layer in layers:
        if f"{layer}.weight" not in shapes:
            new[layer] = "not in that network"
        elif any(shapes.get(name) != w.shape for name, w in weights.items() if name.startswith(f"{layer}.")):
            new[layer] = "its shape differs"
        elif layer == layers[-1] and source.classes != classes:
            new[layer] = "its classes differ"
    fitting = [layer for layer in layers if layer not in new]
    for name in names:
        if name not in fitting:
            why = new.get(name, "not in both networks")
            raise UserError(f"--init-layers {name}: {why}; those that fit are {', '.join(fitting) or 'none'}")
    if not fitting:
        raise UserError("--init: no layer of that network has the name and shape of one of this; name another")
    new |= {layer: "not in --init-layers" for layer in fitting if names and layer not in names}
    taken = [layer for layer in fitting if layer not in new]
    weights |= {name: w for name, w in source.weights.items() if name.partition(".")[0] in taken}
    return weights, {"taken": taken, "new": new}


def history_entry(settings: Settings, dataset: Manifest, processes: int, taken: Taken) -> dict[str, Any]:
    """Return this start's entry in history.json: step, devices, versions, data set, layers taken, changed keys."""
    resumed, init = settings.resumed, settings.init
    changed = difference(resumed.recipe, settings.recipe) if resumed else {}
    return {
        "step": settings.start,
        "devices": [str(device) for device in settings.devices],
        "processes": processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dataset": dataset.identity,
        "init": {"step": init.step, "dataset": init.dataset, **taken} if init else None,
        "changed": {key: list(values) for key, values in changed.items()},
    }


def introduction(recipe: Recipe, classes: int, validated: bool, history: History) -> list[str]:
    """Return the first lines that a run prints: its network, and the changes of a resumed one."""
    now = history[-1]
    count, work = parameter_count(recipe.model, classes), multiply_adds(recipe.model, classes) / 1e6
    columns = "one column on" if recipe.model.columns == 1 else "two columns on"
    processes = f", in each of {now['processes']} processes" if now["processes"] > 1 else ""
    lines = [
        f"{count:,} parameters, {work:,.1f} million multiply-adds an image; {columns} {' and '.join(now['devices'])}"
        + processes
    ]
    if init := now["init"]:
        new = ", ".join(f"{layer} ({reason})" for layer, reason in init["new"].items())
        lines.append(f"taken: {', '.join(init['taken'])}; new: {new or 'none'}")
    if len(history) > 1:
        before, step = history[-2], now["step"]
        lines += [f"from step {step}: {key} {old} → {new}" for key, (old, new) in now["changed"].items()]
        for key in ("devices", "processes", "threads", "torch", "dataset"):
            values = before.get(key, 1), now[key]  # older checkpoints know of one process only
            if values[0] != values[1]:
                old, new = (", ".join(value) if isinstance(value, list) else value for value in values)
                lines.append(f"from step {step}: {key} {old} → {new}: the last bits of the weights may differ")
    if not validated:
        lines.append("no validation split, or not every image of it has a label: the run is not validated")
    return lines
