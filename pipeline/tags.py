"""TIFF tags, in TIFF files and in Exif: the few that we know, and what Pillow would hold for a directory of them."""

import struct

TILE_WIDTH, TILE_HEIGHT, ORIENTATION = 322, 323, 0x0112

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # bytes, by type
_PLAIN = (1, 2, 7)  # types that stay bytes; a number becomes a Python object
_OBJECT = 64  # bytes of memory per byte of numbers, generously


def tag_bytes(tiff: bytes) -> int:
    """Bytes that Pillow may hold for the tags of the first directory of `tiff`; 0 where it is no TIFF, or damaged.

    That is no part of the length: ten thousand tags may point at the same bytes, and each gets a copy of them.
    """
    if tiff[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return 0
    order, big = "<" if tiff[:1] == b"I" else ">", b"+" in tiff[2:4]
    number, entry = (order + "Q", order + "HHQ8x") if big else (order + "H", order + "HHI4x")
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), tiff, 8 if big else 4)
        (tags,) = struct.unpack_from(number, tiff, start)
    except struct.error:
        return 0  # Pillow says what is wrong
    held, first, step = 0, start + struct.calcsize(number), struct.calcsize(entry)
    for place in range(first, min(first + tags * step, len(tiff) - step + 1), step):
        _, kind, length = struct.unpack_from(entry, tiff, place)
        size = length * _SIZES.get(kind, 0)
        if size <= len(tiff):  # else it is not kept
            held += size if kind in _PLAIN else size * _OBJECT
    return held
