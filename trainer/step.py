"""One step of training: masks, forward, backward, new weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.online.batch import Batch
from trainer.distributed import Replicas
from trainer.dropout import masks
from trainer.layers import dropped_units
from trainer.model import Masks
from trainer.nonfinite import Watch
from trainer.optim import Momentum, Rates
from trainer.parallel import TwoColumnNet
from trainer.recipe import TrainRecipe


def drawn_masks(network: TwoColumnNet, seed: int, batch: Batch) -> list[Masks]:
    """The dropout masks of a batch for each column, on its device: drawn there, so that none is sent."""
    units, probability = dropped_units(network.recipe, network.classes), network.recipe.dropout
    each = {
        device: masks(seed, batch.step, len(batch.ids), units, probability, device, batch.place)
        for device in dict.fromkeys(network.devices)
    }
    return [each[device] for device in network.devices]


def update(
    network: TwoColumnNet | Replicas,
    optimiser: Momentum,
    batch: Batch,
    drop: Masks | Sequence[Masks],
    rates: dict[str, Rates],
    recipe: TrainRecipe,
    watch: Watch | None = None,
) -> Tensor:
    """One step: forward, backward, new weights. → the sum of the losses in nats, on the first device.

    Of several processes, each has its part of the batch in `Replicas`, and the sum of that one's losses. A short batch
    counts for less: its gradient too is divided by the full batch's size, as in the 2012 code.
    """
    optimiser.freeze(rates)
    device = network.devices[0].type
    with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = network(batch.replicas, drop)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    losses = F.cross_entropy(logits, batch.labels, reduction="sum")
    if losses.requires_grad:  # else every layer is frozen
        (losses / recipe.batch_size).backward()
    if watch:
        watch.note(batch.step, losses.detach())
    optimiser.step(rates)
    return losses.detach()
