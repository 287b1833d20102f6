"""What a recipe asks of the loader."""

import math
import os
from collections.abc import Sequence

import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from pipeline.online import Loader
from trainer.devices import local_rank
from trainer.recipe import Recipe

BATCH_SIZE = {"centre": 128, "ten": 16, "nine": 16}  # images; several views make as many inputs of each
CPU = (torch.device("cpu"),)


def steps_per_epoch(dataset: Manifest, recipe: Recipe) -> int:
    """The last batch of an epoch may be short."""
    return -(-dataset.split("train").samples // recipe.train.batch_size)


def steps_of(dataset: Manifest, recipe: Recipe) -> int:
    """Of the whole run."""
    return recipe.train.steps or max(1, round(recipe.train.epochs * steps_per_epoch(dataset, recipe)))


def require_pictures(dataset: Manifest, recipe: Recipe) -> None:
    """Raise UserError where the network cannot see the data set's pictures."""
    if dataset.recipe.crop != "centre":
        raise UserError(f"{dataset.root}: built with --crop none, of whole pictures; build with --crop centre")
    size, view = dataset.recipe.size, recipe.model.size
    if size < view:
        raise UserError(
            f"{dataset.root}: images of {size} pixels, and the network sees {view}; build with --size "
            f"{-(-view * 256 // 224)}, or take a recipe of a smaller model.size"
        )


def training(
    dataset: Manifest,
    recipe: Recipe,
    devices: Sequence[torch.device] = CPU,
    batch_size: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Loader:
    """The training split, as process `rank` of a run sees it.

    Raises UserError where data set and recipe do not fit together.
    """
    require_pictures(dataset, recipe)
    until = recipe.data.lighting_until * steps_of(dataset, recipe) / recipe.train.epochs
    return Loader(
        dataset,
        "train",
        batch_size=batch_size or recipe.train.batch_size,
        rank=rank,
        ranks=ranks,
        threads=threads(),
        seed=recipe.train.seed,
        order=recipe.data.order,
        max_bad=recipe.data.max_bad,
        device=tuple(devices),
        view=recipe.model.size,
        mean=recipe.data.mean,
        lighting=recipe.data.lighting,
        lighting_until=math.ceil(until),
        positions=recipe.data.positions,
        crop_chunk=recipe.data.crop_chunk,
    )


def evaluation(
    dataset: Manifest,
    recipe: Recipe,
    split: str,
    views: str,
    devices: Sequence[torch.device],
    batch_size: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Loader:
    """Every image of a split once, as the centre view, ten views, or nine. Raises UserError as `training`."""
    require_pictures(dataset, recipe)
    return Loader(
        dataset,
        split,
        batch_size=BATCH_SIZE[views] * ranks if batch_size is None else batch_size,
        rank=rank,
        ranks=ranks,
        threads=threads(),
        device=tuple(devices),
        views=views,
        view=recipe.model.size,
        mean=recipe.data.mean,
    )


def threads() -> int:
    """Of a process's decoder: its share of the cores that the job may use on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // local_rank()[1])
