"""The encodings of parquet pages: bytes to arrays of levels, indices, numbers, and places of values.

As https://github.com/apache/parquet-format/blob/master/Encodings.md describes them. No length is believed: what is
made of n bytes and a count is at most proportional to both, and the count is bounded by the caller.
"""

from typing import NamedTuple

import numpy as np

STEP = 2**16  # values unpacked at a time, 64 bytes of memory each; a multiple of 8
MAX_BLOCK = 2**16  # values of a delta block; writers make 128


class Damaged(ValueError):
    """Bytes that are not what their format promises."""

    remedy = "fetch it again"


class Cut(Damaged):
    """Bytes that end too early."""


class Unsupported(Damaged):
    """What is perhaps right, and not read here."""

    remedy = "write it again with pyarrow, use_dictionary=False and write_batch_size=8"


class Values(NamedTuple):
    """Where each value lies in `data`: value i is data[starts[i] : stops[i]]."""

    data: bytes
    starts: np.ndarray  # (n,) int64
    stops: np.ndarray  # (n,) int64

    def value(self, i: int) -> bytes:
        return self.data[self.starts[i] : self.stops[i]]

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.data) + self.starts.nbytes + self.stops.nbytes


def varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned LEB128 number of at most 64 bits, and where it ends. Raises Damaged, Cut."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >= 2**64:
                break
            return value, at
        shift += 7
        if shift > 63:
            break
    else:
        raise Cut("it ends inside a number")
    raise Damaged("a number has more than 64 bits")


def zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def hybrid(data: bytes, at: int, width: int, count: int) -> np.ndarray:
    """`count` numbers of `width` bits in runs, repeated or bit-packed, to the end of `data`: (count,) int64."""
    if width > 32:
        raise Damaged(f"indices of {width} bits, at most 32 may be")
    values = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        header, at = varint(data, at)
        length = (header >> 1) * (8 if header & 1 else 1)
        if not length:
            raise Damaged("a run of no values")
        taken = min(length, count - filled)
        if header & 1:
            values[filled : filled + taken] = _unpack(data, at, width, taken)
            at += (header >> 1) * width
        else:
            stop = at + (width + 7) // 8
            if stop > len(data):
                raise Cut("it ends inside a run")
            values[filled : filled + taken] = int.from_bytes(data[at:stop], "little")
            at = stop
        filled += taken
    return values


def plain_bytes(data: bytes, at: int, count: int) -> Values:
    """PLAIN byte arrays: each a length of 4 bytes and as many bytes. Raises Cut."""
    end = len(data)
    if count > (end - at) // 4:
        raise Cut(f"{end - at:,} bytes hold no {count:,} values")
    places = np.empty((2, count), np.int64)
    for i in range(count):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if start > end or at > end:
            raise Cut(f"value {i:,} claims more bytes than there are")
        places[0, i] = start
        places[1, i] = at
    return Values(data, places[0], places[1])


def plain_numbers(data: bytes, at: int, count: int, width: int) -> Values:
    """PLAIN numbers of `width` bytes. Raises Cut."""
    if count > (len(data) - at) // width:
        raise Cut(f"{len(data) - at:,} bytes hold no {count:,} numbers of {width} bytes")
    starts = at + width * np.arange(count, dtype=np.int64)
    return Values(data, starts, starts + width)


def delta_numbers(data: bytes, at: int, count: int) -> tuple[np.ndarray, int]:
    """DELTA_BINARY_PACKED: (count,) int64, modulo 2⁶⁴, and where it ends. Raises Damaged, Cut."""
    block, at = varint(data, at)
    parts, at = varint(data, at)
    total, at = varint(data, at)
    first, at = varint(data, at)
    size = block // parts if parts else 0  # values of a miniblock
    if not 0 < block <= MAX_BLOCK or not size or size % 8 or size * parts != block or total != count:
        raise Damaged("a delta header that contradicts itself or its page")
    deltas = np.zeros(count, np.uint64)
    deltas[:1] = zigzag(first) % 2**64
    filled = 1
    while filled < count:
        least, at = varint(data, at)
        widths = data[at : at + parts]
        at += parts
        for width in widths:
            taken = min(size, count - filled)
            if taken <= 0:  # the last block leaves out the parts without values
                break
            deltas[filled : filled + taken] = _unpack(data, at, width, taken)
            deltas[filled : filled + taken] += np.uint64(zigzag(least) % 2**64)
            at += size * width // 8
            filled += taken
        if len(widths) < parts:
            raise Cut("it ends inside a delta block")
    return np.cumsum(deltas, dtype=np.uint64).view(np.int64), at


def delta_bytes(data: bytes, at: int, count: int) -> Values:
    """DELTA_LENGTH_BYTE_ARRAY: all lengths, then all bytes. Raises Damaged, Cut."""
    lengths, at = delta_numbers(data, at, count)
    if count and (lengths.min() < 0 or lengths.max() > len(data)):
        raise Damaged("a length that is negative or beyond the page")
    stops = at + np.cumsum(lengths)
    if count and stops[-1] > len(data):
        raise Cut("the values claim more bytes than there are")
    return Values(data, stops - lengths, stops)


def _unpack(data: bytes, at: int, width: int, count: int) -> np.ndarray:
    """`count` numbers of `width` bits, the lowest bit first: (count,) uint64. Raises Damaged, Cut."""
    if width > 64:
        raise Damaged(f"numbers of {width} bits, at most 64 may be")
    if at + (count * width + 7) // 8 > len(data):
        raise Cut("it ends inside bit-packed numbers")
    if count > STEP:
        parts = [(at + i * width // 8, min(STEP, count - i)) for i in range(0, count, STEP)]
        return np.concatenate([_unpack(data, start, width, n) for start, n in parts])
    packed = np.frombuffer(data, np.uint8, (count * width + 7) // 8, at)
    bits = np.zeros((count, 64), np.uint8)
    bits[:, :width] = np.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0]
