"""Views → network input, on the consumer's device: one fused kernel on a GPU."""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline.online.batch import Batch, Crops, Recipe

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "uint8")}


def normalise(view: Tensor, offset: Tensor, std: Tensor, mean_deviation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (view − offset) · (1/std) − mean_deviation: (n, h, w, 3) uint8 → (n, 3, h, w), channels last in memory.

    `offset` and `std` (n, 3) float32 in grey levels; `mean_deviation` (h, w, 3) or (n, h, w, 3) float32, or None. The
    arithmetic is float32, in this order, rounded to `dtype` at the end; `augment.reference_normalise` is its oracle.
    """
    x = view.to(torch.float32).sub_(offset[:, None, None, :]).mul_((1 / std)[:, None, None, :])
    if mean_deviation is not None:
        x.sub_(mean_deviation)
    return x.permute(0, 3, 1, 2).to(dtype)


def normalise_aligned(
    view: Tensor, offset: Tensor, std: Tensor, mean_deviation: Tensor, dtype: torch.dtype, start: Tensor, flip: Tensor
) -> Tensor:
    """`normalise` with each view's own box of `mean_deviation` (size, size, 3), at `start` (n, 2) and flipped (n,)."""
    along = torch.arange(view.shape[1], device=view.device)
    rows = start[:, :1] + along
    columns = start[:, 1:] + torch.where(flip[:, None] == 1, view.shape[1] - 1 - along, along)
    return normalise(view, offset, std, mean_deviation[rows[:, :, None], columns[:, None, :]], dtype)


@cache
def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of this module as one kernel for any batch size; it is compiled at its first call."""
    return torch.compile(function, dynamic=True)


class Normaliser:
    """`normalise` for the batches of a recipe, split between the decoding thread and the consumer's stream.

    On a CPU the decoding thread does all of it: the graph has subtracted and divided already (`in_graph`), and only the
    mean deviation is left. On a GPU that thread sends what is needed, and the kernel runs where the images are used.

    Args:
        output: a key of `DTYPES`; "uint8" leaves the views as they were cut.
    """

    def __init__(self, recipe: Recipe, devices: tuple[torch.device, ...], output: str) -> None:
        self._recipe, self._devices, self._output = recipe, devices, DTYPES[output]
        self.in_graph = devices[0].type == "cpu" and not recipe.several and output != "uint8"
        sources = recipe.mean_deviations.items()
        self._planes = {key: np.ascontiguousarray(array.transpose(2, 0, 1)) for key, array in sources}
        self._deviations = {
            (key, device): torch.from_numpy(array).to(device) for key, array in sources for device in devices
        }

    def prepare(self, batch: Batch, views: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return, in the decoding thread, what `images` needs on each device."""
        if self._output == torch.uint8:
            return [(view,) for view in views]
        assert batch.crops is not None
        crops = batch.crops
        if self.in_graph:
            planes = self._planes.get(self._recipe.divisor(batch.step))
            if planes is not None and len(crops):
                for view in views:
                    subtract_deviation(view.numpy(), planes, crops, self._recipe.aligned)
            return [(view.to(self._output),) for view in views]
        arrays = [crops.offset, crops.std, crops.start, crops.flip]
        return [(view, *(_sent(array, device) for array in arrays)) for view, device in zip(views, self._devices)]

    @torch.no_grad()
    def images(self, step: int, tensors: tuple[Tensor, ...], device: torch.device) -> Tensor:
        """Return, in the consumer's thread and on its stream, (n, 3, view, view) or (n, views, 3, view, view)."""
        if self._output == torch.uint8:
            if not self._recipe.several:
                return tensors[0].permute(0, 3, 1, 2)
            return torch.stack([one.permute(0, 3, 1, 2) for one, _ in cut(tensors[0], None, self._recipe)], dim=1)
        if self.in_graph:
            return tensors[0]
        view, offset, std, start, flip = tensors
        mean_deviation = self._deviations.get((self._recipe.divisor(step), device))
        if self._recipe.several:
            pairs = cut(view, mean_deviation, self._recipe)
            return torch.stack([normalise(one, offset, std, own, self._output) for one, own in pairs], dim=1)
        if self._recipe.aligned:
            return _on(device, normalise_aligned)(view, offset, std, mean_deviation, self._output, start, flip)
        return _on(device, normalise)(view, offset, std, mean_deviation, self._output)


def _on(device: torch.device, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return fused(function) if device.type == "cuda" else function


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device)


def cut(images: Tensor, mean_deviation: Tensor | None, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the recipe's several views of each picture of (n, size, size, 3), one after the other: (n, view, view, 3).

    Each comes with its mean deviation (view, view, 3): its own box of `mean_deviation` if aligned, else all of it.
    """
    aligned, side = recipe.aligned, recipe.view
    for top, left, flip in recipe.several:
        inside = (slice(top, top + side), slice(left, left + side))
        view, own = (
            images[:, *inside],
            mean_deviation[inside] if aligned and mean_deviation is not None else mean_deviation,
        )
        if flip:
            view, own = view.flip(2), own.flip(1) if aligned and own is not None else own
        yield view, own


def subtract_deviation(views: np.ndarray, mean_deviation: np.ndarray, crops: Crops, aligned: bool) -> None:
    """Subtract, in place, from (n, 3, h, w) float32 views: the last step of `normalise` alone.

    `mean_deviation` is (3, h, w); or if aligned (3, size, size), of which each view has its own box, flipped with it.
    """
    side = views.shape[2]
    if not aligned:
        np.subtract(views, mean_deviation, out=views)
        return
    for view, (top, left), flip in zip(views, crops.start.tolist(), crops.flip.tolist()):
        own = mean_deviation[:, top : top + side, left : left + side]
        np.subtract(view, own[:, :, ::-1] if flip else own, out=view)
