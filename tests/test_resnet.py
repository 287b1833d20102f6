"""A network of another kind learns from the same shards."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from conftest import CLASSES
from pipeline.online import Loader


class Block(nn.Module):
    """He et al. (2016): two 3 × 3 convolutions beside the identity, or beside a 1 × 1 convolution."""

    def __init__(self, inputs: int, maps: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, maps, 3, stride, 1, bias=False), nn.BatchNorm2d(maps), nn.ReLU(),
            nn.Conv2d(maps, maps, 3, 1, 1, bias=False), nn.BatchNorm2d(maps),
        )  # fmt: skip
        self.beside: nn.Module = nn.Identity()
        if stride > 1 or inputs != maps:
            self.beside = nn.Sequential(nn.Conv2d(inputs, maps, 1, stride, bias=False), nn.BatchNorm2d(maps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.beside(x))


def resnet18(width: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for maps, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(inputs, maps, stride), Block(maps, maps, 1)]
        inputs = maps
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def assert_learns(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Six steps over `batches`, again and again, lower the loss of each."""
    torch.manual_seed(0)
    network = resnet18(8, len(CLASSES))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(6 + len(batches)):
        images, labels = batches[step % len(batches)]
        assert images.shape == (8, 3, 224, 224)
        assert images.dtype == torch.float32
        loss = nn.functional.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    for first, last in zip(losses, losses[-len(batches) :]):
        assert last < first


def test_a_resnet_learns_from_the_loader(dataset: Path):
    """The whole way of another model's batch."""
    with Loader(dataset, "train", batch_size=8, recipe="imagenet") as loader:
        batches = [(batch.images.clone(), batch.labels.clone()) for batch in (next(loader) for _ in range(2))]
    assert_learns(batches)
