"""The losses of the recipe `tiny`, as they were: a refactor must reproduce them."""

import numpy as np
import pytest
import torch

from pipeline.online.batch import Batch
from pipeline.online.philox import philox
from trainer import recipe as recipes
from trainer.model import initial_weights
from trainer.optim import Momentum, Schedule
from trainer.parallel import TwoColumnNet
from trainer.train import draw_masks, train_step

# nats per image, at each of five steps of 32 images; ln 10 is 2.303
LOSSES = [2.320625898985051, 2.298530212351629, 2.3092763638639036, 2.3410055668576177, 2.334037112739547]


def made_up(step: int, images: int) -> Batch:
    """Grey levels less their mean, and labels, of Philox words: no library's generator, no picture's codec."""
    blocks = np.arange(images * 3 * 224 * 224 // 4)
    words = philox((7, 0), (77, step, blocks & 0xFFFF, blocks >> 16)).reshape(images, 3, 224, 224)
    ids = np.arange(images)
    x = torch.from_numpy((words >> 24).astype(np.float64) - 127.5)
    return Batch(step, 0, 0, images, ids, torch.from_numpy((ids + step) % 10), (x, x))


def test_losses_of_tiny_in_float64():
    recipe = recipes.load("tiny", ["train.batch_size=32", "optim.batch_size=32", "train.steps=5"])
    network = TwoColumnNet(recipe.model, 10, (torch.device("cpu"),) * 2).double()
    network.load({name: w.double() for name, w in initial_weights(recipe.model, 10, recipe.train.seed).items()})
    optimiser, schedule = Momentum(network.parts(), recipe.optim.momentum), Schedule(recipe, 5)
    found = []
    for step in range(5):
        batch = made_up(step, 32)
        drop = draw_masks(network, recipe.train.seed, batch)
        losses, wrong = train_step(network, optimiser, batch, drop, schedule.rates(step), recipe.train)
        found.append(float(losses) / 32)
        assert 0 <= wrong <= 32
    assert found == pytest.approx(LOSSES, rel=1e-9, abs=0)
