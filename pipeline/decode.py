"""Decodes the bytes of a picture to RGB, or says why it cannot be used: JPEG segments, TIFF tags, limits, Pillow."""

import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from pipeline import LFS_POINTER, UserError

# A closed list, so that reasons can be counted and compared between builds.
REASONS = {
    "empty": "the file has no bytes",
    "too_many_bytes": "more bytes than max_bytes, packed or unpacked, or more than that in its metadata",
    "too_many_pixels": "more pixels than max_pixels, or than its kind can have in the memory of one worker",
    "too_many_scans": "a JPEG with more scans than max_scans",
    "lfs_pointer": "a Git LFS pointer; run git lfs pull",
    "unrecognised": "no picture format that we read",
    "truncated": "the data ends before the picture does",
    "corrupt": "the decoder rejects the data",
    "unsupported": "a pixel type that is not converted to RGB (floating point, CIELAB)",
}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Pillow's plugins parse with struct, zlib, plain indexing, arithmetic and assertions, and let through what these raise
# on bad data. MemoryError, RecursionError (a RuntimeError): a length that lies; sound pictures fit into HELD_BYTES.
_DECODER_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError,
    RuntimeError, SystemError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
# Bytes that a picture may take at its peak, with its file's bytes: a baseline JPEG of 64 million pixels and 26 MiB, of
# 18 MiB where it is rescaled to 256 × 256.
# The interpreter and its libraries take 60 MB beside it.
HELD_BYTES = 284_000_000
# Measured bytes per pixel, and per byte of the file beside the file: Pillow's picture (4, colour or not) and the RGB
# one (4); WebP's decoder keeps two canvases and a frame as well (12), TIFF's a strip or tile (8).
_HELD = {"PNG": (8, 1), "GIF": (8, 1), "BMP": (8, 0), "WEBP": (20, 2), "TIFF": (16, 0)}

# Pillow rejects a PNG with a text or profile of more than 1 MiB unpacked. Those are cut out, for nothing of them is a
# pixel, and so is what passes 4 MiB in all: unpacking costs time.
_TEXT, _TEXTS = PngImagePlugin.MAX_TEXT_CHUNK, 4 * PngImagePlugin.MAX_TEXT_CHUNK

_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # not a stuffed FF 00, not one of the restarts D0 … D7
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # by TIFF's type
_DAMAGE = ("Corrupt", "Premature", "Inconsistent")  # begin libjpeg's warnings of it; others are of what turbo cannot do
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation → Image.Transpose


class ImageError(UserError):
    """A picture that cannot be used. `code` is a key of `REASONS`."""

    def __init__(self, code: str) -> None:
        assert code in REASONS, code
        super().__init__(f"{code}: {REASONS[code]}")
        self.code = code


class _Jpeg(NamedTuple):
    """The segments of a JPEG; `header` 0 stands for another format."""

    header: int = 0  # bytes before the first scan's data
    frame: int = 0  # the SOF marker; 0: none
    scans: int = 0  # of the first picture in the file
    coefficients: float = 0.0  # bytes per pixel that libjpeg keeps until the last scan; 0 with one scan
    tags: Sequence[bytes | bytearray] = ()  # TIFF directories that Pillow parses: Exif; indexes of multi-picture files


