"""The ways of training that a recipe can choose, and the batch that is made of no pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from pipeline.online.loader import Batch

CLASSES = 1000  # of the network, at least
DEVIATION = 54.0  # grey levels, of a view less its mean image


@dataclass(frozen=True)
class Way:
    """What a recipe says of arithmetic: keys of its section `train`."""

    precision: str = "fp32"
    channels_last: bool = False
    compile: str = "no"

    def __str__(self) -> str:
        compiled = self.compile if self.compile != "no" else ""
        return ", ".join(filter(None, (self.precision, "channels_last" * self.channels_last, compiled)))

    def settings(self) -> tuple[str, ...]:
        layout = str(self.channels_last).lower()
        return f'train.precision="{self.precision}"', f"train.channels_last={layout}", f'train.compile="{self.compile}"'


def require_labels(data: Manifest) -> None:
    """Raise UserError where pictures have none: −1 would leave a GPU unusable for what follows."""
    if data.samples("train")["label"].min() < 0:
        raise UserError("there are training pictures without a label")


def synthetic(size: int, side: int, devices: Sequence[torch.device]) -> Batch:
    """A batch of random numbers in the place of grey levels, laid out on each device as the loader lays out its own.

    Args:
        size: images; side: pixels.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, side, side, 3, generator=generator).mul_(DEVIATION).permute(0, 3, 1, 2)
    labels = torch.randint(CLASSES, (size,), generator=generator).to(devices[0])
    each = {device: images.to(device) for device in dict.fromkeys(devices)}
    return Batch(0, 0, 0, size, np.arange(size), labels, tuple(each[device] for device in devices))
