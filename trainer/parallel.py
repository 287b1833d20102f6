"""Where the network lives: two columns on two devices, which meet at conv3 and at the fully-connected layers only."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError
from trainer.model import LAYERS, Layers, after_conv1, after_conv2, after_conv5, dropout, overhang, shapes
from trainer.recipe import ModelRecipe


class Column(Layers):
    """Half of every layer, on one device. Column 0 also holds the whole of fc8."""

    def __init__(self, place: int, recipe: ModelRecipe, classes: int, device: torch.device) -> None:
        mine = {
            name: shape if name.startswith("fc8") else (shape[0] // 2, *shape[1:])
            for name, shape in shapes(recipe, classes).items()
            if place == 0 or not name.startswith("fc8")
        }
        super().__init__(mine, device)
        self.place, self.device = place, device


class TwoColumns(nn.Module):
    """The network of `model.AlexNet` cut into two columns. `devices` may name one device twice."""

    def __init__(self, recipe: ModelRecipe, classes: int, devices: Sequence[torch.device]) -> None:
        super().__init__()
        assert len(devices) == 2
        self.recipe, self.devices = recipe, tuple(devices)
        self.columns = nn.ModuleList(Column(i, recipe, classes, device) for i, device in enumerate(devices))

    def forward(self, x: Tensor | Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> Tensor:
        """(n, 3, 224, 224), or the same for each column → logits (n, classes) on the first device.

        `masks` as in `model.AlexNet`, on any device.
        """
        columns = self._columns()
        images = [x, x] if isinstance(x, Tensor) else x
        halves = [
            column.conv("conv1", overhang(image.to(column.device)), stride=4) for column, image in zip(columns, images)
        ]
        halves = [after_conv1(half, columns=1) for half in halves]
        halves = [
            after_conv2(column.conv("conv2", half, padding=2), columns=1) for column, half in zip(columns, halves)
        ]
        halves = [
            F.relu(column.conv("conv3", whole, padding=1)) for column, whole in zip(columns, self._exchange(halves))
        ]
        halves = [F.relu(column.conv("conv4", half, padding=1)) for column, half in zip(columns, halves)]
        halves = [
            after_conv5(column.conv("conv5", half, padding=1)).flatten(1) for column, half in zip(columns, halves)
        ]
        for i, name in enumerate(("fc6", "fc7")):
            halves = [F.relu(column.linear(name, whole)) for column, whole in zip(columns, self._exchange(halves))]
            halves = [self._dropout(column, half, masks[i] if masks else None) for column, half in zip(columns, halves)]
        return columns[0].linear("fc8", torch.cat([half.to(self.devices[0]) for half in halves], 1))

    def _columns(self) -> tuple[Column, Column]:
        first, second = self.columns
        assert isinstance(first, Column)
        assert isinstance(second, Column)
        return first, second

    def _exchange(self, halves: list[Tensor]) -> list[Tensor]:
        """Both columns' maps or units, in the grouped order, on each device."""
        return [torch.cat([half.to(device) for half in halves], 1) for device in self.devices]

    def _dropout(self, column: Column, half: Tensor, mask: Tensor | None) -> Tensor:
        units = half.shape[1]
        mine = None if mask is None else mask[:, column.place * units : (column.place + 1) * units].to(column.device)
        return dropout(half, mine, self.recipe.dropout)

    def parts(self) -> list[dict[str, Tensor]]:
        """Each column's parameters by layer."""
        return [column.weights() for column in self._columns()]

    def gathered(self, values: Sequence[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """Weights (or `values`, one dict of the same names per column) in the grouped layout, on the CPU."""
        parts = values or self.parts()
        result = {}
        for name in (f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")):
            result[name] = torch.cat([part[name].detach().cpu() for part in parts if name in part], 0)
        return result

    def scatter(self, grouped: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Tensors in the grouped layout, cut into each column's share on its device."""
        parts = []
        for column in self._columns():
            part = {}
            for name, parameter in column.weights().items():
                start = column.place * parameter.shape[0]
                part[name] = grouped[name][start : start + parameter.shape[0]].to(parameter)
            parts.append(part)
        return parts

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over weights in the grouped layout."""
        with torch.no_grad():
            for column, part in zip(self._columns(), self.scatter(weights)):
                for name, parameter in column.weights().items():
                    parameter.copy_(part[name])


def reference_precision() -> None:
    """float32 throughout, as in 2012: torch would let convolutions on a GPU run in TF32, with 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def parse_devices(text: str) -> tuple[torch.device, torch.device]:
    """`cuda:0,cuda:1`, `cuda:0,cuda:0` or `cpu,cpu` → two devices. Raises UserError where one is not there."""
    names = [name.strip() for name in text.split(",")]
    try:
        devices = [torch.device(name) for name in names]
    except RuntimeError as error:
        raise UserError(f"--devices {text}: not a device; give two, such as cuda:0,cuda:1 or cpu,cpu") from error
    if len(devices) != 2:
        raise UserError(
            f"--devices {text}: {len(devices)} given; the network has two columns: give two, such as cuda:0,cuda:1"
        )
    for device in devices:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--devices {text}: this machine has {torch.cuda.device_count()} CUDA devices; name two, or cpu,cpu"
            )
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--devices {text}: {device.type} is not supported; give cuda:N or cpu")
    return devices[0], devices[1]


def default_devices() -> str:
    """Two GPUs where there are two, one twice where there is one, else the CPU."""
    count = torch.cuda.device_count()
    return "cuda:0,cuda:1" if count > 1 else "cuda:0,cuda:0" if count else "cpu,cpu"
