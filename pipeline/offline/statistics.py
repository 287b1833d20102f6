"""Exact, mergeable sums over rescaled images → mean image, RGB covariance, eigenvectors."""

import math

import numpy as np

from pipeline.manifest import Statistics

_BLOCK = 256  # pixels: a sum of so many products of grey levels is an integer below 2²⁴, exact in float32
_CHUNK = 256 * _BLOCK  # pixels that are float32 at a time: a square of 256 × 256
_RECENT = 257  # images whose grey levels add up in uint16: 257 · 255 = 65535
_SHIFTS = np.array([[0], [8], [16]], "<u4")  # of red, green and blue in an RGBX pixel, read as one number


class Sums:
    """Integer sums over images, so that the result does not depend on order or grouping.

    Sums of size 1 take images of any size: each pixel counts as an image of one pixel.

    Attributes:
        n: images.
        sum_image: (size, size, 3) int64.
        second_moments: (3, 3) int64, the sum over pixels of x·xᵀ.
    """

    def __init__(self, n: int, sum_image: np.ndarray, second_moments: np.ndarray) -> None:
        self.n = n
        self.second_moments = second_moments
        self._sum_image = sum_image
        self._recent: np.ndarray | None = None  # (3, size·size) uint16: of images that are not in _sum_image yet
        self._recent_n = 0

    @classmethod
    def zero(cls, size: int) -> "Sums":
        return cls(0, np.zeros((size, size, 3), np.int64), np.zeros((3, 3), np.int64))

    @property
    def sum_image(self) -> np.ndarray:
        self._flush()
        return self._sum_image

    def add(self, pixels: np.ndarray) -> None:
        """Add one image, (size, size, 4) uint8 RGBX; to sums of size 1, the pixels of (height, width, 4)."""
        words = pixels.view("<u4").reshape(-1)
        if len(self._sum_image) == 1:
            first, second = _moments(words)
            self._sum_image += first
            self.n += len(words)
        else:
            assert pixels.shape[:2] == self._sum_image.shape[:2], pixels.shape
            if self._recent is None:
                self._recent = np.zeros((3, len(words)), np.uint16)
            _, second = _moments(words, self._recent)
            self._recent_n += 1
            self.n += 1
            if self._recent_n == _RECENT:
                self._flush()
        self.second_moments += second

    def _flush(self) -> None:
        if self._recent is not None:
            self._sum_image += self._recent.T.reshape(self._sum_image.shape)
            self._recent, self._recent_n = None, 0

    def merge(self, other: "Sums") -> None:
        self.n += other.n
        self._sum_image += other.sum_image
        self.second_moments += other.second_moments


def _moments(words: np.ndarray, images: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact sums (3,) and sums of x·xᵀ (3, 3), int64, of (n,) uint32 RGBX pixels.

    The products are dot products of channels in float32, block by block: faster than matrix products with so few
    columns. Where `images` is given, (3, n) uint16, each pixel is added there, and the sums (3,) stay zero.
    """
    first, second = np.zeros(3, np.int64), np.zeros((3, 3), np.int64)
    for start in range(0, len(words), _CHUNK):
        channels = (words[start : start + _CHUNK] >> _SHIFTS).astype(np.uint8)
        if images is None:
            first += channels.sum(axis=1, dtype=np.int64)
        else:
            images[:, start : start + _CHUNK] += channels
        levels = channels.astype(np.float32)
        blocks_end = levels.shape[1] // _BLOCK * _BLOCK
        red, green, blue = levels[:, :blocks_end].reshape(3, -1, _BLOCK)
        pairs = ((red, red), (green, green), (blue, blue), (red, green), (green, blue), (red, blue))
        products = np.array([np.vecdot(a, b) for a, b in pairs])
        rr, gg, bb, rg, gb, rb = products.sum(axis=1, dtype=np.float64).astype(np.int64)  # integers below 2⁵³: exact
        second += ((rr, rg, rb), (rg, gg, gb), (rb, gb, bb))
        if blocks_end < levels.shape[1]:
            remainder = channels[:, blocks_end:].astype(np.int64)
            second += remainder @ remainder.T
    return first, second


def finish(sums: Sums) -> Statistics:
    """Round once from the exact sums of at least one image.

    Covariance over all pixels of all images: E[x·xᵀ] − E[x]·E[x]ᵀ, as a fraction of Python integers, whose division
    rounds correctly.
    """
    pixels = sums.n * sums.sum_image.shape[0] * sums.sum_image.shape[1]
    first = [int(value) for value in sums.sum_image.sum(axis=(0, 1))]
    second = sums.second_moments.tolist()
    centred = [[pixels * second[i][j] - first[i] * first[j] for j in range(3)] for i in range(3)]
    covariance = np.array([[value / pixels**2 for value in row] for row in centred])
    exact = (sums.n, sums.sum_image, sums.second_moments)
    mean_color = np.array([value / pixels for value in first])
    return Statistics(*exact, sums.sum_image / sums.n, mean_color, covariance, *jacobi_eigen(covariance))


def jacobi_eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute eigenvalues and eigenvectors of a symmetric 3×3 matrix by a fixed number of Jacobi sweeps in float64.

    Only +, −, ×, ÷ and √, which IEEE 754 rounds alike everywhere, in one fixed order: unlike LAPACK, every machine
    gives the same bits. Method: Golub and Van Loan, Matrix Computations, section 8.5.

    Returns:
        (3,) eigenvalues in descending order; (3, 3) eigenvectors, one per column, largest component positive.
    """
    a = [[float(value) for value in row] for row in matrix]
    v = [[float(i == j) for j in range(3)] for i in range(3)]
    for _sweep in range(12):  # converges quadratically; 12 sweeps are far more than float64 needs
        for p, q in ((0, 1), (0, 2), (1, 2)):
            if a[p][q] == 0.0:
                continue
            tau = (a[q][q] - a[p][p]) / (2.0 * a[p][q])
            root = math.sqrt(1.0 + tau * tau)
            t = 1.0 / (tau + root) if tau >= 0.0 else 1.0 / (tau - root)
            c = 1.0 / math.sqrt(1.0 + t * t)
            s = t * c
            for k in range(3):  # a ← a·J, v ← v·J
                a[k][p], a[k][q] = c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]
                v[k][p], v[k][q] = c * v[k][p] - s * v[k][q], s * v[k][p] + c * v[k][q]
            for k in range(3):  # a ← Jᵀ·a
                a[p][k], a[q][k] = c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]
            a[p][q] = a[q][p] = 0.0
    order = sorted(range(3), key=lambda i: -a[i][i])
    vectors = np.array([[v[k][i] for i in order] for k in range(3)])
    largest = vectors[np.abs(vectors).argmax(axis=0), range(3)]
    return np.array([a[i][i] for i in order]), vectors * np.where(largest < 0, -1.0, 1.0)
