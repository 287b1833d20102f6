"""--crop none: whole pictures for other models' augmentation, their statistics per colour alone."""

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from PIL import Image

from conftest import build
from pipeline import UserError, manifest
from pipeline.online.loader import Loader
from pipeline.online.samples import SampleReader
from reference import jpeg_pixels
from tools.verify_shards import main as verify_shards


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw` as whole pictures with a shorter side of 240 pixels."""
    root = tmp_path_factory.mktemp("whole") / "dataset"
    result = build(raw, root, "--workers", 1, "--samples-per-shard", 16, "--size", 240, "--crop", "none")
    assert result.exit_code == 0, result.output
    return root


def rescaled(picture: Image.Image, size: int) -> np.ndarray:
    """Pillow's own bicubic resize of the whole picture."""
    width, height = picture.size
    long = int(size * max(width, height) / min(width, height))
    shape = (long, size) if width >= height else (size, long)
    return np.asarray(picture.convert("RGB").resize(shape, Image.Resampling.BICUBIC))


def test_the_whole_picture_is_stored(whole: Path, raw: Path):
    shards = [str(whole / shard.name) for shard in manifest.load(whole).split("train").shards]
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


def test_statistics_are_those_of_all_pixels(whole: Path, raw: Path):
    built = manifest.load(whole)
    paths = [p for p in (raw / "train").rglob("*.jpg") if p != raw / "train" / "checks" / "0003.jpg"]
    pixels = np.concatenate([rescaled(Image.open(path), 240).reshape(-1, 3) for path in paths]).astype(np.float64)
    found = built.statistics()
    assert found.n == len(pixels)
    assert found.mean_image.shape == (1, 1, 3)
    np.testing.assert_allclose(found.mean_color, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels.T, bias=True), rtol=1e-9)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(found.covariance)[::-1], rtol=1e-9)


def test_verify_takes_whole_pictures(whole: Path):
    result = CliRunner().invoke(verify_shards, [str(whole)])
    assert result.exit_code == 0, result.output
    assert "all holds" in result.output


def test_the_trainers_loader_says_what_it_needs(whole: Path):
    with pytest.raises(UserError, match="--crop none"):
        Loader(whole, "train")


def test_whole_pictures_feed_other_models(whole: Path):
    """The centre view is the picture's, the random ones are cut from all of it; mean and deviation are ImageNet's."""
    built = manifest.load(whole)
    mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
    with SampleReader(built, "train") as reader:
        pictures = [jpeg_pixels(data.tobytes()).astype(np.float64) for data in reader.read(np.arange(len(reader)))]
    assert len({picture.shape for picture in pictures}) > 1
    with Loader(whole, "train", batch_size=4, recipe="imagenet", views="centre") as loader:
        for batch in loader:
            for number, x in zip(batch.ids, batch.images.numpy()):
                height, width, _ = pictures[number].shape
                top, left = round((height - 224) / 2), round((width - 224) / 2)
                view = pictures[number][top : top + 224, left : left + 224]
                np.testing.assert_allclose(x, ((view - mean) / std).transpose(2, 0, 1), atol=1e-5)
    with Loader(whole, "train", batch_size=4, recipe="imagenet") as loader:
        batch = next(loader)
    assert batch.images.shape == (4, 3, 224, 224)
    levels = batch.images.permute(0, 2, 3, 1).numpy() * std + mean
    for number, view in zip(batch.ids, levels):
        assert view.min() > pictures[number].min() - 1
        assert view.max() < pictures[number].max() + 1


def test_an_absurd_shape_is_skipped_and_not_blown_up(tmp_path: Path):
    (tmp_path / "raw" / "a").mkdir(parents=True)
    (tmp_path / "raw" / "b").mkdir()
    Image.new("RGB", (20_000, 2)).save(tmp_path / "raw" / "a" / "thread.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "raw" / "b" / "plain.png")
    result = build(tmp_path / "raw", tmp_path / "out", "--crop", "none", "--holdout", 0, "--workers", 1)
    assert result.exit_code == 0, result.output
    built = manifest.load(tmp_path / "out")
    assert built.split("train").samples == 1
    assert '"reason": "too_many_pixels"' in (tmp_path / "out" / "skipped.jsonl").read_text()
    square = build(tmp_path / "raw", tmp_path / "square", "--holdout", 0, "--workers", 1)
    assert square.exit_code == 0
    assert manifest.load(tmp_path / "square").split("train").samples == 2
