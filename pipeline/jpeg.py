"""A JPEG's segments, and its pixels by libjpeg-turbo without a detour. Pure functions of the file's bytes."""

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg

_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # not a stuffed FF 00, not one of the restarts D0 … D7
_ALONE = (0x01, 0xD8)  # TEM and start of image have no length
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


@dataclass(frozen=True)
class Header:
    """What stands before the data of a JPEG's first scan."""

    end: int  # bytes; where that data begins, or the file ends
    frame: int = 0  # the SOF marker: C0 baseline, C1 extended, C2 progressive; 0 where there is none
    one_scan: bool = False  # the first scan is the whole picture, and libjpeg reads no other
    coefficients: float = 0.0  # bytes per pixel that libjpeg keeps until the last scan; 0 with one scan
    tags: tuple[bytes, ...] = ()  # TIFF directories that Pillow parses: Exif, and the index of multi-picture files


def read_header(jpeg: bytes) -> Header:
    """Walk the segments of a JPEG, as libjpeg does, to the first scan's data. Raises nothing, whatever the bytes."""
    place, frame, samples = 2, 0, b""
    exif, tags = b"", list[bytes]()
    while found := _MARKER.search(jpeg, place):
        marker, place = found.group()[-1], found.end()
        if marker == 0xD9:
            break
        if marker in _ALONE:
            continue
        body = jpeg[place + 2 : place + int.from_bytes(jpeg[place : place + 2], "big")]
        place += 2 + len(body)
        if marker == 0xDA:
            one_scan = frame not in _PROGRESSIVE and body[:1] == samples[:1]  # both begin with a number of components
            return Header(place, frame, one_scan, 0.0 if one_scan else _coefficients(samples), (exif, *tags))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, samples = marker, body[5:]
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]  # Pillow joins them
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            tags.append(body[4:])
    return Header(len(jpeg), frame, tags=(exif, *tags))


def _coefficients(samples: bytes) -> float:
    """Bytes per pixel of 16-bit coefficients; `samples`: components, then id, sampling factors and table of each."""
    parts = [(factors >> 4) * (factors & 15) for factors in samples[2::3]]
    width = max([factors >> 4 for factors in samples[2::3]], default=1)
    height = max([factors & 15 for factors in samples[2::3]], default=1)
    return 2 * sum(parts) / max(1, width * height)


def count_scans(jpeg: bytes, header: Header, limit: int) -> int:
    """The scans that libjpeg reads of a JPEG's first picture, at most `limit`: segments are walked, not searched for
    FF DA."""
    if header.one_scan:
        return 1
    scans, place = int(header.end < len(jpeg)), header.end
    while scans < limit and (found := _MARKER.search(jpeg, place)):
        marker, place = found.group()[-1], found.end()
        if marker == 0xD9:  # end of image; what follows is another picture, or no picture
            break
        scans += marker == 0xDA  # what follows its header is searched for the next marker
        if marker not in _ALONE:
            place += int.from_bytes(jpeg[place : place + 2], "big")
    return scans


def decode_plain(jpeg: bytes, header: Header) -> np.ndarray | None:
    """The pixels of a JPEG of one or three components: (height, width, 4) uint8, RGB and padding.

    None where libjpeg-turbo has anything to say against it, be it a warning, and for the kinds of JPEG (lossless,
    arithmetic) that not every libjpeg has: then another decoder has to judge. Accurate DCT, smooth chroma.
    """
    if header.frame not in (0xC0, 0xC1, 0xC2):
        return None
    try:
        return simplejpeg.decode_jpeg(jpeg, "RGBX", strict=True)
    except ValueError:
        return None
