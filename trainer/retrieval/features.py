"""The features of a split's images: what the last layer sees of their centre views."""

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.manifest import Manifest
from pipeline.online import Loader
from trainer import data as feed
from trainer.nonfinite import Diverged
from trainer.parallel import TwoColumnNet
from trainer.recipe import Recipe


def features(
    network: TwoColumnNet, dataset: Manifest, recipe: Recipe, split: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of ids (n,) int64 and features (n, units) float32 of every image of `split`, in the order of the ids.

    Raises:
        UserError: as `of_batches` and `feed.evaluation`.
    """
    with feed.evaluation(dataset, recipe, split, "centre", network.devices) as loader:
        yield from of_batches(network, loader)


def of_batches(network: TwoColumnNet, loader: Loader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`features` by a loader at hand, whose meter tells of the stall. Raises Diverged where one is not finite."""
    for batch in loader:
        yield batch.ids, hidden(network, batch.replicas)


@torch.inference_mode()
def hidden(network: TwoColumnNet, images: torch.Tensor | tuple[torch.Tensor, ...]) -> np.ndarray:
    """(n, 3, size, size), or the same for each column → (n, units) float32. Raises Diverged where not finite."""
    found = network.hidden(images).float()
    if not bool(found.isfinite().all()):
        raise Diverged("the network's features are not finite numbers: its training has diverged")
    return found.cpu().numpy()
