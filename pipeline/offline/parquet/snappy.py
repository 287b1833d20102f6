"""Snappy's blocks: where a large compressed page can be entered, so that one image need not cost the whole page.

Writers compress each 64 KiB by themselves (https://github.com/google/snappy/blob/main/format_description.txt), so any
run of whole blocks, with its length before it, is a snappy stream. JPEGs do not compress: a page of 100 has 11 MB and
some 1,200 elements to be walked, the longest 64 KiB.
"""

import numpy as np

from pipeline.offline.parquet.encodings import Damaged, varint

BLOCK = 2**16  # decompressed bytes
MIN_ELEMENT = 2**10  # mean bytes of an element; where they are shorter, the walk takes longer than the whole page


def blocks(data: bytes) -> np.ndarray | None:
    """Where in `data` each block begins, and the last ends: (n + 1,) int64.

    None where the stream has not such blocks, or so many elements that the walk does not pay.
    """
    try:
        size, at = varint(data, 0)
    except Damaged:
        return None
    found = [at]
    done = 0
    for _ in range(len(data) // MIN_ELEMENT):
        if at >= len(data):
            break
        length, back, at = _element(data, at)
        if back > done % BLOCK or done % BLOCK + length > BLOCK:
            return None
        done += length
        if not done % BLOCK or done == size:
            found.append(at)
    return np.array(found, np.int64) if at == len(data) and done == size else None


def run(stored: bytes, size: int) -> bytes:
    """The stream of a run of blocks that make `size` bytes."""
    head = bytearray()
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size]) + stored


def _element(data: bytes, at: int) -> tuple[int, int, int]:
    """Of the element at `at`: the bytes that it makes, how far back it copies them from (0: it has them), its end."""
    tag = data[at]
    kind, coded = tag & 3, tag >> 2
    if kind == 0:
        extra = max(coded - 59, 0)
        length = 1 + (int.from_bytes(data[at + 1 : at + 1 + extra], "little") if extra else coded)
        return length, 0, at + 1 + extra + length
    if kind == 1:
        return (coded & 7) + 4, (tag >> 5 << 8) + int.from_bytes(data[at + 1 : at + 2]), at + 2
    end = at + (3 if kind == 2 else 5)
    return coded + 1, int.from_bytes(data[at + 1 : end], "little"), end
