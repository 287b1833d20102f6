"""AlexNet on one device as torchvision has it, trained in plain torch: what our own step is compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.manifest import Manifest
from pipeline.online.loader import Batch, Loader
from tools.operations import of_step
from tools.ways import CLASSES, Way, require_labels

SIDE = 224  # of a view
CONVOLUTIONS = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))  # maps, kernel, …
POOLED = (True, True, False, False, True)
UNITS = 4096


def alexnet(classes: int = CLASSES) -> nn.Sequential:
    """64, 192, 384, 256, 256 maps and twice 4,096 units, no LRN, no groups. (n, 3, 224, 224) → (n, classes)."""
    layers: list[nn.Module] = []
    maps = 3
    for (width, kernel, stride, padding), pool in zip(CONVOLUTIONS, POOLED):
        layers += [nn.Conv2d(maps, width, kernel, stride, padding), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2)] * pool
        maps = width
    units = maps * 6 * 6
    layers += [nn.AdaptiveAvgPool2d(6), nn.Flatten()]
    for width in (UNITS, UNITS):
        layers += [nn.Dropout(0.5), nn.Linear(units, width), nn.ReLU(inplace=True)]
        units = width
    return nn.Sequential(*layers, nn.Linear(units, classes))


def multiply_adds(classes: int = CLASSES, side: int = SIDE) -> list[int]:
    """Of each layer of weights, for one image, forward, without the biases. Nothing is computed."""
    with torch.device("meta"):
        network, x = alexnet(classes), torch.empty(1, 3, side, side)
    found = []
    for layer in network:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            places = x.shape[2] * x.shape[3] if isinstance(layer, nn.Conv2d) else 1
            found.append(layer.weight.numel() * places)
    return found


class PlainTraining:
    """Its step: SGD with momentum and decay, cross entropy, autocast for bf16; nothing of ours but the batch.

    The rate is next to nothing, as in `gpu_training.Training`.
    """

    def __init__(self, data: Manifest, device: torch.device, name: str, batch: int, way: Way) -> None:
        from trainer import feed, parallel, recipe  # here: only the rows of training need the trainer

        require_labels(data)
        plan = recipe.load(name, (f"train.batch_size={batch}", *way.settings()))
        parallel.reference_precision(way.precision)
        classes = max(CLASSES, len(data.classes))
        torch.manual_seed(plan.train.seed)
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        network = alexnet(classes).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.operations = of_step(multiply_adds(classes, plan.model.size))
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self._run: Callable[[Tensor], Tensor] = network if way.compile == "no" else _compiled(network, way)
        self._criterion = nn.CrossEntropyLoss()
        optim = plan.optim
        self._optimiser = torch.optim.SGD(
            network.parameters(), lr=1e-9, momentum=optim.momentum, weight_decay=optim.decay
        )
        self.devices, self.side = (device,), plan.model.size
        self._device, self._layout, self._half = device, layout, way.precision == "bf16"
        self._loss = torch.zeros(())
        self.loader: Callable[[], Loader] = lambda: feed.training(data, plan, (device,))

    def step(self, given: Batch) -> int:
        """→ its images."""
        images = given.images.to(self._device, memory_format=self._layout)
        self._optimiser.zero_grad()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            loss = self._criterion(self._run(images), given.labels)
        loss.backward()
        self._optimiser.step()
        self._loss = loss.detach()
        return len(given.ids)

    def check(self) -> None:
        """Raise RuntimeError where the last loss is not a finite number."""
        if not bool(self._loss.isfinite()):
            raise RuntimeError("the loss is not a finite number")


def _compiled(network: nn.Module, way: Way) -> Any:
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if way.compile == "graphs" else None)
