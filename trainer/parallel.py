"""Where the network lives: columns on devices, which meet only where a layer sees both."""

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
            if parameter.dim() == 4:  # velocities, too, will lie as the weights do
                parameter.data = parameter.data.contiguous(memory_format=self._format)

    def forward(self, x: Tensor | Sequence[Tensor], masks: Masks | Sequence[Masks] | None = None) -> Tensor:
        """(n, 3, size, size), or the same for each column → logits (n, classes) on the first device.

        `masks` as in `model.Grouped`, on any device, or the same for each column.
        """
        return self.watched(x, masks)[0]

    def watched(
        self, x: Tensor | Sequence[Tensor], masks: Masks | Sequence[Masks] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The logits, and for each column, on its device, the sums of its layers' outputs, as `Column.run` has them."""
        values, sums = self._run(self.segments, x, masks)
        return self._whole(values), sums

    def hidden(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """(n, 3, size, size), or the same for each column → what the last layer sees, when testing: (n, units) on the
        first device, [column 0 | column 1]. With dropout before it, that is times 1 − probability, as in `forward`.
        A last layer that is the first sees the pictures.
        """
        if len(self.layers) == 1:
            return (x if isinstance(x, Tensor) else x[0]).to(self.devices[0]).flatten(1)
        return self._whole(self._run(segments(self.layers[:-1]), x, None)[0]).flatten(1)

    def _run(
        self,
        segments: Sequence[Sequence[Layer]],
        x: Tensor | Sequence[Tensor],
        masks: Masks | Sequence[Masks] | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the columns hold at the end, and the sums of their layers' outputs."""
        given = [x] * len(self.devices) if isinstance(x, Tensor) else x
        values = [each.to(device, memory_format=self._format) for each, device in zip(given, self.devices)]
        sums: list[list[Tensor]] = [[] for _ in self.devices]
        # compiled for training alone: evaluation has other sizes, and keeps outputs that CUDA graphs would overwrite;
        # and not for the empty part of a batch, for which torch compiles wrongly (2.13)
        runs = self._runs if torch.is_grad_enabled() and len(values[0]) else [column.run for column in self._columns()]
        for layers in segments:
            holding = range(layers[0].columns)
            if len(self.devices) > 1 and layers[0].groups == 1 and layers[0] is not self.layers[0]:
                values = [torch.cat([value.to(self.devices[i]) for value in values], 1) for i in holding]
            # one column after the other, so that the devices are both busy
            found = [runs[i](layers, values[i], self._masks(i, layers, masks)) for i in holding]
            values = [value for value, _ in found]
            for i, (_, each) in enumerate(found):
                sums[i].append(each)
        return values, [torch.cat(each) for each in sums]

    def _whole(self, values: Sequence[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.cat([value.to(self.devices[0]) for value in values], 1)

    def _masks(self, i: int, layers: Sequence[Layer], masks: Masks | Sequence[Masks] | None) -> list[Tensor | None]:
        """What a column needs of the masks."""
        given = masks if isinstance(masks, Mapping) or masks is None else masks[i]
        found: list[Tensor | None] = []
        for layer in layers:
            mask = given.get(layer.name) if given else None
            found.append(None if mask is None else mask[:, layer.share(i)].to(self.devices[i]))
        return found

    def _columns(self) -> list[Column]:
        return [column for column in self.columns if isinstance(column, Column)]

    def parts(self) -> list[Weights]:
        """Each column's parameters by layer."""
        return [column.weights() for column in self._columns()]

    def gathered(self, values: Sequence[Weights] | None = None) -> Weights:
        """Weights (or `values`, one dict of the same names per column) in the grouped layout: copies, on the CPU."""
        parts = values or self.parts()
        result = {}
        for name in parts[0]:
            held = [part[name].detach().to("cpu") for part in parts if name in part]
            result[name] = torch.cat(held, 0).contiguous()
        return result

    @torch.no_grad()
    def scatter(self, grouped: Weights) -> list[Weights]:
        """Tensors in the grouped layout, cut into each column's share: copies, on its device."""
        found = []
        for column, own in zip(self._columns(), self.parts()):
            shares = {layer.name: column.share(layer) for layer in self.layers}
            rows = {name: grouped[name][shares[name.partition(".")[0]]] for name in own}
            found.append({name: torch.empty_like(w).copy_(rows[name]) for name, w in own.items()})
        return found

    def load(self, weights: Weights) -> None:
        """Take over weights in the grouped layout."""
        with torch.no_grad():
            for own, part in zip(self.parts(), self.scatter(weights)):
                for name, parameter in own.items():
                    parameter.copy_(part[name])


def segments(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """The layers between exchanges: a segment begins with each layer that sees both columns."""
    starts = [0, *(i for i, layer in enumerate(layers) if i and layer.groups == 1), len(layers)]
    if layers[0].columns == 1:  # one column has nothing to exchange
        starts = [0, len(layers)]
    return [tuple(layers[start:end]) for start, end in pairwise(starts)]


def reference_precision(precision: str = "fp32") -> None:
    """What float32 products on a GPU are made of: "fp32", as in 2012; else TF32, with 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
