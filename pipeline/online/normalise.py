"""Views → network input, on the consumer's device: one fused kernel on a GPU."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline.online.batch import Batch, Crops, Recipe, ViewBox

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
    `output` is a key of `DTYPES`; "uint8" leaves the views as they were cut.
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
        crops = batch.crops
        if self._output == torch.uint8:
            return [(view,) for view in views]
        if self.in_graph:
            planes = self._planes.get(self._recipe.divisor(batch.step))
            if planes is not None:
                for view in views:
                    subtract_deviation(view.numpy(), planes, crops, self._recipe.aligned)
            return [(view.to(self._output),) for view in views]
        arrays = [torch.from_numpy(array) for array in (crops.offset, crops.std, crops.start, crops.flip)]
        return [(view, *(array.to(device) for array in arrays)) for view, device in zip(views, self._devices)]

    @torch.no_grad()
    def images(self, step: int, tensors: tuple[Tensor, ...], device: torch.device) -> Tensor:
        """Return, in the consumer's thread and on its stream, (n, 3, view, view) or (n, views, 3, view, view)."""
        boxes, side, aligned = self._recipe.several, self._recipe.view, self._recipe.aligned
        pictures, *arrays = tensors
        if self._output == torch.uint8:
            views = [_cut(pictures, box, side).permute(0, 3, 1, 2) for box in boxes]
            return torch.stack(views, dim=1) if boxes else pictures.permute(0, 3, 1, 2)
        if self.in_graph:
            return pictures
        offset, std, start, flip = arrays
        deviation = self._deviations.get((self._recipe.divisor(step), device))
        if boxes:
            views = []
            for box in boxes:
                own = _cut(deviation, box, side) if aligned and deviation is not None else deviation
                views.append(normalise(_cut(pictures, box, side), offset, std, own, self._output))
            return torch.stack(views, dim=1)
        function: Callable[..., Tensor] = normalise_aligned if aligned else normalise
        crop_boxes = (start, flip) if aligned else ()
        run = fused(function) if device.type == "cuda" else function
        return run(pictures, offset, std, deviation, self._output, *crop_boxes)


def _cut(images: Tensor, box: ViewBox, side: int) -> Tensor:
    """Cut a view (…, side, side, 3) out of pictures, or of the mean deviation, (…, size, size, 3)."""
    top, left, flip = box
    view = images[..., top : top + side, left : left + side, :]
    return view.flip(-2) if flip else view


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
