"""Exact sums and eigenvectors against numpy over all pixels."""

import pickle

import numpy as np
import pytest

from pipeline.offline.statistics import Sums, finish, jacobi_eigen


def images(n: int, size: int) -> np.ndarray:
    random = np.random.default_rng(5)
    colour = random.integers(0, 256, (n, 1, 1, 3)) * random.random((n, size, size, 1))
    return np.clip(colour + random.integers(0, 40, (n, size, size, 3)), 0, 255).astype(np.uint8)


def padded(picture: np.ndarray) -> np.ndarray:
    """RGB → RGBX; the padding means nothing."""
    return np.dstack([picture, np.full(picture.shape[:2], 201, np.uint8)])


def summed(pictures: np.ndarray) -> Sums:
    sums = Sums.zero(pictures.shape[1])
    for picture in pictures:
        sums.add(padded(picture))
    return sums


@pytest.mark.parametrize("size", [16, 33, 256])
def test_against_numpy_over_all_pixels(size: int):
    pictures = images(7, size)
    found = finish(summed(pictures))
    pixels = pictures.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(found.mean_image, pictures.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.mean_color, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels.T, bias=True), rtol=1e-9)
    values, vectors = np.linalg.eigh(found.covariance)
    np.testing.assert_allclose(found.eigenvalues, values[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.diag(found.eigenvectors.T @ vectors[:, ::-1])), 1, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 16, 23, 33, 256])
def test_sums_are_exact(size: int):
    """Against 64-bit integers, of the brightest pictures, more of them than uint16 can add up."""
    n = 3 if size == 256 else 600
    pictures = np.random.default_rng(7).integers(254, 256, (n, size, size, 3), dtype=np.uint8)
    pictures[: n // 2] = 255
    sums = summed(pictures)
    pixels = pictures.reshape(-1, 3).astype(np.int64)
    assert sums.n == n
    assert sums.sum_image.dtype == sums.second_moments.dtype == np.int64
    assert (sums.sum_image == pictures.sum(axis=0, dtype=np.int64)).all()
    assert (sums.second_moments == pixels.T @ pixels).all()


def test_reading_between_images_changes_nothing():
    pictures = images(5, 16)
    sums, other = Sums.zero(16), summed(pictures)
    for i, picture in enumerate(pictures):
        sums.add(padded(picture))
        assert (sums.sum_image == pictures[: i + 1].sum(axis=0, dtype=np.int64)).all()
    copy = pickle.loads(pickle.dumps(other))
    assert (copy.sum_image == sums.sum_image).all()
    assert (copy.second_moments == sums.second_moments).all()


def test_whole_pictures_count_by_their_pixels():
    pictures = [images(1, 40)[0, :height] for height in (40, 7, 1, 29)]
    sums = Sums.zero(1)
    for picture in pictures:
        sums.add(padded(picture))
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    assert sums.n == len(pixels)
    found = finish(sums)
    assert found.mean_image.shape == (1, 1, 3)
    np.testing.assert_allclose(found.mean_image[0, 0], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.mean_color, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels.T, bias=True), rtol=1e-9)


def test_order_and_grouping_do_not_matter():
    pictures = images(9, 32)
    whole = summed(pictures)
    parts = Sums.zero(32)
    for group in (pictures[5:], pictures[:2], pictures[2:5][::-1]):
        parts.merge(summed(group))
    one, other = finish(whole), finish(parts)
    for name in ("sum_image", "second_moments", "mean_image", "covariance", "eigenvalues", "eigenvectors"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


@pytest.mark.parametrize("seed", range(20))
def test_jacobi_against_lapack(seed: int):
    random = np.random.default_rng(seed)
    root = random.normal(size=(3, 3)) * 10.0 ** random.integers(-3, 4, 3)
    matrix = root @ root.T
    values, vectors = jacobi_eigen(matrix)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1], rtol=1e-9, atol=1e-12 * values[0])
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, matrix, atol=1e-12 * values[0])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-14)
    assert (vectors[np.abs(vectors).argmax(0), range(3)] > 0).all()
    assert (np.diff(values) <= 0).all()


def test_one_grey_image_has_no_colour_variance():
    found = finish(summed(np.full((1, 16, 16, 3), 77, np.uint8)))
    assert found.mean_color.tolist() == [77.0] * 3
    assert found.covariance.tolist() == [[0.0] * 3] * 3
    assert found.eigenvalues.tolist() == [0.0] * 3
