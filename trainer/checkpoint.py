"""Checkpoints: one safetensors file each, written in the background, whole or not at all; and read without pickle."""

import errno
import hashlib
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import UserError, volumes
from pipeline.files import ASIDE, sweep, sync_folder
from pipeline.manifest import Manifest, canonical_json
from pipeline.volumes import naming
from trainer import layers
from trainer.distributed import World
from trainer.metadata import FORMAT, plain_values
from trainer.parallel import TwoColumnNet
from trainer.recipe import Recipe, from_dict

FOLDER = "checkpoints"
KINDS = ("weights", "velocity")  # of tensors
META = "penstock"  # key of the file's metadata; its value is JSON
CHECKSUM = "checksum"  # key in that JSON
PLAIN = ("step", "classes", "dataset", "loader", "progress", "history")  # values in that JSON as they are here
STEP_FILE = re.compile(r"step-(\d{8,})\.safetensors")
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
}


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another data set or version."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` updates. Tensors are in the grouped layout, on the CPU."""

    step: int
    recipe: Recipe
    classes: tuple[str, ...]  # wnids, in the order of the labels
    dataset: str  # identity of the dataset directory
    weights: dict[str, Tensor]  # float32
    velocity: dict[str, Tensor]  # float32, of the names and shapes of the weights
    loader: dict[str, Any]  # pipeline.online.Loader.state_dict()
    progress: dict[str, Any]  # state of the training loop: metadata.Progress
    history: tuple[dict[str, Any], ...]  # an entry for each start of the run: metadata.Start


def step_file(run: Path, step: int) -> Path:
    """Return the path of a checkpoint."""
    return run / FOLDER / f"step-{step:08d}.safetensors"


def best_file(run: Path) -> Path:
    """Return the path of the checkpoint with the least validation error."""
    return run / FOLDER / "best.safetensors"


