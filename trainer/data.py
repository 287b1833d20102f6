"""A recipe's data: its steps on a data set, and the loaders of training and evaluation."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from pipeline import UserError, storage
from pipeline.manifest import Manifest, mending
from pipeline.online import Loader
from pipeline.online.samples import BadSample
from pipeline.records import KINDS
from pipeline.tier import build_command
from trainer.devices import local_rank
from trainer.distributed import SINGLE, World
from trainer.recipe import Recipe

BATCH_SIZE = {"centre": 128, "ten": 16, "nine": 16}  # images of a batch in evaluation, of each rank
CPU = (torch.device("cpu"),)
# Cause of a stall → remedies of a command without options for it
STALLED = {
    "reading": "a faster disk",
    "decoding": "more CPU cores",
    "transfer": "a faster device",
    "workers": "a faster network",
}


def steps_per_epoch(dataset: Manifest, recipe: Recipe) -> int:
    """Return the number of batches of an epoch, the last of which may be short."""
    return -(-dataset.split("train").samples // recipe.train.batch_size)


def steps_of(dataset: Manifest, recipe: Recipe) -> int:
    """Return the number of steps of the whole run."""
    return recipe.train.steps or max(1, round(recipe.train.epochs * steps_per_epoch(dataset, recipe)))


def require_pictures(dataset: Manifest, recipe: Recipe) -> None:
    """Raise UserError if the network cannot see the data set's pictures."""
    if dataset.recipe.crop != "centre":
        raise UserError(f"{dataset.root}: built with --crop none, of whole pictures; build with --crop centre")
    size, view = dataset.recipe.size, recipe.model.size
    if size < view:
        raise UserError(
            f"{dataset.root}: images of {size} pixels, and the network sees {view}; build with --size "
            f"{-(-view * 256 // 224)}, or take a recipe of a smaller model.size"
        )


def require_few_bad(bad: int, dataset: Manifest, split: str, recipe: Recipe) -> None:
    """Raise BadSample if too many samples failed in all ranks together; each rank's loader checks only its own."""
    if bad > (allowed := recipe.data.max_bad):
        count = f"{bad} samples of {split} failed in all processes, allowed: data.max_bad={allowed}"
        raise BadSample(f"{dataset.root}: {count}; {mending(dataset.root)}")


def stall_remedies(recipe: Recipe, dataset: Manifest) -> dict[str, str]:
    """Return the remedies in a log line of a run for a stall, by its cause: what is not turned by itself."""
    there = [kind for kind in KINDS if storage.is_dir(dataset.root / f"raw-{kind}")]
    decoding = STALLED["decoding"] if there else f"{build_command(dataset, 'rgb')}, or {STALLED['decoding']}"
    if recipe.data.tier == "auto":
        return STALLED | {"decoding": decoding}
    readers, depth = (f"--set data.{key}={min(2 * getattr(recipe.data, key), 64)}" for key in ("readers", "depth"))
    return STALLED | {"reading": f"{readers}, or {STALLED['reading']}", "decoding": decoding, "transfer": depth}


def training(
    dataset: Manifest,
    recipe: Recipe,
    devices: Sequence[torch.device] = CPU,
    world: World = SINGLE,
    batch_size: int | None = None,
    workers: Sequence[str] = (),
) -> Loader:
    """Return the loader of one rank's part of the training split. Raises UserError as `require_pictures`.

    `workers`: that decode; those of the recipe are meant for the run alone.
    """
    return _loader(
        dataset,
        recipe,
        "train",
        devices,
        world,
        batch_size=batch_size or recipe.train.batch_size,
        seed=recipe.train.seed,
        order=recipe.data.order,
        max_bad=recipe.data.max_bad,
        lighting=recipe.data.lighting,
        lighting_until=math.ceil(recipe.data.lighting_until * steps_of(dataset, recipe) / recipe.train.epochs),
        positions=recipe.data.positions,
        flips=recipe.data.flips,
        crop_chunk=recipe.data.crop_chunk,
        tier="auto" if workers else recipe.data.tier,
        device_bytes=recipe.data.device_bytes or None,
        workers=workers,
    )


def evaluation(
    dataset: Manifest,
    recipe: Recipe,
    split: str,
    views: str,
    devices: Sequence[torch.device],
    batch_size: int | None = None,
    world: World = SINGLE,
    max_bad: int = 0,
    workers: Sequence[str] = (),
) -> Loader:
    """Return the loader of every image of a split once: the "centre" view, "ten" or "nine". Raises as `training`.

    `batch_size`: images that all ranks take together; `max_bad`: so many may fail in this one, and have no label then.
    """
    size = batch_size or BATCH_SIZE[views] * world.size
    options: dict[str, Any] = {"batch_size": size, "views": views, "max_bad": max_bad, "workers": workers}
    options["tier"] = "jpeg" if recipe.data.tier == "jpeg" else "auto"  # a run that shuns records is not judged by them
    return _loader(dataset, recipe, split, devices, world, **options)


def _loader(
    dataset: Manifest, recipe: Recipe, split: str, devices: Sequence[torch.device], world: World, **options: Any
) -> Loader:
    require_pictures(dataset, recipe)
    threads = max(1, len(os.sched_getaffinity(0)) // local_rank()[1])  # this process's share of the machine's cores
    options |= {"view": recipe.model.size, "mean": recipe.data.mean, "device": tuple(devices), "threads": threads}
    options |= {"readers": recipe.data.readers, "depth": recipe.data.depth}
    options |= {"hardware_share": recipe.data.hardware_share, "max_stall": recipe.data.max_stall}
    # Other ranks wait in a collective meanwhile, which ends with an error after all of the patience.
    options["patience"] = world.patience / min(world.size, 2)
    return Loader(dataset, split, rank=world.rank, ranks=world.size, **options)
