"""A network's probabilities for every image of a split, and its error rates."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline import UserError
from pipeline.manifest import Manifest
from pipeline.online.augment import nine_views, ten_views
from pipeline.online.stall import Wait
from trainer import data as feed
from trainer.distributed import SINGLE, World
from trainer.nonfinite import Diverged
from trainer.parallel import TwoColumnNet
from trainer.recipe import Recipe
from trainer.tally import Evaluation, Tally

VIEWS = ("centre", "ten", "nine")
Progress = Callable[[str, int, int], None]  # what is done, how many images, of how many


@dataclass(frozen=True)
class Predicted:
    """A batch of predictions, on the CPU."""

    ids: np.ndarray  # (n,) int64
    labels: Tensor  # (n,) int64; −1: none
    chances: dict[str, Tensor]  # by views: probabilities (n, classes) float64


@dataclass
class Pace:
    """How fast a split was gone through: images a second, and the stall; a process's own."""

    images: int = 0
    seconds: float = 0.0
    waited: Wait = field(default_factory=Wait)

    def said(self) -> str:
        speed = self.images / self.seconds if self.seconds else 0.0
        return (
            f"{self.images:,} images in {self.seconds:.1f} s, {speed:,.0f} images/s, {self.waited.said(self.seconds)}"
        )


@torch.inference_mode()
def predictions(
    network: TwoColumnNet,
    data: Manifest,
    recipe: Recipe,
    split: str,
    views: Sequence[str],
    batch_size: int | None = None,
    world: World = SINGLE,
    pace: Pace | None = None,
    progress: Progress | None = None,
    gather: bool = True,
) -> Iterator[Predicted]:
    """Every image of `split` exactly once, in the order of the ids: all in the first process, its share in the others.

    Args:
        views: "centre", and "ten" or "nine", whose probabilities are averaged; the centre view is one of those, and
            pictures are decoded once for both.
        batch_size: images that all processes together take at a time.
        pace: takes the speed, once the last batch is taken.
        progress: is told what is done, and how far that is.
        gather: else the first process, too, gets its share alone.
    Raises:
        UserError: the split is empty; data and recipe do not fit together.
        Diverged: an output is not a finite number.
    """
    shown = next((each for each in views if each != "centre"), "centre")
    assert {*views} <= {shown, "centre"}, views
    centre = _centre(shown, data.recipe.size, recipe.model.size)
    with feed.evaluation(data, recipe, split, shown, network.devices, batch_size, world) as loader:
        began, images = time.perf_counter(), 0
        for batch in loader:
            rows = torch.stack([torch.from_numpy(batch.ids), batch.labels.cpu()], 1).double()
            if len(rows):  # a process may have none of a short last batch
                each = view_probabilities(network, batch.replicas)
                found = [each[:, centre] if name == "centre" else each.mean(1) for name in views]
                rows = torch.cat([rows, *(chances.cpu() for chances in found)], 1)
            else:
                rows = rows.new_zeros(0, 2 + network.classes * len(views))
            if not bool(rows.isfinite().all()):
                raise Diverged("the network's outputs are not finite numbers: its training has diverged")
            images += len(batch.ids)
            if progress:
                progress(split, batch.step * loader.order.batch_size + batch.whole, loader.order.samples)
            if gather:
                rows = world.gather_rows(rows, batch.whole)
            chances = rows[:, 2:].chunk(len(views), 1)
            yield Predicted(rows[:, 0].long().numpy(), rows[:, 1].long(), dict(zip(views, chances)))
        if pace is not None:
            pace.images, pace.seconds, pace.waited = images, time.perf_counter() - began, loader.meter.total


def evaluate(
    network: TwoColumnNet, data: Manifest, recipe: Recipe, split: str, views: str, world: World = SINGLE
) -> Evaluation:
    """The error rates over every image of `split`, found by all processes, in each.

    Raises UserError where it is empty or has images without a label.
    """
    require_labels(data, split)
    tally = Tally(network.classes)
    with world.raise_together():
        for batch in predictions(network, data, recipe, split, [views], world=world, gather=False):
            tally.add(batch.labels, batch.chances[views])
    world.sum(tally.sums)
    return tally.whole()


def require_labels(data: Manifest, split: str) -> None:
    """Raise UserError where an image has none."""
    if not labelled(data, split):
        raise UserError(
            f"{data.root}: the split {split!r} has images without a label; they can be predicted "
            "(--save-probabilities, or the command ensemble), not evaluated"
        )


def labelled(data: Manifest, split: str) -> bool:
    """Whether every image of the split has a label."""
    return bool((data.samples(split)["label"] >= 0).all())


def _centre(views: str, size: int, view: int) -> int:
    """Which of several views is the centre view."""
    if views == "centre":
        return 0
    middle = (size - view) // 2
    return {"ten": ten_views, "nine": nine_views}[views](size, view).index((middle, middle, False))


def view_probabilities(network: TwoColumnNet, images: Tensor | Sequence[Tensor]) -> Tensor:
    """(n, 3, size, size), or (n, views, 3, size, size), or the same for each column → softmax (n, views, classes)
    float64, of one view where there is no such dimension."""
    each = [images] * len(network.devices) if isinstance(images, Tensor) else images
    n = len(each[0])
    views = each[0].shape[1] if each[0].dim() == 5 else 1
    flat = [image.reshape(n * views, *image.shape[-3:]) for image in each]
    return network(flat).double().softmax(1).unflatten(0, (n, views))


def probabilities(network: TwoColumnNet, images: Tensor | Sequence[Tensor]) -> Tensor:
    """As `view_probabilities`, the mean over the views: (n, classes) float64."""
    return view_probabilities(network, images).mean(1)
