"""The trained network of a checkpoint, for a data set of its classes."""

from pathlib import Path

import torch

from pipeline.manifest import Manifest
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.layers import shapes
from trainer.parallel import TwoColumnNet


def load_network(
    checkpoint: Checkpoint, dataset: Manifest, devices: tuple[torch.device, ...], where: Path
) -> TwoColumnNet:
    """The network of a checkpoint, which was read from `where`, on `devices`.

    Raises:
        CheckpointError: its classes are not the data set's, or its weights are not those of its recipe.
    """
    require_classes(checkpoint.classes, tuple(record.wnid for record in dataset.classes), where, dataset.root)
    require_weights(checkpoint, where)
    network = TwoColumnNet(checkpoint.recipe.model, len(checkpoint.classes), devices)
    network.load(checkpoint.weights)
    return network


def require_classes(mine: tuple[str, ...], theirs: tuple[str, ...], where: object, other: object) -> None:
    """Raise CheckpointError where the classes (wnids by label) of what `where` names are not those of `other`."""
    if mine == theirs:
        return
    differing = next((pair for pair in zip(mine, theirs) if pair[0] != pair[1]), None)
    how = f"{len(theirs) - len(mine):+} there"
    if differing:
        how = f"label {mine.index(differing[0])} is {differing[0]}, there {differing[1]}"
    raise CheckpointError(
        f"{where}: a network of {len(mine)} classes, {other} has {len(theirs)} others ({how}); "
        "name one with the classes that it was trained on"
    )


def require_weights(checkpoint: Checkpoint, where: object) -> None:
    """Raise CheckpointError where names or shapes are not its recipe's: some would fit all the same, by repetition."""
    wanted = shapes(checkpoint.recipe.model, len(checkpoint.classes))
    found = {name: tuple(value.shape) for name, value in checkpoint.weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{where}: damaged ({name} is {found.get(name, 'missing')}, its recipe says {wanted.get(name, 'none')})"
                "; name another checkpoint, or train again"
            )
