"""A training run, from the first step or from a checkpoint."""

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.online import Loader
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.dropout import masks
from trainer.evaluate import evaluate
from trainer.metrics import Metrics
from trainer.model import initial_weights, parameter_count
from trainer.optim import Momentum, rates
from trainer.parallel import TwoColumns
from trainer.recipe import Recipe, to_dict

DIVERGED = "training has diverged; lower optim.lr (--set optim.lr=…) and start a new run"


def train(
    data: Path, run: Path, recipe: Recipe, devices: tuple[torch.device, torch.device], resumed: Checkpoint | None
) -> None:
    """Train on the split `train` of `data` until `recipe.train.steps`; leave recipe, metrics and a checkpoint in `run`.

    Raises:
        UserError: `run` exists and is not resumed; the data are others than the checkpoint's; the loss is not finite.
    """
    # everything that can be refused, before anything is written
    dataset = manifest.load(data)
    classes = tuple(record.wnid for record in dataset.classes)
    start = resumed.step if resumed else 0
    if resumed:
        checkpoints.require_same_data(resumed, dataset.identity, run)
        _require_same_network(resumed.recipe, recipe, run)
        if start >= recipe.train.steps:
            raise UserError(f"{run}: has done {start} of {recipe.train.steps} steps; raise them: --set train.steps=N")
    else:
        _require_fresh(run)

    # network and optimiser
    network = TwoColumns(recipe.model, len(classes), devices)
    network.load(resumed.weights if resumed else initial_weights(recipe.model, len(classes), recipe.train.seed))
    optimiser = Momentum(network.parts(), recipe.optim)
    click.echo(
        f"{parameter_count(recipe.model, len(classes)):,} parameters in two columns on {devices[0]} and {devices[1]}"
    )
    if resumed:
        optimiser.velocity = network.scatter(resumed.velocity)

    def save(step: int) -> Path:
        weights, velocity = network.gathered(), network.gathered(optimiser.velocity)
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise UserError(f"the weights after step {step} are not finite numbers: {DIVERGED}")
        return checkpoints.save(run, Checkpoint(step, recipe, classes, dataset.identity, weights, velocity))

    # the loop; losses are summed on the device and looked at every log_every steps
    lighting_until = int(recipe.train.lighting_until * recipe.train.steps) if recipe.train.lighting else 0
    with Loader(
        dataset,
        "train",
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        step=start,
        lighting_until=lighting_until,
        device=devices,
    ) as loader:
        write_bytes_aside(run / "recipe.json", (json.dumps(to_dict(recipe), indent=1) + "\n").encode())
        metrics = Metrics(run)
        metrics.drop_after(start)
        window = _Window(devices[0], loader)
        for batch in loader:
            now = rates(recipe.optim, batch.step, recipe.train.steps)
            drop = masks(
                recipe.train.seed, batch.step, len(batch.ids), recipe.model.units, recipe.model.dropout, devices[0]
            )
            losses = F.cross_entropy(network(batch.replicas, drop), batch.labels, reduction="sum")
            (losses / recipe.train.batch_size).backward()  # a short batch counts for less, as in the 2012 code
            optimiser.step(now)
            window.add(losses, len(batch.ids))

            done = batch.step + 1
            last = done == recipe.train.steps
            if done % recipe.train.log_every == 0 or last:
                metrics.train(
                    recipe.train.steps, {"step": done, "epoch": batch.epoch, "lr": now.weights, **window.close()}
                )
            if last or (recipe.train.validate_every and done % recipe.train.validate_every == 0):
                if "val" in dataset.splits and dataset.splits["val"].samples:
                    found = evaluate(network, dataset, "val", "centre")
                    metrics.validation({"step": done, "epoch": batch.epoch, **found.to_dict()})
                window.restart()
            if last:
                click.echo(f"checkpoint: {save(done)}")
                break
            if recipe.train.checkpoint_every and done % recipe.train.checkpoint_every == 0:
                save(done)
                window.restart()


def _require_fresh(run: Path) -> None:
    """A new run takes a new or empty directory, or that of a run which left no checkpoint."""
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if checkpoints.files(run):
        raise UserError(f"{run}: exists already; go on with it by --resume, or name another --out")
    if not (run / "recipe.json").is_file():
        raise UserError(f"{run}: exists and is not a run directory; name another --out")


def _require_same_network(before: Recipe, now: Recipe, run: Path) -> None:
    """Rates, steps and the like may change on resume; not what the weights and the order of the samples stand for."""
    for section, key in (("model", None), ("train", "seed"), ("train", "batch_size")):
        old, new = (getattr(recipe, section) for recipe in (before, now))
        old, new = (getattr(value, key) if key else value for value in (old, new))
        if old != new:
            name = f"{section}.{key}" if key else section
            raise UserError(f"{run}: --set {name}: cannot change on resume ({old} → {new}); start a new run")


class _Window:
    """Loss, speed and stall of the steps since the last log line."""

    def __init__(self, device: torch.device, loader: Loader) -> None:
        self._device, self._loader = device, loader
        self.restart()

    def restart(self) -> None:
        self._losses, self._images = torch.zeros((), device=self._device), 0
        self._since, self._waited = time.perf_counter(), self._loader.meter.total

    def add(self, losses: torch.Tensor, images: int) -> None:
        self._losses += losses.detach()
        self._images += images

    def close(self) -> dict[str, Any]:
        """Mean loss, images/s and stall; raises UserError where the loss is not a finite number."""
        loss = float(self._losses) / self._images  # waits for the device
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss}: training has diverged; lower optim.lr (--set optim.lr=…) and start again"
            )
        seconds = time.perf_counter() - self._since
        waited = self._loader.meter.total - self._waited
        shares = waited.shares(seconds)
        speed = {"images_per_second": self._images / seconds, "stall": sum(shares.values()), "stall_by": shares}
        line = {"loss": loss, "time": speed | {"said": waited.said(seconds)}}
        self.restart()
        return line
