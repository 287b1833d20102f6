"""Views → network input, on the consumer's device: one fused kernel on a GPU."""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline.online.sequence import Prepared
from pipeline.online.windows import Recipe, Windows

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "uint8")}


def normalise(view: Tensor, offset: Tensor, std: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(n, h, w, 3) uint8 → network input (n, 3, h, w), channels last in memory: (view − offset) · (1/std) − rest.

    `offset` and `std` (n, 3) float32 in grey levels; `rest` (h, w, 3) or (n, h, w, 3) float32, or None. The arithmetic
    is float32, in this order; `augment.reference_normalise` is its oracle. Rounded to `dtype` at the end.
    """
    x = view.to(torch.float32).sub_(offset[:, None, None, :]).mul_((1 / std)[:, None, None, :])
    if rest is not None:
        x.sub_(rest)
    return x.permute(0, 3, 1, 2).to(dtype)


def normalise_aligned(
    view: Tensor, offset: Tensor, std: Tensor, rest: Tensor, dtype: torch.dtype, start: Tensor, flip: Tensor
) -> Tensor:
    """`normalise`, where `rest` (size, size, 3) has a window for each view, at `start` (n, 2), flipped with it (n,)."""
    along = torch.arange(view.shape[1], device=view.device)
    rows = start[:, :1] + along
    columns = start[:, 1:] + torch.where(flip[:, None] == 1, view.shape[1] - 1 - along, along)
    return normalise(view, offset, std, rest[rows[:, :, None], columns[:, None, :]], dtype)


@cache
def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of this module as one kernel, whatever the batch size; compiled when it is first called."""
    return torch.compile(function, dynamic=True)


class Normaliser:
    """`normalise` for the batches of a recipe, split between the decoding thread and the consumer's stream.

    On a CPU the decoding thread does all of it: the graph has subtracted and divided already (`in_graph`), and only
    `rest` is left. On a GPU that thread sends what is needed, and the kernel runs where the images are used.

    Args:
        output: a key of `DTYPES`; "uint8" leaves the views as they were cut.
    """

    def __init__(self, recipe: Recipe, devices: tuple[torch.device, ...], output: str) -> None:
        self._recipe, self._devices, self._output = recipe, devices, DTYPES[output]
        self.in_graph = devices[0].type == "cpu" and not recipe.several and output != "uint8"
        # what the recipe gave as `rest`, by identity, and the same as planes (3, h, w) and on devices
        self._planes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._rests: dict[tuple[int, torch.device], tuple[np.ndarray, Tensor]] = {}

    def prepare(self, batch: Prepared, views: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """In the decoding thread: what `images` needs on each device."""
        if self._output == torch.uint8:
            return [(view,) for view in views]
        if self.in_graph:
            rest = self._recipe.rest(batch.step)
            if rest is not None and len(batch.ids):
                if id(rest) not in self._planes:
                    self._planes[id(rest)] = rest, np.ascontiguousarray(rest.transpose(2, 0, 1))
                _, planes = self._planes[id(rest)]
                for view in views:
                    subtract_rest(view.numpy(), planes, batch.windows, self._recipe.aligned)
            return [(view.to(self._output),) for view in views]
        windows = batch.windows
        arrays = [windows.offset, windows.std, windows.start, windows.flip]
        return [(view, *(_sent(array, device) for array in arrays)) for view, device in zip(views, self._devices)]

    @torch.no_grad()
    def images(self, step: int, tensors: tuple[Tensor, ...], device: torch.device) -> Tensor:
        """In the consumer's thread, on its stream: (n, 3, view, view), or (n, views, 3, view, view)."""
        if self._output == torch.uint8:
            if not self._recipe.several:
                return tensors[0].permute(0, 3, 1, 2)
            return torch.stack([one.permute(0, 3, 1, 2) for one, _ in cut(tensors[0], None, self._recipe)], dim=1)
        if self.in_graph:
            return tensors[0]
        view, offset, std, start, flip = tensors
        rest = self._rest(step, device)
        if self._recipe.several:
            pairs = cut(view, rest, self._recipe)
            return torch.stack([normalise(one, offset, std, own, self._output) for one, own in pairs], dim=1)
        if self._recipe.aligned:
            return _on(device, normalise_aligned)(view, offset, std, rest, self._output, start, flip)
        return _on(device, normalise)(view, offset, std, rest, self._output)

    def _rest(self, step: int, device: torch.device) -> Tensor | None:
        rest = self._recipe.rest(step)
        if rest is None:
            return None
        key = (id(rest), device)
        if key not in self._rests:
            self._rests[key] = rest, torch.from_numpy(rest).to(device)
        return self._rests[key][1]


def _on(device: torch.device, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return fused(function) if device.type == "cuda" else function


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device)


def cut(images: Tensor, rest: Tensor | None, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(n, size, size, 3) → the recipe's several views of each picture, one after the other: (n, view, view, 3).

    With each comes what is subtracted at last, (view, view, 3): its own window of `rest` if aligned, else `rest`.
    """
    aligned, side = recipe.aligned, recipe.view
    for top, left, flip in recipe.several:
        inside = (slice(top, top + side), slice(left, left + side))
        view, own = images[:, *inside], rest[inside] if aligned and rest is not None else rest
        if flip:
            view, own = view.flip(2), own.flip(1) if aligned and own is not None else own
        yield view, own


def subtract_rest(views: np.ndarray, rest: np.ndarray, windows: Windows, aligned: bool) -> None:
    """The last step of `normalise` alone, in place, of (n, 3, h, w) float32 views.

    `rest` is (3, h, w); or if aligned (3, size, size), of which each view has its own window, flipped with it.
    """
    side = views.shape[2]
    if not aligned:
        np.subtract(views, rest, out=views)
        return
    for view, (top, left), flip in zip(views, windows.start.tolist(), windows.flip.tolist()):
        own = rest[:, top : top + side, left : left + side]
        np.subtract(view, own[:, :, ::-1] if flip else own, out=view)
