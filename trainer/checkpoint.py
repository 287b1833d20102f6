"""Checkpoints: one safetensors file each, written in the background, whole or not at all; and read without pickle."""

import errno
import json
import math
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline import UserError, volumes
from pipeline.files import HashingFile, sweep, write_aside
from pipeline.manifest import Manifest
from trainer.distributed import World
from trainer.layers import shapes
from trainer.parallel import TwoColumnNet
from trainer.recipe import Recipe, from_dict

FOLDER = "checkpoints"
META = "penstock"  # key of the file's metadata; its value is JSON
FORMAT = 2  # of that value and of the tensors' names
KINDS = ("weights", "velocity")
STEP_FILE = re.compile(r"step-(\d{8,})\.safetensors")
TYPES = {"step": int, "recipe": dict, "dataset": str, "loader": dict, "progress": dict}  # of the values in META
ITEM_TYPES = {"classes": str, "tensors": str, "history": dict}  # of the values that are lists
REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "allow larger files (ulimit -f)"}


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
    progress: dict[str, Any]  # state of the training loop: plain JSON values
    history: tuple[dict[str, Any], ...]  # one entry for each start of the run: plain JSON values


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
    """Write a checkpoint's file atomically, and return its path. Raises OSError with an older checkpoint untouched."""
    path = step_file(run, checkpoint.step)
    write(path, serialised(checkpoint))
    return path


def write(path: Path, parts: list[bytes | memoryview]) -> None:
    """Write the result of `serialised`: all of it or nothing. Raises OSError."""

    def fill(file: HashingFile) -> None:
        for part in parts:
            file.write(part)

    write_aside(path, fill)


def serialised(checkpoint: Checkpoint) -> list[bytes | memoryview]:
    """Return the bytes of a safetensors file: the header, then the memory of each tensor, which is not copied.

    The same checkpoint gives the same bytes. safetensors' own writer hides the errno of a failure, and takes longer.
    Raises ValueError, TypeError: a value is not plain JSON or not finite, or a tensor is not as `Checkpoint` says.
    """
    weights, velocity = checkpoint.weights, checkpoint.velocity
    if {name: value.shape for name, value in weights.items()} != {name: v.shape for name, v in velocity.items()}:
        raise ValueError("weights and velocity differ in names or shapes")
    header: dict[str, Any] = {"__metadata__": {META: _described(checkpoint)}}
    data, end = [], 0
    for kind, tensors in zip(KINDS, (weights, velocity)):
        for name in sorted(tensors):
            data.append(_memory(tensors[name]))
            start, end = end, end + len(data[-1])
            shape = list(tensors[name].shape)
            header[f"{kind}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return [len(text).to_bytes(8, "little") + text, *data]


def _described(checkpoint: Checkpoint) -> str:
    """Return all of a checkpoint but its tensors, as JSON. Raises as `serialised`."""
    names = ("step", "classes", "dataset", "loader", "progress", "history")
    values = {"format": FORMAT, **{name: getattr(checkpoint, name) for name in names}}
    values |= {"recipe": asdict(checkpoint.recipe), "tensors": sorted(checkpoint.weights)}
    return json.dumps(values, allow_nan=False)


def _memory(tensor: Tensor) -> memoryview:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"a tensor is {tensor.dtype} on {tensor.device}; a checkpoint takes float32 on the CPU")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


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

    def save(self, checkpoint: Checkpoint, best: bool = False) -> Path:
        """Begin to write a checkpoint, once the one before is written; return the path that it will have.

        Its tensors must not change from now on; its other values are copied. `best`: best.safetensors becomes this one.
        Raises UserError if the write before this one has failed, and begins none; and as `serialised`.
        """
        self._wait()
        path = step_file(self._run, checkpoint.step)
        self._pending = self._worker.submit(self._write, path, serialised(checkpoint), best)
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

    def _write(self, path: Path, parts: list[bytes | memoryview], best: bool) -> None:
        # best.safetensors first: a run that is killed between the two writes resumes from an older checkpoint, and
        # this one is the best again.
        target = path
        try:
            for target in [best_file(self._run)] * best + [path]:
                write(target, parts)
            others = [file for file in files(self._run) if file != path]  # the new one stays, even with a lower step
            for target in others[: max(0, len(others) - self._keep + 1)]:
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
    with open(file, "rb"):  # to raise the operating system's own error
        pass
    try:
        return _read(file)
    except (SafetensorError, ValueError, RecursionError) as error:  # a UserError is a ValueError; JSON may be too deep
        reason = str(error) if isinstance(error, CheckpointError) else f"not a checkpoint of ours, or damaged ({error})"
        older = [other.name for other in files(path) if other != file]  # none, if `path` is a file
        remedy = f"delete it to use {older[-1]}" if older else "name another checkpoint, or train again"
        raise CheckpointError(f"{file}: {' '.join(reason.split())}; {remedy}") from error


def _newest(run: Path) -> Path:
    if checkpoints := files(run):
        return checkpoints[-1]
    if run.suffix == ".safetensors":
        raise CheckpointError(f"{run}: no such file; name a run directory, or one of its {FOLDER}{volumes.hint(run)}")
    if (run / FOLDER).is_dir():
        os.scandir(run / FOLDER).close()  # to raise the operating system's own error
    train = f"train first: python -m trainer train --data DATASET --out {run}"
    raise CheckpointError(f"{run}: no checkpoint in {run / FOLDER}; {train}{volumes.hint(run)}")


