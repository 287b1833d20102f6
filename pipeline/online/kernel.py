"""Records → network input on a GPU, by one kernel: cut, mirrored, coloured, normalised, in the network's dtype.

The values are those of `yuv.cut` and then `normalise`, bit for bit: the same integers, the same float32 operations in
the same order, none of them contracted.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.online.yuv import BLUE, GREEN_BLUE, GREEN_RED, HALF, RED

BLOCK = 1024  # pixels of a program
OPTIONS = {"enable_fp_fusion": False}  # else a product and a difference would be rounded once, not twice
LAYOUTS = {"rgb": 0, "yuv420": 1, "pixels": 2}
RED_, GREEN_BLUE_, GREEN_RED_, BLUE_, HALF_ = (
    tl.constexpr(number) for number in (RED, GREEN_BLUE, GREEN_RED, BLUE, HALF)
)


@triton.jit
def _smooth(plane, near_row, next_row, near, following, half, rounding):  # type: ignore[no-untyped-def]
    """Return chroma at full size, by libjpeg's triangle filter."""
    column = 3 * tl.load(plane + near_row * half + near).to(tl.int32)
    column += tl.load(plane + next_row * half + near).to(tl.int32)
    beside = 3 * tl.load(plane + near_row * half + following).to(tl.int32)
    beside += tl.load(plane + next_row * half + following).to(tl.int32)
    return ((3 * column + beside + rounding) >> 4) - 128


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    records,  # (n, length) uint8
    start,  # (n, 2) int32
    flip,  # (n,) int32
    offset,  # (n, 3) float32
    factor,  # (n, 3) float32: 1/std
    deviation,  # (side, side, 3) or (size, size, 3) float32
    out,  # (n, side, side, 3)
    step,  # bytes from record to record
    size: tl.constexpr,
    side: tl.constexpr,
    layout: tl.constexpr,
    normalised: tl.constexpr,
    centred: tl.constexpr,  # 0: no deviation; 1: one for every view; 2: each view's own window of it
    block: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < side * side
    pixel = tl.minimum(pixel, side * side - 1)  # so that every address is one of the record's
    y, x = pixel // side, pixel % side
    mirrored = tl.load(flip + image)
    row = y + tl.load(start + 2 * image)
    column = tl.where(mirrored == 1, side - 1 - x, x) + tl.load(start + 2 * image + 1)
    record = records + image * step
    if layout == 1:
        half: tl.constexpr = (size + 1) // 2
        luma = tl.load(record + row * size + column).to(tl.int32)
        near_row, near = row // 2, column // 2
        next_row = tl.minimum(tl.maximum(near_row + 2 * (row % 2) - 1, 0), half - 1)
        following = tl.minimum(tl.maximum(near + 2 * (column % 2) - 1, 0), half - 1)
        plane, rounding = record + size * size, 8 - column % 2
        cb = _smooth(plane, near_row, next_row, near, following, half, rounding)
        cr = _smooth(plane + half * half, near_row, next_row, near, following, half, rounding)
        red = luma + ((cr * RED_ + HALF_) >> 16)
        green = luma + ((HALF_ - cb * GREEN_BLUE_ - cr * GREEN_RED_) >> 16)
        blue = luma + ((cb * BLUE_ + HALF_) >> 16)
        red, green, blue = (
            tl.minimum(tl.maximum(red, 0), 255),
            tl.minimum(tl.maximum(green, 0), 255),
            tl.minimum(tl.maximum(blue, 0), 255),
        )
    else:
        apart: tl.constexpr = 1 if layout == 2 else size * size  # from channel to channel
        first = record + (row * size + column) * (3 if layout == 2 else 1)
        red, green, blue = tl.load(first), tl.load(first + apart), tl.load(first + 2 * apart)
    target = out + (image * side * side + pixel) * 3
    if normalised:
        where = deviation + (pixel if centred == 1 else row * size + column) * 3
        for channel in tl.static_range(3):
            level = (red if channel == 0 else green if channel == 1 else blue).to(tl.float32)
            level = (level - tl.load(offset + 3 * image + channel)) * tl.load(factor + 3 * image + channel)
            if centred != 0:
                level -= tl.load(where + channel)
            tl.store(target + channel, level.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(target, red.to(tl.uint8), mask=inside)
        tl.store(target + 1, green.to(tl.uint8), mask=inside)
        tl.store(target + 2, blue.to(tl.uint8), mask=inside)


def views(
    records: Tensor,
    kind: str,
    size: int,
    start: Tensor,
    flip: Tensor,
    side: int,
    offset: Tensor | None,
    std: Tensor | None,
    deviation: Tensor | None,
    aligned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return views of records, (n, 3, side, side), channels last in memory; arguments as of `yuv.cut` and `normalise`.

    dtype uint8: as they are cut, without `offset`, `std` (n, 3) and `deviation`. `aligned`: the deviation is as large
    as the pictures, (size, size, 3), and each view has its own window of it, mirrored with it; else (side, side, 3).
    Each record, and every other tensor, is contiguous.
    """
    out = torch.empty((len(records), side, side, 3), dtype=dtype, device=records.device)
    if len(records):
        colours, centred = (records, records), 0  # never read
        if offset is not None and std is not None:
            colours = offset, std.reciprocal()
            centred = 0 if deviation is None else 2 if aligned else 1
        tensors = records, start, flip, *colours, records if deviation is None else deviation, out
        with torch.cuda.device_of(records):
            _kernel[(len(records), triton.cdiv(side * side, BLOCK))](
                *tensors,
                records.stride(0),
                **constants(kind, size, side, dtype, centred),
                **OPTIONS,
            )
    return out.permute(0, 3, 1, 2)


def constants(kind: str, size: int, side: int, dtype: torch.dtype, centred: int) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    normalised = dtype != torch.uint8
    return {
        "size": size,
        "side": side,
        "layout": LAYOUTS[kind],
        "normalised": normalised,
        "centred": centred if normalised else 0,
        "block": BLOCK,
    }
