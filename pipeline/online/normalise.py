"""Views → network input, on the consumer's device: one fused kernel on a GPU."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline.online import yuv
from pipeline.online.batch import Batch, Crops, Transform, ViewBox

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "uint8")}
CHANNELS = np.array([0xFF, 0xFF00, 0xFF0000], np.int32)[:, None, None]  # of a word of RGBX, red first


def normalise(view: Tensor, offset: Tensor, std: Tensor, mean_deviation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (view − offset) · (1/std) − mean_deviation: (n, h, w, 3) uint8 → (n, 3, h, w), in memory as it was.

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


def normalise_planes(
    levels: np.ndarray,
    offset: np.ndarray,
    factor: np.ndarray,
    mean_deviation: np.ndarray | None,
    out: np.ndarray,
    planes: np.ndarray,
) -> None:
    """Write the grey levels of a view, (3, h, w) of any integers, to `out` (3, h, w) float32: `normalise` in numpy.

    `offset` and `factor` (3, 1, 1) are of the scale of the levels, as `scaled` has them; `mean_deviation` is (3, h, w),
    or None; `planes` (3, h, w) float32 is memory to compute in.
    """
    planes[...] = levels
    np.subtract(planes, offset, out=planes)
    if mean_deviation is None:
        np.multiply(planes, factor, out=out)
    else:
        np.multiply(planes, factor, out=planes)
        np.subtract(planes, mean_deviation, out=out)


def scaled(crops: Crops, in_words: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and 1/std, (n, 3, 1, 1) float32; `in_words`: of channels in their place in a word of RGBX.

    Green is there 2⁸ times its level, blue 2¹⁶ times. Powers of two change no other bit of a product or a difference.
    """
    scale = np.array([1, 2**8, 2**16] if in_words else [1, 1, 1], np.float32)
    return (crops.offset * scale)[..., None, None], (np.float32(1) / crops.std / scale)[..., None, None]


@cache
def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of this module as one kernel for any batch size; it is compiled at its first call."""
    return torch.compile(function, dynamic=True)


class Normaliser:
    """`normalise` for the batches of a recipe, split between the decoding thread and the consumer's stream.

    On a CPU the decoder has normalised each view already, unless several are cut from a picture or workers have decoded
    it (`remote`); then the decoding thread does. On a GPU the decoding thread sends what is needed, and the kernel runs
    where the images are used. `output` is a key of `DTYPES`; "uint8" leaves the views as they were cut.
    """

    def __init__(
        self, recipe: Transform, devices: tuple[torch.device, ...], output: str, size: int, remote: bool = False
    ) -> None:
        """`size`: pixels of a side of the pictures that records hold."""
        self._recipe, self._devices, self._output, self._size = recipe, devices, DTYPES[output], size
        self._on_cpu = devices[0].type == "cpu"
        self.in_decoder = self._on_cpu and not remote and not recipe.several and output != "uint8"
        self._deviations = {
            (key, device): torch.from_numpy(array).to(device)
            for key, array in recipe.mean_deviations.items()
            for device in devices
        }

    def prepare(self, batch: Batch, views: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return, in the decoding thread, what `images` needs on each device."""
        if views[0].is_floating_point():  # the decoder has done it
            return [(view.to(self._output),) for view in views]
        crops = batch.crops
        arrays = [torch.from_numpy(array) for array in (crops.offset, crops.std, crops.start, crops.flip)]
        if self._on_cpu and batch.kind:
            crop_boxes = self._size, arrays[2], arrays[3], self._recipe.decoded
            views = [yuv.cut(view, batch.kind, *crop_boxes) for view in views]
            batch.kind = ""
        if self._output == torch.uint8 and not batch.kind:
            return [(view,) for view in views]
        if self._on_cpu:
            return [(self._normalised(batch, view, arrays, view.device).contiguous(),) for view in views]
        return [(view, *(array.to(device) for array in arrays)) for view, device in zip(views, self._devices)]

    @torch.no_grad()
    def images(self, batch: Batch, tensors: tuple[Tensor, ...], device: torch.device) -> Tensor:
        """Return, in the consumer's thread and on its stream, (n, 3, view, view) or (n, views, 3, view, view)."""
        boxes, side = self._recipe.several, self._recipe.view
        pictures, *arrays = tensors
        if self._output == torch.uint8:
            if batch.kind:
                pictures = self._from_records(batch.kind, pictures, arrays)
            views = [_cut(pictures, box, side).permute(0, 3, 1, 2) for box in boxes]
            return torch.stack(views, dim=1) if boxes else pictures.permute(0, 3, 1, 2)
        return pictures if self._on_cpu else self._normalised(batch, pictures, arrays, device)

    @torch.no_grad()
    def _normalised(self, batch: Batch, pictures: Tensor, arrays: list[Tensor], device: torch.device) -> Tensor:
        boxes, side, aligned = self._recipe.several, self._recipe.view, self._recipe.aligned
        offset, std, start, flip = arrays
        deviation = self._deviations.get((self._recipe.divisor(batch.step), device))
        if batch.kind and not boxes:
            from pipeline.online import kernel  # needs Triton, which torch has where it has CUDA

            crops = self._size, start, flip, side
            return kernel.views(pictures, batch.kind, *crops, offset, std, deviation, aligned, self._output)
        if batch.kind:
            pictures = self._from_records(batch.kind, pictures, arrays)
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

    def _from_records(self, kind: str, records: Tensor, arrays: list[Tensor]) -> Tensor:
        """Return what a decoder would give of a GPU's records: views, or whole pictures, (n, h, w, 3) uint8."""
        from pipeline.online import kernel

        _, _, start, flip = arrays
        crops = self._size, start, flip, self._recipe.decoded
        views = kernel.views(records, kind, *crops, None, None, None, False, torch.uint8)
        return views.permute(0, 2, 3, 1)


def _cut(images: Tensor, box: ViewBox, side: int) -> Tensor:
    """Cut a view (…, side, side, 3) out of pictures, or of the mean deviation, (…, size, size, 3)."""
    top, left, flip = box
    view = images[..., top : top + side, left : left + side, :]
    return view.flip(-2) if flip else view
