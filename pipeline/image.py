"""Rescales an RGB picture, square or whole, and encodes it as JPEG. Pure functions of the builder and prediction.

Pixels are (height, width, 4) uint8, C-contiguous, RGBX: X is padding; libjpeg-turbo reads RGBX directly, Pillow keeps
RGB so, and 4-byte pixels vectorise.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, features

from pipeline.decode import HELD_BYTES, ImageError, as_image, decode
from pipeline.manifest import BuildRecipe

MAX_ASPECT = 16  # of a whole picture: its rescaled longer side is at most so many times the shorter one
MAX_SIDE = 65_500  # pixels: libjpeg's
_ONE = 2**14  # the sum of the weights of one pixel
_PART = 8  # rescaled rows, or columns, at a time: their weights and raw pixels take little memory


def rescaled(data: bytes, recipe: BuildRecipe, warn: Callable[[str], object] = lambda warning: None) -> np.ndarray:
    """Return the pixels that `recipe` stores of a raw picture, RGBX. Raises ImageError with the reason's code.

    `warn` is called where `decode` calls it.
    """
    limits = {name: getattr(recipe, name) for name in ("max_bytes", "max_pixels", "max_scans", "exif")}
    return rescale(decode(data, **limits, warn=warn), recipe.size, recipe.filter, recipe.crop, len(data))


def rescale(image: Image.Image, size: int, kernel: str = "bicubic", crop: str = "centre", held: int = 0) -> np.ndarray:
    """Bring the shorter side to `size` and cut the central square, in one resampling.

    The grid is that of the two steps: the longer side becomes int(size·long/short) and the square starts at
    int(round((that − size)/2)), as in torchvision's Resize and CenterCrop; only the pixels of the square are computed.
    `crop` "none" keeps the whole picture on that grid. `kernel` is "bicubic" (antialiased), or "area": the mean over
    each pixel's share of a larger raw picture, as in cuda-convnet2; smaller pictures are enlarged bicubically.
    `held` are the bytes that the caller holds of the picture's file.

    Returns:
        (size, size, 4) uint8, RGBX; (height, width, 4) of a whole picture.
    Raises:
        ImageError: too_many_pixels, where a whole picture's longer side would pass `MAX_ASPECT`·size or `MAX_SIDE`, or
            the pictures at the peak pass `HELD_BYTES`.
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
    by_area = kernel == "area" and short > size
    rows = 0 if by_area else math.ceil(box[3] - box[1])  # of Pillow's picture between its two passes
    peak = width * height + max(shape[0] * (rows + shape[1]), 2 * shape[0] * shape[1])  # 2: the result is copied
    if 4 * peak + held > HELD_BYTES:
        raise ImageError("too_many_pixels")
    if by_area:
        return _area(image, box, shape)
    return pixels_of(image.resize(shape, Image.Resampling.BICUBIC, box=box))


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return a copy of an RGB image's pixels, RGBX."""
    pixels = np.empty((image.height, image.width, 4), np.uint8)
    as_image(pixels).paste(image)  # the fastest way out of Pillow
    return pixels


def _area(image: Image.Image, box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """Return the mean over the area of `box` that each pixel of `shape` (width, height) covers, RGBX.

    Weights are integers and every sum stays below 2⁵³, so that float64 is exact, every machine rounds alike, and the
    picture may come in parts.
    """
    (left, top, right, bottom), (width, height) = box, shape
    pixels = np.empty((height, width, 4), np.uint8)
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
        pixels[i : i + _PART, :, :3] = np.rint(np.concatenate(both, axis=1) / _ONE**2)
    return pixels


def _weights(low: float, high: float, size: int, first: int, raw: int) -> tuple[int, np.ndarray]:
    """Return the shares of raw pixels in at most `_PART` rescaled pixels, from the pixel `first` on.

    Of the `raw` pixels of a side, the part from `low` to `high` is divided into `size` equal pixels. Returns the first
    raw pixel with a share, and (rescaled pixels, raw pixels) float64 integers.
    """
    edges = low + (high - low) / size * np.arange(first, min(first + _PART, size) + 1)
    start, stop = int(edges[0]), min(raw, math.ceil(edges[-1]))
    share = (np.arange(start, stop + 1) - edges[:-1, None]) / (edges[1:] - edges[:-1])[:, None]
    return start, np.diff(np.rint(_ONE * np.clip(share, 0.0, 1.0)), axis=1)


def encode(pixels: np.ndarray, *, quality: int, subsampling: str) -> bytes:
    """Encode RGBX pixels as baseline JPEG, accurate DCT, with no metadata but JFIF's.

    `subsampling` is 4:4:4, 4:2:2 or 4:2:0. By Pillow: below quality 96, simplejpeg has the fast DCT only.
    """
    out = io.BytesIO()
    as_image(pixels).save(out, "JPEG", quality=quality, subsampling=subsampling)
    return out.getvalue()


def codec_versions() -> dict[str, str]:
    """Return the versions of what decodes, resamples and encodes: other versions may give other bytes."""
    names = {"jpeg": "libjpeg_turbo", "png": "zlib", "webp": "webp", "tiff": "libtiff"}
    codecs = {"pillow-simd": Image.__version__, "simplejpeg": simplejpeg.__version__}
    return codecs | {key: str(features.version(name)) for key, name in names.items()}