def _read(path: Path) -> Checkpoint:
    """Read a file. Raises CheckpointError without the file's name, and what safetensors, json and the recipe raise."""
    with safe_open(path, framework="pt") as file:
        values = _values((file.metadata() or {}).get(META))
        kinds = [{name: f"{kind}.{name}" for name in values["tensors"]} for kind in KINDS]
        expected = {full for kind in kinds for full in kind.values()}
        if different := expected.symmetric_difference(file.keys()):
            raise CheckpointError(f"damaged (tensors are missing or too many: {', '.join(sorted(different))})")
        weights, velocity = ({name: file.get_tensor(full) for name, full in kind.items()} for kind in kinds)
    for name, value in weights.items():
        if value.shape != velocity[name].shape or {value.dtype, velocity[name].dtype} != {torch.float32}:
            raise CheckpointError(f"damaged ({name}: weights and velocity differ in shape, or are not float32)")
    return _checkpoint(values, weights, velocity)


def _values(text: str | None) -> dict[str, Any]:
    """Return the values of the metadata. Raises CheckpointError or ValueError unless all are there, of their types."""
    if text is None:
        raise CheckpointError("not a checkpoint of ours: a safetensors file of something else")
    values = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if type(values) is not dict:
        raise CheckpointError("damaged (its values are not a JSON object)")
    if (version := values.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"of format {version!r}, and this version of the program reads format {FORMAT}; read it with the version "
            "that wrote it"
        )
    wrong = [key for key, kind in TYPES.items() if type(values.get(key)) is not kind]
    for key, kind in ITEM_TYPES.items():
        if type(values.get(key)) is not list or any(type(item) is not kind for item in values[key]):
            wrong.append(key)
    if wrong or values["step"] < 0:
        raise CheckpointError(f"damaged ({', '.join(wrong) or 'step'}: missing, or of another type)")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _checkpoint(values: dict[str, Any], weights: dict[str, Tensor], velocity: dict[str, Tensor]) -> Checkpoint:
    try:
        recipe = from_dict(values["recipe"], Recipe(), "its recipe")
    except UserError as error:
        raise CheckpointError(f"a checkpoint of another version of this program ({error})") from error
    classes, history = tuple(values["classes"]), tuple(values["history"])
    plain = (values["loader"], values["progress"], history)
    return Checkpoint(values["step"], recipe, classes, values["dataset"], weights, velocity, *plain)


def shared(world: World, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return the main process's checkpoint in every process; its tensors are in the main process alone."""
    text = world.all_gather(_described(checkpoint) if world.size > 1 and checkpoint else None)[0]
    return checkpoint if world.is_main or text is None else _checkpoint(_values(text), {}, {})


def load_network(
    checkpoint: Checkpoint, dataset: Manifest, devices: tuple[torch.device, ...], path: Path
) -> TwoColumnNet:
    """Return the network of a checkpoint, which was read from `path`, on `devices`.

    Raises CheckpointError: its classes are not the data set's, or its weights are not those of its recipe.
    """
    require_classes(checkpoint.classes, tuple(record.wnid for record in dataset.classes), path, dataset.root)
    require_weights(checkpoint, path)
    network = TwoColumnNet(checkpoint.recipe.model, len(checkpoint.classes), devices)
    network.load(checkpoint.weights)
    return network


def require_same_data(checkpoint: Checkpoint, identity: str, path: Path, alternative: str = "") -> None:
    """Raise CheckpointError if the checkpoint was trained on other data."""
    if checkpoint.dataset != identity:
        raise CheckpointError(
            f"{path}: trained on the data set {checkpoint.dataset[:12]}…, this one is {identity[:12]}…; "
            f"name the DATASET that it was trained on{alternative}"
        )


def require_classes(classes: tuple[str, ...], others: tuple[str, ...], path: object, other_path: object) -> None:
    """Raise CheckpointError if the classes (wnids by label) of `path` are not those of `other_path`."""
    if classes == others:
        return
    differing = next((i for i, pair in enumerate(zip(classes, others)) if pair[0] != pair[1]), None)
    difference = f"{len(others) - len(classes):+} there"
    if differing is not None:
        difference = f"label {differing} is {classes[differing]}, there {others[differing]}"
    raise CheckpointError(
        f"{path}: a network of {len(classes)} classes, {other_path} has {len(others)} others ({difference}); "
        "name one with the classes that it was trained on"
    )


def require_weights(checkpoint: Checkpoint, path: object) -> None:
    """Raise CheckpointError if names or shapes are not its recipe's: some would fit all the same, by broadcasting."""
    expected = shapes(checkpoint.recipe.model, len(checkpoint.classes))
    stored = {name: tuple(value.shape) for name, value in checkpoint.weights.items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise CheckpointError(
                f"{path}: damaged ({name} is {stored.get(name, 'missing')}, its recipe says "
                f"{expected.get(name, 'none')}); name another checkpoint, or train again"
            )
