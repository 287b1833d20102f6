"""Bytes of any picture → a square RGB picture → JPEG bytes. Pure functions, shared by the builder and by prediction."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from pipeline.errors import UserError

# Why a picture is left out: a closed list, so that reasons can be counted and compared between builds.
REASONS = {
    "empty": "the file has no bytes",
    "too_many_bytes": "more bytes than max_bytes",
    "too_many_pixels": "more pixels than max_pixels",
    "too_many_scans": "a JPEG with more scans than max_scans",
    "unrecognised": "no picture format that we read",
    "truncated": "the data ends before the picture does",
    "corrupt": "the decoder rejects the data",
    "unsupported": "a pixel type that is not converted to RGB (floating point, CIELAB)",
}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What Pillow's format plugins raise on bad data (they parse with struct, zlib and plain indexing).
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageError(UserError):
    """A picture that cannot be used. `code` is a key of `REASONS`."""

    def __init__(self, code: str) -> None:
        assert code in REASONS, code
        super().__init__(f"{code}: {REASONS[code]}")
        self.code = code


def decode(data: bytes, *, max_bytes: int, max_pixels: int, max_scans: int, exif: str = "ignore") -> Image.Image:
    """Decode the first frame of a picture in any of `FORMATS`, whatever its file name says.

    CMYK and YCCK are converted, palettes resolved, transparency put over white, 16-bit grey scaled to 8 bits. Colour
    profiles are ignored, and so is the EXIF orientation, as torchvision and the original do, unless `exif` is "apply".
    Limits are counts, so that the verdict is the same on every machine.

    Returns:
        An image of mode RGB.
    Raises:
        ImageError: with the reason's code.
    """
    if not data:
        raise ImageError("empty")
    if len(data) > max_bytes:
        raise ImageError("too_many_bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of metadata that we do not read
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError("unrecognised") from error
        except Image.DecompressionBombError as error:
            raise ImageError("too_many_pixels") from error
        except _DECODER_ERRORS as error:
            raise ImageError("corrupt") from error
        if image.width * image.height > max_pixels:
            raise ImageError("too_many_pixels")
        if image.format in ("JPEG", "MPO") and count_scans(data, max_scans + 1) > max_scans:
            raise ImageError("too_many_scans")  # libjpeg's time grows with pixels × scans
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image) if exif == "apply" else image)
        except _DECODER_ERRORS as error:
            if isinstance(error, ImageError):
                raise
            short = isinstance(error, EOFError) or "truncated" in str(error)
            raise ImageError("truncated" if short else "corrupt") from error


def count_scans(jpeg: bytes, limit: int) -> int:
    """The scans of a JPEG's first picture, at most `limit`: its segments are walked, not searched for FF DA."""
    scans, place = 0, 2
    while scans < limit and (found := _MARKER.search(jpeg, place)):
        marker = found.group()[-1]
        if marker == 0xD9:  # end of image; what follows is another picture, or no picture
            break
        scans += marker == 0xDA  # start of scan; what follows its header is searched for the next marker
        standalone = marker == 0x01
        length = 0 if standalone else int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
        place = found.end() + length
    return scans


_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # not a stuffed FF 00, not one of the restarts D0 … D7


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "LAB"):
        raise ImageError("unsupported")
    if image.mode in _SIXTEEN_BIT:
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def rescale(image: Image.Image, size: int, kernel: str = "bicubic") -> np.ndarray:
    """Bring the shorter side to `size` and cut the central square, in one resampling.

    The grid is that of the two steps: the longer side becomes int(size·long/short) and the square starts at
    int(round((that − size)/2)), as in torchvision's Resize and CenterCrop; only the pixels of the square are computed.
    `kernel` is "bicubic" (antialiased), or "area": the mean over each pixel's share of the raw picture, as in
    cuda-convnet2, where that is larger; smaller pictures are enlarged bicubically.

    Returns:
        (size, size, 3) uint8, RGB.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    rescaled_long = max(size, int(size * long / short))
    start = round((rescaled_long - size) / 2)
    step = long / rescaled_long  # raw pixels per rescaled pixel along the longer side
    low, high = start * step, min((start + size) * step, float(long))
    box = (low, 0.0, high, float(height)) if width >= height else (0.0, low, float(width), high)
    if kernel == "area" and short > size:
        return _area(np.asarray(image), box, size)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _area(pixels: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Mean over the area that each of size × size pixels covers of `box`; pixels (height, width, 3) uint8.

    Weights are integers and every sum stays below 2⁵³, so that float64 is exact and every machine rounds alike.
    """
    height, width, _ = pixels.shape
    rows, columns = _coverage(box[1], box[3], size, height), _coverage(box[0], box[2], size, width)
    down = rows @ pixels.reshape(height, width * 3).astype(np.float64)  # (size, width · 3)
    both = columns @ down.reshape(size, width, 3)  # (size, size, 3)
    return np.rint(both / _ONE**2).astype(np.uint8)


_ONE = 2**14  # the sum of the weights of one pixel


def _coverage(low: float, high: float, size: int, raw: int) -> np.ndarray:
    """(size, raw) float64 integers: how much of raw pixel j lies in pixel i of `size` equal parts of [low, high)."""
    edges = low + (high - low) / size * np.arange(size + 1)
    share = (np.arange(raw + 1) - edges[:-1, None]) / (edges[1:] - edges[:-1])[:, None]
    return np.diff(np.rint(_ONE * np.clip(share, 0.0, 1.0)), axis=1)


def encode(pixels: np.ndarray, *, quality: int, subsampling: str) -> bytes:
    """(height, width, 3) uint8 RGB → baseline JPEG bytes without metadata."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=subsampling)
    return out.getvalue()


def codec_versions() -> dict[str, str]:
    """Names and versions of what decodes, resamples and encodes: other versions may give other bytes."""
    names = {"jpeg": "libjpeg_turbo", "png": "zlib", "webp": "webp", "tiff": "libtiff"}
    return {"pillow-simd": Image.__version__} | {key: str(features.version(name)) for key, name in names.items()}
