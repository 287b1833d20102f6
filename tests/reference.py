"""Plain oracles: the same results by the shortest road, independent of the code under test."""

import io
import itertools
import struct
import zlib
from collections import OrderedDict

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


def view_places(end: int) -> dict[str, list[tuple[int, int, int]]]:
    """Return by views the top and the left of each, and the step along a row; `end` is the greatest of a corner."""
    middle = end // 2
    corners = [(0, 0), (0, end), (middle, middle), (end, 0), (end, end)]
    return {
        "centre": [(middle, middle, 1)],
        "ten": [(*corner, step) for step in (1, -1) for corner in corners],
        "nine": [(*corner, 1) for corner in itertools.product((0, middle, end), repeat=2)],
    }


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


class ColumnLRN(nn.Module):
    """torch's normalisation, which divides alpha by the window, in each column."""

    def __init__(self, columns: int, alpha: float = 1e-4, k: float = 2.0) -> None:
        super().__init__()
        self.columns, self.lrn = columns, nn.LocalResponseNorm(5, alpha=alpha, beta=0.75, k=k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.lrn(part) for part in x.chunk(self.columns, dim=1)], 1)


class SameMap(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(x.flatten(0, 1)[:, None] ** 2, 5, padding=2).sum(1)
        return x * (1 + 0.001 / 25 * patches.view_as(x)) ** -0.75


class Halving(nn.Module):
    """The paper's dropout: a mask in training, half of the value in testing."""

    mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2 if self.mask is None else x * self.mask


class PlainLocal(nn.Module):
    """3 × 3, padding 1, unshared: a convolution of one place for every place."""

    def __init__(self, seen: int, width: int, side: int) -> None:
        super().__init__()
        self.side, self.weight = side, nn.Parameter(torch.zeros(width, seen, 3, 3, side, side))
        self.bias = nn.Parameter(torch.zeros(width, side, side))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, rows = nn.functional.pad(x, (1, 1, 1, 1)), []
        for i in range(self.side):
            one = [
                nn.functional.conv2d(x[:, :, i : i + 3, j : j + 3], self.weight[..., i, j], self.bias[:, i, j])
                for j in range(self.side)
            ]
            rows.append(torch.cat(one, 3))
        return torch.cat(rows, 2)


class PlainHalves(nn.Module):
    """Either half of the inputs gives half of the outputs, the second of an odd number one more."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(outputs, inputs // 2)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half, seen = len(self.bias) // 2, self.weight.shape[1]
        first = nn.functional.linear(x[:, :seen], self.weight[:half], self.bias[:half])
        return torch.cat([first, nn.functional.linear(x[:, seen:], self.weight[half:], self.bias[half:])], 1)


def plain_network(name: str, classes: int, side: int = 3) -> nn.Sequential:
    """A recipe's network at the widths of `networks.WIDTHS` from torch's own layers, written out, in evaluation.

    `side` is that of the last maps: 6 of an image of 224 pixels; of one of 100, 3, or 2 of pools that do not overlap.
    """
    apart = name == "without-overlap"
    relu, pool = nn.Tanh() if name == "tanh" else nn.ReLU(), nn.MaxPool2d(2 if apart else 3, 2, ceil_mode=True)
    conv, linear, columns = nn.Conv2d, nn.Linear, 1 if name == "half" else 2
    overhang, lrn = nn.ZeroPad2d((0, 3, 0, 3)), ColumnLRN(columns)
    conv1, conv2 = ("conv1", conv(3, 8, 11, 4)), ("conv2", conv(8, 16, 5, 1, 1 if apart else 2, groups=columns))
    middle = [
        ("conv3", conv(16, 24, 3, 1, 1)), relu, ("conv4", conv(24, 24, 3, 1, 1, groups=columns)), relu,
        ("conv5", conv(24, 16, 3, 1, 0 if apart else 1, groups=columns)), relu, pool,
    ]  # fmt: skip
    head = [
        nn.Flatten(), ("fc6", linear(16 * side**2, 64)), relu, Halving(), ("fc7", linear(64, 48)), relu, Halving(),
    ]  # fmt: skip
    fc8 = ("fc8", linear(48, classes))
    first = [overhang, conv1, lrn, pool, relu, conv2, relu, lrn, SameMap(), pool]
    if name in ("original", "half", "tanh", "without-overlap"):
        return _sequence(*first, *middle, *head, fc8)
    if name == "paper":
        literal = ColumnLRN(2, alpha=5e-4)
        return _sequence(overhang, conv1, relu, literal, pool, conv2, relu, literal, pool, *middle, *head, fc8)
    if name in ("pretrain-2011", "halves"):
        conv6, bottleneck = ("conv6", conv(16, 16, 3, 1, 1)), ("bottleneck", linear(48, 20))
        last = (PlainHalves if name == "halves" else linear)(20, classes)
        return _sequence(*first, *middle, conv6, relu, *head, bottleneck, ("fc8", last))
    mean = nn.AvgPool2d(3, 2, ceil_mode=True)
    small = ("conv1", conv(3, 8, 5, 1, 2)), ("conv2", conv(8, 16, 5, 1, 2))
    if name == "figure1-relu":
        conv3 = ("conv3", conv(16, 24, 5, 1, 2))
        last = nn.Flatten(), ("fc10", linear(24 * side**2, classes))
        return _sequence(small[0], pool, relu, small[1], relu, mean, conv3, relu, mean, *last)
    norm = {"cifar-11": [ColumnLRN(1, alpha=1e-3, k=1.0)], "cifar-13": []}[name]
    convolutions = small[0], relu, *norm, pool, small[1], relu, *norm, pool
    local = ("local3", PlainLocal(16, 6, 6)), relu, ("local4", PlainLocal(6, 4, 6)), relu
    return _sequence(*convolutions, *local, nn.Flatten(), ("fc10", linear(4 * 36, classes)))


def _sequence(*layers: nn.Module | tuple[str, nn.Module]) -> nn.Sequential:
    """Layers with weights by their names, the others by their places."""
    named = [layer if isinstance(layer, tuple) else (f"{i}", layer) for i, layer in enumerate(layers)]
    return nn.Sequential(OrderedDict(named))


def philox_words(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 on Python integers, word by word."""
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c
