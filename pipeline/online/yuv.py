"""Records → views, by libjpeg's own integer arithmetic: the pixels of its decoder. `kernel` does the same on a GPU."""

import torch
from torch import Tensor

# A pixel's levels by ITU-T T.871 in units of 2⁻¹⁶, as libjpeg rounds them (jdcolor.c), with Cb and Cr less 128.
RED, GREEN_BLUE, GREEN_RED, BLUE = 91_881, 22_554, 46_802, 116_130  # 1.402, 0.34414, 0.71414, 1.772
HALF = 1 << 15


def cut(records: Tensor, kind: str, size: int, start: Tensor, flip: Tensor, side: int) -> Tensor:
    """Cut a view out of each record, (n, bytes) uint8 → (n, side, side, 3) uint8, RGB, in planes in memory.

    `kind` is one of `records.KINDS`, or "pixels": rows of RGB, as a GPU's JPEG decoder gives whole pictures. `size` is
    the side of the pictures in pixels, 5 or more; `start` (n, 2) top and left of each view, `flip` (n,) 1 where it is
    mirrored. Any device will do, but the host reads `start` and `flip`.
    """
    views = torch.empty((len(records), 3, side, side), dtype=torch.uint8, device=records.device)
    for view, record, (top, left), mirrored in zip(views, records, start.tolist(), flip.tolist()):
        rows, columns = slice(top, top + side), slice(left, left + side)
        if kind == "yuv420":
            planes = _colours(record, size, top, left, side)
        elif kind == "rgb":
            planes = record.view(3, size, size)[:, rows, columns]
        else:
            planes = record.view(size, size, 3)[rows, columns].permute(2, 0, 1)
        view.copy_(planes.flip(-1) if mirrored else planes)
    return views.permute(0, 2, 3, 1)


def _colours(record: Tensor, size: int, top: int, left: int, side: int) -> Tensor:
    """Return a window of a record of kind "yuv420", (3, side, side) int32 from 0 to 255."""
    half = (size + 1) // 2
    luma = record[: size * size].view(size, size)[top : top + side, left : left + side].to(torch.int32)
    chroma = _enlarged(record[size * size :].view(2, half, half), top, left, side)
    blue, red = chroma.to(torch.int32).sub_(128)
    green = (red * -GREEN_RED).sub_(blue * GREEN_BLUE)
    return torch.stack([red * RED, green, blue * BLUE]).add_(HALF).bitwise_right_shift_(16).add_(luma).clamp_(0, 255)


def _enlarged(planes: Tensor, top: int, left: int, side: int) -> Tensor:
    """Return a window of planes (2, half, half) at twice their size, (2, side, side) int16: libjpeg's smooth chroma.

    A pixel has ¾ of the nearest sample and ¼ of the next one, first down, then across; at an edge these are one. Of
    two pixels next to each other the left one is rounded up in a tie, the right one down (jdsample.c).
    """
    tall, wide = (
        torch.arange(first // 2 - 1, (first + side - 1) // 2 + 2, device=planes.device).clamp_(0, planes.shape[1] - 1)
        for first in (top, left)
    )
    samples = planes.index_select(1, tall).index_select(2, wide).to(torch.int16)
    near = samples[:, 1:-1] * 3
    down = torch.stack([near + samples[:, :-2], near + samples[:, 2:]], dim=2).flatten(1, 2)
    near = down[:, :, 1:-1] * 3
    across = torch.stack([near + down[:, :, :-2] + 8, near + down[:, :, 2:] + 7], dim=3).flatten(2, 3)
    return across[:, top % 2 :, left % 2 :][:, :side, :side].bitwise_right_shift(4)
