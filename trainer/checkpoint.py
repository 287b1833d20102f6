"""Checkpoints: one safetensors file each, written whole or not at all, readable without us and without unpickling."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline import UserError, volumes
from pipeline.files import HashingFile, write_aside
from trainer.distributed import World
from trainer.recipe import Recipe, from_dict, to_dict

FOLDER = "checkpoints"
META = "penstock"  # the key of our plain values, JSON, in the metadata of the file
FORMAT = 2
KINDS = ("weights", "velocity")
STEP_FILE = re.compile(r"step-(\d{8,})\.safetensors")
PLAIN = {"step": int, "recipe": dict, "classes": list, "dataset": str, "loader": dict, "progress": dict}
PLAIN |= {"history": list, "tensors": list}


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
    progress: dict[str, Any]  # what the loop itself remembers: plain JSON values
    history: tuple[dict[str, Any], ...]  # one entry for each start of the run: plain JSON values


def step_file(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.safetensors"


def files(run: Path) -> list[Path]:
    """The checkpoints of a run directory by their steps, oldest first; without best.safetensors."""
    found = ((STEP_FILE.fullmatch(path.name), path) for path in (run / FOLDER).glob("step-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def best_file(run: Path) -> Path:
    return run / FOLDER / "best.safetensors"


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write RUN/checkpoints/step-NNNNNNNN.safetensors atomically. Raises OSError with an older checkpoint untouched."""
    path = step_file(run, checkpoint.step)
    write(path, serialised(checkpoint))
    return path


def write(path: Path, parts: list[bytes | memoryview]) -> None:
    """Write what `serialised` returned: all of it or nothing. Raises OSError."""

    def write_parts(file: HashingFile) -> None:
        for part in parts:
            file.write(part)

    write_aside(path, write_parts)


def serialised(checkpoint: Checkpoint) -> list[bytes | memoryview]:
    """The bytes of a safetensors file: the header, then the memory of each tensor, which is not copied.

    The same checkpoint gives the same bytes. safetensors' own writer would hide the reason of a failure (errno), and
    before version 0.8 copies the tensors and holds the interpreter's lock, which stops the training beside it.

    Raises:
        ValueError, TypeError: a value is not plain JSON or not finite, or a tensor is not as `Checkpoint` says.
    """
    weights, velocity = checkpoint.weights, checkpoint.velocity
    if {name: value.shape for name, value in weights.items()} != {name: v.shape for name, v in velocity.items()}:
        raise ValueError("weights and velocity differ in names or shapes")
    header: dict[str, Any] = {"__metadata__": {META: described(checkpoint)}}
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


def described(checkpoint: Checkpoint) -> str:
    """All of a checkpoint but its tensors, as JSON. Raises ValueError, TypeError as `serialised`."""
    plain = {
        "format": FORMAT,
        "step": checkpoint.step,
        "recipe": to_dict(checkpoint.recipe),
        "classes": checkpoint.classes,
        "dataset": checkpoint.dataset,
        "loader": checkpoint.loader,
        "progress": checkpoint.progress,
        "history": checkpoint.history,
        "tensors": sorted(checkpoint.weights),
    }
    return json.dumps(plain, allow_nan=False)


def shared(world: World, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return the main process's checkpoint in all, where it has one; its tensors are in the main process alone."""
    text = world.all_gather(described(checkpoint) if world.size > 1 and checkpoint else None)[0]
    return checkpoint if world.is_main or text is None else without_tensors(text)


def without_tensors(text: str) -> Checkpoint:
    """What `described` gave, with no tensors. Raises CheckpointError, ValueError where it is of another version."""
    return _checkpoint(_plain(text), {}, {})


def _memory(tensor: Tensor) -> memoryview:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"a tensor is {tensor.dtype} on {tensor.device}; a checkpoint takes float32 on the CPU")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def load(place: Path) -> Checkpoint:
    """A checkpoint file, or the newest one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version; the message names file and remedy.
        OSError: it cannot be read.
    """
    path = place if place.is_file() else _newest(place)
    with open(path, "rb"):  # the operating system's own words, where it cannot be read
        pass
    try:
        return _read(path)
    except (SafetensorError, ValueError, RecursionError) as error:  # a UserError is a ValueError; JSON may be too deep
        what = str(error) if isinstance(error, CheckpointError) else f"not a checkpoint of ours, or damaged ({error})"
        raise CheckpointError(f"{path}: {' '.join(what.split())}; {_remedy(path, place)}") from error