def files(run: Path) -> list[Path]:
    """Return the checkpoints of a run directory by their steps, oldest first; without best.safetensors."""
    matches = ((STEP_FILE.fullmatch(path.name), path) for path in (run / FOLDER).glob("step-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def newest_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint of a run directory; None if there is none."""
    return int(files(run)[-1].stem.removeprefix("step-")) if files(run) else None


# ---- Writing. ----


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint's file, and return its path. Raises as `contents` and `write`."""
    path = step_file(run, checkpoint.step)
    tensors, metadata = contents(checkpoint)
    write(path, tensors, sealed(tensors, metadata))
    return path


def contents(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a checkpoint's file, which are not copied, and its metadata: all else as JSON.

    Raises ValueError, TypeError: a value is not plain JSON or not finite.
    """
    tensors = {f"{kind}.{name}": value for kind in KINDS for name, value in getattr(checkpoint, kind).items()}
    values = {"format": FORMAT} | {key: getattr(checkpoint, key) for key in PLAIN}
    values |= {"recipe": asdict(checkpoint.recipe), "tensors": sorted(checkpoint.weights)}  # older versions read it
    return {name: w.detach().contiguous() for name, w in tensors.items()}, json.dumps(values, allow_nan=False)


def sealed(tensors: dict[str, Tensor], metadata: str) -> str:
    """Return the metadata as canonical JSON with a checksum: the SHA-256 of all else in that, and of the tensors.

    The bytes of the tensors follow in the order of their names. They are not copied.
    """
    values = {key: value for key, value in json.loads(metadata).items() if key != CHECKSUM}
    digest = hashlib.sha256(canonical_json(values))
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).numpy().data)
    return canonical_json(values | {CHECKSUM: digest.hexdigest()}).decode()


def write(path: Path, tensors: dict[str, Tensor], metadata: str) -> None:
    """Write a safetensors file, all of it or nothing. Raises OSError, with an older file untouched.

    Other threads go on meanwhile: since version 0.8 safetensors does not hold the interpreter's lock while it writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ASIDE)
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask says; safetensors closes its file to all other users
        save_file(tensors, aside, {META: metadata})
        aside.chmod(mode)
        with open(aside, "rb") as file, naming(path):
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except SafetensorError as error:
        if not (match := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time; keeps the newest `keep`, and best.safetensors.

    An interpreter that exits waits for the pending write.
    """

    def __init__(self, run: Path, keep: int) -> None:
        """Delete the unfinished files of writers that were killed; the caller holds the lock of the run."""
        self._run, self._keep = run, keep
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        sweep(run / FOLDER)
        for leftover in (run / FOLDER).glob(".tmp*"):  # of safetensors
            leftover.unlink()

    def save(self, checkpoint: Checkpoint, best: bool = False, pending: bool = False) -> Path:
        """Begin to write a checkpoint, once the one before is written; return the path that it will have.

        Its tensors must not change from now on; its other values are copied. `best`: best.safetensors becomes this one.
        `pending`: it comes in addition to the newest `keep`, for its validation may show that it has diverged.
        Raises:
            UserError: the write before this one has failed; this one is not begun.
            ValueError, TypeError: a value is not plain JSON or not finite.
        """
        self._wait()
        path = step_file(self._run, checkpoint.step)
        self._pending = self._worker.submit(self._write, path, best, self._keep + pending, *contents(checkpoint))
        return path

    def raise_if_failed(self) -> None:
        """Raise UserError if the pending write has failed by now. Does not wait."""
        if self._pending and self._pending.done():
            self._wait()

    def close(self) -> None:
        """Wait for the last write. Raises UserError if it failed."""
        self._worker.shutdown(wait=True)
        self._wait()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the body's own exception is the one to see

    def _wait(self) -> None:
        if self._pending:
            wait([self._pending])  # an interruption here leaves it pending
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, path: Path, best: bool, keep: int, tensors: dict[str, Tensor], metadata: str) -> None:
        # best.safetensors first: a run that is killed between the two writes resumes from an older checkpoint, and
        # this one is the best again.
        targets = [best_file(self._run), path] if best else [path]
        try:
            metadata = sealed(tensors, metadata)  # here, for it takes long
            for target in targets:
                write(target, tensors, metadata)
            others = [file for file in files(self._run) if file != path]  # the new one stays, even with a lower step
            for target in others[: max(0, len(others) - keep + 1)]:
                target.unlink(missing_ok=True)
        except OSError as error:
            remedy, older = REMEDIES.get(error.errno or 0, "mend that"), newest_step(self._run)
            advice = f"there is no older checkpoint; {remedy}, then start again"
            if older is not None:
                advice = f"the checkpoint of step {older} stays; {remedy}, then go on by --resume"
            raise UserError(f"{target}: {error.strerror}; {advice}") from error


# ---- Reading. ----


def load(path: Path) -> Checkpoint:
    """Return the checkpoint of a file, or the newest one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version; the message names file and remedy.
        OSError: it cannot be read.
    """
    file = path if path.is_file() else _newest(path)
    try:
        if not file.is_file():  # a fifo would be waited for
            raise UserError("not a regular file")
        with open(file, "rb"):  # to raise the operating system's own error
            checkpoint = _read(file)
        if STEP_FILE.fullmatch(file.name) and file.name != step_file(file, checkpoint.step).name:
            raise UserError(f"holds step {checkpoint.step}, and its name another")  # it would stay the newest
        return checkpoint
    except (SafetensorError, ValueError, RecursionError) as error:  # a UserError is a ValueError
        reason = str(error) if isinstance(error, UserError) else f"not a checkpoint of ours, or damaged ({error})"
        older = [other.name for other in files(path) if other != file]  # none, if `path` is a file
        remedy = f"delete it to use {older[-1]}" if older else "name another checkpoint, or train again"
        raise CheckpointError(f"{file}: {' '.join(reason.split()):.400}; {remedy}") from error


def _newest(run: Path) -> Path:
    if checkpoints := files(run):
        return checkpoints[-1]
    if run.exists() and not run.is_dir():
        return run
    if run.suffix == ".safetensors":
        raise CheckpointError(f"{run}: no such file; name a run directory, or one of its {FOLDER}{volumes.hint(run)}")
    if (run / FOLDER).is_dir():
        os.scandir(run / FOLDER).close()  # to raise the operating system's own error
    train = f"train first: python -m trainer train --data DATASET --out {run}"
    raise CheckpointError(f"{run}: no checkpoint in {run / FOLDER}; {train}{volumes.hint(run)}")


def _read(path: Path) -> Checkpoint:
    """Read a file. Raises UserError without the name of the file, and what safetensors and json raise."""
    with safe_open(path, framework="pt") as file:
        metadata, names = (file.metadata() or {}).get(META), sorted(file.keys())
        if metadata is None:
            raise UserError("not a checkpoint of ours: a safetensors file of something else")
        if others := [name for name in names if file.get_slice(name).get_dtype() != "F32"]:
            raise UserError(f"damaged ({others[0]} is not float32)")
        tensors = {name: file.get_tensor(name) for name in names}
    values = plain_values(metadata)
    if CHECKSUM in values and metadata != sealed(tensors, metadata):  # earlier versions wrote none
        raise UserError("damaged (its checksum is not that of its bytes)")
    checkpoint = _without_tensors(values)
    shapes = layers.shapes(checkpoint.recipe.model, len(checkpoint.classes))
    expected = {f"{kind}.{name}": shape for kind in KINDS for name, shape in shapes.items()}
    stored = {name: tuple(value.shape) for name, value in tensors.items()}
    if different := dict(expected.items() ^ stored.items()):  # some shapes would fit all the same, by broadcasting
        name = min(different)
        reason = f"{stored.get(name, 'missing')}, its recipe says {expected.get(name, 'none')}"
        raise UserError(f"damaged ({name} is {reason})")
    if diverged := [name for name, value in tensors.items() if not bool(value.isfinite().all())]:
        raise UserError(f"{diverged[0]} is not finite: its training has diverged")
    weights, velocity = ({name: tensors[f"{kind}.{name}"] for name in shapes} for kind in KINDS)
    return replace(checkpoint, weights=weights, velocity=velocity)


def _without_tensors(values: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a file's metadata. Raises as `_read`."""
    try:
        recipe = from_dict(values["recipe"], Recipe(), "its recipe")
    except UserError as error:
        raise UserError(f"a checkpoint of another version of this program ({error})") from error
    fields = {key: values[key] for key in PLAIN}
    fields |= {"recipe": recipe, "classes": tuple(values["classes"]), "history": tuple(values["history"])}
    return Checkpoint(**fields, weights={}, velocity={})


def shared(world: World, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return the main process's checkpoint in every process; its tensors are in the main process alone."""
    text = world.all_gather(contents(checkpoint)[1] if world.size > 1 and checkpoint else None)[0]
    return checkpoint if world.is_main or text is None else _without_tensors(plain_values(text))


# ---- Use. ----


def load_network(
    checkpoint: Checkpoint, dataset: Manifest, devices: tuple[torch.device, ...], path: Path
) -> TwoColumnNet:
    """Return the network of a checkpoint, which was read from `path`, on `devices`.

    Raises CheckpointError: its classes are not the data set's.
    """
    require_classes(checkpoint.classes, tuple(record.wnid for record in dataset.classes), path, dataset.root)
    network = TwoColumnNet(checkpoint.recipe.model, len(checkpoint.classes), devices)
    network.load(checkpoint.weights)
    network.name = str(path)
    return network


def require_same_data(checkpoint: Checkpoint, identity: str, path: Path, alternative: str = "") -> None:
    """Raise CheckpointError if the checkpoint was trained on other data."""
    if checkpoint.dataset != identity:
        raise CheckpointError(
            f"{path}: trained on the data set {checkpoint.dataset[:12]}…, this one is {identity[:12]}…; "
            f"name the DATASET that it was trained on{alternative}"
        )


def note_other_data(checkpoint: Checkpoint, dataset: Manifest) -> None:
    """Print a line if the data set is not the one that the checkpoint was trained on."""
    if checkpoint.dataset != dataset.identity:
        names = f"{dataset.identity[:12]}…, not {checkpoint.dataset[:12]}…"
        click.echo(f"note: {dataset.root}: another data set than the run's ({names}); its own mean is used", err=True)


def require_classes(classes: tuple[str, ...], others: tuple[str, ...], path: object, other_path: object) -> None:
    """Raise CheckpointError if the classes (wnids by label) of `path` are not those of `other_path`."""
    if classes == others:
        return
    difference = f"{len(others) - len(classes):+} there"
    for label, (one, other) in enumerate(zip(classes, others)):
        if one != other:
            difference = f"label {label} is {one}, there {other}"
            break
    raise CheckpointError(
        f"{path}: a network of {len(classes)} classes, {other_path} has {len(others)} others ({difference}); "
        "name one with the classes that it was trained on"
    )
