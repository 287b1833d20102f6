"""An RGB picture → a smaller one, square or whole → JPEG bytes. Pure functions, shared by the builder and prediction.

What decodes raw pictures stands in pipeline/decoding.py; its names are offered here, too.
"""

import io
import math
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image, features

from pipeline.decoding import REASONS, ImageError, decode, sharing

__all__ = ["REASONS", "ImageError", "codec_versions", "decode", "encode", "padded", "rescale", "rescaled"]

CROPS = ("centre", "none")
MAX_ASPECT = 16  # of a whole picture: its rescaled longer side is at most so many times the shorter one
MAX_SIDE = 65_500  # pixels: libjpeg's


class Rules(Protocol):
    """What a build recipe (`manifest.BuildRecipe`) says of raw pictures."""

    @property
    def size(self) -> int: ...
    @property
    def crop(self) -> str: ...
    @property
    def filter(self) -> str: ...
    @property
    def exif(self) -> str: ...
    @property
    def max_bytes(self) -> int: ...
    @property
    def max_pixels(self) -> int: ...
    @property
    def max_scans(self) -> int: ...


def rescaled(data: bytes, rules: Rules) -> np.ndarray:
    """A raw picture's bytes → its pixels as a build recipe has them stored: `decode`, then `rescale`.

    Raises:
        ImageError: with the reason's code.
    """
    limits = {name: getattr(rules, name) for name in ("max_bytes", "max_pixels", "max_scans", "exif")}
    return rescale(decode(data, **limits), rules.size, rules.filter, rules.crop)


def rescale(image: Image.Image, size: int, kernel: str = "bicubic", crop: str = "centre") -> np.ndarray:
    """Bring the shorter side to `size` and cut the central square, in one resampling.

    The grid is that of the two steps: the longer side becomes int(size·long/short) and the square starts at
    int(round((that − size)/2)), as in torchvision's Resize and CenterCrop; only the pixels of the square are computed.
    `crop` "none" keeps the whole picture on that grid. `kernel` is "bicubic" (antialiased), or "area": the mean over
    each pixel's share of the raw picture, as in cuda-convnet2, where that is larger; smaller pictures are enlarged
    bicubically.

    Args:
        image: mode RGB.
    Returns:
        (size, size, 3) uint8, RGB; (height, width, 3) of a whole picture. Bicubically a view of four channels.
    Raises:
        ImageError: too_many_pixels, where a whole picture's longer side would pass `MAX_ASPECT`·size or `MAX_SIDE`.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    rescaled_long = max(size, int(size * long / short))
    start, kept = (round((rescaled_long - size) / 2), size) if crop == "centre" else (0, rescaled_long)
    if kept > min(MAX_ASPECT * size, MAX_SIDE):
        raise ImageError("too_many_pixels")
    step = long / rescaled_long  # raw pixels per rescaled pixel along the longer side
    low, high = start * step, min((start + kept) * step, float(long))
    wide = width >= height
    box = (low, 0.0, high, float(height)) if wide else (0.0, low, float(width), high)
    shape = (kept, size) if wide else (size, kept)
    if kernel == "area" and short > size:
        return _area(image, box, shape)
    pixels = np.empty((shape[1], shape[0], 4), np.uint8)
    sharing(pixels).paste(image.resize(shape, Image.Resampling.BICUBIC, box=box))  # the fastest way out of Pillow
    return pixels[..., :3]


def _area(image: Image.Image, box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """Mean over the area that each pixel of `shape` (width, height) covers of `box`: (height, width, 3) uint8.

    Weights are integers and every sum stays below 2⁵³, so that float64 is exact, every machine rounds alike, and the
    picture may come in parts.
    """
    (left, top, right, bottom), (width, height) = box, shape
    pixels = np.empty((height, width, 3), np.uint8)
    columns = [_weights(left, right, width, i, image.width) for i in range(0, width, _PART)]
    band = max(1, 2**13 // image.width)  # raw rows; so few that the BLAS starts no threads
    for i in range(0, height, _PART):
        first, rows = _weights(top, bottom, height, i, image.height)
        down = np.zeros((len(rows), image.width * 3))
        for j in range(0, rows.shape[1], band):
            weights = rows[:, j : j + band]
            raw = image.crop((0, first + j, image.width, first + j + weights.shape[1]))
            down += weights @ np.asarray(raw).reshape(weights.shape[1], -1).astype(np.float64)
        thin = down.reshape(len(rows), -1, 3)
        both = [across @ thin[:, start : start + across.shape[1]] for start, across in columns]
        pixels[i : i + _PART] = np.rint(np.concatenate(both, axis=1) / _ONE**2)
    return pixels


_ONE = 2**14  # the sum of the weights of one pixel
_PART = 8  # rescaled rows, or columns, at a time: their weights and raw pixels take little memory


def _weights(low: float, high: float, size: int, first: int, raw: int) -> tuple[int, np.ndarray]:
    """How much of each raw pixel lies in the pixels from `first` on, at most `_PART`, of `size` equal parts of
    [low, high): the first of these raw pixels, and (pixels, raw pixels) float64 integers."""
    edges = low + (high - low) / size * np.arange(first, min(first + _PART, size) + 1)
    start, stop = int(edges[0]), min(raw, math.ceil(edges[-1]))
    share = (np.arange(start, stop + 1) - edges[:-1, None]) / (edges[1:] - edges[:-1])[:, None]
    return start, np.diff(np.rint(_ONE * np.clip(share, 0.0, 1.0)), axis=1)


def padded(pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 → contiguous (height, width, 4): the array that `rescale` shows three of, or a copy.

    What stands in the fourth channel means nothing. Four bytes are how Pillow keeps RGB, and faster to go through.
    """
    shape, base = (*pixels.shape[:2], 4), pixels.base
    if isinstance(base, np.ndarray) and base.shape == shape and base.flags.c_contiguous:
        first = base[..., :3].__array_interface__
        if first == pixels.__array_interface__:
            return base
    copy = np.zeros(shape, np.uint8)
    copy[..., :3] = pixels
    return copy


def encode(pixels: np.ndarray, *, quality: int, subsampling: str) -> bytes:
    """(height, width, 3) uint8 RGB → baseline JPEG, accurate DCT, with no metadata but JFIF's.

    `subsampling` is 4:4:4, 4:2:2 or 4:2:0. By Pillow: below quality 96, simplejpeg has the fast DCT only.
    """
    out = io.BytesIO()
    sharing(padded(pixels)).save(out, "JPEG", quality=quality, subsampling=subsampling)
    return out.getvalue()


def codec_versions() -> dict[str, str]:
    """Names and versions of what decodes, resamples and encodes: other versions may give other bytes."""
    names = {"jpeg": "libjpeg_turbo", "png": "zlib", "webp": "webp", "tiff": "libtiff"}
    codecs = {"pillow-simd": Image.__version__, "simplejpeg": simplejpeg.__version__}
    return codecs | {key: str(features.version(name)) for key, name in names.items()}