def _read(path: Path) -> Checkpoint:
    """Raises CheckpointError without the name of the file, and whatever safetensors, json and the recipe raise."""
    with safe_open(path, framework="pt") as file:
        meta = _plain((file.metadata() or {}).get(META))
        names = set(file.keys())
        kinds = [{name: f"{kind}.{name}" for name in meta["tensors"]} for kind in KINDS]
        wanted = {full for kind in kinds for full in kind.values()}
        if names != wanted:
            raise CheckpointError(f"damaged (tensors are missing or too many: {', '.join(sorted(names ^ wanted))})")
        weights, velocity = ({name: file.get_tensor(full) for name, full in kind.items()} for kind in kinds)
    for name, value in weights.items():
        if value.shape != velocity[name].shape or {value.dtype, velocity[name].dtype} != {torch.float32}:
            raise CheckpointError(f"damaged ({name}: weights and velocity differ in shape, or are not float32)")
    return _checkpoint(meta, weights, velocity)


def _checkpoint(meta: dict[str, Any], weights: dict[str, Tensor], velocity: dict[str, Tensor]) -> Checkpoint:
    try:
        recipe = from_dict(meta["recipe"], Recipe(), "its recipe")
    except UserError as error:
        raise CheckpointError(f"a checkpoint of another version of this program ({error})") from error
    classes, history = tuple(meta["classes"]), tuple(meta["history"])
    plain = (meta["loader"], meta["progress"], history)
    return Checkpoint(meta["step"], recipe, classes, meta["dataset"], weights, velocity, *plain)


def _plain(text: str | None) -> dict[str, Any]:
    """Our values in the metadata, with the types that they must have."""
    if text is None:
        raise CheckpointError("not a checkpoint of ours: a safetensors file of something else")
    meta = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if type(meta) is not dict:
        raise CheckpointError("damaged (its values are not a JSON object)")
    if (number := meta.get("format", 1)) != FORMAT:
        raise CheckpointError(f"of format {number!r}, of another version of this program: this one reads {FORMAT}")
    wrong = [key for key, kind in PLAIN.items() if type(meta.get(key)) is not kind]
    items = {"classes": str, "tensors": str, "history": dict}
    wrong += [key for key, kind in items.items() if key not in wrong and any(type(v) is not kind for v in meta[key])]
    if wrong or meta["step"] < 0:
        raise CheckpointError(f"damaged ({', '.join(wrong) or 'step'}: missing, or of another type)")
    return meta


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _remedy(path: Path, place: Path) -> str:
    """What to do about a file that is of no use: an older one serves only who named the run directory."""
    older = [file for file in files(place) if file != path]
    return f"delete it to use an older one, {older[-1].name}" if older else "name another checkpoint, or train again"


def _newest(run: Path) -> Path:
    found = files(run)
    if found:
        return found[-1]
    if run.suffix == ".safetensors":
        raise CheckpointError(f"{run}: no such file; name a run directory, or one of its {FOLDER}{volumes.hint(run)}")
    if (run / FOLDER).is_dir():
        os.scandir(run / FOLDER).close()  # the operating system's own words, where it cannot be listed
    train = f"train first: python -m trainer train --data DATASET --out {run}"
    raise CheckpointError(f"{run}: no checkpoint in {run / FOLDER}; {train}{volumes.hint(run)}")


def require_same_data(checkpoint: Checkpoint, identity: str, where: Path) -> None:
    """Raises CheckpointError where the checkpoint was trained on other data."""
    if checkpoint.dataset != identity:
        raise CheckpointError(
            f"{where}: trained on the data set {checkpoint.dataset[:12]}…, this one is {identity[:12]}…; "
            "name the DATASET that it was trained on, or say --other-data"
        )