def decode(
    data: bytes,
    *,
    max_bytes: int,
    max_pixels: int,
    max_scans: int,
    exif: str = "ignore",
    warn: Callable[[str], object] = lambda warning: None,
) -> Image.Image:
    """Decode the first frame of a picture in any of `FORMATS`, gzipped or not, as mode RGB.

    CMYK and YCCK are converted, palettes resolved, transparency put over white, 16-bit grey scaled to 8 bits. Colour
    profiles are ignored, and so is the EXIF orientation, as torchvision and the original do, unless `exif` is "apply".
    Limits are counts, so that the verdict is the same on every machine; so is the one on memory, `HELD_BYTES`. The
    verdict is Pillow's: it reads the header, and each picture that libjpeg-turbo does not decode without a warning.
    `warn` is called with the warning where that is of damage and Pillow decodes the picture.

    Raises:
        ImageError: with the reason's code. No other exception, whatever the bytes.
    """
    _silence_libraries()
    packed, image = data, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of metadata that we do not read
            if packed.startswith(b"\x1f\x8b") and len(packed) <= max_bytes:
                data = _inflated(packed, max_bytes)  # as some of ILSVRC2010's pictures; one level
            if not data:
                raise ImageError("empty")
            if data.startswith(LFS_POINTER):
                raise ImageError("lfs_pointer")
            if max(len(packed), len(data)) > max_bytes:
                raise ImageError("too_many_bytes")
            jpeg = _read_jpeg(data, max_scans) if data.startswith(b"\xff\xd8") else _Jpeg()
            tags = sum(_tag_memory(directory) for directory in jpeg.tags or (data,))
            if tags > HELD_BYTES // 4:
                raise ImageError("too_many_bytes")
            texts = 0
            if data.startswith(b"\x89PNG\r\n\x1a\n"):
                data, texts = _with_short_texts(data)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise ImageError("too_many_pixels")
            if jpeg.scans > max_scans:
                raise ImageError("too_many_scans")  # libjpeg's time grows with pixels × scans
            held = _held(image, data, jpeg) + len(data) + len(packed) * (packed is not data) + tags
            held += 4 * texts  # at most 4 bytes a character
            if held + 4 * pixels * (exif == "apply") > HELD_BYTES:  # 4: the turned picture
                raise ImageError("too_many_pixels")
            rgb = _load(image, data, jpeg, held, warn)
            turn = _TURNS.get(image.getexif().get(0x0112, 1)) if exif == "apply" else None
            return rgb if turn is None else rgb.transpose(Image.Transpose(turn))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("unrecognised") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels") from error
    except _DECODER_ERRORS as error:
        # a header that ends early is no picture that ends early: what it would have said is unknown
        short = image is not None and (isinstance(error, EOFError) or "truncated" in str(error))
        raise ImageError("truncated" if short else "corrupt") from error


