"""The network as columns on devices, which exchange values only where a layer sees both."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.layers import Layer, ModelRecipe
from trainer.model import Column, Masks, Weights, compiled


class TwoColumnNet(nn.Module):
    """The network of `model.Grouped` cut into its columns, one for each device; a device may be named twice.

    The columns compute a segment of layers at the same time on two GPUs, for kernels are launched without waiting. Then
    they exchange values, if the next layer sees both columns.
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
        self.name = ""  # the file of its weights
        self._columns = [Column(recipe, classes, i, device) for i, device in enumerate(devices)]
        self.columns = nn.ModuleList(self._columns)
        self.layers = self._columns[0].layers
        self.segments = segments(self.layers)
        self._runs = [compiled(column.run, compile) for column in self._columns]
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.parameters():
            if parameter.dim() == 4:  # velocities get the layout of their weights
                parameter.data = parameter.data.contiguous(memory_format=self._format)

    def forward(self, x: Tensor | Sequence[Tensor], masks: Masks | Sequence[Masks] | None = None) -> Tensor:
        """Return the logits (n, classes) on the first device.

        Args:
            x: (n, 3, size, size), or a copy for each column, on any device.
            masks: (n, units) by layer with dropout, or a copy for each column, on any device; None: evaluation.
        """
        return joined(self._run(self.segments, x, masks), self.devices[0])

    def hidden(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the input of the last layer in evaluation: (n, units) on the first device, [column 0 | column 1].

        After dropout, that is times 1 − probability. If the last layer is the first one, its input is the images.
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
        """Return the output of the last segment, of each column that holds its last layer."""
        copies = [x] * len(self.devices) if isinstance(x, Tensor) else x
        values = [copy.to(device, memory_format=self._format) for copy, device in zip(copies, self.devices)]
        # Compiled for training alone: evaluation has other sizes, and keeps outputs that CUDA graphs would overwrite.
        # And not for an empty part of a batch, for which torch 2.13 compiles wrongly.
        runs = self._runs if torch.is_grad_enabled() and len(values[0]) else [column.run for column in self._columns]
        for index, layers in enumerate(segments):
            columns = range(layers[0].columns)
            if index:
                values = [joined(values, self.devices[i]) for i in columns]
            # launched one after the other without waiting, so that both devices are busy
            values = [runs[i](layers, values[i], self._masks(i, layers, masks)) for i in columns]
        return values

    def _masks(self, i: int, layers: Sequence[Layer], masks: Masks | Sequence[Masks] | None) -> list[Tensor | None]:
        """Return a column's part of the mask of each layer, on its device."""
        by_layer = (masks if isinstance(masks, Mapping) else masks[i]) if masks else {}
        return [
            by_layer[layer.name][:, layer.share(i)].to(self.devices[i]) if layer.name in by_layer else None
            for layer in layers
        ]

    def parts(self) -> list[Weights]:
        """Return each column's parameters by name."""
        return [column.weights() for column in self._columns]

    def gathered(self, parts: Sequence[Weights] | None = None) -> Weights:
        """Return the weights, or other `parts` of the same names, in the grouped layout: copies, on the CPU."""
        parts = parts or self.parts()
        shares = {name: [part[name].detach().to("cpu") for part in parts if name in part] for name in parts[0]}
        return {name: torch.cat(tensors, 0).contiguous() for name, tensors in shares.items()}

    @torch.no_grad()
    def scatter(self, grouped: Weights) -> list[Weights]:
        """Cut tensors in the grouped layout into each column's share: copies, on its device, in the weights' format."""
        parts = []
        for column in self._columns:
            rows = {layer.name: column.share(layer) for layer in self.layers}
            shares = {name: grouped[name][rows[name.partition(".")[0]]] for name in column.weights()}
            parts.append({name: torch.empty_like(w).copy_(shares[name]) for name, w in column.weights().items()})
        return parts

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Copy weights in the grouped layout into the columns."""
        for parameters, part in zip(self.parts(), self.scatter(weights)):
            for name, parameter in parameters.items():
                parameter.copy_(part[name])


def joined(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the columns' values side by side on one device. Values are copied between devices nowhere else."""
    return values[0] if len(values) == 1 else torch.cat([value.to(device) for value in values], 1)


def segments(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Cut the layers where columns exchange values: each layer that sees both columns begins a segment."""
    starts = [0, *(i for i, layer in enumerate(layers) if i and layer.groups == 1), len(layers)]
    if layers[0].columns == 1:  # one column has nothing to exchange
        starts = [0, len(layers)]
    return [tuple(layers[start:end]) for start, end in pairwise(starts)]


def reference_precision(precision: str = "fp32") -> None:
    """Set the precision of float32 products on GPUs: "fp32", as in 2012; else TF32, with 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
