"""Exact, mergeable sums over rescaled images → mean image, RGB covariance, eigenvectors."""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.manifest import Statistics


@dataclass
class Sums:
    """Integer sums over images, so that the result does not depend on order or grouping."""

    n: int
    sum_image: np.ndarray  # (size, size, 3) int64
    second_moments: np.ndarray  # (3, 3) int64: sum over pixels of x·xᵀ

    @classmethod
    def zero(cls, size: int) -> "Sums":
        return cls(0, np.zeros((size, size, 3), np.int64), np.zeros((3, 3), np.int64))

    def add(self, pixels: np.ndarray) -> None:
        """Add one image, (size, size, 3) uint8."""
        flat = pixels.reshape(-1, 3).astype(np.float64)
        self.n += 1
        self.sum_image += pixels
        # exact: every partial sum is an integer below size²·255² < 2⁵³
        self.second_moments += (flat.T @ flat).astype(np.int64)

    def merge(self, other: "Sums") -> None:
        self.n += other.n
        self.sum_image += other.sum_image
        self.second_moments += other.second_moments


def finish(sums: Sums) -> Statistics:
    """Round once from the exact sums.

    Covariance over all pixels of all images: E[x·xᵀ] − E[x]·E[x]ᵀ, as a fraction of Python integers, whose division
    rounds correctly.

    Raises:
        ZeroDivisionError: without any image.
    """
    pixels = sums.n * sums.sum_image.shape[0] * sums.sum_image.shape[1]
    first = [int(value) for value in sums.sum_image.sum(axis=(0, 1))]
    second = sums.second_moments.tolist()
    covariance = np.array(
        [[(pixels * second[i][j] - first[i] * first[j]) / pixels**2 for j in range(3)] for i in range(3)]
    )
    eigenvalues, eigenvectors = jacobi_eigen(covariance)
    return Statistics(
        n=sums.n,
        sum_image=sums.sum_image,
        second_moments=sums.second_moments,
        mean_image=sums.sum_image / sums.n,
        mean_color=np.array([value / pixels for value in first]),
        covariance=covariance,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
    )


def jacobi_eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of a symmetric 3×3 matrix by a fixed number of Jacobi sweeps in float64.

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
            for k in range(3):  # a ← a·J
                a[k][p], a[k][q] = c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]
            for k in range(3):  # a ← Jᵀ·a
                a[p][k], a[q][k] = c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]
            for k in range(3):
                v[k][p], v[k][q] = c * v[k][p] - s * v[k][q], s * v[k][p] + c * v[k][q]
            a[p][q] = a[q][p] = 0.0
    order = sorted(range(3), key=lambda i: -a[i][i])
    vectors = np.array([[v[k][i] for i in order] for k in range(3)])
    largest = vectors[np.abs(vectors).argmax(axis=0), range(3)]
    return np.array([a[i][i] for i in order]), vectors * np.where(largest < 0, -1.0, 1.0)
