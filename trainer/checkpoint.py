"""Checkpoints: one safetensors file each, written whole or not at all, readable without us and without unpickling."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from trainer.recipe import Recipe, from_dict, to_dict

FOLDER = "checkpoints"
META = "penstock"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another data set."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` updates. Tensors are in the grouped layout, on the CPU."""

    step: int
    recipe: Recipe
    classes: tuple[str, ...]  # wnids, in the order of the labels
    dataset: str  # identity of the dataset directory
    weights: dict[str, Tensor]
    velocity: dict[str, Tensor]


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write RUN/checkpoints/step-NNNNNNNN.safetensors atomically. Raises OSError with an older checkpoint untouched."""
    tensors = {f"weights.{name}": value.contiguous() for name, value in checkpoint.weights.items()}
    tensors |= {f"velocity.{name}": value.contiguous() for name, value in checkpoint.velocity.items()}
    meta = {
        "step": checkpoint.step,
        "recipe": to_dict(checkpoint.recipe),
        "classes": checkpoint.classes,
        "dataset": checkpoint.dataset,
    }
    path = run / FOLDER / f"step-{checkpoint.step:08d}.safetensors"
    write_bytes_aside(path, safetensors.torch.save(tensors, {META: json.dumps(meta)}))
    return path


def load(place: Path) -> Checkpoint:
    """A checkpoint file, or the newest one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the file.
    """
    path = place if place.is_file() else _newest(place)
    try:
        with open(path, "rb"):  # the operating system's own words, where it cannot be read
            pass
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads((file.metadata() or {})[META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        recipe = from_dict(meta["recipe"], Recipe(), str(path))
        parts = {
            kind: {
                name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")
            }
            for kind in ("weights", "velocity")
        }
        return Checkpoint(
            meta["step"], recipe, tuple(meta["classes"]), meta["dataset"], parts["weights"], parts["velocity"]
        )
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of ours, or damaged ({error}); delete it to use an older one"
        ) from error


def files(run: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"))


def _newest(run: Path) -> Path:
    found = files(run)
    if not found:
        raise CheckpointError(
            f"{run}: no checkpoint in {run / FOLDER}; train first: python -m trainer train --data DATASET --out {run}"
        )
    return found[-1]


def require_same_data(checkpoint: Checkpoint, identity: str, where: Path) -> None:
    """Raises CheckpointError where the checkpoint was trained on other data."""
    if checkpoint.dataset != identity:
        raise CheckpointError(
            f"{where}: trained on the data set {checkpoint.dataset[:12]}…, this one is {identity[:12]}…; "
            "name the DATASET that it was trained on"
        )
