"""Exact sums and eigenvectors against numpy over all pixels; whole pictures, whose statistics are per colour alone."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from conftest import build, verify
from pipeline import UserError, manifest
from pipeline.offline.statistics import Sums, finish, jacobi_eigen
from pipeline.online.loader import Loader
from pipeline.online.samples import SampleReader
from reference import jpeg_pixels


def images(n: int, size: int) -> np.ndarray:
    random = np.random.default_rng(5)
    colour = random.integers(0, 256, (n, 1, 1, 3)) * random.random((n, size, size, 1))
    return np.clip(colour + random.integers(0, 40, (n, size, size, 3)), 0, 255).astype(np.uint8)


def summed(pictures: np.ndarray) -> Sums:
    """Add up pictures with padding, which means nothing."""
    sums = Sums.zero(pictures.shape[1])
    for pixels in pictures:
        sums.add(np.dstack([pixels, np.full(pixels.shape[:2], 201, np.uint8)]))
    return sums


@pytest.mark.parametrize("size", [16, 33, 256])
def test_against_numpy_over_all_pixels(size: int):
    pictures = images(7, size)
    statistics = finish(summed(pictures))
    pixels = pictures.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(statistics.mean_image, pictures.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics.mean_color, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(pixels.T, bias=True), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 23, 256])
def test_sums_are_exact(size: int):
    """Compare with 64-bit integers, for more of the brightest pictures than uint16 can add up."""
    n = 3 if size == 256 else 600
    pictures = np.random.default_rng(7).integers(254, 256, (n, size, size, 3), dtype=np.uint8)
    pictures[: n // 2] = 255
    sums = summed(pictures)
    pixels = pictures.reshape(-1, 3).astype(np.int64)
    assert sums.n == n
    assert sums.sum_image.dtype == sums.second_moments.dtype == np.int64
    assert (sums.sum_image == pictures.sum(axis=0, dtype=np.int64)).all()
    assert (sums.second_moments == pixels.T @ pixels).all()


def test_order_grouping_and_copies_do_not_matter():
    pictures = images(9, 32)
    parts = Sums.zero(32)
    for group in (pictures[5:], pictures[:2], pictures[2:5][::-1]):
        parts.merge(pickle.loads(pickle.dumps(summed(group))))
        assert parts.sum_image.max() > 0  # reading between additions changes nothing
    one, other = finish(summed(pictures)), finish(parts)
    for name in ("sum_image", "second_moments", "mean_image", "covariance", "eigenvalues", "eigenvectors"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


@pytest.mark.parametrize("seed", range(10))
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
    statistics = finish(summed(np.full((1, 16, 16, 3), 77, np.uint8)))
    assert statistics.mean_color.tolist() == [77.0] * 3
    assert statistics.covariance.tolist() == [[0.0] * 3] * 3
    assert statistics.eigenvalues.tolist() == [0.0] * 3


# --crop none: pictures for other models, in their own shapes


@pytest.fixture(scope="module")
def uncropped(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, uncropped, with a shorter side of 240 pixels."""
    root = tmp_path_factory.mktemp("uncropped") / "dataset"
    result = build(raw, root, "--workers", 1, "--samples-per-shard", 16, "--size", 240, "--crop", "none")
    assert result.exit_code == 0, result.output
    return root


def rescaled(picture: Image.Image, size: int) -> np.ndarray:
    """Return the picture resized by Pillow, bicubic."""
    width, height = picture.size
    long = int(size * max(width, height) / min(width, height))
    shape = (long, size) if width >= height else (size, long)
    return np.asarray(picture.convert("RGB").resize(shape, Image.Resampling.BICUBIC))


def test_the_whole_picture_is_stored(uncropped: Path, raw: Path):
    shards = [str(uncropped / shard.name) for shard in manifest.load(uncropped).split("train").shards]
    seen = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        _, name, stem = sample["__key__"].split("_")
        expected = rescaled(Image.open(raw / "train" / name / f"{stem}.jpg"), 240)
        stored = np.asarray(Image.open(io.BytesIO(sample["jpg"])))
        assert stored.shape == expected.shape
        assert min(stored.shape[:2]) == 240 < max(stored.shape[:2])
        assert np.abs(stored.astype(int) - expected).mean() < 12
        seen += 1
    assert seen == 41
    assert "all holds" in verify(uncropped).output


def test_statistics_are_those_of_all_pixels(uncropped: Path, raw: Path):
    built = manifest.load(uncropped)
    paths = [p for p in (raw / "train").rglob("*.jpg") if p != raw / "train" / "checks" / "0003.jpg"]
    pixels = np.concatenate([rescaled(Image.open(path), 240).reshape(-1, 3) for path in paths]).astype(np.float64)
    statistics = built.statistics()
    assert statistics.n == len(pixels)
    assert statistics.mean_image.shape == (1, 1, 3)
    np.testing.assert_allclose(statistics.mean_color, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(pixels.T, bias=True), rtol=1e-9)
    np.testing.assert_allclose(statistics.eigenvalues, np.linalg.eigvalsh(statistics.covariance)[::-1], rtol=1e-9)


def test_whole_pictures_feed_other_models(uncropped: Path):
    """The centre view is the picture's; mean and deviation are ImageNet's."""
    with pytest.raises(UserError, match="--crop none"):
        Loader(uncropped, "train")
    built = manifest.load(uncropped)
    mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
    with SampleReader(built, "train") as reader:
        pictures = [jpeg_pixels(data.tobytes()).astype(np.float64) for data in reader.read(np.arange(len(reader)))]
    assert len({picture.shape for picture in pictures}) > 1
    with Loader(uncropped, "train", batch_size=4, recipe="imagenet", views="centre") as loader:
        for batch in loader:
            for number, x in zip(batch.ids, batch.images.numpy()):
                height, width, _ = pictures[number].shape
                top, left = round((height - 224) / 2), round((width - 224) / 2)
                view = pictures[number][top : top + 224, left : left + 224]
                np.testing.assert_allclose(x, ((view - mean) / std).transpose(2, 0, 1), atol=1e-5)
