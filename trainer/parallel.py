"""The network as columns on devices, which exchange values only where a layer sees both."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.layers import Layer, ModelRecipe
from trainer.model import Column, Masks, Weights, compiled


class TwoColumnNet(nn.Module):
    """The network of `model.Grouped` cut into its columns, one for each device; a device may be named twice.

    A segment of one column is started after the other's without waiting for it: on two GPUs they run at once. Values go
    from device to device only before a layer that sees both columns.
    """

    def __init__(
        self,
        recipe: ModelRecipe,
        classes: int,
        devices: Sequence[torch.device],
        compile: str = "no",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        assert len(devices) == recipe.columns
        self.recipe, self.classes, self.devices = recipe, classes, tuple(devices)
        self.columns = nn.ModuleList(Column(recipe, classes, i, device) for i, device in enumerate(devices))
        self.layers = self._columns()[0].layers
        self.segments = segments(self.layers)
        self._runs = [compiled(column.run, compile) for column in self._columns()]
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.parameters():
            if parameter.dim() == 4:  # velocities get the layout of their weights
                parameter.data = parameter.data.contiguous(memory_format=self._format)

    def forward(self, x: Tensor | Sequence[Tensor], masks: Masks | Sequence[Masks] | None = None) -> Tensor:
        """Return the logits (n, classes) on the first device.

        Args:
            x: (n, 3, size, size), or a copy for each column.
            masks: as in `model.Grouped`, on any device, or a copy for each column.
        """
        return joined(self._run(self.segments, x, masks), self.devices[0])

    def hidden(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the last layer's input, when testing: (n, units) on the first device, [column 0 | column 1].

        After dropout, that is times 1 − probability, as in `forward`. A last layer that is the first sees the images.
        """
        if len(self.layers) == 1:
            return (x if isinstance(x, Tensor) else x[0]).to(self.devices[0]).flatten(1)
        return joined(self._run(segments(self.layers[:-1]), x, None), self.devices[0]).flatten(1)

    def _run(
        self,
        segments: Sequence[Sequence[Layer]],
        x: Tensor | Sequence[Tensor],
        masks: Masks | Sequence[Masks] | None,
    ) -> list[Tensor]:
        """Return the output of each column that has the last layer."""
        copies = [x] * len(self.devices) if isinstance(x, Tensor) else x
        values = [copy.to(device, memory_format=self._format) for copy, device in zip(copies, self.devices)]
        # compiled for training alone: evaluation has other sizes, and keeps outputs that CUDA graphs would overwrite;
        # and not for the empty part of a batch, for which torch compiles wrongly (2.13)
        runs = self._runs if torch.is_grad_enabled() and len(values[0]) else [column.run for column in self._columns()]
        for index, layers in enumerate(segments):
            columns = range(layers[0].columns)
            if index:
                values = [joined(values, self.devices[i]) for i in columns]
            # one column after the other, so that the devices are both busy
            values = [runs[i](layers, values[i], self._masks(i, layers, masks)) for i in columns]
        return values

    def _masks(self, i: int, layers: Sequence[Layer], masks: Masks | Sequence[Masks] | None) -> list[Tensor | None]:
        """Return a column's part of the mask of each layer, on its device."""
        by_layer = (masks if isinstance(masks, Mapping) else masks[i]) if masks else {}
        return [
            by_layer[layer.name][:, layer.share(i)].to(self.devices[i]) if layer.name in by_layer else None
            for layer in layers
        ]

    def _columns(self) -> list[Column]:
        return [column for column in self.columns if isinstance(column, Column)]

    def parts(self) -> list[Weights]:
        """Return each column's parameters by name."""
        return [column.weights() for column in self._columns()]

    def gathered(self, values: Sequence[Weights] | None = None) -> Weights:
        """Return weights, or `values` by the same names per column, in the grouped layout: copies, on the CPU."""
        parts = values or self.parts()
        result = {}
        for name in parts[0]:
            shares = [part[name].detach().to("cpu") for part in parts if name in part]
            result[name] = torch.cat(shares, 0).contiguous()
        return result

    @torch.no_grad()
    def scatter(self, grouped: Weights) -> list[Weights]:
        """Cut tensors in the grouped layout into each column's share: copies, on its device."""
        parts = []
        for column in self._columns():
            rows = {layer.name: column.share(layer) for layer in self.layers}
            part = {}
            for name, w in column.weights().items():
                part[name] = torch.empty_like(w).copy_(grouped[name][rows[name.partition(".")[0]]])
            parts.append(part)
        return parts

    def load(self, weights: Weights) -> None:
        """Copy weights in the grouped layout into the columns."""
        with torch.no_grad():
            for parameters, part in zip(self.parts(), self.scatter(weights)):
                for name, parameter in parameters.items():
                    parameter.copy_(part[name])


def joined(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the columns' values side by side on one device: the only copy from column to column."""
    return values[0] if len(values) == 1 else torch.cat([value.to(device) for value in values], 1)


def segments(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Cut the layers where columns exchange values: a segment begins with each layer that sees both columns."""
    starts = [0, *(i for i, layer in enumerate(layers) if i and layer.groups == 1), len(layers)]
    if layers[0].columns == 1:  # one column has nothing to exchange
        starts = [0, len(layers)]
    return [tuple(layers[start:end]) for start, end in pairwise(starts)]


def reference_precision(precision: str = "fp32") -> None:
    """Choose a GPU's float32 products: "fp32", as in 2012; else TF32, with 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
