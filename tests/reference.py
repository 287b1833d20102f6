"""Plain oracles: the same results by the shortest road, independent of the code under test."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image
from torch import nn


def two_step_rescale(image: Image.Image, size: int) -> np.ndarray:
    """torchvision's Resize(size, BICUBIC, antialias) and CenterCrop(size), by Pillow, as two steps."""
    width, height = image.size
    if width <= height:
        shape = (size, int(size * height / width))
    else:
        shape = (int(size * width / height), size)
    resized = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def jpeg_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png(
    width: int, height: int, colour: int, depth: int = 8, *, interlaced: bool = False, chunks: bytes = b""
) -> bytes:
    """A PNG of equal pixels, every sample byte 129, by its specification, row by row: no picture is ever in memory.

    `colour` is PNG's type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; `chunks` stand before the data.
    """
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    whole = [(0, 0, 1, 1)]
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    deflate, data = zlib.compressobj(1), bytearray()
    for x, y, step_x, step_y in adam7 if interlaced else whole:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        for _ in range(rows if columns > 0 else 0):
            data += deflate.compress(b"\0" + b"\x81" * (-(-columns * samples * depth // 8)))
    data += deflate.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = png_chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    parts = png_chunk(b"IHDR", head), palette, chunks, png_chunk(b"IDAT", bytes(data)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff_directory(tags: int, kind: int, count: int) -> bytes:
    """A TIFF directory of so many tags, each of `count` values of type `kind`, all of them the same bytes."""
    entries = b"".join(struct.pack("<HHII", 1000 + i, kind, count, 0) for i in range(tags))
    return b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4)


def plain_alexnet(maps: tuple[int, ...], units: tuple[int, ...], classes: int) -> nn.Sequential:
    """The 2012 network from torch's own layers (evaluation; dropout's factor ½ stands in `Half`)."""

    class ColumnLRN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lrn = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.lrn(half) for half in x.chunk(2, dim=1)], 1)

    class SameMap(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            patches = nn.functional.unfold(x.flatten(0, 1)[:, None] ** 2, 5, padding=2).sum(1)
            return x * (1 + 0.001 / 25 * patches.view_as(x)) ** -0.75

    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    pool = nn.MaxPool2d(3, 2)
    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)), nn.Conv2d(3, maps[0], 11, 4), ColumnLRN(), pool, nn.ReLU(),
        nn.Conv2d(maps[0], maps[1], 5, 1, 2, groups=2), nn.ReLU(), ColumnLRN(), SameMap(), pool,
        nn.Conv2d(maps[1], maps[2], 3, 1, 1), nn.ReLU(),
        nn.Conv2d(maps[2], maps[3], 3, 1, 1, groups=2), nn.ReLU(),
        nn.Conv2d(maps[3], maps[4], 3, 1, 1, groups=2), nn.ReLU(), pool, nn.Flatten(),
        nn.Linear(maps[4] * 36, units[0]), nn.ReLU(), Half(),
        nn.Linear(units[0], units[1]), nn.ReLU(), Half(),
        nn.Linear(units[1], classes),
    )  # fmt: skip


def load_plain(network: nn.Sequential, weights: dict[str, torch.Tensor]) -> None:
    """Put weights named by layer (conv1 … fc8) into `plain_alexnet`, in order."""
    layers = [layer for layer in network if isinstance(layer, nn.Conv2d | nn.Linear)]
    names = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    with torch.no_grad():
        for name, layer in zip(names, layers, strict=True):
            layer.weight.copy_(weights[f"{name}.weight"])
            assert layer.bias is not None
            layer.bias.copy_(weights[f"{name}.bias"])


def philox_words(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 on Python integers, word by word."""
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c