@cache
def _silence_libraries() -> None:
    """Keep what Pillow and libtiff have to say about a file off the terminal: a reason is enough."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    symbols = ctypes.CDLL(Image.core.__file__)  # its own, and those of the libraries that it is linked with
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(symbols, name):
            getattr(symbols, name)(None)


def _inflated(packed: bytes, max_bytes: int) -> bytes:
    """Return the content of a gzip member, at most one byte more than `max_bytes`."""
    inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)  # 16: gzip's own header and checksum
    data = inflate.decompress(packed, max_bytes + 1)
    if not inflate.eof and len(data) <= max_bytes:
        raise ImageError("truncated")
    return data


# The parsers below read by slices, int.from_bytes and iter_unpack of whole entries, none of which raises anything,
# whatever offset, length or count a file claims.


def _with_short_texts(png: bytes) -> tuple[bytes, int]:
    """Return a PNG without texts and profiles that are too long, and the bytes of the other texts, unpacked."""
    parts, start, position, left, texts = list[memoryview](), 0, 8, _TEXTS, 0
    while (end := position + 12 + int.from_bytes(png[position : position + 4], "big")) <= len(png):
        if (kind := png[position + 4 : position + 8]) == b"IEND":
            break
        if kind in (b"iCCP", b"iTXt", b"zTXt"):
            size = _text_bytes(kind, png[position + 8 : end - 4], min(left, _TEXT)) if left else _TEXTS
            if size > left:
                parts.append(memoryview(png)[start:position])
                start = end
            elif kind != b"iCCP":
                texts += size
            left -= min(size, left, _TEXT)
        position = end
    return b"".join([*parts, memoryview(png)[start:]]) if parts else png, texts


def _text_bytes(kind: bytes, body: bytes, limit: int) -> int:
    """Return the bytes of a text or profile, unpacked; `_TEXTS` + 1 where it is packed, and longer than `limit`."""
    rest = body.partition(b"\0")[2]  # behind the name: the method, or whether packed, method, language, translated name
    if kind == b"iTXt" and rest[:1] in (b"", b"\0"):
        return len(body)
    packed = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]
    inflate = zlib.decompressobj()
    with suppress(zlib.error):  # then Pillow passes over it
        size = len(inflate.decompress(packed, limit))
        return _TEXTS + 1 if inflate.unconsumed_tail else size
    return 0


def _read_jpeg(jpeg: bytes, max_scans: int) -> _Jpeg:
    """Walk the segments, as libjpeg does, to the end of the image, or until there are more scans than `max_scans`."""
    position, header, frame, scans, one_scan, components = 2, 0, 0, 0, False, b""
    exif, indexes = bytearray(), list[bytes]()
    while not one_scan and scans <= max_scans and (match := _MARKER.search(jpeg, position)):
        marker, position = match.group()[-1], match.end()
        if marker == 0xD9:  # end of image; what follows is another picture, or no picture
            break
        if marker in (0x01, 0xD8):  # TEM and start of image have no length
            continue
        body = jpeg[position + 2 : position + int.from_bytes(jpeg[position : position + 2], "big")]
        position += 2 + len(body)
        if marker == 0xDA:  # a scan; its data is searched for the next marker
            scans += 1
            if not header:  # with as many components as the frame, libjpeg reads no other scan of a sequential JPEG
                header, one_scan = position, frame not in (0xC2, 0xC6, 0xCA, 0xCE) and body[:1] == components[:1]
        elif header:
            continue  # Pillow reads no metadata behind the first scan's header
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, components = marker, body[5:]  # a number, then id, sampling factors and table of each
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]  # Pillow joins them
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            indexes.append(body[4:])
    factors = [(factor >> 4, factor & 15) for factor in components[2::3]] or [(0, 0)]
    area = max(1, max(across for across, _ in factors) * max(down for _, down in factors))
    kept = 2 * sum(across * down for across, down in factors) / area if header and not one_scan else 0.0
    return _Jpeg(header or len(jpeg), frame, scans, kept, (exif, *indexes))


def _tag_memory(tiff: bytes | bytearray) -> int:
    """Return the bytes that Pillow may hold for the tags of the first directory of `tiff`, a file or Exif.

    0 where it is no TIFF, or damaged. The file's length is no bound: many tags may have copies of the same bytes.
    """
    if tiff[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return 0
    order: Literal["little", "big"] = "little" if tiff[:1] == b"I" else "big"
    form, offset, width = ("2xHQ8x", tiff[8:16], 8) if b"+" in tiff[2:4] else ("2xHI4x", tiff[4:8], 2)
    entry = struct.Struct(("<" if order == "little" else ">") + form)
    first = int.from_bytes(offset, order) + width  # that many bytes hold the number of tags
    count = min(int.from_bytes(tiff[first - width : first], order), max(0, len(tiff) - first) // entry.size)
    memory = 0
    for kind, length in entry.iter_unpack(memoryview(tiff)[first : first + count * entry.size]):
        size = length * _TAG_BYTES.get(kind, 0)
        if size <= len(tiff):  # else it is not kept
            memory += size if kind in (1, 2, 7) else size * 64  # bytes; numbers become Python objects: generously
    return memory


def _held(image: Image.Image, data: bytes, jpeg: _Jpeg) -> float:
    """Return the bytes held at the peak of decoding, by the format, the mode and the header alone."""
    pixels = image.width * image.height
    if jpeg.header:  # the pixels, those of CMYK converted; libjpeg's coefficients; metadata, which Pillow keeps twice
        return pixels * ((8 if image.mode == "CMYK" else 4) + jpeg.coefficients) + 2 * jpeg.header
    if image.format == "TIFF":
        width, height = (int(image.tag_v2.get(tag, 0)) for tag in (322, 323))  # type: ignore[attr-defined]
        pixels = max(pixels, width * height)  # of a tile
    per_pixel, per_byte = _HELD[str(image.format)]
    return pixels * per_pixel + len(data) * per_byte + 24 * image.height  # Pillow's pointers to rows


def _load(image: Image.Image, data: bytes, jpeg: _Jpeg, held: float, warn: Callable[[str], object]) -> Image.Image:
    warning = ""
    # the kinds that every libjpeg has: baseline, extended, progressive; accurate DCT, smooth chroma, as Pillow has them
    if image.mode in ("RGB", "L") and jpeg.frame in (0xC0, 0xC1, 0xC2):
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGBX", strict=True)
            if pixels.shape == (image.height, image.width, 4):
                rgb = as_image(pixels)
                rgb.format = image.format if image.mode == "RGB" else None  # as Pillow has it after a conversion
                return rgb
        except ValueError as error:  # a warning is enough: then Pillow has to judge
            warning = str(error)
    if jpeg.header and image.mode == "L" and held + image.width * image.height > HELD_BYTES:
        raise ImageError("too_many_pixels")  # a grey picture beside the RGB one
    image.load()
    rgb = _to_rgb(image)
    if warning.startswith(_DAMAGE):
        warn(warning)
    return rgb


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return an image of mode RGB in the memory of `pixels`, (height, width, 4) uint8, RGBX: Pillow's own layout."""
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
        if band.mode.startswith("I"):  # 16 bits
            levels = np.clip(np.asarray(band), 0, 65535).astype(np.int32)
            band = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
        if band.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in band.info:
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band.convert("RGBA"))
        rgb.paste(band.convert("RGB"), (0, top))
    return rgb
