"""Bytes of any picture → an RGB picture, or the reason why not. Pure functions."""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline import UserError
from pipeline.jpeg import Header, count_scans, decode_plain, read_header
from pipeline.tags import ORIENTATION, TILE_HEIGHT, TILE_WIDTH, tag_bytes

# Why a picture is left out: a closed list, so that reasons can be counted and compared between builds.
REASONS = {
    "empty": "the file has no bytes",
    "too_many_bytes": "more bytes than max_bytes, packed or unpacked, or more than that in its metadata",
    "too_many_pixels": "more pixels than max_pixels, or than its kind can have in the memory of one worker",
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
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")

# Bytes that a picture may take at its peak, with its file's bytes: a baseline JPEG of 64 million pixels and 26 MiB.
# The interpreter and its libraries take 60 MB beside it.
HELD_BYTES = 284_000_000
# Bytes per pixel, and per byte of the file beside the file, at the peak, as measured: Pillow's picture (4, colour or
# not) and the RGB one that it is converted to (4); WebP's decoder keeps two canvases and a frame as well (12), TIFF's a
# strip or tile (8).
_HELD = {"PNG": (8, 1), "GIF": (8, 1), "BMP": (8, 0), "WEBP": (20, 2), "TIFF": (16, 0)}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """A picture that cannot be used. `code` is a key of `REASONS`."""

    def __init__(self, code: str) -> None:
        assert code in REASONS, code
        super().__init__(f"{code}: {REASONS[code]}")
        self.code = code


def decode(data: bytes, *, max_bytes: int, max_pixels: int, max_scans: int, exif: str = "ignore") -> Image.Image:
    """Decode the first frame of a picture in any of `FORMATS`, gzipped or not, whatever its file name says.

    CMYK and YCCK are converted, palettes resolved, transparency put over white, 16-bit grey scaled to 8 bits. Colour
    profiles are ignored, and so is the EXIF orientation, as torchvision and the original do, unless `exif` is "apply".
    Limits are counts, so that the verdict is the same on every machine. Besides those given there is one on memory,
    `HELD_BYTES`: bytes per pixel of the kind × pixels, and bytes of the file.

    The verdict is Pillow's: it reads the header, and every picture that libjpeg-turbo does not decode without a
    warning.

    Returns:
        An image of mode RGB.
    Raises:
        ImageError: with the reason's code.
    """
    raw = data
    data = _unpacked(raw, max_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of metadata that we do not read
        header = read_header(data) if data.startswith(b"\xff\xd8") else Header(0)
        tags = sum(tag_bytes(directory) for directory in (header.tags if header.end else (data,)))
        if tags > HELD_BYTES // 4:
            raise ImageError("too_many_bytes")
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise ImageError("too_many_pixels")
        if header.end and count_scans(data, header, max_scans + 1) > max_scans:
            raise ImageError("too_many_scans")  # libjpeg's time grows with pixels × scans
        try:
            held = _held(image, data, header) + len(data) + (len(raw) if raw is not data else 0) + tags
            _check_held(held + (4 * image.width * image.height if exif == "apply" else 0))  # the turned picture
            rgb = _load(image, data, header, held)
            return _upright(rgb, image) if exif == "apply" else rgb
        except ImageError:
            raise
        except _DECODER_ERRORS as error:
            short = isinstance(error, EOFError) or "truncated" in str(error)
            raise ImageError("truncated" if short else "corrupt") from error


def _unpacked(data: bytes, max_bytes: int) -> bytes:
    """The file, or what its gzip member holds (some of ILSVRC2010's pictures are gzipped); one level of it."""
    if not data:
        raise ImageError("empty")
    if len(data) > max_bytes:
        raise ImageError("too_many_bytes")
    if not data.startswith(b"\x1f\x8b"):
        return data
    inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)  # 16: gzip's own header and checksum
    try:
        data = inflate.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise ImageError("corrupt") from error
    if len(data) > max_bytes:
        raise ImageError("too_many_bytes")
    if not inflate.eof:
        raise ImageError("truncated")
    if not data:
        raise ImageError("empty")
    return data


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError("unrecognised") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels") from error
    except _DECODER_ERRORS as error:
        raise ImageError("corrupt") from error


def _held(image: Image.Image, data: bytes, header: Header) -> float:
    """Bytes held at the peak of decoding, by the format, the mode and the header alone."""
    pixels = image.width * image.height
    if header.end:  # the pixels, those of CMYK converted; libjpeg's coefficients; metadata, which Pillow keeps twice
        return pixels * ((8 if image.mode == "CMYK" else 4) + header.coefficients) + 2 * header.end
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        pixels = max(pixels, int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_HEIGHT, 0)))
    texts = data.count(b"zTXt") + data.count(b"iTXt") if image.format == "PNG" else 0  # each at most 4 MiB unpacked
    per_pixel, per_byte = _HELD[str(image.format)]
    return pixels * per_pixel + len(data) * per_byte + texts * 2**22 + 24 * image.height  # Pillow's pointers to rows


def _check_held(held: float) -> None:
    if held > HELD_BYTES:
        raise ImageError("too_many_pixels")


def _load(image: Image.Image, data: bytes, header: Header, held: float) -> Image.Image:
    if image.mode in ("RGB", "L"):
        plain = decode_plain(data, header)
        if plain is not None and plain.shape == (image.height, image.width, 4):
            rgb = sharing(plain)
            rgb.format = image.format if image.mode == "RGB" else None  # as Pillow has it: what was converted has none
            return rgb
    if header.end and image.mode == "L":
        _check_held(held + image.width * image.height)  # a grey picture beside the RGB one
    image.load()
    return _to_rgb(image)


def sharing(pixels: np.ndarray) -> Image.Image:
    """An image of mode RGB in the memory of (height, width, 4) uint8 pixels: Pillow keeps RGB in four bytes, too."""
    height, width, _ = pixels.shape
    image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
    image.im.setmode("RGB")
    return image._new(image.im)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert in bands, so that the intermediate pictures are small."""
    if image.mode in ("F", "LAB"):
        raise ImageError("unsupported")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rgb = Image.new("RGB", image.size)
    rows = max(1, 2**18 // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_band_to_rgb(band), (0, top))
    return rgb


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        levels = np.clip(np.asarray(image), 0, 65535).astype(np.int32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    turn = _TURNS.get(source.getexif().get(ORIENTATION, 1))
    return rgb if turn is None else rgb.transpose(turn)
