"""Philox4x32-10: random words as a function of (key, counter), without any state.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Our own integer arithmetic, so that
no library's generator and no version of one decides what a sample looks like.
"""

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(key: tuple[int, int], counter: tuple[np.ndarray | int, ...]) -> np.ndarray:
    """Return (…, 4) uint32, independent uniform words, by ten rounds of Philox4x32.

    `key` has two 32-bit words, `counter` four, each an integer or an array; they broadcast.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = key
    for _round in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # 32 × 32 → 64 bits: no overflow
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def key_of(seed: int) -> tuple[int, int]:
    """Return the Philox key of a seed of up to 64 bits."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def keyed_words(seed: int, use: np.ndarray | int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Return the four words of each id in an epoch, (…, 4) uint32, for one of the uses below."""
    return philox(key_of(seed), (use, epoch, ids & 0xFFFFFFFF, ids >> 32))


# The first counter word of every use of a seed, so that no two uses share a draw.
# DROPOUT adds 256 for each layer.
ORDER, VIEW, LIGHTING, DROPOUT, SHARDS, REGION = range(6)
